"""Rows of the page's tables, as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from milepost.core.units import format_bytes, format_duration
from milepost.runs.lineage import restore_words
from milepost.trajectory.benchmarks import Series
from milepost.trajectory.collect import Checkpoint
from milepost.trajectory.fields import text
from milepost.trajectory.sections.wording import plural
from milepost.trajectory.segments import Segment
from milepost.trajectory.summary import ending

MAX_SEGMENT_ROWS = 200
MAX_CHECKPOINT_ROWS = 500

UNKNOWN = "unknown"


@dataclass(frozen=True)
class SegmentRow:
    """One segment; every field is text for people."""

    number: str
    steps: str
    started_from: str
    exactness: str
    compared: str
    hardware: str
    numerics: str
    times: str
    end: str


@dataclass(frozen=True)
class CheckpointRow:
    """One checkpoint; every field is text for people."""

    step: str
    segment: str
    size: str
    seconds: str
    state: str
    sha256: str


@dataclass(frozen=True)
class BenchmarkRow:
    """The latest score of one benchmark and setting; every field is text for people."""

    name: str
    setting: str
    step: str
    acc: str
    acc_norm: str
    chance: str
    majority: str
    verdict: str


def benchmark_rows(benchmarks: Sequence[Series]) -> list[BenchmarkRow]:
    """A row a series, in the order of the page."""
    return [_benchmark_row(series) for series in benchmarks]


def segment_rows(segments: Sequence[Segment], *, first_weights: str) -> list[SegmentRow]:
    """Rows of the newest segments, in order.

    Args:
        segments: of a run.
        first_weights: what a segment starts from that restored no checkpoint.
    """
    shown = segments[-MAX_SEGMENT_ROWS:]
    return [
        _segment_row(segment, first_weights=first_weights, is_last=segment is segments[-1])
        for segment in shown
    ]


def checkpoint_rows(checkpoints: Sequence[Checkpoint]) -> list[CheckpointRow]:
    """Rows of the newest checkpoints, in order."""
    return [
        CheckpointRow(
            step=f"{c.step:,}",
            segment=UNKNOWN if c.segment is None else str(c.segment),
            size=UNKNOWN if c.num_bytes is None else format_bytes(c.num_bytes),
            seconds=format_duration(c.seconds),
            state=c.state,
            sha256=(c.sha256 or UNKNOWN)[:12],
        )
        for c in checkpoints[-MAX_CHECKPOINT_ROWS:]
    ]


def _benchmark_row(series: Series) -> BenchmarkRow:
    latest = series.latest
    verdicts = {True: "yes", False: "no", None: UNKNOWN}
    words = series.words
    if latest.num_truncated:
        words += f", {plural(latest.num_truncated, 'context')} cut"
    return BenchmarkRow(
        name=series.setting.name,
        setting=words,
        step=f"{latest.step:,}",
        acc=str(latest.scores.get("acc", "–")),
        acc_norm=str(latest.scores.get("acc_norm", "–")),
        chance=_level(latest.chance),
        majority=_level(latest.majority),
        verdict=verdicts[latest.beats_guessing],
    )


def _level(fraction: float | None) -> str:
    return UNKNOWN if fraction is None else f"{100 * fraction:.1f} %"


def _segment_row(segment: Segment, *, first_weights: str, is_last: bool) -> SegmentRow:
    return SegmentRow(
        number=str(segment.number),
        steps=_steps(segment),
        started_from=_started_from(segment, first_weights=first_weights),
        exactness=_exactness(segment),
        compared=_compared(segment),
        hardware=_hardware(segment),
        numerics=_numerics(segment),
        times=(
            f"{format_duration(segment.training_seconds)}"
            f" (wall {format_duration(segment.wall_seconds)})"
        ),
        end=ending(segment, is_last=is_last),
    )


def _steps(segment: Segment) -> str:
    if segment.first_step is None or segment.last_step is None:
        return "none"
    return f"{segment.first_step:,} to {segment.last_step:,}"


def _started_from(segment: Segment, *, first_weights: str) -> str:
    if not segment.started:
        return UNKNOWN
    restored = segment.say("restored")
    if segment.restored_step is None:
        return first_weights
    what = UNKNOWN if restored is None else restore_words(restored)
    if (parent := segment.say("parent")) is not None:
        return f"{parent}, restored: {what}"
    return f"step {segment.restored_step:,}, restored: {what}"


def _exactness(segment: Segment) -> str:
    exactness, reason = segment.say("exactness") or UNKNOWN, segment.say("reason")
    return f"{exactness}: {reason}" if reason else exactness


def _compared(segment: Segment) -> str:
    replay = segment.replay
    if replay is None:
        return "no step run again"
    told = f"{replay.equal:,} of {plural(replay.compared, 'step')} equal"
    if replay.found_here:
        told += " (compared in the log)"
    if replay.differing_steps:
        shown = ", ".join(f"{step:,}" for step in replay.differing_steps[:5])
        told += f"; differing: {shown}{' …' * (len(replay.differing_steps) > 5)}"
    return told


def _hardware(segment: Segment) -> str:
    ranks, threads = segment.count("ranks"), segment.count("threads")
    parts = [segment.say("device") or "device unknown"]
    if ranks is not None:
        parts.append(plural(ranks, "rank"))
    if threads is not None:
        parts.append(plural(threads, "thread") + " each" * (ranks != 1))
    devices = segment.started.get("devices")
    names = [d for d in devices if text(d)] if isinstance(devices, list) else []
    parts += [name for name in dict.fromkeys(names) if name != parts[0]]
    return ", ".join(parts)


def _numerics(segment: Segment) -> str:
    compiled = segment.started.get("compile")
    words = {True: "compiled", False: "not compiled"}
    told = words[compiled] if isinstance(compiled, bool) else "compile unknown"
    versions = segment.started.get("versions")
    torch_version = text(versions.get("torch")) if isinstance(versions, dict) else None
    torch_words = [f"torch {torch_version}"] if torch_version else []
    return ", ".join([segment.say("precision") or "precision unknown", told, *torch_words])
