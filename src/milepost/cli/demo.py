"""`milepost demo`: the whole road in miniature."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def demo(*, run: Path | None = None, json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """The whole road in miniature, on two CPU cores and real text, in a few minutes.

    Prepares the State of the Union addresses, trains a small LLaMA, has it killed, goes on and
    compares every step that is run again, lets checkpoints write, and makes the report. Then
    fine-tunes the model on questions about the addresses and counts its exact answers before
    and after. Interrupted anywhere, the same command goes on.

    Example: `milepost demo --run runs/demo`

    Parameters
    ----------
    run
        The run folder; the prepared data, the questions and the fine-tuning's run go beside it.
        Default: runs/demo, or runs/demo-2 and so on where that is done already.
    json
        Print one JSON document at the end.
    """
    from milepost.core.console import show_json
    from milepost.experiments.demo import run_demo, show_demo

    result = run_demo(run or _free_folder(Path("runs")))
    if json:
        show_json(result.as_plain())
    else:
        show_demo(result)


def _free_folder(parent: Path) -> Path:
    """The first of demo, demo-2, ... that holds no finished demo."""
    from milepost.experiments.demo_tuning import tuned_folder
    from milepost.runs.layout import RunLayout

    number = 1
    while True:
        folder = parent / ("demo" if number == 1 else f"demo-{number}")
        if not RunLayout(tuned_folder(folder)).report.exists():
            return folder
        number += 1
