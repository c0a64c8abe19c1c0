"""What a curve does not show by itself: where training began anew, on what it ran, and where
batches were refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from milepost.runs.lineage import FULL, restore_words
from milepost.trajectory.collect import Trajectory
from milepost.trajectory.fields import text
from milepost.trajectory.sections.wording import enumerate_words, plural
from milepost.trajectory.segments import Segment
from milepost.trajectory.subject import Subject

MAX_DEVICE_CHARACTERS = 16
MAX_NAMED = 5


@dataclass(frozen=True)
class Mark:
    """A step at which training began anew, or refused a batch.

    Attributes:
        kind: "hardware" where the number of ranks or the device is another than before.
        label: what stands above the line.
        words: what changed; for a restart on the same hardware the label.
    """

    step: int
    kind: Literal["restart", "hardware", "rollback", "skip"]
    label: str
    words: str


@dataclass(frozen=True)
class Span:
    """Neighbouring steps that ran on one number of ranks."""

    first_step: int
    last_step: int
    ranks: int


def marks_of(subject: Subject) -> list[Mark]:
    """The restarts of the main course, in order of step; one a step."""
    if subject.run is None:
        return [Mark(step, "restart", "restart", "restart") for step in subject.course.restarts]
    segments = subject.run.segments
    found: dict[int, list[Mark]] = {}
    for before, segment in itertools.pairwise(segments):
        if segment.resumed_at is not None:
            found.setdefault(segment.resumed_at, []).append(_mark(before, segment))
    return [_together(found[step]) for step in sorted(found)]


def refusals_of(subject: Subject) -> list[Mark]:
    """The rollbacks, each where it led to, and the steps at which a batch was skipped."""
    if subject.run is None:
        return []
    refused = subject.run.refused
    back: dict[int, list[int]] = {}
    for rollback in refused.rollbacks:
        back.setdefault(rollback.to_step, []).append(rollback.from_step)
    marks = [
        Mark(step, "rollback", "rollback", f"from {', '.join(f'{s:,}' for s in back[step])}")
        for step in sorted(back)
    ]
    skipped = sorted({skip.step for skip in refused.skips})
    return marks + [Mark(step, "skip", "", "skipped") for step in skipped]


def spans_of(run: Trajectory) -> list[Span]:
    """The world size along the steps; a step belongs to the segment whose values count."""
    ranks = {segment.number: segment.count("ranks") for segment in run.segments}
    spans: list[Span] = []
    for step, number in zip(run.steps.steps, run.steps.segments, strict=True):
        count = None if number is None else ranks.get(number)
        if count is None:
            continue
        if spans and spans[-1].ranks == count:
            spans[-1] = Span(spans[-1].first_step, step, count)
        else:
            spans.append(Span(step - 1, step, count))
    return spans


def marks_in_words(marks: Sequence[Mark]) -> str:
    """'Restarts at steps 400 and 500; hardware changed at step 700 (1 → 2 ranks).'; '' for none."""
    restarts = [f"{mark.step:,}" for mark in marks if mark.kind == "restart"]
    changes = [f"{mark.step:,} ({mark.words})" for mark in marks if mark.kind == "hardware"]
    back = [f"{mark.step:,} ({mark.words})" for mark in marks if mark.kind == "rollback"]
    skipped = [f"{mark.step:,}" for mark in marks if mark.kind == "skip"]
    told = []
    if restarts:
        told.append(f"Restarted at {_named('step', restarts)}")
    if changes:
        started = "hardware changed" if told else "Hardware changed"
        told.append(f"{started} at {_named('step', changes)}")
    if back:
        told.append(f"{'rolled' if told else 'Rolled'} back to {_named('step', back)}")
    if skipped:
        told.append(f"{'batches' if told else 'Batches'} skipped at {_named('step', skipped)}")
    return "; ".join(told) + "." if told else ""


def spans_in_words(spans: Sequence[Span]) -> str:
    """'World size: 2 ranks to step 300, 1 to 700, 2 to 1,000.'; '' where nothing is known."""
    if not spans:
        return ""
    if len(spans) == 1:
        return f"World size: {plural(spans[0].ranks, 'rank')} throughout."
    first, *others = spans[:MAX_NAMED]
    told = [f"{plural(first.ranks, 'rank')} to step {first.last_step:,}"]
    told += [f"{span.ranks} to {span.last_step:,}" for span in others]
    more = len(spans) - MAX_NAMED
    return f"World size: {', '.join(told)}{f' and {more:,} more changes' if more > 0 else ''}."


def _named(noun: str, words: Sequence[str]) -> str:
    shown = list(words[:MAX_NAMED])
    if len(words) > MAX_NAMED:
        shown.append(f"{len(words) - MAX_NAMED:,} more")
    return f"{noun if len(words) == 1 else noun + 's'} {enumerate_words(shown)}"


def _mark(before: Segment, segment: Segment) -> Mark:
    step = segment.resumed_at
    assert step is not None
    ranks, devices = _change_of_ranks(before, segment), _change_of_device(before, segment)
    restored = segment.say("restored")
    loss = "" if restored in (None, FULL) else restore_words(str(restored))
    loss = "nothing restored" if loss == "nothing" else loss
    if ranks or devices:
        label = ranks or f"now {_short(_device(segment))}"
        changes = [words for words in (ranks, devices, loss) if words]
        return Mark(step, "hardware", label, ", ".join(changes))
    label = loss or f"segment {segment.number}"
    return Mark(step, "restart", label, label)


def _together(marks: Sequence[Mark]) -> Mark:
    """One mark of all that lie on a step: the change of hardware is the one that is told."""
    last = marks[-1]
    if len(marks) == 1:
        return last
    changes = [mark for mark in marks if mark.kind == "hardware"]
    if changes:
        words = ", then ".join(dict.fromkeys(mark.words for mark in changes))
        return Mark(last.step, "hardware", changes[-1].label, words)
    label = f"{len(marks):,} restarts"
    return Mark(last.step, "restart", label, label)


def _change_of_ranks(before: Segment, segment: Segment) -> str:
    old, new = before.count("ranks"), segment.count("ranks")
    if old is None or new is None or old == new:
        return ""
    return f"{old} → {plural(new, 'rank')}"


def _change_of_device(before: Segment, segment: Segment) -> str:
    old, new = _device(before), _device(segment)
    return f"{old} → {new}" if old and new and old != new else ""


def _device(segment: Segment) -> str:
    """The first device's name, else its kind; '' where neither is known."""
    devices = segment.started.get("devices")
    names = [name for name in devices if text(name)] if isinstance(devices, list) else []
    return names[0] if names else segment.say("device") or ""


def _short(device: str) -> str:
    plain = device.removeprefix("NVIDIA ")
    if len(plain) <= MAX_DEVICE_CHARACTERS:
        return plain
    return plain[: MAX_DEVICE_CHARACTERS - 1].rstrip() + "…"
