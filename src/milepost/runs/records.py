"""Records that stand beside the history: samples now, others as they come."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from milepost.core.files import append_json_line, read_json_lines, sha256_of_json

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class SampleRecord:
    """One completion with all that made it.

    Attributes:
        sample_id: hash of everything else but the quality, which follows from it.
        step: updates the model had seen; None for a model that is not of a run.
        adapter: hash of the adapter used, None without one.
        decoding: max_new_tokens, temperature, top_k, top_p, stopped.
        quality: how much the completion repeats itself; None where nobody counted.
    """

    step: int | None
    adapter: str | None
    prompt: str
    completion: str
    token_ids: list[int]
    decoding: dict[str, Any]
    seed: int
    quality: dict[str, Any] | None = None

    @property
    def sample_id(self) -> str:
        """Hash of the record's content."""
        content = {name: value for name, value in asdict(self).items() if name != "quality"}
        return sha256_of_json(content)[:16]

    def as_line(self) -> dict[str, Any]:
        """The record as it is written."""
        return {"v": SCHEMA_VERSION, "sample_id": self.sample_id} | asdict(self)


def append_sample(path: Path, record: SampleRecord) -> None:
    """Appends one sample to samples.jsonl.

    Raises:
        StorageError: the line could not be written.
    """
    append_json_line(path, record.as_line())


def read_samples(path: Path) -> tuple[list[dict[str, Any]], int]:
    """All sample lines in file order and how many could not be read."""
    return read_json_lines(path)
