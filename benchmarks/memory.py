"""Peak memory of training on a CPU: what `milepost plan` says, and what is measured.

Each case is a recipe at its real width in processes of its own, as the launcher starts them, with
its settings of the allocator; deep models have fewer layers and long batches one microbatch a
lane, which the rows say. A process makes two updates, validates, saves and makes another update.
Measured is the largest resident set of the main rank. One JSON row a case on stdout.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost.config.recipe import as_plain, load_recipe
from milepost.config.schema import Config
from milepost.core.console import say_error
from milepost.core.errors import MilepostError
from milepost.core.files import strict
from milepost.distributed.launch import KEEP_FREED_MEMORY
from milepost.distributed.place import RENDEZVOUS_VARIABLE
from milepost.planner.memory import estimate_memory

BENCHMARKS = Path(__file__).resolve().parent
LEAST_RATIO, MOST_RATIO = 0.9, 1.1


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        rows: of a forward pass; a lane has as many.
        layers: in place of the recipe's; None: the recipe's.
    """

    recipe: str
    precision: str
    recompute: str = "none"
    optimizer: str = "adamw"
    ranks: int = 1
    is_compiled: bool = False
    rows: int | None = None
    layers: int | None = None

    def config(self) -> Config:
        """The recipe with one microbatch a lane, nothing left at "auto"."""
        config = load_recipe(self.recipe, overrides=())
        rows = self.rows or config.train.rows_of_forward
        batch = rows * config.train.lanes * config.data.sequence_length
        words = {
            "train.precision": self.precision,
            "train.recompute": self.recompute,
            "train.compile": str(self.is_compiled).lower(),
            "train.microbatch_rows": str(rows),
            "train.global_batch_tokens": str(batch),
            "optimizer.name": self.optimizer,
        }
        if self.layers is not None:
            words["model.num_hidden_layers"] = str(self.layers)
        overrides = [word for name, value in words.items() for word in (f"--{name}", value)]
        return load_recipe(self.recipe, overrides=overrides)


def cases() -> list[Case]:
    """All of them, small ones first."""
    return [
        *(Case("demo", precision) for precision in ("float32", "bfloat16", "float16")),
        Case("demo", "bfloat16", ranks=2),
        Case("demo", "bfloat16", is_compiled=True),
        Case("lab", "bfloat16"),
        Case("demo-sft", "float32"),
        Case("demo-sft", "bfloat16"),
        *(Case("corpus-30m", precision) for precision in ("float32", "bfloat16")),
        *(Case("corpus-30m", p, is_compiled=True) for p in ("float32", "bfloat16")),
        Case("corpus-30m", "bfloat16", recompute="block"),
        Case("corpus-30m", "bfloat16", recompute="block", is_compiled=True),
        Case("corpus-30m", "bfloat16", recompute="3"),
        Case("corpus-30m", "bfloat16", optimizer="adamw8bit"),
        Case("corpus-30m", "bfloat16", ranks=2),
        Case("llama-124m", "float32", rows=2, recompute="block"),
        Case("llama-124m", "bfloat16", rows=4),
        Case("llama-124m", "bfloat16", rows=4, is_compiled=True),
        Case("llama-124m", "bfloat16", rows=4, recompute="block", optimizer="adamw8bit"),
        Case("dmas-1.7b", "bfloat16", rows=1, layers=4),
        Case("dmas-1.7b", "bfloat16", rows=2, layers=4, is_compiled=True),
        Case("dmas-1.7b", "bfloat16", rows=2, layers=4, recompute="block", is_compiled=True),
        Case("dmas-1.7b", "float32", rows=1, layers=2),
        Case("dmas-1.7b", "bfloat16", rows=1, layers=2, optimizer="adamw8bit"),
        Case("sft-alpaca", "bfloat16", rows=2, layers=4, recompute="block", optimizer="adamw8bit"),
        Case("sft-alpaca", "bfloat16", rows=2, layers=4, optimizer="adamw"),
        Case("sft-alpaca", "bfloat16", rows=2, layers=4, is_compiled=True),
    ]


def measure(case: Case) -> dict[str, Any]:
    """The fields of one row.

    Raises:
        MilepostError: a process failed.
    """
    config = case.config()
    planned = estimate_memory(config, ranks=case.ranks, device="cpu")
    with tempfile.TemporaryDirectory(prefix="memory-") as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(as_plain(config)))
        answers = _run_ranks(folder, ranks=case.ranks)
    peaks = answers[0]["peaks_bytes"]
    ratio = planned.total_bytes / peaks["saved"]
    return {
        "question": "memory",
        **dataclasses.asdict(case),
        "rows": config.train.rows_of_forward,
        "layers": config.model.num_hidden_layers,
        "malloc": KEEP_FREED_MEMORY,
        "planned_parts_bytes": dataclasses.asdict(planned),
        "planned_bytes": planned.total_bytes,
        "measured_bytes": peaks["saved"],
        "planned_over_measured": ratio,
        "is_within_a_tenth": LEAST_RATIO <= ratio <= MOST_RATIO,
        "peaks_bytes": peaks,
    }


def _run_ranks(folder: Path, *, ranks: int) -> list[dict[str, Any]]:
    paths = [str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    shared = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(Path(path).absolute()) for path in paths),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLIBC_TUNABLES": KEEP_FREED_MEMORY,
        "WORLD_SIZE": str(ranks),
        RENDEZVOUS_VARIABLE: str(folder / "rendezvous"),
    }
    command = [sys.executable, "-m", "on_cpu.memory_rank", str(folder)]
    processes = [
        subprocess.Popen(
            command,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if codes := [process.returncode for process in processes if process.returncode]:
        raise MilepostError(f"a process ended with exit code {codes[0]}; see above")
    return [json.loads(output) for output in outputs]


def main(words: Sequence[str]) -> int:
    """Measures the cases that are asked for; 1 where a plan is off by more than a tenth."""
    parser = argparse.ArgumentParser(prog="memory.py", description=__doc__)
    parser.add_argument("--recipe", help="only the cases of this recipe")
    arguments = parser.parse_args(words)
    is_good = True
    try:
        for case in cases():
            if arguments.recipe in (None, case.recipe):
                row = measure(case)
                is_good &= row["is_within_a_tenth"]
                print(json.dumps(strict(row)), flush=True)
    except MilepostError as error:
        say_error(error)
        return error.exit_code
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
