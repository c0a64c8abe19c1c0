"""The segments of a run: what each ran on, from where it went on, how exactly, and how it ended."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from milepost.runs.events import Event
from milepost.trajectory.fields import clock_seconds, finite, text, whole

COMPARED_FIELDS = ("loss_nats", "grad_norm", "batch_sha256")
"""What makes a step that is run again equal to the one logged before (contract, Definitions)."""


@dataclass(frozen=True)
class Replay:
    """Steps that were run again after a resume, against what was logged before.

    Attributes:
        found_here: True where the report compared the log itself, because the segment ended
            before it could say.
    """

    compared: int
    equal: int
    differing_steps: list[int]
    found_here: bool

    @property
    def is_exact(self) -> bool:
        """Whether every compared step was equal."""
        return self.equal == self.compared


@dataclass(frozen=True)
class Segment:
    """One process lifetime in the run.

    Attributes:
        number: as its events carry it.
        started: its `segment_started` event's fields; empty where that line is lost.
        first_step: lowest step it logged, None where it logged none.
        last_step: highest step it logged.
        end_reason: of `segment_ended`; None for a segment that has no end on record.
        training_seconds: time in steps only.
        wall_seconds: from its first event to its last; None where the clock went backwards.
        replay: None where no step was run again.
    """

    number: int
    started: dict[str, Any]
    first_step: int | None
    last_step: int | None
    end_reason: str | None
    training_seconds: float
    wall_seconds: float | None
    replay: Replay | None
    is_resume: bool = field(default=False)

    @property
    def restored_step(self) -> int | None:
        """The step of the checkpoint it started from."""
        return whole(self.started.get("restored_step"))

    @property
    def resumed_at(self) -> int | None:
        """Where it joins the trajectory; None for the first segment."""
        if not self.is_resume:
            return None
        if self.restored_step is not None:
            return self.restored_step
        return None if self.first_step is None else max(0, self.first_step - 1)

    def say(self, name: str) -> str | None:
        """A text field of `segment_started`, None where it is not known."""
        return text(self.started.get(name))

    def count(self, name: str) -> int | None:
        """A count of `segment_started`, None where it is not known."""
        return whole(self.started.get(name))


def segments_of(events: Sequence[Event]) -> list[Segment]:
    """The segments in order of their numbers.

    Args:
        events: the whole history in file order.
    """
    by_segment: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        number = whole(event.get("segment"))
        if number is not None:
            by_segment[number].append(event)
    logged: dict[int, Event] = {}
    segments = []
    for number in sorted(by_segment):
        own = by_segment[number]
        steps = _step_events(own)
        segments.append(_segment(number, own, steps, logged=logged))
        logged = _logged_after(logged, own)
    return segments


def _segment(
    number: int, events: list[Event], steps: list[Event], *, logged: dict[int, Event]
) -> Segment:
    first, last = _last_of_kind(events, "segment_started"), _last_of_kind(events, "segment_ended")
    numbers = [event["step"] for event in steps]
    told_seconds = finite(last.get("training_seconds"))
    counted_seconds = sum(finite(event.get("step_seconds")) or 0.0 for event in steps)
    return Segment(
        number=number,
        started=first,
        first_step=min(numbers, default=None),
        last_step=max(numbers, default=None),
        end_reason=(text(last.get("reason")) or "unknown") if last else None,
        training_seconds=counted_seconds if told_seconds is None else told_seconds,
        wall_seconds=_wall_seconds(events),
        replay=_replay(events, logged=logged),
        is_resume=bool(logged) or (number > 1 and first.get("restored_step") is not None),
    )


def _logged_after(logged: dict[int, Event], events: list[Event]) -> dict[int, Event]:
    """The steps that count after these events: a rollback undoes those that are later than it."""
    found = dict(logged)
    for event in events:
        last = whole(event.get("to_step")) if event["kind"] == "rolled_back" else None
        if last is not None:
            found = {step: before for step, before in found.items() if step <= last}
        found |= {e["step"]: e for e in _step_events([event])}
    return found


def _step_events(events: list[Event]) -> list[Event]:
    return [e for e in events if e["kind"] == "step" and whole(e.get("step")) is not None]


def _last_of_kind(events: list[Event], kind: str) -> Event:
    return next((event for event in reversed(events) if event["kind"] == kind), {})


def _wall_seconds(events: list[Event]) -> float | None:
    first, last = _first_time(events), _first_time(reversed(events))
    return None if first is None or last is None or last < first else round(last - first, 3)


def _first_time(events: Iterable[Event]) -> float | None:
    times = (clock_seconds(event.get("time")) for event in events)
    return next((time for time in times if time is not None), None)


def _replay(events: list[Event], *, logged: dict[int, Event]) -> Replay | None:
    told = {event.get("from_step"): event for event in events if event["kind"] == "replayed"}
    if told:
        return Replay(
            compared=sum(whole(event.get("compared")) or 0 for event in told.values()),
            equal=sum(whole(event.get("equal")) or 0 for event in told.values()),
            differing_steps=sorted(step for event in told.values() for step in _differing(event)),
            found_here=False,
        )
    rollbacks = (place for place, e in enumerate(events) if e["kind"] == "rolled_back")
    before_rollback = _step_events(events[: next(rollbacks, len(events))])
    again = [event for event in before_rollback if event["step"] in logged]
    if not again:
        return None
    differing = sorted({e["step"] for e in again if not _are_equal(e, logged[e["step"]])})
    compared = len({event["step"] for event in again})
    return Replay(compared, compared - len(differing), differing, found_here=True)


def _differing(event: Event) -> list[int]:
    steps = event.get("differing_steps")
    return [s for s in steps if whole(s) is not None] if isinstance(steps, list) else []


def _are_equal(one: Event, other: Event) -> bool:
    return all(one.get(name) == other.get(name) for name in COMPARED_FIELDS)
