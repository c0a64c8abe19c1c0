"""Rows 4 and 42: a read of data that hangs, and the warning that Slurm sends."""

from __future__ import annotations

import signal
from pathlib import Path

from milepost.runs.layout import RunLayout
from tests.sabotage import Sabotage
from tests.training import Course, events, wait_for_step

HANGING_READ = """
import time
really = module.Loader.batch
def batch(self, data_step):
    if data_step == 30 and os.environ.get("RANK") == "1" and is_once(once):
        time.sleep(3600)
    return really(self, data_step)
module.Loader.batch = batch
"""


def test_a_read_that_hangs_ends_the_run_with_3_and_shows_where_every_rank_stands(
    plain: Course, tmp_path: Path, sabotage: Sabotage
) -> None:
    run = tmp_path / "run"
    sabotage.patch("milepost.data.loader", HANGING_READ)
    words = ("--ranks", "2", "--guards.loader_timeout_seconds", "4")
    done = plain.train(run, *words)
    assert done.returncode == 3, done.stderr
    assert "error: the batch of data step 30 was not read in 4.0 s" in done.stderr
    assert "warning: rank 1 has waited 2.0 s for the batch of data step 30" in done.stderr
    assert "the thread that reads the data stands here:\n" in done.stderr
    assert "rank 0 stands here, the newest call first:" in done.stderr
    assert 'distributed/reduce.py", line ' in done.stderr
    assert "Traceback" not in done.stderr
    plain.finish(run)


def test_the_main_rank_records_that_a_batch_is_late(
    plain: Course, tmp_path: Path, sabotage: Sabotage
) -> None:
    run = tmp_path / "run"
    sabotage.patch("milepost.data.loader", HANGING_READ.replace('== "1"', '== "0"'))
    words = ("--ranks", "1", "--guards.loader_timeout_seconds", "2")
    done = plain.train(run, *words)
    assert done.returncode == 3, done.stderr
    (warned,) = events(run, "guard_warned")
    assert (warned["guard"], warned["data_step"]) == ("loader", 30)
    assert events(run, "segment_ended")[-1]["reason"] == "failed"
    plain.finish(run)


def test_a_warning_of_slurm_saves_and_leaves_with_75(plain: Course, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = plain.start(run, "--ranks", "2")
    wait_for_step(run, 3)
    process.send_signal(signal.SIGUSR1)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 75, talk
    ended = events(run, "segment_ended")[-1]
    assert ended["reason"] == "stop requested"
    assert RunLayout(run).checkpoint(ended["step"]).is_dir()
    plain.finish(run)
