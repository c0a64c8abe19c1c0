"""Histories of wandb: the file of an offline run, or what its page and its client export."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from milepost.core.errors import UsageError
from milepost.core.files import read_json_lines, storage_errors
from milepost.trajectory.course import Course
from milepost.trajectory.imports import table_csv
from milepost.trajectory.imports.names import STEP_NAMES, step_name
from milepost.trajectory.imports.points import (
    Points,
    enumerate_some,
    left_out,
    refuse_several_runs,
)
from milepost.trajectory.imports.sniff import files_in, limit_size, refuse
from milepost.trajectory.imports.wandb_log import MAGIC, WandbLog
from milepost.trajectory.sections.wording import plural

EXPECTED = (
    "an offline run's folder (offline-run-*) or its run-*.wandb file, or a history exported as"
    " .csv, .jsonl or .parquet"
)

MAX_BYTES = 128 << 20
"""Every record is held in memory, at some five times its length in the file."""

_EXPORT_EXTREMES = ("__MIN", "__MAX")
"""Columns that the export of a chart adds to each of its own."""


@dataclass
class _OfflineRun:
    """What the files of one run say, in order of their names, which begin with the time."""

    name: str = ""
    records: list[dict[str, Any]] = field(default_factory=list)
    num_files: int = 0
    num_damaged: int = 0


def read(path: Path, *, name: str | None, tokens_per_step: int | None) -> Course:
    """See `formats.import_course`."""
    endings = {".csv": _from_csv, ".jsonl": _from_json_lines, ".parquet": _from_parquet}
    if path.is_file() and path.suffix in endings:
        points, usual, notes = endings[path.suffix](path)
        source = f"a history exported from wandb, {path.name}"
    else:
        points, usual, notes = _from_offline_run(path)
        source = f"the wandb run {path.resolve().name}"
    return points.course(name or usual, source=source, notes=notes, tokens_per_step=tokens_per_step)


def _from_offline_run(path: Path) -> tuple[Points, str, list[str]]:
    files = [file for file in files_in(path) if file.suffix == ".wandb"]
    if not files:
        raise refuse(path, expected=EXPECTED)
    limit_size(files, max_bytes=MAX_BYTES, what="a wandb run")
    runs: dict[str, _OfflineRun] = defaultdict(_OfflineRun)
    for file in files:
        _read_log(file, runs)
    if len(runs) > 1:
        shown = [
            f"{run.name or key} ({plural(run.num_files, 'file')})" for key, run in runs.items()
        ]
        raise UsageError(
            f"{path} holds {len(runs)} runs: {enumerate_some(shown)}",
            hint="an import is one trajectory: give the folder of one run",
        )
    key, run = next(iter(runs.items()))
    damaged = [left_out(run.num_damaged, "part", why="of the run's files that cannot be read")]
    return _points(run.records, path), run.name or key, damaged * bool(run.num_damaged)


def _read_log(file: Path, runs: dict[str, _OfflineRun]) -> None:
    """Adds one file to the run whose id it says."""
    try:
        from google.protobuf.message import DecodeError
        from wandb.proto import wandb_internal_pb2
    except ImportError as missing:
        raise UsageError(
            "reading wandb's files needs the package wandb",
            hint="pip install 'milepost[trackers]'",
        ) from missing
    # Which of its versions the module takes is settled when it is imported.
    parse: Callable[[bytes], Any] = vars(wandb_internal_pb2)["Record"].FromString
    found, key = _OfflineRun(), file.stem.removeprefix("run-")
    with storage_errors(file, verb="read"), file.open("rb") as content:
        if content.read(len(MAGIC)) != MAGIC:
            raise refuse(file, expected=EXPECTED)
        content.seek(0)
        log = WandbLog(content)
        for serialized in log.records():
            try:
                record = parse(serialized)
            except DecodeError:
                log.num_damaged += 1
                continue
            if record.HasField("run"):
                key = record.run.run_id or key
                found.name = record.run.display_name or found.name
            elif record.HasField("history"):
                found.records.append(_history(record.history))
    run = runs[key]
    run.name = found.name or run.name
    run.records += found.records
    run.num_files += 1
    run.num_damaged += log.num_damaged


def _history(history: Any) -> dict[str, Any]:
    """One call of `log`; a nested value has its names with dots between."""
    record: dict[str, Any] = {"_step": history.step.num}
    for item in history.item:
        try:
            record[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        except (ValueError, RecursionError):
            continue
    return record


def _from_csv(path: Path) -> tuple[Points, str, list[str]]:
    """The export of a chart ("Step", "NAME - metric") or of a whole history ("_step", "metric")."""
    header = table_csv.read_header(path)
    wanted = [name for name in header.columns if name and not name.endswith(_EXPORT_EXTREMES)]
    of_run = {name: name.rpartition(" - ") for name in wanted if name not in STEP_NAMES}
    runs = {run for run, mark, _ in of_run.values() if mark}
    refuse_several_runs(path, runs)
    names = {name: of_run[name][2] if name in of_run else name for name in wanted}
    points, _, notes = table_csv.gather(path, header, names=names)
    return points, next(iter(runs), path.stem), notes


def _from_json_lines(path: Path) -> tuple[Points, str, list[str]]:
    limit_size([path], max_bytes=MAX_BYTES, what="a history")
    records, num_bad = read_json_lines(path)
    notes = [left_out(num_bad, "line", why="that cannot be read")] if num_bad else []
    return _points(records, path), path.stem, notes


def _from_parquet(path: Path) -> tuple[Points, str, list[str]]:
    import pyarrow.parquet

    limit_size([path], max_bytes=MAX_BYTES, what="a history")
    try:
        with storage_errors(path, verb="read"):
            table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as bad:
        raise UsageError(
            f"{path} cannot be read as Parquet: {bad}", hint=f"expected {EXPECTED}"
        ) from bad
    return _points(table.to_pylist(), path), path.stem, []


def _points(records: Sequence[dict[str, Any]], path: Path) -> Points:
    names: dict[str, None] = dict.fromkeys(key for record in records for key in record)
    step = step_name(names)
    if step is None:
        told = f"; it has {enumerate_some(names)}" if names else ""
        raise UsageError(f"{path} has no history by step{told}", hint=f"expected {EXPECTED}")
    refuse_several_runs(path, (r["run"] for r in records if isinstance(r.get("run"), str)))
    points = Points()
    for record in records:
        points.add_record(record, step_name=step)
    if not points:
        raise UsageError(f"{path} has no numbers beside {step}", hint=f"expected {EXPECTED}")
    return points
