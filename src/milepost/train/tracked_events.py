"""From the events of a run's history to what a tracker is told, in their order."""

from __future__ import annotations

import datetime
import math
from typing import Any

from milepost.runs.events import Event
from milepost.runs.metric_names import STEP_METRICS, VALIDATION_METRICS, benchmark_metric
from milepost.train.trackers import Tracker


def metrics_of(event: Event) -> dict[str, float]:
    """The metrics that an event holds, by name; none for an event of another kind.

    What was not finite when it was measured is null in the history and left out here.
    """
    kind = event.get("kind")
    named: dict[str, Any] = {}
    if not _is_number(event.get("step")):
        return {}  # of another kind, or a foreign line
    if kind == "step":
        named = {name: event.get(field) for field, name in STEP_METRICS.items()}
    elif kind == "validation":
        named = {name: event.get(field) for field, name in VALIDATION_METRICS.items()}
    elif kind == "evaluation":
        named = {
            benchmark_metric(event["benchmark"], name): metric["value"]
            for name, metric in event["metrics"].items()
        }
    return {name: float(value) for name, value in named.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


class TrackedEvents:
    """Passes on what is new and no repetition.

    Steps that are run again after a resume are in the history twice, and are passed on once.
    Where a segment is labelled approximate the second time may differ, and after a rollback it
    will: a tracker that can take back forgets the first, and each gets the second.

    Args:
        tracker: to be told.
        every_steps: of the `step` events only those whose step is a multiple are passed on.
        num_rows: what the tracker was told in earlier segments.
    """

    def __init__(self, tracker: Tracker, *, every_steps: int, num_rows: int) -> None:
        self.num_rows = num_rows
        self._tracker = tracker
        self._every_steps = every_steps
        self._told: set[tuple[int, str, str | None]] = set()

    def remember(self, event: Event) -> None:
        """Takes note of an event that the tracker was told of in an earlier segment."""
        last = _last_that_counts(event)
        if last is not None:
            self._told = {key for key in self._told if key[0] <= last}
        if metrics_of(event):
            self._told.add(_key(event))

    def tell(self, event: Event) -> None:
        """Tells the tracker of an event, if it is one for it."""
        last = _last_that_counts(event)
        if last is not None:
            self._tracker.rewind(last + 1)
        metrics = metrics_of(event)
        is_new = bool(metrics) and _key(event) not in self._told
        self.remember(event)
        if not is_new or (event["kind"] == "step" and event["step"] % self._every_steps):
            return
        measured = datetime.datetime.fromisoformat(event["time"])
        self._tracker.log(
            metrics, step=event["step"], unix_seconds=measured.timestamp(), row=self.num_rows
        )
        self.num_rows += 1


def _last_that_counts(event: Event) -> int | None:
    """The step after which other numbers may come than those before the event; None of most."""
    kind = event.get("kind")
    if kind == "rolled_back" and _is_number(event.get("to_step")):
        return int(event["to_step"])
    if kind == "segment_started" and event.get("exactness") != "exact":
        return event.get("restored_step") or 0
    return None


def _key(event: Event) -> tuple[int, str, str | None]:
    return event["step"], event["kind"], event.get("benchmark")
