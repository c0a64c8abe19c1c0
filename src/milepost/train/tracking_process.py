"""The process that feeds one tracker from a run's history: `python -m` this, with an `Order`.

A process of its own, so that whatever the tracker's package does, print, hang, die, take the
signals or a core, training neither waits nor fails: all that they share is the file of events.
It ends soon after its standard input does, which the rank that started it holds open. Imports no
torch.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from milepost.config.recipe import as_plain
from milepost.core.errors import MilepostError
from milepost.core.files import read_json, write_json
from milepost.runs.events import read_history
from milepost.runs.following import NewEvents
from milepost.runs.layout import RunLayout
from milepost.runs.manifest import read_run_manifest
from milepost.runs.overrides import apply_changes, config_with_overrides
from milepost.train.tracked_events import TrackedEvents
from milepost.train.trackers import TrackedRun, open_tracker

SCHEMA_VERSION = 1

POLL_SECONDS = 0.5
LEDGER_SECONDS = 10.0
"""What a kill of this process makes the next one tell the tracker again is younger than this."""


@dataclass(frozen=True)
class Order:
    """What the process is to do, as its one argument holds it in JSON.

    Attributes:
        run: the run folder.
        tool: name of the tracker.
        project: see the recipe's [tracking].
        mode: see there.
        every_steps: see there.
        finish_seconds: how long the process may go on when its input has ended.
    """

    run: str
    tool: str
    project: str
    mode: Literal["online", "offline"]
    every_steps: int
    finish_seconds: float

    @property
    def folder(self) -> Path:
        """The tracker's own, inside the run folder."""
        return RunLayout(Path(self.run)).tracking / self.tool

    def as_json(self) -> str:
        """The argument."""
        return json.dumps(dataclasses.asdict(self))


def main(argument: str) -> NoReturn:
    """Feeds the tracker until standard input ends, and leaves with 0, or 1 where it failed."""
    order = Order(**json.loads(argument))
    report = _take_over_output()
    ended = _watch_input(order.finish_seconds)
    # What stops the run must let it deliver the end; and training comes first on every core.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.nice(5)
    code = 0
    try:
        with _alone(order.folder):
            _follow(order, ended=ended, report=report)
    except Exception as error:  # whatever the tool's package raises
        traceback.print_exc()
        report("failed", _in_one_line(error))
        code = 1
    sys.stderr.flush()
    os._exit(code)  # past the threads and exit handlers of the tool, which may wait for ever


def _take_over_output() -> Callable[[str, str], None]:
    """Reports go to what was standard output; what the tool prints goes where errors go."""
    reports = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def report(kind: str, text: str) -> None:
        try:
            reports.write(json.dumps({"kind": kind, "text": text}) + "\n")
            reports.flush()
        except OSError:
            pass  # the rank has left, there is nobody to tell

    return report


def _watch_input(finish_seconds: float) -> threading.Event:
    """Set when standard input ends; so much later the kernel ends this process, hung or not."""
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.buffer.read()
        signal.setitimer(signal.ITIMER_REAL, finish_seconds)
        ended.set()

    threading.Thread(target=wait, name="end-of-input", daemon=True).start()
    return ended


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits for the process of the segment before, which may have the end of it to deliver."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _follow(order: Order, *, ended: threading.Event, report: Callable[[str, str], None]) -> None:
    tracker = open_tracker(order.tool, _tracked_run(order))
    report("ready", tracker.notice)
    ledger = _Ledger(order.folder / "sent.json", destination=tracker.destination)
    sent = ledger.read()
    tracked = TrackedEvents(tracker, every_steps=order.every_steps, num_rows=sent.num_rows)
    events = NewEvents(RunLayout(Path(order.run)).events)
    last_save = time.monotonic()
    is_last = False
    while not is_last:
        is_last = ended.wait(POLL_SECONDS)
        for end_byte, event in events.read():
            if end_byte <= sent.num_bytes:
                tracked.remember(event)
            else:
                tracked.tell(event)
                sent = Sent(num_bytes=end_byte, num_rows=tracked.num_rows)
        tracker.flush()
        if is_last or time.monotonic() - last_save >= LEDGER_SECONDS:
            # Before the end: what was logged is the tool's to deliver, whatever comes.
            ledger.write(sent)
            last_save = time.monotonic()
    tracker.finish()


def _tracked_run(order: Order) -> TrackedRun:
    layout = RunLayout(Path(order.run))
    manifest, history = read_run_manifest(layout), read_history(layout.events)
    config = config_with_overrides(manifest.config, history=history)
    *_, segment = history.of_kind("segment_started")
    changes = [(c["field"], c["old"], c["new"]) for c in segment["changed"]]
    config = apply_changes(config, changes)
    return TrackedRun(
        run_id=manifest.run_id,
        name=config.run.name or layout.name,
        folder=order.folder,
        config=as_plain(config),
        project=order.project,
        mode=order.mode,
    )


@dataclass(frozen=True)
class Sent:
    """How much of the history a tracker was told.

    Attributes:
        num_bytes: of the event log.
        num_rows: that the tracker got from them.
    """

    num_bytes: int = 0
    num_rows: int = 0


class _Ledger:
    """Keeps what was sent for the next segment."""

    def __init__(self, path: Path, *, destination: str) -> None:
        self._path = path
        self._head = {"v": SCHEMA_VERSION, "destination": destination}

    def read(self) -> Sent:
        """What was sent to the same destination so far; another one is told of the whole run."""
        values = read_json(self._path, error=MilepostError) if self._path.exists() else {}
        if any(values.pop(name, None) != value for name, value in self._head.items()):
            return Sent()
        return Sent(**values)

    def write(self, sent: Sent) -> None:
        """Writes it down."""
        write_json(self._path, self._head | dataclasses.asdict(sent))


def _in_one_line(error: Exception) -> str:
    text = error.message if isinstance(error, MilepostError) else str(error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]


if __name__ == "__main__":
    main(sys.argv[1])
