"""The certificate of a replay: what was claimed, what was compared, on what, with which result."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from milepost.core.files import write_atomically, write_json
from milepost.core.units import format_duration
from milepost.experiments.comparison import Compared
from milepost.runs.events import Event
from milepost.runs.layout import RunLayout

SCHEMA_VERSION = 1
WIDTH = 96
_COLUMN = 38

FACTS = (
    ("ranks", "ranks"),
    ("threads", "threads a rank"),
    ("device", "device"),
    ("torch", "torch"),
    ("cuda", "CUDA"),
    ("python", "Python"),
    ("milepost", "Milepost"),
    ("compile", "compiled"),
    ("precision", "precision"),
    ("exactness", "promised"),
    ("reason", "because"),
)
"""What a segment's start says of it, and how people call that."""

_MUST_MATCH = ("device", "torch", "cuda", "milepost", "python")


@dataclass(frozen=True)
class Certificate:
    """The outcome of one replay.

    Attributes:
        run: the run folder as it was given.
        compared: steps first, then each file.
        hashes: what is certified, by what it is the hash of.
        then: facts of every segment that trained the range, by the names of `FACTS`.
        now: the same of the replay.
        notes: what limits the certificate, in sentences.
        time: UTC, when it was written.
        seconds: of the whole replay.
        training_seconds: of its steps.
    """

    run: str
    run_id: str
    from_step: int
    to_step: int
    compared: list[Compared]
    hashes: dict[str, str]
    then: list[dict[str, Any]]
    now: dict[str, Any]
    notes: list[str]
    time: str
    command: str
    seconds: float
    training_seconds: float

    @property
    def is_equal(self) -> bool:
        """Whether all that was compared is the same to the last bit."""
        return all(part.is_equal for part in self.compared)

    @property
    def claim(self) -> str:
        """What the replay set out to show."""
        start = f"the checkpoint of step {self.from_step}" if self.from_step else "the first step"
        return (
            f"Trained again from {start}, steps {self.from_step + 1} to {self.to_step} and the "
            f"checkpoint of step {self.to_step} are those of the run, to the last bit."
        )

    @property
    def verdict(self) -> str:
        """What it showed, as one sentence."""
        if self.is_equal:
            parts = [f"{part.equal} of {part.count} {part.unit}" for part in self.compared]
            return f"EQUAL: {', '.join(parts)}."
        firsts = [(p.name, p.first_difference) for p in self.compared if p.first_difference]
        name, first = firsts[0]
        if name != "events.jsonl":
            return f"DIFFERENT: every step is equal; first at {name}, {first.place}: {first.what}."
        verdict = f"DIFFERENT: first at {first.place}: {first.what}."
        if len(firsts) == 1:
            return f"{verdict} The checkpoint is equal."
        name, inner = firsts[1]
        return f"{verdict} In the checkpoint first at {name}, {inner.place}: {inner.what}."

    def as_plain(self) -> dict[str, Any]:
        """The certificate as JSON holds it."""
        head = {"v": SCHEMA_VERSION, "kind": "replay", "claim": self.claim}
        verdict = "equal" if self.is_equal else "different"
        return head | {"verdict": verdict, "verdict_in_words": self.verdict} | asdict(self)

    def as_text(self) -> str:
        """The certificate for people."""
        return "\n".join(_lines(self)) + "\n"


def facts_of(segment: Event) -> dict[str, Any]:
    """What a `segment_started` event says of machine and settings; None where it does not."""
    versions = segment.get("versions")
    known = {**segment, **(versions if isinstance(versions, dict) else {})}
    if "cuda" in known and known["cuda"] is None:
        known["cuda"] = "none"
    return {name: known.get(name) for name, _ in FACTS}


def changes_between(then: Sequence[dict[str, Any]], now: dict[str, Any]) -> list[str]:
    """What of device and versions is another one now, in words."""
    changes = []
    for name in _MUST_MATCH:
        was = sorted({_shown(facts[name]) for facts in then} - {_shown(now[name])})
        if was:
            changes.append(f"{dict(FACTS)[name]} was {' and '.join(was)}, is {_shown(now[name])}")
    return changes


def write_certificate(layout: RunLayout, certificate: Certificate) -> tuple[Path, Path]:
    """Writes the certificate as JSON and as text; returns both paths.

    One of the same steps and ranks is replaced.

    Raises:
        StorageError: the run folder cannot be written.
    """
    steps = f"{certificate.from_step}-{certificate.to_step}"
    name = f"replay-{steps}-ranks{certificate.now['ranks']}"
    document, text = (layout.certificates / f"{name}.{ending}" for ending in ("json", "txt"))
    write_json(document, certificate.as_plain())
    write_atomically(text, certificate.as_text())
    return document, text


def _lines(certificate: Certificate) -> list[str]:
    return [
        f"certificate   replay of steps {certificate.from_step + 1} to {certificate.to_step}",
        f"run           {certificate.run}",
        f"run id        {certificate.run_id}",
        *_paragraph("claim", certificate.claim),
        *_paragraph("verdict", certificate.verdict),
        "",
        "compared, bit by bit",
        *(_compared_line(part) for part in certificate.compared),
        "",
        *(line for note in certificate.notes for line in _paragraph("note", note)),
        *([""] if certificate.notes else []),
        "SHA-256",
        *(f"  {name:<24}{value}" for name, value in certificate.hashes.items()),
        "",
        *_table_of_facts(certificate),
        "",
        *_paragraph("made", f"{certificate.time}, in {format_duration(certificate.seconds)}"),
        f"command       {certificate.command}",
    ]


def _paragraph(title: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{title:<14}",
        subsequent_indent=" " * 14,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _compared_line(part: Compared) -> str:
    result = f"{part.equal:,} of {part.count:,} {part.unit} equal"
    return f"  {part.name:<40}{result}"


def _table_of_facts(certificate: Certificate) -> list[str]:
    lines = [f"{'machine':<18}{'then':<{_COLUMN}}  now"]
    for name, title in FACTS:
        then = "; ".join(dict.fromkeys(_shown(facts[name]) for facts in certificate.then))
        lefts = textwrap.wrap(then, _COLUMN) or [""]
        rights = textwrap.wrap(_shown(certificate.now[name]), _COLUMN) or [""]
        for row in range(max(len(lefts), len(rights))):
            left = lefts[row] if row < len(lefts) else ""
            right = rights[row] if row < len(rights) else ""
            head = f"  {title}" if row == 0 else ""
            lines.append(f"{head:<18}{left:<{_COLUMN}}  {right}".rstrip())
    return lines


def _shown(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
