"""Starts the ranks of a run on this machine, watches them, and ends them together.

Imports no torch: the parent of a run only waits. The children get one thread each on the CPU
and an allocator that keeps freed memory, since giving it back costs up to half of a step.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from milepost.core.console import say
from milepost.core.errors import LEFT_AT_ONCE_EXIT_CODE, StopRequested
from milepost.distributed.meeting_place import meeting_place
from milepost.distributed.place import (
    PARENT_PIPE_VARIABLE,
    RENDEZVOUS_VARIABLE,
    SAVING_MARK,
    STALLED_MARK,
    end_with_pipe,
    read_parent_pipe,
)
from milepost.distributed.stacks import show_stacks_if_asked
from milepost.distributed.stop_requests import StopRequests, held_back_stops

POLL_SECONDS = 0.02

GRACE_SECONDS = 10.0
"""How long the other ranks may go on after one has died, to say what they saw."""

LONGEST_SAVE_SECONDS = 1800.0
"""How long the main rank may go on with a save when another rank has died."""

GRACE_AFTER_REASON_SECONDS = 1.0
"""The same after a rank that has said why: the others only wait for it."""

KEEP_FREED_MEMORY = ":".join(
    (
        "glibc.malloc.mmap_max=0",
        "glibc.malloc.trim_threshold=17179869184",
        "glibc.malloc.top_pad=67108864",
    )
)


@dataclass(frozen=True)
class Phrases:
    """What is said of the work when it is stopped or dies: of a training, unless said otherwise.

    Attributes:
        finishing: what still happens after a stop was asked for.
        kept: what is as it was when the ranks left at once.
        goes_on: what the same command does after a rank has died.
    """

    finishing: str = "the step is finished and saved"
    kept: str = "the newest checkpoint is as it was"
    goes_on: str = "it goes on from the newest checkpoint"


def launch(
    words: Sequence[str],
    *,
    ranks: int,
    on_gpus: bool,
    stops: StopRequests | None = None,
    phrases: Phrases = Phrases(),
) -> int:
    """Runs `milepost WORDS` as `ranks` processes and returns the run's exit code.

    SIGTERM, a closed terminal and the first SIGINT ask every rank to save and stop; a second
    SIGINT kills them. Children die with this process, however it dies, and this process with
    the one that started it where that one gave it a pipe.

    Args:
        words: the command line after the program's name, the same for every rank.
        ranks: processes to start.
        on_gpus: whether each rank has a GPU, or one CPU thread.
        stops: taken by the caller already, so that one asked for before this call counts.
        phrases: of the work.
    """
    with contextlib.ExitStack() as stack:
        if stops is None:
            stops = stack.enter_context(StopRequests())
        folder = stack.enter_context(meeting_place())
        reader, writer = os.pipe()
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        shared = _shared_environment(folder / "rendezvous", pipe=reader, on_gpus=on_gpus)
        command = [sys.executable, "-P", "-m", "milepost.cli.main", *words]
        children: list[subprocess.Popen[bytes]] = []
        stack.callback(_end_all, children)
        with held_back_stops():
            end_with_pipe(read_parent_pipe(os.environ))
        if stops.is_requested:
            say("stopped on request before a rank was started; nothing has changed")
            return StopRequested.exit_code
        with held_back_stops():
            for rank in range(ranks):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                children.append(
                    subprocess.Popen(command, env={**shared, **place}, pass_fds=(reader,))
                )
        return _watch(children, stops=stops, phrases=phrases, marks=folder)


def _end_all(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            child.kill()
        child.wait()


def _shared_environment(rendezvous: Path, *, pipe: int, on_gpus: bool) -> dict[str, str]:
    environment: dict[str, str] = dict(os.environ)
    environment[RENDEZVOUS_VARIABLE] = str(rendezvous)
    environment[PARENT_PIPE_VARIABLE] = str(pipe)
    if not on_gpus:
        # Ranks were counted for the CPU: none may find a GPU that the count did not.
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment["OMP_NUM_THREADS"] = "1"
        environment["MKL_NUM_THREADS"] = "1"
        environment.setdefault("GLOO_SOCKET_IFNAME", _loopback_interface())
        environment.setdefault("GLIBC_TUNABLES", KEEP_FREED_MEMORY)
    return environment


def _loopback_interface() -> str:
    """The name of 127.0.0.1's interface: lo on Linux, lo0 on BSD and macOS."""
    names = [name for _, name in socket.if_nameindex()]
    return "lo0" if "lo0" in names else "lo"


