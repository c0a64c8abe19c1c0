"""What every contender is given, in a folder: the same weights, batches and settings.

Imports neither Milepost nor torch, since a peer may run under another Python.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Work:
    """The settings; `weights` and `batches` lie beside them.

    Attributes:
        config: Milepost's own, plain; only Milepost reads it.
        model: the fields of a Hugging Face config.json.
        learning_rates: of each update.
        betas: of AdamW, as `eps` and `weight_decay`, which is on matrices only.
        clip_grad_norm: None: not clipped.
        precision: dtype of the products; weights and optimizer are float32.
        paper_code: folder of the paper's repository, "" without it.
    """

    config: dict[str, Any]
    model: dict[str, Any]
    microbatch_rows: int
    learning_rates: list[float]
    betas: list[float]
    eps: float
    weight_decay: float
    clip_grad_norm: float | None
    precision: str
    is_compiled: bool
    paper_code: str

    def write(self, folder: Path) -> None:
        """Makes the folder's work.json."""
        (folder / "work.json").write_text(json.dumps(dataclasses.asdict(self)))


def read_work(folder: Path) -> Work:
    """What `Work.write` wrote."""
    return Work(**json.loads((folder / "work.json").read_text()))


def weights_file(folder: Path) -> Path:
    """Initial weights under Hugging Face's names, float32."""
    return folder / "model.safetensors"


def batches_file(folder: Path) -> Path:
    """Global batches, uint32 [updates, rows, T + 1]."""
    return folder / "batches.npy"


def read_batches(folder: Path) -> np.ndarray:
    """All global batches."""
    batches: np.ndarray = np.load(batches_file(folder))
    return batches
