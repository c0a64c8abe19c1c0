"""What is asked of an evaluation, and by whom."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from milepost.distributed.world import World
from milepost.evaluation.evaluate import Request

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
TASKS = ("piqa", "boolq")


def asked(model: Path, rows: Path, **changes: object) -> Request:
    """Two tasks on every checkpoint, but for the changes."""
    return replace(Request(model=model, tasks=TASKS, data_dir=rows, steps="all"), **changes)
