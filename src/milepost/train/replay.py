"""Compares steps that are run again after a resume with what was logged before the kill."""

from __future__ import annotations

from typing import Any

from milepost.core.console import say
from milepost.runs.events import EventWriter, History

COMPARED = ("loss_nats", "grad_norm", "learning_rate", "batch_sha256")


class ReplayCheck:
    """Holds the logged steps after the restored one until each has been run again."""

    def __init__(self, history: History | None, *, restored_step: int) -> None:
        logged = {} if history is None else history.latest_by_step("step")
        self._expected = {s: e for s, e in logged.items() if s > restored_step}
        self._first = restored_step + 1
        self._last = max(self._expected, default=restored_step)
        self._num_compared = 0
        self._differing: list[int] = []

    @property
    def num_expected(self) -> int:
        """Steps that were logged before and will be run again."""
        return len(self._expected)

    def compare(self, step: int, fields: dict[str, Any]) -> None:
        """Compares one step that has just been run."""
        before = self._expected.get(step)
        if before is None:
            return
        self._num_compared += 1
        if any(before.get(name) != fields[name] for name in COMPARED):
            self._differing.append(step)

    def forget_after(self, step: int) -> None:
        """Takes no notice of later steps: a rollback undid them."""
        self._expected = {s: e for s, e in self._expected.items() if s <= step}
        self._last = min(self._last, step)

    def report_if_done(self, step: int, *, events: EventWriter, is_last: bool) -> None:
        """Says and records the result once: when the last logged step has been run again, or
        when the segment ends before.
        """
        if not self._num_compared or not (step >= self._last or is_last):
            return
        equal = self._num_compared - len(self._differing)
        events.append(
            "replayed",
            from_step=self._first,
            to_step=min(step, self._last),
            compared=self._num_compared,
            equal=equal,
            differing_steps=self._differing[:100],
        )
        word = "exact" if equal == self._num_compared else "not exact"
        say(f"{word}: {equal} of {self._num_compared} steps run again are as logged before")
        self._num_compared = 0
        self._expected = {}
