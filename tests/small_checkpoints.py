"""Checkpoints of one tensor by the real writer, and what is found of them."""

from __future__ import annotations

from pathlib import Path

import torch

from milepost.checkpoint.retention import Restorable, newest_restorable
from milepost.checkpoint.state import Progress, TrainState
from milepost.checkpoint.store import save_checkpoint, verify_checkpoint
from milepost.runs.layout import RunLayout

RUN_ID = "ab"
ROWS = 64


def state(step: int, *, rows: int = ROWS) -> TrainState:
    """A train state whose numbers say its step."""
    tensor = torch.arange(rows * 64, dtype=torch.float32).view(rows, 64) + step
    return TrainState(
        progress=Progress(step=step),
        weights={"w": tensor},
        moments={"exp_avg.w": tensor * 2, "exp_avg_sq.w": tensor * 3},
        optimizer_step=step,
    )


def save(layout: RunLayout, step: int, *, weights_dtype: str = "float32", rows: int = ROWS) -> Path:
    """Writes the checkpoint of a step; returns its folder."""
    saved = save_checkpoint(
        layout,
        run_id=RUN_ID,
        state=state(step, rows=rows),
        model_files={"config.json": b"{}\n"},
        weights_dtype=weights_dtype,
    )
    folder = layout.checkpoint(step)
    assert verify_checkpoint(folder, run_id=RUN_ID, step=step) == saved.sha256
    return folder


def make_checkpoints(root: Path, *steps: int) -> RunLayout:
    """A run folder with a checkpoint of each step."""
    layout = RunLayout(root)
    for step in steps:
        save(layout, step)
    return layout


def find(layout: RunLayout, *dropped: int) -> tuple[Restorable | None, list[tuple[int, str]]]:
    """What is found, and the steps set aside with their reasons."""
    aside: list[tuple[int, str]] = []
    found = newest_restorable(
        layout,
        run_id=RUN_ID,
        dropped=set(dropped),
        quarantined=lambda step, place, reason: aside.append((step, reason)),
    )
    return found, aside
