"""`milepost verify`: whether a run's files are whole and its bits can be trained again."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from milepost.core import console
from milepost.core.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from milepost.checkpoint.audit import Audit
    from milepost.experiments.certificate import Certificate
    from milepost.runs.layout import RunLayout


QUIET_SECONDS = 2.0
"""A check that takes no longer needs no progress."""


class NotAsItShouldBe(CheckpointError):
    """A run's files are damaged, or its replay gave other bits."""


def verify(
    run: Path,
    *,
    replay: Annotated[bool, Parameter(negative="")] = False,
    ranks: int | None = None,
    from_step: int | None = None,
    data: Path | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
    words: Annotated[Sequence[str], Parameter(parse=False)],
) -> None:
    """Check a run's checkpoints, and prove that it can be continued exactly.

    Every file of every checkpoint is held against its manifests, and the checkpoints against the
    run's history. With --replay a part of the run is trained again, from one checkpoint to the
    next, and compared bit by bit; a certificate is written to RUN/certificates. The run itself
    is only read, and may be training meanwhile.

    Example: `milepost verify runs/first --replay --ranks 1`

    Parameters
    ----------
    run
        The run folder.
    replay
        Train again from a checkpoint to the next and compare.
    ranks
        Processes of the replay; any number that divides the lanes gives the same bits.
    from_step
        The checkpoint the replay starts from; 0: the first step. Default: the latest one that
        has a train state and a later checkpoint.
    data
        Where the run's prepared data lies now, if it was moved.
    json
        Print one JSON document on stdout.
    words
        The command line, for the certificate.
    """
    from milepost.runs.layout import RunLayout

    _refuse_a_model_folder(run)
    _refuse_options_without_replay(replay, ranks=ranks, from_step=from_step, data=data)
    if replay:
        from milepost.experiments.replay_plan import plan_replay

        # What cannot be replayed is said before every file of the run is read.
        plan_replay(RunLayout(run), from_step=from_step, data=data)
    found = _audit(RunLayout(run))
    if not json:
        _show_audit(run, found)
    certificate = None
    files: Sequence[Path] = ()
    if replay:
        from milepost.experiments import replay as replaying

        command = shlex.join(["milepost", *words])
        certificate, files = replaying.replay(
            run, from_step=from_step, ranks=ranks, data=data, command=command
        )
    if json:
        console.show_json(_as_plain(run, found, certificate, files))
    elif certificate is not None:
        console.show("")
        console.show(certificate.as_text().rstrip())
        console.say(f"written to {files[1]}, and as JSON beside it")
    _refuse_if_wrong(run, found, certificate)


def _refuse_a_model_folder(run: Path) -> None:
    from milepost.runs.steps import is_run

    if (run / "config.json").exists() and not is_run(run):
        raise UsageError(
            f"{run} is a model folder, not a run", hint="give the folder that was named with --run"
        )


def _refuse_options_without_replay(is_replay: bool, **options: Any) -> None:
    given = [name.replace("_", "-") for name, value in options.items() if value is not None]
    if given and not is_replay:
        raise UsageError(f"--{given[0]} says how to replay", hint="add --replay, or leave it out")


def _audit(layout: RunLayout) -> Audit:
    from milepost.checkpoint.audit import audit, bytes_to_read

    total = bytes_to_read(layout)
    with console.progress(f"checking {layout.root}", total=total or None) as bar:
        return audit(layout, on_read=_with_time_left(bar.update, total=total))


def _with_time_left(update: Callable[..., None], *, total: int) -> Callable[[int, str], None]:
    from milepost.core.units import format_duration

    started = time.monotonic()

    def on_read(num_bytes: int, name: str) -> None:
        passed = time.monotonic() - started
        if passed < QUIET_SECONDS:
            return
        left = passed * (total / max(num_bytes, 1) - 1)
        update(num_bytes, note=f"{name}  left {format_duration(max(left, 0.0))}")

    return on_read


def _show_audit(run: Path, found: Audit) -> None:
    from milepost.core.units import format_bytes

    for finding in found.findings:
        console.show(f"{finding.place}: {finding.what}; {finding.meaning}")
    for note in found.notes:
        console.show(f"note: {note}")
    states = f"{found.num_train_states} with a train state"
    console.show(
        f"{run}: {_count(found.num_checkpoints, 'checkpoint')}, {states}; "
        f"{_count(found.num_files, 'file')}, {format_bytes(found.num_bytes)}; "
        f"{_count(found.last_step, 'step')} in {_count(found.num_segments, 'segment')}"
    )
    if not found.findings:
        console.show("all is well: every file is as its manifest says, and the history agrees")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _as_plain(
    run: Path, found: Audit, certificate: Certificate | None, files: Sequence[Path]
) -> dict[str, Any]:
    from dataclasses import asdict

    plain = {"run": str(run), "is_whole": not found.findings, **asdict(found)}
    if certificate is None:
        return plain
    return plain | {"replay": certificate.as_plain(), "certificate_files": list(map(str, files))}


def _refuse_if_wrong(run: Path, found: Audit, certificate: Certificate | None) -> None:
    if certificate is not None and not certificate.is_equal:
        raise NotAsItShouldBe(
            f"{run}: the replay did not give the same bits",
            hint="the certificate says where they part; milepost doctor says what this machine is",
        )
    if found.findings:
        raise NotAsItShouldBe(
            f"{run}: {_count(len(found.findings), 'finding')}, nothing was changed",
            hint="milepost train sets damaged checkpoints aside and goes on from the newest whole "
            "one that has a train state",
        )
