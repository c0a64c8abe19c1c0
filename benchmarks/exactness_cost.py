"""What exactness costs: lanes, and deterministic settings, in tokens a second.

Lanes: one process group holds a stepper of each number of lanes, at the same global batch and
microbatch, and they take turns step by step. Determinism: it is a setting of the whole process,
so that groups of processes take turns. Token ids are made up; no data folder is needed.

    python benchmarks/exactness_cost.py                  the shape of corpus-30m, bfloat16, compiled
    python benchmarks/exactness_cost.py --questions lanes --ranks 1 --steps 4

On one rank 2 lanes stand against 1; on two ranks 4 against 2, as 1 lane cannot be dealt to 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from on_gpu.setting import (
    Setting,
    add_shared_arguments,
    has_gpu,
    new_model,
    new_optimizer,
    new_stepper,
    open_setting,
    show_row,
    tell,
    wait,
)

from milepost.config.schema import Config
from milepost.core.errors import MilepostError
from milepost.data.batch import Batch
from milepost.distributed.launch import KEEP_FREED_MEMORY
from milepost.distributed.place import RENDEZVOUS_VARIABLE, read_place
from milepost.distributed.world import World, join_world
from milepost.planner.cost import count_parameters
from milepost.train.gradients import LaneGradients
from milepost.train.objective import build_objective
from milepost.train.step import Stepper

RECIPE = "corpus-30m"
DEFAULTS = ("train.precision=bfloat16", "train.compile=true", "train.microbatch_rows=4")
"""A microbatch of 8 rows would leave 4 lanes of corpus-30m's 16 rows with half of one."""
WARM_STEPS = 2
WORKER_SECONDS = 3600
LEARNING_RATE = 1e-6