def _watch(
    children: list[subprocess.Popen[bytes]], *, stops: StopRequests, phrases: Phrases, marks: Path
) -> int:
    stops.pass_on_to(children)
    codes = _wait_for_all(children, stops=stops, phrases=phrases, marks=marks)
    if stops.must_leave:
        say(f"left at once; {phrases.kept}")
        return LEFT_AT_ONCE_EXIT_CODE
    return _exit_code(codes, phrases=phrases)


def _wait_for_all(
    children: list[subprocess.Popen[bytes]], *, stops: StopRequests, phrases: Phrases, marks: Path
) -> dict[int, int]:
    """Exit codes by rank, in the order of the ends; 1 for ranks that are ended here.

    Once a rank has failed the others have a grace, and the main one what its save takes. Where
    one gives up waiting, the others show where they stand.
    """
    codes: dict[int, int] = {}
    saving, stalled = marks / SAVING_MARK, marks / STALLED_MARK
    deadline = latest = math.inf
    has_said_stopping = has_shown_stacks = False
    while len(codes) < len(children):
        alive = {rank: child for rank, child in enumerate(children) if rank not in codes}
        has_shown_stacks |= show_stacks_if_asked(stalled, alive)
        for rank, child in enumerate(children):
            if rank not in codes and child.poll() is not None:
                codes[rank] = child.returncode
                if child.returncode not in (0, StopRequested.exit_code):
                    has_said_why = child.returncode > 1 or has_shown_stacks
                    grace = GRACE_AFTER_REASON_SECONDS if has_said_why else GRACE_SECONDS
                    deadline = min(deadline, time.monotonic() + grace)
                    latest = min(latest, deadline + LONGEST_SAVE_SECONDS)
        if stops.is_requested and not has_said_stopping:
            has_said_stopping = True
            say(f"stopping: {phrases.finishing}; Ctrl-C again leaves at once")
        if 0 not in codes and saving.exists():
            # When its save is done the main rank needs a moment to leave.
            moment = min(time.monotonic() + GRACE_AFTER_REASON_SECONDS, latest)
            deadline = max(deadline, moment)
        if time.monotonic() > deadline:
            late = [rank for rank in range(len(children)) if rank not in codes]
            _end_all(children)
            codes |= dict.fromkeys(late, 1)
        time.sleep(POLL_SECONDS)
    return codes


def _exit_code(codes: dict[int, int], *, phrases: Phrases = Phrases()) -> int:
    """The code of the rank that knows why: one of the contract before a bare failure.

    Args:
        codes: by rank, in the order in which the ranks ended.
        phrases: of the work.
    """
    stopped = StopRequested.exit_code
    reasons = [code for code in codes.values() if code > 1 and code != stopped]
    if reasons:
        return reasons[0]
    if codes[0] == stopped:
        return stopped  # the main rank has saved; the others only leave
    killed = [(rank, code) for rank, code in codes.items() if code < 0]
    if killed:
        rank, code = killed[0]
        say(f"error: rank {rank} was ended by {_signal_name(-code)}")
        say(f"hint: run the same command again; {phrases.goes_on}")
    return 1 if any(codes.values()) else 0


def _signal_name(signum: int) -> str:
    """SIGKILL and its like; real-time signals have numbers only."""
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"
