"""What a run's history says of its checkpoints: saved, set aside, undone, train state dropped."""

from __future__ import annotations

from dataclasses import dataclass, replace

from milepost.runs.events import History


@dataclass(frozen=True)
class Recorded:
    """What the history says of one checkpoint.

    Attributes:
        sha256: of its manifest; None where no save is recorded.
        is_set_aside: whether it was moved to the quarantine after that.
        is_dropped: whether its train state was dropped after that.
        is_undone: whether a rollback undid its step after that; then it is set aside, or about
            to be.
    """

    sha256: str | None = None
    is_set_aside: bool = False
    is_dropped: bool = False
    is_undone: bool = False


@dataclass(frozen=True)
class Records:
    """What the history says of all checkpoints.

    Attributes:
        by_step: each checkpoint's.
        is_open: whether the history may lack what the last segment did last: it is at work, was
            killed, or ended as the disk took no more.
    """

    by_step: dict[int, Recorded]
    is_open: bool

    @property
    def saved_steps(self) -> list[int]:
        """Steps with a recorded save that was not set aside since, ascending."""
        return sorted(
            step
            for step, recorded in self.by_step.items()
            if recorded.sha256 is not None and not (recorded.is_set_aside or recorded.is_undone)
        )

    @property
    def newest_step(self) -> int:
        """The last of `saved_steps`; 0 where there is none."""
        return max(self.saved_steps, default=0)


def records_of(history: History) -> Records:
    """Reads events of saves, drops, quarantines and rollbacks in file order; the later counts."""
    by_step: dict[int, Recorded] = {}
    is_open = False
    for event in history.events:
        kind, step = event.get("kind"), event.get("step")
        if kind in ("segment_started", "segment_ended"):
            is_open = kind == "segment_started" or event.get("reason") == "storage"
        if kind == "rolled_back" and isinstance(last := event.get("to_step"), int):
            undone = {s: replace(r, is_undone=True) for s, r in by_step.items() if s > last}
            by_step |= undone
        if not isinstance(step, int):
            continue
        before = by_step.get(step, Recorded())
        if kind == "checkpoint_saved":
            by_step[step] = Recorded(sha256=str(event.get("sha256")))
        elif kind == "checkpoint_quarantined":
            by_step[step] = replace(before, is_set_aside=True)
        elif kind == "train_state_dropped":
            by_step[step] = replace(before, is_dropped=True)
    return Records(by_step, is_open)
