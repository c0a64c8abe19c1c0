"""A save that is under way when ranks end with an error is finished before they are ended."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.training import command, environment, events, write_recipe


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_two_ranks_that_diverge_during_a_slow_save_lose_none(
    tiny_data: Path, tmp_path: Path
) -> None:
    """The save takes longer than the launcher gives the others once a rank has left."""
    run = tmp_path / "run"
    slow = ("-e", "trace=fsync", "-e", "inject=fsync:delay_enter=300000")
    words = command(write_recipe(tmp_path), run, tiny_data, "--ranks", "2")
    words += ["--optimizer.learning_rate", "1e30", "--checkpoint.every_steps", "1"]
    result = subprocess.run(
        ["strace", "-f", "-qq", "-o", "/dev/null", *slow, *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 5, result.stderr
    last_step = events(run, "step")[-1]["step"]
    assert events(run, "checkpoint_saved")[-1]["step"] == last_step >= 1
    (ended,) = events(run, "segment_ended")
    assert (ended["reason"], ended["step"]) == ("diverged", last_step)
