"""The only module that prints. stdout is data, stderr is talk."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import IO, Any, Protocol

from milepost.core.errors import MilepostError
from milepost.core.files import strict


def say(text: str = "") -> None:
    """Talk: one line on stderr. A closed terminal is not an error."""
    _write(sys.stderr, text)


def show(text: str) -> None:
    """Data for people: one line on stdout."""
    _write(sys.stdout, text)


def show_json(value: Any) -> None:
    """Data for programs: one strict JSON document on stdout."""
    _write(sys.stdout, json.dumps(strict(value), indent=2, ensure_ascii=False))


def say_error(error: MilepostError) -> None:
    """One `error:` line, and a hint where there is one."""
    say(f"error: {error.message}")
    if error.hint:
        say(f"hint: {error.hint}")


def warn(text: str) -> None:
    """One `warning:` line on stderr."""
    say(f"warning: {text}")


def _write(stream: IO[str], text: str) -> None:
    try:
        stream.write(text + "\n")
        stream.flush()
    except (BrokenPipeError, ValueError, OSError):
        # The reader went away (`| head`, a closed terminal): training must not die of it.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class ProgressBar(Protocol):
    """What long work tells: how much is done."""

    def update(self, done: float, *, note: str = "") -> None:
        """Says that `done` of the total are done."""


@contextlib.contextmanager
def progress(what: str, *, total: float | None) -> Iterator[ProgressBar]:
    """A bar with what is done and what time is left; lines now and then where no terminal is.

    Args:
        what: the work, as a short phrase.
        total: how much there is, in any unit; None where it is not known.
    """
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        with _rich_bar(what, total) as bar:
            yield bar
    else:
        yield _LineBar(what, total)


@contextlib.contextmanager
def _rich_bar(what: str, total: float | None) -> Iterator[ProgressBar]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=False) as bars:
        task = bars.add_task(what, total=total, note="")

        class _Bar:
            def update(self, done: float, *, note: str = "") -> None:
                bars.update(task, completed=done, note=note)

        yield _Bar()


class _LineBar:
    """Ten lines at most, for logs."""

    def __init__(self, what: str, total: float | None) -> None:
        self._what = what
        self._total = total
        self._next_tenth = 1

    def update(self, done: float, *, note: str = "") -> None:
        if not self._total:
            return
        tenth = int(10 * done / self._total)
        if tenth >= self._next_tenth:
            self._next_tenth = tenth + 1
            say(f"{self._what}: {10 * tenth} %  {note}".rstrip())
