"""Live trackers beside a training: started, listened to, and left behind in time.

Each one runs in a process of its own that reads the run's history (`tracking_process`); nothing
is handed to it on the way, so that no step waits for it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from milepost.checkpoint.state import Progress
from milepost.config.schema import TrackingSection
from milepost.core.console import say, warn
from milepost.runs.events import EventWriter
from milepost.runs.layout import RunLayout
from milepost.train.tracking_process import Order

TALK_FILE = "talk.log"
"""What a tracker prints, in its folder."""

FINISH_SECONDS = 10.0
"""How long trackers may take to deliver what is left when the segment has ended."""

STOPPING_SECONDS = 2.0
"""How long a run that was asked to stop waits for its trackers; they end by themselves later."""

POLL_SECONDS = 0.02

_ONLINE_VARIABLES = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
_OFFLINE_VARIABLES = {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}


class Tracking:
    """The trackers of one segment, on the main rank; a `with` block ends them.

    A block that ends with an error does not wait for them, as the error must be heard first; one
    that was asked to stop waits a moment. They deliver what is left on their own and then end.

    Args:
        layout: the run folder.
        stop_requested: whether this process was asked to stop.
    """

    def __init__(self, layout: RunLayout, *, stop_requested: Callable[[], bool]) -> None:
        self._layout = layout
        self._stop_requested = stop_requested
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._events: EventWriter | None = None

    def start(self, section: TrackingSection, *, events: EventWriter) -> None:
        """Starts the recipe's trackers; what fails is said and changes nothing else.

        Args:
            section: of the run's config.
            events: of this segment.
        """
        self._events = events
        for tool in section.tools:
            order = Order(
                run=str(self._layout.root),
                tool=tool,
                project=section.project,
                mode=section.mode,
                every_steps=section.every_steps,
                finish_seconds=FINISH_SECONDS,
            )
            try:
                self._processes[tool] = _start(order)
            except OSError as error:
                self._lose(tool, f"cannot be started: {error}")

    def look(self, progress: Progress) -> None:
        """Passes on what the trackers have reported by now; does not wait."""
        for tool, process in list(self._processes.items()):
            self._hear(tool, process)

    def _hear(self, tool: str, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None and process.stdout is not None
        code = process.poll()  # first, so that its last words are read
        for line in (process.stdout.read() or b"").splitlines():
            report = json.loads(line)
            if report["kind"] == "ready":
                say(f"{tool}: {report['text']}")
            else:
                self._lose(tool, report["text"])
        if code is None or tool not in self._processes:
            return
        if code == 0 and process.stdin.closed:
            del self._processes[tool]
        elif code == -signal.SIGALRM:
            self._lose(tool, f"it had not taken everything in {FINISH_SECONDS:.0f} s after the end")
        else:
            self._lose(tool, f"its process ended with code {code}")

    def _lose(self, tool: str, reason: str) -> None:
        """Says and records once that a tracker is off, and lets it go."""
        process = self._processes.pop(tool, None)
        if process is not None and process.stdin is not None:
            process.stdin.close()
        talk = self._layout.tracking / tool / TALK_FILE
        warn(f"{tool} is off until the next start, the run is unharmed: {reason} (see {talk})")
        if self._events is not None:
            self._events.append("tracking_failed", tool=tool, reason=reason)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.close()
        if error is None:
            self._wait()

    def _wait(self) -> None:
        started = time.monotonic()
        while self._processes:
            for tool, process in list(self._processes.items()):
                self._hear(tool, process)
            seconds = time.monotonic() - started
            if self._stop_requested() and seconds > STOPPING_SECONDS:
                break
            # The kernel ends them after FINISH_SECONDS; what cannot be ended is not waited for.
            if seconds > FINISH_SECONDS + 5:
                break
            time.sleep(POLL_SECONDS)
        for tool in self._processes:
            say(f"{tool} still delivers the end and leaves in {FINISH_SECONDS:.0f} s at most")


def _start(order: Order) -> subprocess.Popen[bytes]:
    order.folder.mkdir(parents=True, exist_ok=True)
    with (order.folder / TALK_FILE).open("ab") as talk:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "milepost.train.tracking_process", order.as_json()],
            env=_environment(os.environ, mode=order.mode),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=talk,
            bufsize=0,
            start_new_session=True,  # no Ctrl-C at the terminal reaches it
        )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    return process


def _environment(ours: Mapping[str, str], *, mode: str) -> dict[str, str]:
    if mode == "online":
        return dict(ours)
    return {k: v for k, v in ours.items() if k not in _ONLINE_VARIABLES} | _OFFLINE_VARIABLES
