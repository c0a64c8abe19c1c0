"""All rows at once: a minute of random faults against one run (benchmarks/chaos.py)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training import environment

CHAOS = Path(__file__).resolve().parents[2] / "benchmarks" / "chaos.py"


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler is installed")
def test_a_run_comes_through_a_minute_of_random_faults(tmp_path: Path) -> None:
    words = [str(CHAOS), "--minutes", "1", "--seed", "7", "--folder", str(tmp_path / "chaos")]
    done = subprocess.run(
        [sys.executable, *words], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout
    row = json.loads(done.stdout)
    assert row["equal"]
    assert sum(row["faults"].values()) > 0
