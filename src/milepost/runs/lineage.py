"""Where a run begins that is made from a checkpoint of another, and what it takes of it.

What can be restored are four things, which one mechanism takes apart: the weights, the
optimizer's state, the place in the schedule, and the place in the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost.core.errors import CheckpointError, UsageError
from milepost.runs.layout import RunLayout, step_of_folder
from milepost.runs.steps import is_run

WEIGHTS, OPTIMIZER, SCHEDULE, DATA = PARTS = ("weights", "optimizer", "schedule", "data")
FULL = "full"
"""All of `PARTS` in one word."""

Parts = tuple[str, ...]
"""Some of `PARTS`, in their order, the weights always among them."""


@dataclass(frozen=True)
class ParentRequest:
    """What `--from` and `--restore` ask for.

    Attributes:
        run: the parent's run folder.
        step: of its checkpoint; None: the latest.
        parts: what is restored.
    """

    run: Path
    step: int | None
    parts: Parts


@dataclass(frozen=True)
class Lineage:
    """The checkpoint that a run was made from, as its manifest holds it.

    Attributes:
        run: the parent's run folder, absolute.
        run_id: the parent's.
        step: of the checkpoint.
        checkpoint_sha256: of its manifest.json, by which it is known again.
        parts: what was restored.
        changed: what the new run's config has another value of: {field: [parent's, own]}.
    """

    run: Path
    run_id: str
    step: int
    checkpoint_sha256: str
    parts: Parts
    changed: dict[str, list[Any]]

    @property
    def checkpoint(self) -> Path:
        """The folder of the checkpoint."""
        return RunLayout(self.run).checkpoint(self.step)

    @property
    def first_step(self) -> int:
        """The step the new run begins at."""
        return self.step if SCHEDULE in self.parts else 0

    def as_plain(self) -> dict[str, Any]:
        """As the manifest's `lineage` holds it."""
        return {
            "from": str(self.run),
            "run_id": self.run_id,
            "step": self.step,
            "checkpoint_sha256": self.checkpoint_sha256,
            "restore": restore_text(self.parts),
            "changed": self.changed,
        }


def lineage_of(values: dict[str, Any]) -> Lineage | None:
    """The lineage in a manifest; None where the run was not made from another one's checkpoint.

    Raises:
        CheckpointError: it is not as `Lineage.as_plain` gave it.
    """
    if "from" not in values:
        return None
    try:
        return Lineage(
            run=Path(values["from"]),
            run_id=str(values["run_id"]),
            step=int(values["step"]),
            checkpoint_sha256=str(values["checkpoint_sha256"]),
            parts=parse_restore(values["restore"]),
            changed=dict(values["changed"]),
        )
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise CheckpointError(f"the run's manifest has a lineage that lacks {error}") from error


def restore_text(parts: Sequence[str]) -> str:
    """`parts` as `--restore` takes them: "full", "weights", "weights,schedule,data"."""
    return FULL if tuple(parts) == PARTS else ",".join(parts)


def restore_words(text: str) -> str:
    """What "full" or "weights,schedule" means, inside a sentence; other texts as they are."""
    parts = text.split(",")
    if text == FULL:
        return "everything"
    if parts == [WEIGHTS]:
        return "weights only"
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else text


def parse_restore(text: str) -> Parts:
    """What a `--restore` option means.

    Raises:
        UsageError: it names something else, or leaves the weights out.
    """
    named = [part.strip() for part in text.split(",")]
    parts = PARTS if named == [FULL] else tuple(part for part in PARTS if part in named)
    strangers = [name for name in named if name not in (*PARTS, FULL)]
    if strangers or WEIGHTS not in parts or (FULL in named and len(named) > 1):
        raise UsageError(
            f"--restore {text!r} cannot be read",
            hint=f"give full, weights, or weights with some of {', '.join(PARTS[1:])}, such as "
            "weights,schedule,data",
        )
    return parts


def parse_parent(text: str, *, restore: str) -> ParentRequest:
    """What `--from` and `--restore` mean.

    Only names are looked at: a run that has checkpoints of its own goes on with the command that
    it was begun with, wherever its parent is by then.

    Args:
        text: RUN:STEP, RUN for its latest checkpoint, or a checkpoint folder of a run.
        restore: see `parse_restore`.

    Raises:
        UsageError: `restore` cannot be read.
    """
    parts = parse_restore(restore)
    path, step = Path(text), None
    head, colon, tail = text.rpartition(":")
    if not path.is_dir() and colon and head and tail.isascii() and tail.isdigit():
        path, step = Path(head), int(tail)
    path = path.resolve()
    of_folder = step_of_folder(path)
    if of_folder is not None and step is None and not is_run(path):
        path, step = path.parent.parent, of_folder
    return ParentRequest(path, step, parts)


def refuse_no_run(request: ParentRequest) -> None:
    """Refuses a parent that is not there, or is no run.

    Raises:
        UsageError: it is neither.
    """
    path = request.run
    if not path.is_dir():
        raise UsageError(
            f"--from: there is no folder {path}",
            hint="give RUN:STEP, a run folder and the step of one of its checkpoints",
        )
    if not is_run(path):
        raise UsageError(
            f"--from: {path} is not a run folder",
            hint="give RUN:STEP; a model of another program becomes a run with milepost import",
        )
