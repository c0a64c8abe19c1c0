"""Probes: what a small change of a prompt does to one model, a line a variant of the prompt."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from milepost.core.files import append_json_line, read_json_lines, sha256_of_json

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class LikelyToken:
    """One of the likeliest next tokens.

    Attributes:
        token_id: in the model's vocabulary.
        token: as a reader sees it, `·Berlin`.
        probability: of the whole vocabulary.
    """

    token_id: int
    token: str
    probability: float


@dataclass(frozen=True)
class ProbeRecord:
    """What one model makes of one variant of a prompt.

    Attributes:
        step: updates the model had seen; None for a model that is not of a run.
        checkpoint_sha256: names the weights; see `inference.load.identify`.
        adapter: hash of the adapter put on them, None without one.
        variant: its name, "base" or "space".
        base: the prompt that this one is compared with.
        prompt: the variant's text.
        token_ids: of the prompt alone.
        tokens: the same, as a reader sees them.
        kl_nats: KL(base || variant): the sum over the next token of p_base (ln p_base - ln p).
        reverse_kl_nats: KL(variant || base).
        kl_nats_aside_from_blanks: KL(base || variant) where tokens that differ only in the blanks
            before them, `Paris` and `·Paris`, are one; at most `kl_nats`.
        entropy_nats: of the next token after this variant.
        likeliest: next tokens, the likeliest first.
        completion: the greedy one.
        completion_ids: its tokens.
        decoding: as in samples.jsonl.
        device: that did the work, by name.
        milepost: version of the program.
        time: UTC, ISO 8601.
    """

    step: int | None
    checkpoint_sha256: str
    adapter: str | None
    variant: str
    base: str
    prompt: str
    token_ids: list[int]
    tokens: list[str]
    kl_nats: float
    reverse_kl_nats: float
    kl_nats_aside_from_blanks: float
    entropy_nats: float
    likeliest: list[LikelyToken]
    completion: str
    completion_ids: list[int]
    decoding: dict[str, Any]
    device: str
    milepost: str
    time: str

    @property
    def probe_id(self) -> str:
        """Hash of what was asked of which weights; of two lines with one id the later counts."""
        settings = {name: value for name, value in self.decoding.items() if name != "stopped"}
        asked = {
            "checkpoint_sha256": self.checkpoint_sha256,
            "adapter": self.adapter,
            "base": self.base,
            "prompt": self.prompt,
            "decoding": settings,
            "likeliest": len(self.likeliest),
        }
        return sha256_of_json(asked)[:16]

    def as_line(self) -> dict[str, Any]:
        """The record as it is written."""
        return {"v": SCHEMA_VERSION, "probe_id": self.probe_id} | asdict(self)


def append_probe(path: Path, record: ProbeRecord) -> None:
    """Appends one variant's record to probes.jsonl.

    Raises:
        StorageError: the line could not be written.
    """
    append_json_line(path, record.as_line())


def read_probes(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines that count, in file order, and how many could not be read.

    Raises:
        StorageError: the log is there and cannot be read.
    """
    lines, num_bad = read_json_lines(path)
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        probe_id = line.get("probe_id")
        if not isinstance(probe_id, str):
            num_bad += 1
            continue
        found.pop(probe_id, None)
        found[probe_id] = line
    return list(found.values()), num_bad
