"""Trains a part of a run again, from one of its checkpoints to the next, and compares the bits.

The run is only read; training happens in a scratch copy that goes away afterwards.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from milepost.checkpoint.store import (
    MANIFEST,
    MODEL_FILE,
    STATE_FOLDER,
    read_checkpoint_manifest,
)
from milepost.config.recipe import differences
from milepost.core.console import progress, say, warn
from milepost.core.errors import CheckpointError, MilepostError, StopRequested, StorageError
from milepost.core.files import read_json, sha256_of_file, storage_errors
from milepost.core.units import format_duration
from milepost.distributed.devices import check_ranks
from milepost.experiments.certificate import (
    Certificate,
    changes_between,
    facts_of,
    write_certificate,
)
from milepost.experiments.comparison import Compared, compare_checkpoints, compare_steps
from milepost.experiments.replay_plan import ReplayPlan, plan_replay
from milepost.experiments.scratch_copy import scratch_copy, verified_sha256
from milepost.experiments.segment_process import SegmentFailed, run_segment, stops_as_exceptions
from milepost.runs.events import Event, History, read_history, utc_now
from milepost.runs.layout import RunLayout
from milepost.train.replay import COMPARED


class ReplayFailed(MilepostError):
    """The replay's training ended with an error; nothing can be said of the run's bits."""

    def __init__(self, failure: SegmentFailed) -> None:
        super().__init__(
            f"the replay's {failure.message}",
            hint="this says nothing of the run's bits; once it is mended, run the same command",
        )
        self.exit_code = failure.exit_code


def replay(
    run: Path,
    *,
    from_step: int | None = None,
    ranks: int | None = None,
    data: Path | None = None,
    command: str,
) -> tuple[Certificate, tuple[Path, Path]]:
    """Trains from one checkpoint to the next, compares, and writes the certificate into the run.

    Args:
        run: the run folder; a training may be at work in it.
        from_step: of the checkpoint to start from; None: the latest that will do.
        ranks: processes; None: as many as `milepost train` takes.
        data: prepared data; None: where the run says.
        command: for the certificate.

    Returns:
        The certificate and the two files it was written to.

    Raises:
        MilepostError: as `plan_replay`; no room on the disk; the training failed; a stop was
            asked for. The scratch copy is gone in every case.
    """
    started = time.monotonic()
    layout = RunLayout(run)
    try:
        with stops_as_exceptions():
            plan = plan_replay(layout, from_step=from_step, data=data)
            if ranks is not None:
                check_ranks(ranks, lanes=plan.config.train.lanes)
            _make_writable(layout.certificates)
            # Before the training: hours of it must not end without a certificate.
            hashes = _hashes(plan, to_sha256=verified_sha256(plan, layout, step=plan.to_step))
            with scratch_copy(plan) as scratch:
                _train_again(plan, scratch=scratch, ranks=ranks)
                history = read_history(scratch.events)
                compared, notes = _compare(plan, scratch=scratch, history=history)
    except StopRequested as stop:
        hint = "the run is as it was; the same command begins the replay anew"
        raise StopRequested(stop.message.partition(";")[0], hint=hint) from stop
    certificate = _certificate(
        plan,
        compared=compared,
        notes=notes,
        hashes=hashes,
        history=history,
        command=command,
        started=started,
    )
    return certificate, write_certificate(layout, certificate)


def _make_writable(folder: Path) -> None:
    """Hours of training must not end at a folder that takes no file."""
    with storage_errors(folder):
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def _train_again(plan: ReplayPlan, *, scratch: RunLayout, ranks: int | None) -> None:
    words = ["train", str(scratch.root.parent / "recipe.toml"), "--run", str(scratch.root)]
    words += [] if ranks is None else ["--ranks", str(ranks)]
    start = f"step {plan.from_step}" if plan.from_step else "the first step"
    took = format_duration(sum(event["step_seconds"] for event in plan.logged.values()))
    say(f"training again from {start} to step {plan.to_step}, which took {took} in the run")
    with progress("train again", total=len(plan.steps)) as bar:
        watch = _Watch(plan)

        def on_step(event: Event) -> None:
            bar.update(event["step"] - plan.from_step, note=watch.note(event))

        try:
            run_segment(words, run=scratch.root, on_step=on_step, kill_when=lambda event: False)
        except SegmentFailed as failure:
            raise ReplayFailed(failure) from failure


class _Watch:
    """Says on the way whether the steps are as logged, and once where they are not."""

    def __init__(self, plan: ReplayPlan) -> None:
        self._plan = plan
        self._has_differed = False

    def note(self, event: Event) -> str:
        """What stands beside the bar."""
        step = event["step"]
        seen = compare_steps(self._plan.logged, {step: event}, steps=[step], fields=COMPARED)
        if seen.first_difference is not None and not self._has_differed:
            self._has_differed = True
            difference = seen.first_difference
            warn(f"{difference.place}: {difference.what}; it goes on, to compare the checkpoint")
        left = (self._plan.to_step - step) * event["step_seconds"]
        word = "not as logged" if self._has_differed else "as logged"
        return f"step {step}  {word}  left {format_duration(left)}"


def _compare(
    plan: ReplayPlan, *, scratch: RunLayout, history: History
) -> tuple[list[Compared], list[str]]:
    """What was compared, and what could not be."""
    say("comparing the checkpoints")
    now = history.latest_by_step("step")
    steps = compare_steps(plan.logged, now, steps=plan.steps, fields=COMPARED)
    then, again = plan.layout.checkpoint(plan.to_step), scratch.checkpoint(plan.to_step)
    compared = [steps]
    try:
        compared += compare_checkpoints(then, again)
    except (CheckpointError, StorageError):
        # A training that is at work may drop the train state; weights always stay.
        if (then / STATE_FOLDER).is_dir():
            raise
        compared = [steps, *compare_checkpoints(then, again)]
    if (then / STATE_FOLDER).is_dir():
        return compared, []
    return compared, [
        f"The checkpoint of step {plan.to_step} has no train state any more, as the run's "
        "retention says: weights and log were compared, the optimizer's moments were not."
    ]


def _certificate(
    plan: ReplayPlan,
    *,
    compared: Sequence[Compared],
    notes: list[str],
    hashes: dict[str, str],
    history: History,
    command: str,
    started: float,
) -> Certificate:
    segment = next(iter(history.of_kind("segment_started")))
    then, now = [facts_of(event) for event in plan.segments], facts_of(segment)
    overridden = [f"{f} = {new!r}" for f, _, new in differences(plan.manifest.config, plan.config)]
    if overridden:
        notes = [*notes, f"The run had been overridden by then: {', '.join(overridden)}."]
    changes = changes_between(then, now)
    if changes:
        notes = [*notes, f"The machine is not the same: {'; '.join(changes)}."]
    for event in plan.segments:
        if event.get("exactness") != "exact":
            number, reason = event.get("segment"), event.get("reason")
            notes = [*notes, f"Segment {number} of the run is labelled approximate: {reason}."]
    return Certificate(
        run=str(plan.layout.root),
        run_id=plan.manifest.run_id,
        from_step=plan.from_step,
        to_step=plan.to_step,
        compared=list(compared),
        hashes=hashes,
        then=then,
        now=now,
        notes=notes,
        time=utc_now(),
        command=command,
        seconds=time.monotonic() - started,
        training_seconds=sum(e["step_seconds"] for e in history.of_kind("step")),
    )


def _hashes(plan: ReplayPlan, *, to_sha256: str) -> dict[str, str]:
    layout, last = plan.layout, plan.to_step
    folder = layout.checkpoint(last)
    files = read_checkpoint_manifest(folder, run_id=plan.manifest.run_id, step=last)["files"]
    if MODEL_FILE not in files:
        raise CheckpointError(f"{folder / MODEL_FILE} is missing")
    hashes = {f"weights of step {last}": files[MODEL_FILE]["sha256"]}
    if plan.from_step:
        start = layout.checkpoint(plan.from_step) / MANIFEST
        with storage_errors(start, verb="read"):
            hashes[f"manifest of step {plan.from_step}"] = sha256_of_file(start)
    config = read_json(layout.manifest, error=CheckpointError)["config_sha256"]
    return hashes | {
        f"manifest of step {last}": to_sha256,
        "config of the run": config,
        "data fingerprint": plan.manifest.data_fingerprint,
    }
