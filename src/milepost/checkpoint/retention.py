"""Which train states stay, and finding the newest checkpoint that can be trusted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from milepost.checkpoint.store import STATE_FOLDER, LaterVersionError, verify_checkpoint
from milepost.core.errors import CheckpointError
from milepost.core.files import delete_folder, move_aside, storage_errors
from milepost.runs.layout import RunLayout, checkpoint_folders


class Restorable(NamedTuple):
    """A verified checkpoint with a train state."""

    step: int
    folder: Path
    sha256: str


def steps_to_drop(
    steps: list[int],
    *,
    keep: int,
    every_steps: int | None,
    scheduled: int | None = None,
    first_step: int = 0,
) -> list[int]:
    """Steps whose train state goes: all but the newest `keep` and multiples of `every_steps`.

    Args:
        steps: with a train state.
        keep: the newest that stay; 1 at least.
        every_steps: multiples of it stay.
        scheduled: the newest two multiples of it stay too, of which a rollback needs one.
        first_step: that the run began at; it counts as a multiple.
    """
    old = sorted(steps)[:-keep]
    if scheduled is not None:
        needed = [s for s in sorted(steps) if s % scheduled == 0 or s == first_step][-2:]
        old = [step for step in old if step not in needed]
    return [step for step in old if every_steps is None or step % every_steps]


def drop_old_train_states(
    layout: RunLayout,
    *,
    good_step: int,
    keep: int,
    every_steps: int | None,
    scheduled: int | None = None,
    first_step: int = 0,
    record: Callable[[int], None],
) -> list[int]:
    """Drops train states by the rule of `steps_to_drop`; weights always stay.

    Each is recorded, renamed away, then deleted, so that a missing one is never taken for damage.
    A train state that nobody vouches for counts for nothing: it neither goes nor makes another
    one go, so that the newest good one always stays.

    Args:
        layout: the run folder.
        good_step: the newest step whose train state is known to be whole; later ones are not
            looked at.
        keep: the newest that stay, that of `good_step` among them; 1 at least.
        every_steps: multiples of it stay too.
        scheduled: the newest two multiples of it stay too.
        first_step: that the run began at; it counts as a multiple.
        record: called with each step before its train state goes; on the disk when it returns.

    Returns:
        The steps whose train state was dropped.

    Raises:
        StorageError: the folder cannot be changed.
    """
    with_state = [
        step
        for step, folder in checkpoint_folders(layout)
        if step <= good_step and (folder / STATE_FOLDER).is_dir()
    ]
    dropped = steps_to_drop(
        with_state, keep=keep, every_steps=every_steps, scheduled=scheduled, first_step=first_step
    )
    for step in dropped:
        doomed = layout.checkpoints / f".deleted-{STATE_FOLDER}-{step:08d}"
        record(step)
        delete_folder(layout.checkpoint(step) / STATE_FOLDER, doomed=doomed)
    return dropped


def set_aside_after(
    layout: RunLayout, *, step: int, record: Callable[[int, Path, str], None]
) -> None:
    """Moves the checkpoints of later steps to the quarantine: a rollback undid those steps.

    A kill on the way leaves some where they are, and the next call moves them.

    Args:
        layout: the run folder.
        step: the last one that counts.
        record: called with step, new place and reason of each that was moved.

    Raises:
        StorageError: a folder cannot be moved.
    """
    for later, folder in checkpoint_folders(layout):
        if later > step:
            place = move_aside(folder, folder=layout.quarantine)
            record(later, place, f"undone by the rollback to step {step}")


def newest_restorable(
    layout: RunLayout,
    *,
    run_id: str,
    dropped: set[int],
    quarantined: Callable[[int, Path, str], None],
) -> Restorable | None:
    """The newest checkpoint with a train state whose every byte is as its manifest says.

    Damaged ones that are met on the way are moved to the quarantine folder and reported.

    Args:
        layout: the run folder.
        run_id: checkpoints of another run are damage.
        dropped: steps whose train state was dropped on purpose.
        quarantined: called with step, new place and reason for each damaged checkpoint.

    Raises:
        LaterVersionError: a later version of Milepost wrote one; it stays where it is.
        StorageError: a checkpoint cannot be read, or a damaged one cannot be moved.
    """
    for step, folder in reversed(checkpoint_folders(layout)):
        try:
            if not _has_train_state(folder):
                if step in dropped:
                    continue
                raise CheckpointError(f"{folder / STATE_FOLDER} is missing")
            sha256 = verify_checkpoint(folder, run_id=run_id, step=step)
        except LaterVersionError:
            raise
        except CheckpointError as error:
            place = move_aside(folder, folder=layout.quarantine)
            quarantined(step, place, error.message)
            continue
        return Restorable(step, folder, sha256)
    return None


def _has_train_state(folder: Path) -> bool:
    with storage_errors(folder, verb="read"):
        return any(entry.name == STATE_FOLDER for entry in folder.iterdir())
