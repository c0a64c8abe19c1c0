"""Where a thread stands, in words: the frames of this program and no others."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from types import FrameType

import milepost

PACKAGE = Path(milepost.__file__).parent


def frame_of_thread(ident: int | None) -> FrameType | None:
    """The frame that a thread is in now; None where there is no such thread."""
    return None if ident is None else sys._current_frames().get(ident)


def stack_lines(frame: FrameType | None, *, without: str = "") -> list[str]:
    """'  train/loop.py:61 in run_loop: result = ...', the newest call last.

    Args:
        frame: the newest; None for the caller's own.
        without: a file whose frames are left out.
    """
    lines = []
    for entry in traceback.extract_stack(frame):
        place = Path(entry.filename)
        if place.is_relative_to(PACKAGE) and entry.filename not in (without, __file__):
            name = place.relative_to(PACKAGE).as_posix()
            lines.append(f"  {name}:{entry.lineno} in {entry.name}: {entry.line}")
    return lines
