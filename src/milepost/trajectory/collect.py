"""Everything a run's files say, read once into plain tables by step.

Reads what `milepost.runs` defines and changes nothing. Of two entries for a step the later in the
file counts, and none that a rollback undid; a value that is missing, not a number or not finite is
None.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from milepost.core.errors import CheckpointError
from milepost.core.files import read_json_lines
from milepost.runs.answers import Answers, read_answers
from milepost.runs.evaluations import EvaluationStore
from milepost.runs.events import SCHEMA_VERSION, Event, History, present_events, read_history
from milepost.runs.exact_answers import ExactAnswers, read_exact_answers
from milepost.runs.layout import RunLayout
from milepost.runs.manifest import RunManifest, read_run_manifest
from milepost.runs.overrides import config_with_overrides
from milepost.runs.probes import read_probes
from milepost.runs.records import read_samples
from milepost.trajectory.benchmarks import Series, main_series, series_of
from milepost.trajectory.fields import all_finite, finite, text, whole
from milepost.trajectory.refused import GUARD_KINDS, Refused, refused_of
from milepost.trajectory.segments import Segment, segments_of

STEP_FIELDS = (
    "data_step",
    "loss_nats",
    "grad_norm",
    "learning_rate",
    "tokens_seen",
    "tokens_per_second",
    "step_seconds",
    "mfu_fraction",
    "loss_scale",
)
VALIDATION_FIELDS = ("loss_nats", "bits_per_byte", "tokens", "seconds")
HELLASWAG_FIELDS = ("acc_norm", "acc_norm_stderr")

TOLD_ELSEWHERE = frozenset(
    [
        "segment_started",
        "segment_ended",
        "step",
        "validation",
        "evaluation",
        "sample",
        "replayed",
        "checkpoint_saved",
        "train_state_dropped",
        *GUARD_KINDS,
    ]
)
"""Kinds that have their own place in the report; the others are counted in the summary."""


@dataclass(frozen=True)
class Table:
    """Rows in order of step: one list a column, all of one length.

    Attributes:
        steps: the step of each row, ascending.
        segments: the segment that wrote each row, None where it does not say.
        columns: field name to values; None where a value is missing or not finite.
    """

    steps: list[int]
    segments: list[int | None]
    columns: dict[str, list[float | None]]

    def points(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of every row where the field has a value."""
        pairs = zip(self.steps, self.columns[name], strict=True)
        return [(step, value) for step, value in pairs if value is not None]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as the history tells it.

    Attributes:
        state: "whole", "weights only" (train state dropped) or "quarantined".
    """

    step: int
    segment: int | None
    sha256: str | None
    num_bytes: float | None
    seconds: float | None
    state: str


@dataclass(frozen=True)
class LeftOut:
    """Evaluation records that can be read and do not count.

    Attributes:
        foreign: of another run, or of a model that is of none.
        not_whole: whose items file is missing or is not as it was written.
    """

    foreign: int
    not_whole: int


@dataclass(frozen=True)
class Trajectory:
    """What the files of one run hold.

    Attributes:
        benchmarks: the scores of checkpoints, in the order of the page.
        left_out_scores: records that are not among them.
        num_bad_lines: file name to lines that were skipped because they could not be read.
        other_events: kind to count, of the kinds that have no place of their own.
        batches: step to the hash of its batch, where it is on record.
        refused: what the guards refused.
        probes: lines of what small changes of a prompt did.
        answers: of a fine-tuning: to its questions, before and after; None where there are none.
        exact_answers: likewise, to questions with one right answer.
        answers_problem: why those on record cannot be read; empty where they can.
    """

    layout: RunLayout
    manifest: RunManifest
    steps: Table
    validation: Table
    hellaswag: Table
    benchmarks: list[Series]
    left_out_scores: LeftOut
    segments: list[Segment]
    checkpoints: list[Checkpoint]
    samples: list[dict[str, Any]]
    num_bad_lines: dict[str, int]
    other_events: dict[str, int]
    batches: dict[int, str]
    refused: Refused
    probes: list[dict[str, Any]]
    answers: Answers | None = None
    exact_answers: ExactAnswers | None = None
    answers_problem: str = ""

    @property
    def name(self) -> str:
        """What people call the run."""
        return self.manifest.config.run.name or self.layout.name

    @property
    def is_finetuning(self) -> bool:
        """Whether it tuned a model that was there already."""
        return self.manifest.config.is_finetuning

    @property
    def has_events(self) -> bool:
        """Whether anything has happened yet."""
        return bool(self.segments)

    @property
    def last_step(self) -> int:
        """The highest step in the history; 0 before the first."""
        return max([*self.steps.steps[-1:], *self.validation.steps[-1:]], default=0)

    @property
    def missing_steps(self) -> list[tuple[int, int]]:
        """Ranges (first, last) of steps absent between the first and the last of the history."""
        pairs = zip(self.steps.steps, self.steps.steps[1:], strict=False)
        return [(before + 1, after - 1) for before, after in pairs if after > before + 1]


def collect(run: Path) -> Trajectory:
    """Reads a run folder.

    Raises:
        UsageError: the folder holds no run.
        CheckpointError: the manifest is damaged, or a record is of a later schema.
    """
    layout = RunLayout(run)
    manifest = read_run_manifest(layout)
    history, num_foreign = _known_events(read_history(layout.events), path=layout.events)
    # What the run is made of now: a page that showed the first recipe would describe another run.
    config = config_with_overrides(manifest.config, history=history)
    present = History(present_events(history.events), history.num_bad_lines)
    manifest = replace(manifest, config=config)
    samples, num_bad_samples = read_samples(layout.samples)
    probes, num_bad_probes = read_probes(layout.probes)
    lines, num_bad_lines = read_json_lines(layout.evaluations)
    records = [line for line in lines if isinstance(line.get("key"), str) and "run_id" in line]
    own, left_out = _own_records(records, layout=layout, run_id=manifest.run_id)
    undone = _undone(history.events, present.events)
    benchmarks, num_empty = series_of(_without(own, undone))
    bad = {
        layout.events.name: history.num_bad_lines + num_foreign,
        layout.evaluations.name: num_bad_lines + len(lines) - len(records) + num_empty,
        layout.samples.name: num_bad_samples,
        layout.probes.name: num_bad_probes,
    }
    answers, exact_answers, answers_problem = _answers(layout)
    return Trajectory(
        layout=layout,
        manifest=manifest,
        steps=_table(present.of_kind("step"), STEP_FIELDS),
        validation=_table(present.of_kind("validation"), VALIDATION_FIELDS),
        hellaswag=_table(_hellaswag_scores(benchmarks), HELLASWAG_FIELDS),
        benchmarks=benchmarks,
        left_out_scores=left_out,
        segments=segments_of(history.events),
        checkpoints=_checkpoints(history.events),
        samples=_without(samples, undone),
        num_bad_lines={name: count for name, count in bad.items() if count},
        other_events=_other_events(history.events),
        batches=_batches(present.of_kind("step")),
        refused=refused_of(history.events),
        probes=_without(probes, undone),
        answers=answers,
        exact_answers=exact_answers,
        answers_problem=answers_problem,
    )


def _answers(layout: RunLayout) -> tuple[Answers | None, ExactAnswers | None, str]:
    """What the files of answers hold, or why one cannot be read: the rest is worth a report."""
    try:
        return read_answers(layout.answers), read_exact_answers(layout.exact_answers), ""
    except CheckpointError as error:
        return None, None, str(error)


def _known_events(history: History, *, path: Path) -> tuple[History, int]:
    known = []
    for event in history.events:
        version = event.get("v")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise CheckpointError(
                f"{path} has events of schema version {version},"
                f" this program reads {SCHEMA_VERSION}",
                hint="use the version of Milepost that made the run, or a later one",
            )
        if isinstance(event.get("kind"), str):
            known.append(event)
    return History(known, history.num_bad_lines), len(history.events) - len(known)


def _own_records(
    records: Sequence[dict[str, Any]], *, layout: RunLayout, run_id: str
) -> tuple[list[dict[str, Any]], LeftOut]:
    """The records that count, in file order; of two with one key only the later is looked at."""
    store = EvaluationStore(layout.root)
    own: dict[str, dict[str, Any]] = {}
    for record in records:
        if record["run_id"] == run_id:
            own.pop(record["key"], None)
            own[record["key"]] = record
    whole_ones = [record for record in own.values() if store.is_whole(record)]
    num_foreign = sum(record["run_id"] != run_id for record in records)
    return whole_ones, LeftOut(num_foreign, len(own) - len(whole_ones))


_NAMED_BY = (
    ("checkpoint_saved", "sha256", "checkpoint_sha256"),
    ("evaluation", "key", "key"),
    ("sample", "sample_id", "sample_id"),
)
"""Kind of event, its field, and the field of the records that it names."""


def _undone(events: Sequence[Event], present: Sequence[Event]) -> set[tuple[str, str]]:
    """What records are known by that a rollback undid: field and value, of no present event."""

    def named(found: Sequence[Event]) -> set[tuple[str, str]]:
        fields = {kind: (field, record_field) for kind, field, record_field in _NAMED_BY}
        known = ((fields[e["kind"]], e) for e in found if e["kind"] in fields)
        return {(record_field, str(event.get(field))) for (field, record_field), event in known}

    return named(events) - named(present)


def _without(
    records: Sequence[dict[str, Any]], undone: set[tuple[str, str]]
) -> list[dict[str, Any]]:
    fields = [record_field for *_, record_field in _NAMED_BY]
    return [
        record
        for record in records
        if not any((field, str(record.get(field))) in undone for field in fields)
    ]


def _table(events: Iterable[Event], fields: Sequence[str]) -> Table:
    latest: dict[int, Event] = {}
    for event in events:
        step = whole(event.get("step"))
        if step is not None:
            latest[step] = event
    rows = [latest[step] for step in sorted(latest)]
    return Table(
        steps=sorted(latest),
        segments=[whole(row.get("segment")) for row in rows],
        columns={name: all_finite([row.get(name) for row in rows]) for name in fields},
    )


def _batches(events: Iterable[Event]) -> dict[int, str]:
    found = {whole(e.get("step")): text(e.get("batch_sha256")) for e in events}
    return {step: sha256 for step, sha256 in found.items() if step is not None and sha256}


def _hellaswag_scores(benchmarks: Sequence[Series]) -> Iterable[Event]:
    """Rows of HellaSwag's length-normalized accuracy, of one setting only."""
    for series in main_series(benchmarks):
        if series.setting.benchmark == "hellaswag":
            for step, score in series.points("acc_norm"):
                yield {"step": step, "acc_norm": score.value, "acc_norm_stderr": score.stderr}


def _checkpoints(events: Iterable[Event]) -> list[Checkpoint]:
    found: dict[int, Checkpoint] = {}
    for event in events:
        step = whole(event.get("step"))
        if step is None:
            continue
        if event["kind"] == "checkpoint_saved":
            found[step] = _saved_checkpoint(event, step=step)
        elif event["kind"] in _STATE_AFTER and step in found:
            found[step] = replace(found[step], state=_STATE_AFTER[event["kind"]])
    return [found[step] for step in sorted(found)]


_STATE_AFTER = {"train_state_dropped": "weights only", "checkpoint_quarantined": "quarantined"}


def _saved_checkpoint(event: Event, *, step: int) -> Checkpoint:
    sha256 = event.get("sha256")
    return Checkpoint(
        step=step,
        segment=whole(event.get("segment")),
        sha256=sha256 if isinstance(sha256, str) else None,
        num_bytes=finite(event.get("bytes")),
        seconds=finite(event.get("seconds")),
        state="whole",
    )


def _other_events(events: Iterable[Event]) -> dict[str, int]:
    counts = Counter(e["kind"] for e in events if e["kind"] not in TOLD_ELSEWHERE)
    return dict(sorted(counts.items()))
