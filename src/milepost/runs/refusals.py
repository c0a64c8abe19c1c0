"""What a run's history says of batches that were refused: those skipped, and rollbacks.

What was refused once stays refused when its steps are run again, whatever the reason was: so a
fault that does not come back still leaves the same run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from milepost.runs.events import Event, History


@dataclass(frozen=True)
class Rollback:
    """A return to an earlier step, from where training goes on with other data.

    Attributes:
        to_step: whose weights and moments count again.
        skipped: batches skipped by then; the next update uses `data_step = to_step + skipped`.
        rollbacks: of the run so far, this one among them.
    """

    to_step: int
    skipped: int
    rollbacks: int


@dataclass(frozen=True)
class Refusals:
    """What holds for the steps that are still to be run, or run again.

    Attributes:
        skips: (step, data step) of updates that were refused, with that batch.
        rollbacks: in order of their steps; an earlier one that a later one undid is not here.
        is_rollback_open: whether nothing was trained after the last one, so that it may not have
            been carried out.
    """

    skips: frozenset[tuple[int, int]] = frozenset()
    rollbacks: tuple[Rollback, ...] = ()
    is_rollback_open: bool = False

    def with_rollback(self, rollback: Rollback) -> Refusals:
        """These, and a rollback that undoes what came after its step."""
        return Refusals(
            skips=frozenset(skip for skip in self.skips if skip[0] <= rollback.to_step),
            rollbacks=(*(r for r in self.rollbacks if r.to_step < rollback.to_step), rollback),
            is_rollback_open=True,
        )

    def as_plain(self) -> dict[str, Any]:
        """The same as JSON holds it."""
        return {
            "skips": sorted(self.skips),
            "rollbacks": [(r.to_step, r.skipped, r.rollbacks) for r in self.rollbacks],
            "is_rollback_open": self.is_rollback_open,
        }


def refusals_from_plain(values: dict[str, Any]) -> Refusals:
    """Reads back what `Refusals.as_plain` gave."""
    return Refusals(
        skips=frozenset((step, data_step) for step, data_step in values["skips"]),
        rollbacks=tuple(Rollback(*numbers) for numbers in values["rollbacks"]),
        is_rollback_open=values["is_rollback_open"],
    )


def refusals_of(history: History) -> Refusals:
    """Reads the events in file order.

    A change of the recipe ends the memory of skips: under other settings a batch is tried again.
    """
    refusals = Refusals()
    for event in history.events:
        kind = event.get("kind")
        if kind == "batch_skipped" and (skip := _whole(event, ("step", "data_step"))):
            skips = refusals.skips | {(skip[0], skip[1])}
            refusals = Refusals(skips, refusals.rollbacks, refusals.is_rollback_open)
        elif kind == "rolled_back" and (
            numbers := _whole(event, ("to_step", "skipped", "rollbacks"))
        ):
            refusals = refusals.with_rollback(Rollback(*numbers))
        elif kind == "override":
            refusals = Refusals(frozenset(), refusals.rollbacks, refusals.is_rollback_open)
        elif kind == "step":
            refusals = Refusals(refusals.skips, refusals.rollbacks)
    return refusals


def _whole(event: Event, names: Sequence[str]) -> list[int] | None:
    """The fields of a line, None where one is no whole number: a foreign line."""
    values = [event.get(name) for name in names]
    numbers = [value for value in values if type(value) is int]
    return numbers if len(numbers) == len(names) else None
