"""What the guards of a run did: batches skipped, rollbacks, warnings, and where they gave up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from milepost.runs.events import Event
from milepost.trajectory.fields import text, whole

GUARD_KINDS = frozenset(["batch_skipped", "rolled_back", "guard_warned", "guard_stopped"])
"""Events that this module tells of."""

MAX_TOLD = 3


@dataclass(frozen=True)
class SkippedBatch:
    """A batch that no update was made with; `step` is that of the update."""

    step: int
    data_step: int | None
    why: str


@dataclass(frozen=True)
class RolledBack:
    """A return from one step to an earlier one.

    Attributes:
        num_data_steps: batches that were left out; None where the event does not say.
    """

    from_step: int
    to_step: int
    num_data_steps: int | None
    why: str


@dataclass(frozen=True)
class Warned:
    """A warning, or with `is_stop` the end of a segment; `step` where the event says one."""

    guard: str
    step: int | None
    is_stop: bool


@dataclass(frozen=True)
class Refused:
    """All of a run, in file order, each once however often its steps were run."""

    skips: list[SkippedBatch]
    rollbacks: list[RolledBack]
    warnings: list[Warned]


def refused_of(events: Sequence[Event]) -> Refused:
    """Reads the history; a line that lacks a step is left out."""
    return Refused(
        skips=list(dict.fromkeys(_skips(events))),
        rollbacks=list(dict.fromkeys(_rollbacks(events))),
        warnings=list(dict.fromkeys(_warnings(events))),
    )


def _skips(events: Sequence[Event]) -> Iterator[SkippedBatch]:
    for event in events:
        step = whole(event.get("step"))
        if event["kind"] == "batch_skipped" and step is not None:
            why = text(event.get("why")) or "no reason on record"
            yield SkippedBatch(step, whole(event.get("data_step")), why)


def _rollbacks(events: Sequence[Event]) -> Iterator[RolledBack]:
    for event in events:
        first, last = whole(event.get("from_step")), whole(event.get("to_step"))
        if event["kind"] == "rolled_back" and first is not None and last is not None:
            data = whole(event.get("first_data_step")), whole(event.get("last_data_step"))
            count = None if data[0] is None or data[1] is None else data[1] + 1 - data[0]
            why = text(event.get("why")) or "no reason on record"
            yield RolledBack(first, last, count, why)


def _warnings(events: Sequence[Event]) -> Iterator[Warned]:
    for event in events:
        if event["kind"] in ("guard_warned", "guard_stopped"):
            guard = text(event.get("guard")) or "unknown"
            step = whole(event.get("step"))
            if step is None:
                step = whole(event.get("data_step"))
            yield Warned(guard, step, event["kind"] == "guard_stopped")


def refused_sentences(refused: Refused) -> list[str]:
    """What the opening of a report says of them."""
    told = []
    if refused.skips:
        steps = [f"{skip.step:,} ({skip.why})" for skip in refused.skips]
        count = "One batch was" if len(steps) == 1 else f"{len(steps):,} batches were"
        told.append(f"{count} skipped, at {_listed('step', steps)}.")
    if refused.rollbacks:
        returns = [
            f"from {r.from_step:,} to {r.to_step:,} ({r.why}"
            + ("" if r.num_data_steps is None else f"; {r.num_data_steps:,} batches left out")
            + ")"
            for r in refused.rollbacks
        ]
        count = "once" if len(returns) == 1 else f"{len(returns):,} times"
        told.append(f"It rolled back {count}: {_listed('', returns)}.")
    for is_stop, words in ((False, "Guards warned of"), (True, "It was stopped by the guard of")):
        found = [w for w in refused.warnings if w.is_stop == is_stop]
        guards = dict.fromkeys(warned.guard for warned in found)
        parts = [f"{_GUARDS.get(g, g)}{_steps_of(found, guard=g)}" for g in guards]
        told += [f"{words} {_listed('', parts)}."] if parts else []
    return told


_GUARDS = {
    "spike": "spikes",
    "nonfinite": "numbers that are not finite",
    "resume_drift": "a drift of the loss after a resume",
    "loader": "data that came late",
    "disk": "too little space for the next checkpoint",
}


def _steps_of(warnings: Sequence[Warned], *, guard: str) -> str:
    steps = sorted({w.step for w in warnings if w.guard == guard and w.step is not None})
    return f" at {_listed('step', [f'{step:,}' for step in steps])}" if steps else ""


def _listed(noun: str, words: Sequence[str]) -> str:
    shown = list(words[:MAX_TOLD])
    if len(words) > MAX_TOLD:
        shown.append(f"{len(words) - MAX_TOLD:,} more")
    named = shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
    return f"{noun}{'s' if len(words) > 1 else ''} {named}" if noun else named