def main(words: list[str]) -> int:
    """One JSON row a result; the exit code is 0 unless something failed."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    parser = argparse.ArgumentParser(description=__doc__)
    add_shared_arguments(parser, recipe=RECIPE, steps=8)
    parser.add_argument("--questions", nargs="+", default=["lanes", "deterministic"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each arm; default: 3")
    parser.add_argument("--arm", help=argparse.SUPPRESS)  # what a started process measures
    parser.set_defaults(folder=Path(tempfile.gettempdir()))  # nothing is written there
    arguments = parser.parse_args(words)
    setting = open_setting(arguments, defaults=DEFAULTS)
    if arguments.arm is not None:
        return _be_a_rank(arguments, setting)
    for ranks in arguments.ranks:
        if has_gpu() and ranks > torch.cuda.device_count():
            tell(f"{ranks} ranks need as many GPUs, left out")
            continue
        if "lanes" in arguments.questions:
            _answer_lanes(setting, words=words, ranks=ranks)
        if "deterministic" in arguments.questions:
            _answer_deterministic(setting, words=words, ranks=ranks, rounds=arguments.rounds)
    return 0


def _answer_lanes(setting: Setting, *, words: list[str], ranks: int) -> None:
    """One row: seconds of a step at the fewest lanes and at twice as many, and the buffers."""
    few, many = ranks, 2 * ranks
    if setting.config.rows_per_step % (many * setting.config.train.microbatch_rows):
        tell(f"the microbatch does not divide a lane of {many}, left out")
        return
    found = _measure(words, ranks=ranks, arm="lanes")
    medians = {lanes: statistics.median(found["seconds"][str(lanes)]) for lanes in (few, many)}
    show_row(
        "cost of lanes",
        setting=setting,
        ranks=ranks,
        lanes=[few, many],
        **_shape(setting.config),
        step_seconds={str(lanes): found["seconds"][str(lanes)] for lanes in (few, many)},
        median_step_seconds=medians,
        extra_share_of_step=_paired_ratio(found["seconds"], few=str(few), many=str(many)) - 1,
        extra_share_of_medians=medians[many] / medians[few] - 1,
        gradient_buffer_bytes=found["buffer_bytes"],
        extra_buffer_bytes=found["buffer_bytes"][str(many)] - found["buffer_bytes"][str(few)],
        bytes_of_one_buffer=4 * count_parameters(setting.config.model).total,
    )


def _paired_ratio(seconds: dict[str, list[float]], *, few: str, many: str) -> float:
    """Median of the ratios of neighbours, which met the same weather."""
    pairs = zip(seconds[many], seconds[few], strict=True)
    return statistics.median(one / other for one, other in pairs)


def _answer_deterministic(setting: Setting, *, words: list[str], ranks: int, rounds: int) -> None:
    """One row: tokens a second with deterministic kernels demanded and without."""
    seconds: dict[str, list[float]] = {"on": [], "off": []}
    memory: dict[str, list[int]] = {"on": [], "off": []}
    for number in range(rounds):
        for arm in ("on", "off") if number % 2 == 0 else ("off", "on"):
            found = _measure(words, ranks=ranks, arm=arm)
            seconds[arm] += found["seconds"][arm]
            memory[arm].append(found["peak_bytes"])
    medians = {arm: statistics.median(seconds[arm]) for arm in seconds}
    tokens = setting.config.train.global_batch_tokens
    show_row(
        "cost of deterministic settings",
        setting=setting,
        ranks=ranks,
        **_shape(setting.config),
        step_seconds=seconds,
        tokens_per_second={arm: tokens / median for arm, median in medians.items()},
        extra_share_of_step=medians["on"] / medians["off"] - 1,
        peak_bytes={arm: max(values) for arm, values in memory.items()},
    )


def _shape(config: Config) -> dict[str, Any]:
    train = config.train
    return {
        "parameters": count_parameters(config.model).total,
        "tokens_per_step": train.global_batch_tokens,
        "microbatch_rows": train.microbatch_rows,
        "precision": train.precision,
        "compile": train.compile,
    }


def _measure(words: list[str], *, ranks: int, arm: str) -> dict[str, Any]:
    """Starts the ranks of one arm and reads what rank 0 printed.

    Raises:
        MilepostError: a rank failed.
    """
    tell(f"{ranks} ranks, {arm}")
    command = [sys.executable, str(Path(__file__).resolve()), *words, "--arm", arm]
    with tempfile.TemporaryDirectory(prefix="milepost-cost-") as folder:
        shared = {**os.environ, RENDEZVOUS_VARIABLE: str(Path(folder) / "rendezvous")}
        if not has_gpu():
            # As `milepost train` starts its ranks.
            shared |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            shared |= {"GLIBC_TUNABLES": KEEP_FREED_MEMORY}
        processes = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            output = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            processes.append(subprocess.Popen(command, env=shared | place, stdout=output))
        try:
            answer, _ = processes[0].communicate(timeout=WORKER_SECONDS)
            codes = [process.wait(timeout=60) for process in processes]
        finally:
            for process in processes:
                process.kill()
    if any(codes):
        raise MilepostError(f"the ranks of {arm} ended with {codes}")
    found: dict[str, Any] = json.loads(answer)
    return found


def _be_a_rank(arguments: argparse.Namespace, setting: Setting) -> int:
    """What one started process does: its share of every step; rank 0 prints what it measured."""
    place = read_place(os.environ)
    assert place is not None
    device_type = "cuda" if has_gpu() else "cpu"
    with join_world(place, device_type=device_type, timeout_seconds=WORKER_SECONDS) as world:
        if arguments.arm == "lanes":
            lanes = (place.size, 2 * place.size)
            configs = {str(n): setting.with_train(lanes=n) for n in lanes}
        else:
            is_on = arguments.arm == "on"
            own = setting.with_train(deterministic=is_on, lanes=max(2, place.size))
            configs = {arguments.arm: own}
        found = _run_in_turns(configs, steps=arguments.steps, world=world)
        if world.is_main:
            print(json.dumps(found), flush=True)
    return 0


def _run_in_turns(configs: dict[str, Config], *, steps: int, world: World) -> dict[str, Any]:
    """Every arm in this process; they share model, optimizer and compiled code."""
    config = next(iter(configs.values()))
    model = new_model(config, device=world.device)
    optimizer = new_optimizer(model, config=config)
    first = new_stepper(model, optimizer=optimizer, config=config, world=world, end_of_text_id=0)
    objective = build_objective(model, config=config, end_of_text_id=0)
    buffers = {arm: LaneGradients(model) for arm in configs}
    steppers = {
        arm: Stepper(
            objective,
            optimizer=optimizer,
            gradients=buffers[arm],
            config=own,
            world=world,
            loss_scale=dataclasses.replace(first.loss_scale),
        )
        for arm, own in configs.items()
    }
    seconds: dict[str, list[float]] = {arm: [] for arm in configs}
    for step in range(WARM_STEPS + steps):
        batch = _made_up_batch(config, step=step)
        order = list(steppers) if step % 2 == 0 else list(reversed(steppers))
        for arm in order:
            taken = _timed_step(steppers[arm], batch, device=world.device)
            if step >= WARM_STEPS:
                seconds[arm].append(taken)
    return {
        "seconds": seconds,
        "buffer_bytes": {arm: _bytes_held(gradients) for arm, gradients in buffers.items()},
        "peak_bytes": _peak_bytes(world.device),
    }


def _timed_step(stepper: Stepper, batch: np.ndarray, *, device: torch.device) -> float:
    wait(device)
    started = time.perf_counter()
    result = stepper.run_step(
        Batch.of_tokens(batch), learning_rate=LEARNING_RATE, stop_requested=lambda: False
    )
    wait(device)
    taken = time.perf_counter() - started
    assert math.isfinite(result.loss_nats)
    return taken


def _made_up_batch(config: Config, *, step: int) -> np.ndarray:
    """uint32 [rows, T + 1], the same on every rank."""
    shape = (config.rows_per_step, config.data.sequence_length + 1)
    source = np.random.default_rng(step)
    return source.integers(0, config.model.vocab_size, size=shape, dtype=np.uint32)


def _bytes_held(gradients: LaneGradients) -> int:
    """Between steps every buffer is free."""
    return sum(buffer.nbytes for buffer in gradients._free)


def _peak_bytes(device: torch.device) -> int:
    """Of the allocator on a GPU, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
