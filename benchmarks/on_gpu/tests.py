"""Runs the tests that need a CUDA device."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from on_gpu.setting import open_setting, show_row, tell

QUESTION = "do the tests that need a GPU pass?"
RECIPE = "demo"
STEPS = 0
ROOT = Path(__file__).resolve().parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing besides the shared arguments."""


def answer(arguments: argparse.Namespace) -> int:
    """One row; the exit code is pytest's."""
    setting = open_setting(arguments)
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "tests/gpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    lines = (result.stdout + result.stderr).strip().splitlines()
    tell("\n".join(lines[-60:]))
    show_row(
        "tests",
        setting=setting,
        exit_code=result.returncode,
        summary=lines[-1] if lines else "",
        seconds=time.perf_counter() - started,
    )
    return result.returncode
