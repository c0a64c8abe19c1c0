"""Trajectories that other programs wrote, by the name of their format."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Protocol

from milepost.core.errors import UsageError
from milepost.trajectory.course import Course
from milepost.trajectory.imports import event_files, lm_eval, table_csv, wandb_history


class Reader(Protocol):
    """Reads one format."""

    def __call__(self, path: Path, *, name: str | None, tokens_per_step: int | None) -> Course:
        """See `import_course`."""


READERS: dict[str, Reader] = {
    "lm-eval": lm_eval.read,
    "csv": table_csv.read,
    "tensorboard": event_files.read,
    "wandb": wandb_history.read,
}
"""Name of a format to its reader."""


def import_course(
    format: str, path: Path, *, name: str | None = None, tokens_per_step: int | None = None
) -> Course:
    """A trajectory that another program wrote.

    Args:
        format: one of `READERS`.
        path: the file or folder.
        name: as the page calls it; None takes what the source or its path says.
        tokens_per_step: for sources that do not count tokens; None leaves them unknown.

    Raises:
        UsageError: there is no such format or path, or what lies there is of another format.
        StorageError: it cannot be read.
    """
    if format not in READERS:
        close = difflib.get_close_matches(format, READERS, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise UsageError(
            f"there is no import format {format!r}",
            hint=f"{meant}formats are {', '.join(READERS)}",
        )
    return READERS[format](path, name=name, tokens_per_step=tokens_per_step)
