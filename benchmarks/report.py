"""How long the report of a run as long as the paper's takes, and how much memory and page.

A made-up run (see report_run.py) is written once into the folder for temporary files, some 0.7 GB;
then `milepost report` runs in processes of its own, one after the other.

    python benchmarks/report.py
    python benchmarks/report.py --turns 1 --folder DIR

Prints one JSON row. Limits: under 5 seconds, under 1 GB of memory, a page of at most 5 MB.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report_run import BENCHMARKS, EVERY_STEPS, NUM_STEPS, make_run

from milepost.core.console import say
from milepost.core.environment import code_version
from milepost.runs.events import utc_now

RUN_NAME = "milepost-report-run-1"
"""The number is of the run's content: another one is made when it changes."""

LIMITS = {"seconds": 5.0, "peak_bytes": 10**9, "page_bytes": 5 * 10**6}

PROGRAM = """
import sys
from milepost.cli.main import run
code = run(["report", sys.argv[1]])
with open("/proc/self/status") as status:
    peak = next(line for line in status if line.startswith("VmHWM"))
print(peak.split()[1], file=sys.stderr)
sys.exit(code)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5, help="processes that are timed")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    run = arguments.folder / RUN_NAME
    if not run.is_dir():
        say(f"writing the run into {run}")
        with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
            make_run(Path(temporary) / RUN_NAME)
            shutil.move(Path(temporary) / RUN_NAME, run)
    seconds, cpu_seconds, peaks = [], [], []
    for turn in range(arguments.turns):
        started, worked = time.perf_counter(), _children_seconds()
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(run)], capture_output=True, text=True, check=False
        )
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(_children_seconds() - worked)
        if done.returncode != 0:
            say(done.stderr)
            return done.returncode
        peaks.append(1024 * int(done.stderr.split()[-1]))
        times = f"{seconds[-1]:.2f} s, {cpu_seconds[-1]:.2f} s of work"
        say(f"turn {turn + 1}: {times}, {peaks[-1] / 1e6:.0f} MB")
    found = {
        "seconds": statistics.median(seconds),
        "peak_bytes": max(peaks),
        "page_bytes": (run / "report" / "index.html").stat().st_size,
    }
    row = {
        "question": "report",
        "time": utc_now(),
        "code": code_version(),
        "command": " ".join(sys.argv),
        "steps": NUM_STEPS,
        "checkpoints": NUM_STEPS // EVERY_STEPS,
        "benchmarks": len(BENCHMARKS),
        **found,
        "all_seconds": seconds,
        "all_cpu_seconds": cpu_seconds,
        "limits": LIMITS,
        "is_within_limits": all(found[name] <= limit for name, limit in LIMITS.items()),
    }
    print(json.dumps(row))
    return 0


def _children_seconds() -> float:
    """Work of the processes that have ended: what tells a slow report from a busy machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
