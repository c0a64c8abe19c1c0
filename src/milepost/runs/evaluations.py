"""Evaluation records: one model's score on one benchmark, with a file of its items.

The record is the truth: it is written after its items file and carries that file's hash, so a
kill between the two leaves nothing that counts.
"""

from __future__ import annotations

import gzip
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from milepost.core.files import (
    append_json_line,
    read_json_lines,
    sha256_of_file,
    sha256_of_json,
    storage_errors,
    strict,
    write_atomically,
)
from milepost.runs.layout import RunLayout

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Weights:
    """Which weights were scored.

    Attributes:
        checkpoint_sha256: of the checkpoint's manifest, or of the files of a folder without one;
            None while training, when the weights are of a step that is not saved.
        run_id: of the run; None for a model that is not of a run.
        step: updates the model had seen; None where nothing says.
        tokens_seen: target tokens the model was trained on; None where nothing says.
    """

    checkpoint_sha256: str | None
    run_id: str | None
    step: int | None
    tokens_seen: int | None

    @property
    def identity(self) -> dict[str, Any]:
        """What of it can change a score."""
        if self.checkpoint_sha256 is not None:
            return {"checkpoint_sha256": self.checkpoint_sha256}
        return {"run_id": self.run_id, "step": self.step}


@dataclass(frozen=True)
class Conditions:
    """On what and how a model was scored, as far as it can change the score; see `ItemSet`."""

    benchmark: str
    protocol: str
    num_fewshot: int
    limit: int | None
    data_sha256: str
    dtype: str


@dataclass(frozen=True)
class EvaluationRecord:
    """One benchmark's score of one model.

    Attributes:
        weights: that were scored.
        conditions: of the score.
        n: items.
        metrics: {"acc": {"value": 0.25, "stderr": 0.01}, ...}.
        chance: accuracy of guessing.
        majority: accuracy of always giving the commonest place among the choices.
        num_truncated: choices whose context was cut to fit the model.
        device: that did the work, by name.
        ranks: processes that shared the work.
        seconds: that scoring took.
        milepost: version of the program.
        time: UTC, ISO 8601.
    """

    weights: Weights
    conditions: Conditions
    n: int
    metrics: dict[str, dict[str, float | None]]
    chance: float
    majority: float
    num_truncated: int
    device: str
    ranks: int
    seconds: float
    milepost: str
    time: str

    @property
    def key(self) -> str:
        """Hash of what was scored and how."""
        return evaluation_key(self.weights, self.conditions)

    def as_line(self) -> dict[str, Any]:
        """The record as it is written, without the items file it may have."""
        values = asdict(self)
        parts = values.pop("weights") | values.pop("conditions")
        return {"v": SCHEMA_VERSION, "key": self.key} | parts | values


def evaluation_key(weights: Weights, conditions: Conditions) -> str:
    """The name of a score: equal where weights and conditions are.

    The kind of device and the version of the program, which can move last digits, are not in it.
    """
    return sha256_of_json(weights.identity | asdict(conditions))[:16]


@dataclass(frozen=True)
class EvaluationStore:
    """The evaluations of a folder: `evaluations.jsonl`, and `items/` beside it."""

    folder: Path

    @property
    def log(self) -> Path:
        """The file of the records."""
        return RunLayout(self.folder).evaluations

    def items_file(self, key: str) -> Path:
        """The items file of a record."""
        return RunLayout(self.folder).items / f"{key}.jsonl.gz"

    def add(self, record: EvaluationRecord, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Writes the items file, then the record; returns the record's line.

        Raises:
            StorageError: either cannot be written; what was there before is whole.
        """
        file = self.items_file(record.key)
        write_atomically(file, _compressed(items))
        pointer = {"items": f"items/{file.name}", "items_sha256": sha256_of_file(file)}
        line = record.as_line() | pointer
        append_json_line(self.log, line)
        return line

    def latest(self) -> dict[str, dict[str, Any]]:
        """Record lines by key, the later in the file where there are two; bad lines count not.

        Raises:
            StorageError: the log is there and cannot be read.
        """
        with storage_errors(self.log, verb="read"):
            lines, _ = read_json_lines(self.log)
        return {line["key"]: line for line in lines if isinstance(line.get("key"), str)}

    def is_whole(self, line: dict[str, Any]) -> bool:
        """Whether a record's items file is there as it was written."""
        file = self.items_file(line["key"])
        with storage_errors(file, verb="read"):
            return file.is_file() and sha256_of_file(file) == line.get("items_sha256")

    def items(self, line: dict[str, Any]) -> list[dict[str, Any]]:
        """The item lines of a whole record, in the order of the benchmark."""
        file = self.items_file(line["key"])
        with storage_errors(file, verb="read"):
            text = gzip.decompress(file.read_bytes()).decode()
        return [json.loads(item) for item in text.splitlines()]


def _compressed(items: list[dict[str, Any]]) -> bytes:
    """The bytes of an items file, the same for the same items: no name, no time of day."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as file:
        for item in items:
            file.write(json.dumps(strict(item), separators=(",", ":")).encode() + b"\n")
    return buffer.getvalue()
