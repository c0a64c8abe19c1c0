"""Milepost's training step beside its peers on the CPU, on the same work, in turns.

Every contender is a process (Milepost: one a rank) that gets the same first weights, batches and
learning rates; they stay alive and take turns update by update, so that what else the machine
does slows everyone. The first update, which compiles, counts for nothing but its loss. A bfloat16
matrix product on as many threads takes its turn as well: the measured peak. One JSON row a
contender on stdout, talk on stderr; `ratio` is Milepost's rate over the contender's.

    python benchmarks/step.py --python litgpt=PATH [--paper-code FOLDER]
    python benchmarks/step.py --questions accumulation

litgpt wants an older huggingface_hub than Milepost: give it an environment of its own with the
same torch. All have the allocator's settings of `milepost train`; the paper's code runs as it
comes. By default Milepost runs one rank of one thread a core, as `milepost train` does;
`milepost-threads` is one rank with as many threads, which is not exact.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from on_cpu.started import Entry, Started
from on_cpu.work import Work, batches_file, weights_file
from on_gpu.setting import (
    Setting,
    add_shared_arguments,
    new_model,
    open_setting,
    show_row,
    tell,
)
from safetensors.torch import save_file

from milepost.config.recipe import as_plain
from milepost.core.console import say_error
from milepost.core.errors import MilepostError, UsageError
from milepost.model.huggingface import hf_config
from milepost.planner.cost import count_parameters, flops_per_token
from milepost.train.schedule import learning_rate

RECIPE = "corpus-30m"
DEFAULTS = (
    "model.tie_word_embeddings=false",
    "train.precision=bfloat16",
    "train.compile=true",
    "train.microbatch_rows=8",
    "train.global_batch_tokens=8192",
)
OURS = ("milepost", "milepost-threads")
PACKAGES = {
    "transformers": "transformers",
    "transformers-compiled": "transformers",
    "litgpt": "litgpt",
}
MICROBATCHES = 8
"""Of the question what accumulation costs."""


def main(words: list[str]) -> int:
    """Answers the questions; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_shared_arguments(parser, recipe=RECIPE, steps=4)
    names = [*OURS, *PACKAGES]
    parser.add_argument("--contenders", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--questions", nargs="+", choices=["peers", "accumulation"], default=["peers"]
    )
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="default: all")
    parser.add_argument("--ranks", type=int, help="of Milepost; default: as many as cores")
    parser.add_argument(
        "--python", action="append", default=[], metavar="NAME=PATH", help="who runs a contender"
    )
    parser.add_argument("--paper-code", type=Path, help="folder of the paper's repository")
    arguments = parser.parse_args(words)
    try:
        setting = open_setting(arguments, defaults=DEFAULTS)
        if "peers" in arguments.questions:
            _compare(arguments, setting)
        if "accumulation" in arguments.questions:
            _measure_accumulation(arguments, setting)
    except MilepostError as error:
        say_error(error)
        return error.exit_code
    return 0


def _compare(arguments: argparse.Namespace, setting: Setting) -> None:
    entries = _entries(arguments)
    for entry in entries:
        _check(entry, arguments)
    rows = setting.config.rows_per_step
    _write_work(setting, arguments=arguments, rows=rows)
    turns = _take_turns(entries, setting=setting, steps=arguments.steps)
    peak_flops = statistics.median(t["flops"] / t["seconds"] for t in turns["gemm"])
    tokens = setting.config.train.global_batch_tokens
    length = setting.config.data.sequence_length
    work = flops_per_token(setting.config.model, sequence_length=length, lora=setting.config.lora)
    rates = {
        label: statistics.median(tokens / turn["seconds"] for turn in found[1:])
        for label, found in turns.items()
    }
    ours = rates.get("milepost")
    for entry in entries[1:]:
        found, rate = turns[entry.label], rates[entry.label]
        show_row(
            "step",
            setting=setting,
            name=entry.label,
            processes=entry.processes,
            threads=entry.threads,
            malloc=entry.malloc,
            is_exact=entry.name == "milepost" and entry.threads == 1,
            torch_of_contender=found[0]["torch"],
            parameters=count_parameters(setting.config.model).total,
            tokens_per_step=tokens,
            microbatch_rows=setting.config.train.microbatch_rows,
            tokens_per_second=rate,
            all_tokens_per_second=[tokens / turn["seconds"] for turn in found[1:]],
            ratio=None if ours is None else ours / rate,
            share_of_gemm_peak=rate * work / peak_flops,
            gemm_peak_flops=peak_flops,
            peak_bytes=max(turn["peak_bytes"] for turn in found),
            cpu_seconds=statistics.median(turn["cpu_seconds"] for turn in found[1:]),
            first_step_seconds=found[0]["seconds"],
            losses_nats=[turn["loss_nats"] for turn in found],
        )


