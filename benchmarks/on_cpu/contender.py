"""One contender of `step.py` in its process: `python -m on_cpu.contender NAME FOLDER`.

Reads numbers of updates on stdin, one a line; runs each; answers with one JSON line. What a
library prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from on_cpu import peers
from on_cpu.work import Work, read_batches, read_work

Turn = Callable[[int], dict[str, Any]]

PEERS = {
    "transformers": peers.transformers_update,
    "transformers-compiled": peers.transformers_compiled_update,
    "litgpt": peers.litgpt_update,
    "paper": peers.paper_update,
}
_GEMM_SIZE, _GEMM_TIMES = 1024, 50


def main(name: str, folder: Path) -> None:
    """Answers until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with ExitStack() as stack:
        turn = _turns(name, read_work(folder), folder=folder, stack=stack)
        for line in sys.stdin:
            started, busy = time.perf_counter(), time.process_time()
            fields = turn(int(line))
            answer = {
                "seconds": time.perf_counter() - started,
                "cpu_seconds": time.process_time() - busy,
                "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                "torch": torch.__version__,
                **fields,
            }
            print(json.dumps(answer), file=answers, flush=True)


def _turns(name: str, work: Work, *, folder: Path, stack: ExitStack) -> Turn:
    if name == "gemm":
        return _gemm
    if name in PEERS:
        update, batches = PEERS[name](work, folder=folder), read_batches(folder)
        return lambda index: {"loss_nats": update(batches[index], work.learning_rates[index])}
    from on_cpu import ours  # a peer's Python may lack what it imports

    if name == "accumulation":
        return ours.accumulation_turns(work, folder=folder)
    own = ours.milepost_turns(work, folder=folder, stack=stack)
    return lambda index: {"loss_nats": own(index)}


def _gemm(index: int) -> dict[str, Any]:
    """Floating-point operations of square bfloat16 products that stay in the cache."""
    left = torch.ones(_GEMM_SIZE, _GEMM_SIZE, dtype=torch.bfloat16)
    product = torch.empty_like(left)
    for _ in range(_GEMM_TIMES):
        torch.mm(left, left, out=product)
    return {"flops": _GEMM_TIMES * 2 * _GEMM_SIZE**3}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
