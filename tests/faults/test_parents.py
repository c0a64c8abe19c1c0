"""Row 21 from above: a training ends with the process that started it, however that one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training import (
    Course,
    children_of,
    environment,
    events,
    wait_for_step,
    wait_until_gone,
)

SEGMENT = """
import sys
from pathlib import Path
from milepost.core.errors import StopRequested
from milepost.experiments.segment_process import run_segment
try:
    run_segment(sys.argv[2:], run=Path(sys.argv[1]), on_step=lambda event: None,
                kill_when=lambda event: False)
except StopRequested as stop:
    sys.exit(stop.exit_code)
"""
ENDLESS = ("--train.total_steps", "100000")


@pytest.mark.parametrize(
    ("signum", "code", "reasons"),
    [
        pytest.param(signal.SIGTERM, 75, ["stop requested"], marks=pytest.mark.long),
        pytest.param(signal.SIGHUP, 75, ["stop requested"], marks=pytest.mark.long),
        pytest.param(signal.SIGINT, 1, [], marks=pytest.mark.long),
        (signal.SIGKILL, -9, []),
    ],
)
def test_a_training_ends_with_the_process_that_watches_it(
    signum: int, code: int, reasons: list[str], plain: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = plain.command(run, *ENDLESS, "--ranks", "1")[3:]
    demo = subprocess.Popen(
        [sys.executable, "-c", SEGMENT, str(run), *words],
        env=environment(),
        stderr=subprocess.DEVNULL,
    )
    wait_for_step(run, 2)
    launcher = children_of(demo.pid)
    ranks = children_of(launcher[0])
    assert len(launcher) == len(ranks) == 1
    demo.send_signal(signum)
    demo.wait(20)
    wait_until_gone(launcher + ranks)
    assert demo.returncode in (code, -signum)
    assert [e["reason"] for e in events(run, "segment_ended")] == reasons


def test_the_ranks_end_with_a_launcher_that_is_killed_alone(plain: Course, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = plain.start(run, "--ranks", "2")
    wait_for_step(run, 13)
    ranks = children_of(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    wait_until_gone(ranks)
    plain.finish(run)
