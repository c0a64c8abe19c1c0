"""A contender that was started, seen from the outside: its processes, asked for one update."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost.core.errors import MilepostError
from milepost.distributed.launch import KEEP_FREED_MEMORY
from milepost.distributed.place import RENDEZVOUS_VARIABLE

BENCHMARKS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Entry:
    """How a contender is started.

    Attributes:
        name: of `on_cpu.contender`.
        label: what the rows call it.
        processes: ranks.
        threads: of each process.
        python: which runs it.
        malloc: GLIBC_TUNABLES, None: as it comes.
    """

    name: str
    label: str
    processes: int
    threads: int
    python: str = sys.executable
    malloc: str | None = KEEP_FREED_MEMORY


class Started:
    """The processes of one contender; they wait between their turns."""

    def __init__(self, entry: Entry, *, folder: Path) -> None:
        """Starts them; they are ready when the first turn is done."""
        self.entry = entry
        shared = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
        paths = [str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
        shared |= {
            "PYTHONPATH": os.pathsep.join(str(Path(path).absolute()) for path in paths),
            "OMP_NUM_THREADS": str(entry.threads),
            "MKL_NUM_THREADS": str(entry.threads),
            "CUDA_VISIBLE_DEVICES": "",
            "WORLD_SIZE": str(entry.processes),
            RENDEZVOUS_VARIABLE: str(folder / f"rendezvous-{entry.label}"),
        }
        if entry.malloc is not None:
            shared["GLIBC_TUNABLES"] = entry.malloc
        command = [entry.python, "-m", "on_cpu.contender", entry.name, str(folder)]
        self._processes = [
            subprocess.Popen(
                command,
                env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(entry.processes)
        ]

    def turn(self, index: int) -> dict[str, Any]:
        """Runs update `index` on all ranks.

        Returns:
            The main rank's fields, with the sums of all ranks' `cpu_seconds` and `peak_bytes`.

        Raises:
            MilepostError: a process has ended.
        """
        for process in self._processes:
            assert process.stdin is not None
            try:
                process.stdin.write(f"{index}\n")
                process.stdin.flush()
            except BrokenPipeError:
                raise self._ended(process) from None
        answers = [self._answer(process) for process in self._processes]
        sums = {key: sum(a[key] for a in answers) for key in ("cpu_seconds", "peak_bytes")}
        return {**answers[0], **sums}

    def end(self) -> None:
        """Ends the processes; they have nothing to save."""
        for process in self._processes:
            process.kill()
            process.wait()

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise self._ended(process)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self, process: subprocess.Popen[str]) -> MilepostError:
        code = process.wait()
        return MilepostError(f"{self.entry.label} ended with exit code {code}; see above")
