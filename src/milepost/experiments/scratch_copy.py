"""The scratch copy of a run in which a replay trains: where it lies, and what is in it."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from milepost.checkpoint.store import STATE_FOLDER, needed_bytes, verify_checkpoint
from milepost.config.schema import Config
from milepost.core.errors import CheckpointError, RunInUseError, StorageError
from milepost.core.files import exclusive_lock, folder_bytes, free_bytes, storage_errors
from milepost.core.units import format_bytes
from milepost.experiments.comparison import weights_dtype_of
from milepost.experiments.replay_plan import ReplayPlan
from milepost.planner.cost import count_parameters
from milepost.runs.events import EventWriter
from milepost.runs.layout import RunLayout
from milepost.runs.manifest import write_run_manifest
from milepost.trajectory.provenance import recipe_toml

NEVER_STEPS = 2**40
"""An interval that no run reaches."""

_MAY_BE_DROPPED = (
    "if a training is at work in this folder, it may have dropped what was read: run the same "
    "command again; if not, milepost verify without --replay says what is damaged"
)

SCRATCH_LOCK = "replay.lock"
"""Held in a scratch copy as long as its replay lives."""


@contextlib.contextmanager
def scratch_copy(plan: ReplayPlan) -> Iterator[RunLayout]:
    """A run folder with the start of the range in it and nothing else, for the block."""
    config = replay_config(plan)
    prefix = f".{plan.layout.name}-replay-"
    for place in _places(plan):
        _remove_litter(place, prefix=prefix)
    place = _place_for_scratch(plan, config=config)
    with storage_errors(place):
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
    with contextlib.ExitStack() as stack:
        stack.callback(_delete, folder)
        stack.enter_context(exclusive_lock(folder / SCRATCH_LOCK, what=str(folder)))
        scratch = RunLayout(folder / "run")
        write_run_manifest(scratch, replace(plan.manifest, config=config))
        (folder / "recipe.toml").write_text(recipe_toml(config), encoding="utf-8")
        if plan.from_step:
            _link_checkpoint(plan, scratch=scratch)
            sha256 = verified_sha256(plan, scratch, step=plan.from_step)
            # Without it a damaged copy would be taken for a run from its first step.
            events = EventWriter(scratch.events, segment=1)
            events.append("checkpoint_saved", step=plan.from_step, sha256=sha256)
        for event in plan.refused:
            events = EventWriter(scratch.events, segment=1)
            events.append(**{k: v for k, v in event.items() if k not in ("v", "time", "segment")})
        yield scratch


def _places(plan: ReplayPlan) -> list[Path]:
    """Where a scratch copy may lie: beside the run, and where temporary files go."""
    return [plan.layout.root.resolve().parent, Path(tempfile.gettempdir()).resolve()]


def _remove_litter(place: Path, *, prefix: str) -> None:
    """Deletes the scratch copies of replays that were killed; those at work hold their lock."""
    for lock in place.glob(f"{glob.escape(prefix)}*/{SCRATCH_LOCK}"):
        with contextlib.suppress(RunInUseError, StorageError):
            with exclusive_lock(lock, what=str(lock.parent)):
                _delete(lock.parent)


def _delete(folder: Path) -> None:
    """Deletes a scratch copy, its lock last: by it the next replay finds what a kill leaves."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    for name in ("recipe.toml", SCRATCH_LOCK):
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def replay_config(plan: ReplayPlan) -> Config:
    """The range's config without what changes no weight and costs time."""
    config = plan.config
    row_tokens = config.data.sequence_length
    dtype = weights_dtype_of(plan.layout.checkpoint(plan.to_step))
    changes = {
        "data": {"path": str(plan.data.folder.resolve())},
        "train": {"stop_at_step": plan.to_step},
        "checkpoint": {
            "every_steps": NEVER_STEPS,
            "keep_train_state_every_steps": None,
            "weights_dtype": dtype,
        },
        # There is always one at the last step.
        "validation": {"every_steps": NEVER_STEPS, "tokens": row_tokens},
        "samples": {"every_steps": None},
        "evaluation": {"every_steps": None},
        "tracking": {"tools": ()},
        # What the range left out is in the copy's history; a rollback judges as a warning does.
        "guards": {"spike": "warn" if config.guards.spike == "rollback" else config.guards.spike},
    }
    sections = {n: getattr(config, n).model_copy(update=values) for n, values in changes.items()}
    return config.model_copy(update=sections)


def _place_for_scratch(plan: ReplayPlan, *, config: Config) -> Path:
    """Beside the run, else where temporary files go.

    Raises:
        StorageError: neither has room, or can be written.
    """
    needed = needed_bytes(
        count_parameters(config.model).total, weights_dtype=config.checkpoint.weights_dtype
    )
    copied = folder_bytes(plan.layout.checkpoint(plan.from_step)) if plan.from_step else 0
    told = []
    for place in _places(plan):
        is_linkable = place.stat().st_dev == plan.layout.root.stat().st_dev
        wanted = needed + (0 if is_linkable else copied)
        free = free_bytes(place)
        if free >= wanted and os.access(place, os.W_OK):
            return place
        reason = "cannot be written" if free >= wanted else f"has {format_bytes(free)} free"
        told.append(f"{place} {reason}, {format_bytes(wanted)} are needed")
    raise StorageError(
        f"no room for the replay's copy: {'; '.join(dict.fromkeys(told))}",
        hint="free some space, or set TMPDIR to a folder that has it",
    )


def verified_sha256(plan: ReplayPlan, layout: RunLayout, *, step: int) -> str:
    """The hash of a checkpoint, of the run or of its scratch copy, that is whole."""
    try:
        return verify_checkpoint(layout.checkpoint(step), run_id=plan.manifest.run_id, step=step)
    except (CheckpointError, StorageError) as error:
        message = error.message.replace(str(layout.root), str(plan.layout.root))
        raise type(error)(message, hint=_MAY_BE_DROPPED) from error


def _link_checkpoint(plan: ReplayPlan, *, scratch: RunLayout) -> None:
    """The checkpoint to start from, in the scratch copy: the same files under another name."""
    source, target = plan.layout.checkpoint(plan.from_step), scratch.checkpoint(plan.from_step)
    try:
        (target / STATE_FOLDER).mkdir(parents=True)
        for path in [*source.iterdir(), *(source / STATE_FOLDER).iterdir()]:
            if path.is_file():
                _link(path, target / path.relative_to(source))
    except FileNotFoundError as gone:
        raise CheckpointError(
            f"{gone.filename} went away while it was read", hint=_MAY_BE_DROPPED
        ) from gone
    except OSError as error:
        raise StorageError(f"cannot copy {source} to {target}: {error.strerror}") from error


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except FileNotFoundError:
        raise
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
