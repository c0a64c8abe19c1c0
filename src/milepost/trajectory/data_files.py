"""The data of every figure as CSV, all values, beside the page."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from milepost.trajectory.benchmarks import Evaluation, Setting
from milepost.trajectory.collect import Table, Trajectory
from milepost.trajectory.figures.panel_kinds import PANEL_KINDS
from milepost.trajectory.segments import Segment

BENCHMARK_COLUMNS = (
    *("step", "tokens_seen", "benchmark", "protocol", "num_fewshot", "limit", "data_sha256"),
    *("dtype", "device", "n", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "chance"),
    *("majority", "num_truncated", "checkpoint_sha256"),
)
CHECKPOINT_COLUMNS = ("step", "segment", "sha256", "bytes", "seconds", "state")
SEGMENT_COLUMNS = (
    *("segment", "first_step", "last_step", "restored_step", "restored", "exactness", "reason"),
    *("compared_steps", "equal_steps", "ranks", "threads", "device", "precision", "host"),
    *("end_reason", "training_seconds", "wall_seconds"),
)


def data_files(trajectory: Trajectory) -> dict[str, str]:
    """File name to CSV text: each panel, the benchmarks if any, segments and checkpoints."""
    files = {}
    for kind in PANEL_KINDS:
        fields = (kind.field, *kind.extra_fields)
        files[f"{kind.key}.csv"] = _table_csv(kind.table(trajectory), fields)
    if trajectory.benchmarks:
        scored = [(s.setting, e) for s in trajectory.benchmarks for e in s.evaluations]
        rows = [_benchmark_row(setting, evaluation) for setting, evaluation in scored]
        files["benchmarks.csv"] = _csv(BENCHMARK_COLUMNS, rows)
    segments = [_segment_row(segment) for segment in trajectory.segments]
    files["segments.csv"] = _csv(SEGMENT_COLUMNS, segments)
    checkpoints = [
        (c.step, c.segment, c.sha256, c.num_bytes, c.seconds, c.state)
        for c in trajectory.checkpoints
    ]
    files["checkpoints.csv"] = _csv(CHECKPOINT_COLUMNS, checkpoints)
    return files


def _table_csv(table: Table, fields: Sequence[str]) -> str:
    columns = [table.columns[name] for name in fields]
    rows = zip(table.steps, table.segments, *columns, strict=True)
    return _csv(("step", "segment", *fields), rows)


def _benchmark_row(setting: Setting, evaluation: Evaluation) -> tuple[Any, ...]:
    scores = [evaluation.scores.get(name) for name in ("acc", "acc_norm")]
    values = [(score.value, score.stderr) if score else (None, None) for score in scores]
    return (
        *(evaluation.step, evaluation.tokens_seen, setting.benchmark, setting.protocol),
        *(setting.num_fewshot, setting.limit, setting.data_sha256, setting.dtype),
        *(evaluation.device, evaluation.num_items, *values[0], *values[1], evaluation.chance),
        *(evaluation.majority, evaluation.num_truncated, evaluation.checkpoint_sha256),
    )


def _segment_row(segment: Segment) -> tuple[Any, ...]:
    replay = segment.replay
    return (
        *(segment.number, segment.first_step, segment.last_step, segment.restored_step),
        *(segment.say("restored"), segment.say("exactness"), segment.say("reason")),
        *((replay.compared, replay.equal) if replay else (None, None)),
        *(segment.count("ranks"), segment.count("threads"), segment.say("device")),
        *(segment.say("precision"), segment.say("host"), segment.end_reason),
        *(segment.training_seconds, segment.wall_seconds),
    )


def _csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Numbers as Python writes them, so that they read back to the last bit; None is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
