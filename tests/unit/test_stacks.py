"""Where ranks stand, shown by the launcher: the one that is frozen, and no rank twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from milepost.distributed.place import STALLED_MARK
from milepost.distributed.stacks import ask_for_stacks, show_stacks_if_asked

RANK = """
import threading, time
from milepost.distributed.stacks import answer_with_stack

def another_thread():
    time.sleep(60)

def the_one_that_trains():
    print("ready", flush=True)
    time.sleep(60)

answer_with_stack()
for _ in range(16):
    threading.Thread(target=another_thread, daemon=True).start()
the_one_that_trains()
"""


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[dict[int, subprocess.Popen[bytes]]]:
    """Three processes that wait; what they say lies in `tmp_path`, by their number."""
    found = {}
    for rank in range(3):
        with (tmp_path / f"{rank}.txt").open("wb") as talk:
            found[rank] = subprocess.Popen(
                [sys.executable, "-c", RANK], stdout=subprocess.PIPE, stderr=talk
            )
    try:
        for process in found.values():
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        yield found
    finally:
        for process in found.values():
            process.kill()
            process.communicate()


def ask_at_once(mark: Path, *asking: int) -> list[threading.Thread]:
    threads = [
        threading.Thread(target=ask_for_stacks, args=(mark,), kwargs={"rank": rank})
        for rank in asking
    ]
    for thread in threads:
        thread.start()
    return threads


def shown(folder: Path) -> list[int]:
    return [rank for rank in range(3) if (folder / f"{rank}.txt").read_text()]


@pytest.mark.parametrize("attempt", range(3))
def test_a_frozen_rank_shows_the_thread_that_trains(
    attempt: int, ranks: dict[int, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    mark = tmp_path / STALLED_MARK
    for process in (ranks[1], ranks[2]):
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
    (asking,) = ask_at_once(mark, 0)
    while not show_stacks_if_asked(mark, ranks):
        pass
    asking.join(30)
    assert shown(tmp_path) == [1, 2]
    for rank in (1, 2):
        talk = (tmp_path / f"{rank}.txt").read_text()
        assert "in the_one_that_trains" in talk and "another_thread" not in talk


def test_ranks_that_ask_together_are_answered_once_and_show_nothing_twice(
    ranks: dict[int, subprocess.Popen[bytes]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mark = tmp_path / STALLED_MARK
    threads = ask_at_once(mark, 0, 2)
    while not show_stacks_if_asked(mark, ranks):
        pass
    for thread in threads:
        thread.join(30)
    assert not show_stacks_if_asked(mark, ranks), "all were answered"
    assert shown(tmp_path) == [1]
    assert capsys.readouterr().err.count("stands here") == 1


def test_a_rank_that_has_left_is_not_said_to_stand_anywhere(
    ranks: dict[int, subprocess.Popen[bytes]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mark = tmp_path / STALLED_MARK
    ranks[1].kill()
    os.waitid(os.P_PID, ranks[1].pid, os.WEXITED | os.WNOWAIT)
    (asking,) = ask_at_once(mark, 0)
    while not show_stacks_if_asked(mark, ranks):
        pass
    asking.join(30)
    assert "rank 1 stands" not in capsys.readouterr().err
    assert shown(tmp_path) == [2]
