"""The only module that prints. stdout is data, stderr is talk."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol, TextIO

from milepost.core.errors import DataError, MilepostError, StorageError
from milepost.core.files import as_storage_error, strict
from milepost.core.units import format_duration


def open_closed_streams() -> None:
    """Puts the null device where standard input, output or error was closed by the starter.

    Otherwise the next file or pipe gets its number, and a child takes that for its stream.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this one
            os.set_inheritable(number, True)


def say(text: str = "") -> None:
    """Talk: one line on stderr. Nobody there to hear it is not an error."""
    if sys.stderr is None:  # closed before the program began
        return
    with contextlib.suppress(OSError, ValueError):
        _write(sys.stderr, text)


def show(text: str) -> None:
    """Data for people: one line on stdout.

    Raises:
        StorageError: stdout takes no data, as on a full disk. A reader that left (`| head`) had
            what it wanted.
    """
    _write_data(text)


def show_piece(text: str) -> None:
    """Data for people that comes bit by bit: on stdout, without a line's end.

    Raises:
        StorageError: as `show`.
    """
    _write_data(text, end="")


def ask(prompt: str) -> str | None:
    """One line from stdin without its end; None where there are no more.

    Args:
        prompt: shown at a terminal only, where the line can be edited.

    Raises:
        DataError: the line is not in the encoding of stdin.
    """
    if sys.stdin is None:
        return None
    if not is_terminal():
        try:
            line = sys.stdin.readline()
            line.encode()  # in some locales bytes that are no text come as half characters
        except UnicodeError as error:
            raise DataError(
                f"standard input is not {sys.stdin.encoding}", hint="convert it with iconv"
            ) from error
        return line.rstrip("\r\n") if line else None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (from now on `input` knows the arrow keys)
    try:
        return input(prompt)
    except EOFError:
        return None


def is_terminal() -> bool:
    """Whether a person types and reads here."""
    streams = (sys.stdin, sys.stdout)
    return all(stream is not None and stream.isatty() for stream in streams)


def width() -> int | None:
    """Columns of the terminal that stdout is; None where it is a file or a pipe."""
    if sys.stdout is None or not sys.stdout.isatty():
        return None
    return shutil.get_terminal_size().columns


def show_json(value: Any) -> None:
    """Data for programs: one strict JSON document on stdout.

    Raises:
        StorageError: as `show`.
    """
    plain = strict(value)
    text = json.dumps(plain, indent=2, ensure_ascii=False)
    if sys.stdout is not None and _encodable(text, sys.stdout) != text:
        # JSON has escapes of its own for what the encoding lacks.
        text = json.dumps(plain, indent=2, ensure_ascii=True)
    _write_data(text)


def say_error(error: MilepostError) -> None:
    """One `error:` line, and a hint where there is one."""
    say(f"error: {error.message}")
    if error.hint:
        say(f"hint: {error.hint}")


def warn(text: str) -> None:
    """One `warning:` line on stderr."""
    say(f"warning: {text}")


def _write_data(text: str, *, end: str = "\n") -> None:
    if sys.stdout is None:
        raise StorageError("cannot write standard output: it is closed", hint=_OPEN_STDOUT)
    try:
        _write(sys.stdout, text, end=end)
    except BrokenPipeError:
        return
    except OSError as error:
        raise as_storage_error(error, what="standard output") from error
    except ValueError as error:
        raise StorageError(f"cannot write standard output: {error}", hint=_OPEN_STDOUT) from error


_OPEN_STDOUT = "leave standard output open, or send it to a file"


def _write(stream: TextIO, text: str, *, end: str = "\n") -> None:
    """Writes text; after a failure the stream leads nowhere, so that no later flush fails.

    Raises:
        OSError: the stream takes no data.
        ValueError: the stream is closed.
    """
    try:
        stream.write(_encodable(text, stream) + end)
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, stream.fileno())
            finally:
                os.close(nowhere)
        raise


def _encodable(text: str, stream: TextIO) -> str:
    """`text`, with an escape for each character that the stream's encoding lacks."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, errors="backslashreplace").decode(encoding)


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
        self._started = time.monotonic()

    def update(self, done: float, *, note: str = "") -> None:
        if not self._total:
            return
        tenth = int(10 * done / self._total)
        if tenth >= self._next_tenth:
            self._next_tenth = tenth + 1
            seconds = (time.monotonic() - self._started) * (self._total / done - 1)
            left = f", {format_duration(seconds)} left" if tenth < 10 else ""
            say(f"{self._what}: {10 * tenth} %{left}  {note}".rstrip())