def _measure_accumulation(arguments: argparse.Namespace, setting: Setting) -> None:
    """One row: an update of several microbatches beside the microbatches by themselves."""
    rows = MICROBATCHES * setting.config.train.microbatch_rows
    _write_work(setting, arguments=arguments, rows=rows)
    entry = Entry("accumulation", "accumulation", processes=1, threads=1)
    _, *turns = _take_turns([entry], setting=setting, steps=arguments.steps)["accumulation"]
    extra = [turn["update_seconds"] / turn["alone_seconds"] - 1 for turn in turns]
    extra_cpu = [turn["update_cpu_seconds"] / turn["alone_cpu_seconds"] - 1 for turn in turns]
    show_row(
        "accumulation",
        setting=setting,
        microbatches=MICROBATCHES,
        microbatch_rows=setting.config.train.microbatch_rows,
        turns=turns,
        extra_share=statistics.median(extra),
        extra_share_of_processor_time=statistics.median(extra_cpu),
    )


def _entries(arguments: argparse.Namespace) -> list[Entry]:
    """The matrix product, then who is asked for."""
    cores, pythons = arguments.cores, _pythons(arguments.python)
    entries = [Entry("gemm", "gemm", processes=1, threads=cores)]
    for name in arguments.contenders:
        if name == "milepost":
            ranks = arguments.ranks or _power_of_two(cores)
            entries.append(Entry("milepost", name, processes=ranks, threads=1))
        elif name == "milepost-threads":
            entries.append(Entry("milepost", name, processes=1, threads=cores))
        else:
            python = pythons.get(name, pythons.get(PACKAGES[name], sys.executable))
            entries.append(Entry(name, name, processes=1, threads=cores, python=python))
    if arguments.paper_code is not None:
        entries.append(Entry("paper", "paper", processes=1, threads=cores, malloc=None))
    return entries


def _power_of_two(cores: int) -> int:
    return int(2 ** math.floor(math.log2(cores)))


def _pythons(words: list[str]) -> dict[str, str]:
    pythons = dict(word.split("=", 1) for word in words if "=" in word)
    if len(pythons) != len(words):
        raise UsageError(f"--python {' '.join(words)}: wants NAME=PATH, once a name")
    return pythons


def _check(entry: Entry, arguments: argparse.Namespace) -> None:
    """Refuses to leave out or replace a peer whose code is not there."""
    if entry.name == "paper" and not (arguments.paper_code / "models" / "llama.py").is_file():
        raise UsageError(f"--paper-code {arguments.paper_code}: has no models/llama.py")
    package = PACKAGES.get(entry.name)
    if package is None:
        return
    try:
        done = subprocess.run([entry.python, "-c", f"import {package}"], capture_output=True)
    except OSError as error:
        raise UsageError(f"--python {package}={entry.python}: {error.strerror}") from error
    if done.returncode != 0:
        raise UsageError(
            f"{entry.label}: {entry.python} cannot import {package}",
            hint=f"install {package} beside the same torch ({torch.__version__}) in an environment "
            f"of its own and give --python {package}=PATH/bin/python, or name the others with "
            "--contenders",
        )


def _write_work(setting: Setting, *, arguments: argparse.Namespace, rows: int) -> None:
    """Weights, batches of made-up tokens and settings, for every contender."""
    config, folder = setting.config, setting.folder
    folder.mkdir(parents=True, exist_ok=True)
    num_updates = arguments.steps + 1
    model = new_model(config, device=setting.device)
    save_file(dict(model.state_dict()), weights_file(folder))
    shape = (num_updates, rows, config.data.sequence_length + 1)
    source = np.random.default_rng(config.run.seed)
    ids = source.integers(0, config.model.vocab_size, size=shape, dtype=np.uint32)
    np.save(batches_file(folder), ids)
    Work(
        config=as_plain(config),
        model=hf_config(config.model, end_of_text_id=0, dtype="float32"),
        microbatch_rows=config.train.microbatch_rows,
        learning_rates=[learning_rate(step, config=config) for step in range(num_updates)],
        betas=list(config.optimizer.betas),
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        clip_grad_norm=config.optimizer.clip_grad_norm,
        precision=config.train.precision,
        is_compiled=config.train.compile is True,
        paper_code="" if arguments.paper_code is None else str(arguments.paper_code.absolute()),
    ).write(folder)


def _take_turns(
    entries: list[Entry], *, setting: Setting, steps: int
) -> dict[str, list[dict[str, Any]]]:
    """What each answered to each update, by label; the first update is in a round of its own."""
    turns: dict[str, list[dict[str, Any]]] = {entry.label: [] for entry in entries}
    with ExitStack() as stack:
        started = []
        for entry in entries:
            contender = Started(entry, folder=setting.folder)
            stack.callback(contender.end)
            started.append(contender)
            # One after the other, so that nobody compiles while another is timed.
            turns[entry.label].append(contender.turn(0))
            tell(f"{entry.label}: started in {turns[entry.label][0]['seconds']:.1f} s")
        for index in range(1, steps + 1):
            for contender in started if index % 2 else reversed(started):
                answer = contender.turn(index)
                turns[contender.entry.label].append(answer)
                tell(f"{contender.entry.label}: update {index}: {answer['seconds']:.2f} s")
    return turns


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
