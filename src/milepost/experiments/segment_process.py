"""A training segment as a process of its own, watched through the run's history."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NoReturn

from milepost.core.console import progress
from milepost.core.errors import MilepostError, StopRequested
from milepost.core.units import format_duration
from milepost.distributed.place import PARENT_PIPE_VARIABLE
from milepost.runs.events import Event
from milepost.runs.following import NewEvents
from milepost.runs.layout import RunLayout

POLL_SECONDS = 0.2

SAVING_SECONDS = 10.0
"""How long a training that is asked to stop has to save before it is killed."""


class SegmentFailed(MilepostError):
    """The training process ended with an error; its last words are in the message.

    Attributes:
        exit_code: the training's own, 1 where a signal ended it.
    """

    def __init__(self, code: int, *, last_words: Sequence[str]) -> None:
        super().__init__(
            f"training ended with exit code {code}:\n  " + "\n  ".join(last_words),
            hint="run the same command again; it goes on from the newest checkpoint",
        )
        self.exit_code = code if code > 0 else 1


def run_segment(
    words: Sequence[str],
    *,
    run: Path,
    on_step: Callable[[Event], None],
    kill_when: Callable[[Event], bool],
    environment: Mapping[str, str] | None = None,
) -> bool:
    """Runs `milepost WORDS` to its end, or kills it.

    The training ends with this process: SIGTERM and SIGHUP let it save first, a Ctrl-C here and
    every other death end it at once.

    Args:
        words: a `train` command for `run`.
        run: the run folder.
        on_step: called with the newest `step` event as the history grows.
        kill_when: asked with the same event; True ends the whole process group by SIGKILL.
        environment: variables that the training has beside this process's own.

    Returns:
        Whether it was killed.

    Raises:
        SegmentFailed: it ended with another exit code than 0.
        StopRequested: this process was asked to stop.
    """
    log = RunLayout(run).events
    events = NewEvents(log, start_byte=log.stat().st_size if log.exists() else 0)
    with tempfile.TemporaryFile() as talk, contextlib.ExitStack() as stack:
        stack.enter_context(stops_as_exceptions())
        process = stack.enter_context(_training(words, talk=talk, environment=environment or {}))
        was_killed = _watch(process, events, on_step=on_step, kill_when=kill_when)
        if process.returncode != 0 and not was_killed:
            talk.seek(0)
            last_words = talk.read().decode(errors="replace").strip().splitlines()[-4:]
            raise SegmentFailed(process.returncode, last_words=last_words)
    return was_killed


def run_with_progress(
    words: Sequence[str],
    *,
    what: str,
    run: Path,
    last_step: int,
    kill_when: Callable[[Event], bool] = lambda event: False,
    environment: Mapping[str, str] | None = None,
) -> bool:
    """As `run_segment`, with a bar up to the last step.

    Args:
        words: as `run_segment` takes them, like `run`, `kill_when` and `environment`.
        what: the work, as a short phrase.
        run: the run folder.
        last_step: where the bar is full.
        kill_when: asked after steps.
        environment: variables.
    """

    def note(event: Event) -> str:
        left = (last_step - event["step"]) * event["step_seconds"]
        return f"step {event['step']}  loss {event['loss_nats']:.3f}  left {format_duration(left)}"

    with progress(what, total=last_step) as bar:
        return run_segment(
            words,
            run=run,
            on_step=lambda event: bar.update(event["step"], note=note(event)),
            kill_when=kill_when,
            environment=environment,
        )


@contextlib.contextmanager
def stops_as_exceptions() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind the block instead of ending this process on the spot."""

    def stop(signum: int, frame: object) -> NoReturn:
        raise StopRequested(
            f"stopped on request ({signal.Signals(signum).name}); the same command goes on"
        )

    signals = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    previous = {s: signal.signal(s, stop) for s in signals}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def _training(
    words: Sequence[str], *, talk: IO[bytes], environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """The process for the block; it holds a pipe that tells it of this process's end."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb"), os.fdopen(reader, "rb"):
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "milepost.cli.main", *words],
            env={**os.environ, **environment, PARENT_PIPE_VARIABLE: str(reader)},
            pass_fds=(reader,),
            stdout=subprocess.DEVNULL,
            stderr=talk,
            start_new_session=True,
        )
        try:
            yield process
        except StopRequested:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SAVING_SECONDS)
            raise
        finally:
            if process.poll() is None:
                _kill(process)


def _watch(
    process: subprocess.Popen[bytes],
    events: NewEvents,
    *,
    on_step: Callable[[Event], None],
    kill_when: Callable[[Event], bool],
) -> bool:
    while True:
        has_ended = process.poll() is not None
        new = [event for _, event in events.read() if event.get("kind") == "step"]
        if new:
            on_step(new[-1])
            if not has_ended and kill_when(new[-1]):
                _kill(process)
                return True
        if has_ended:
            return False
        time.sleep(POLL_SECONDS)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
