"""Milepost's decoding beside transformers' generate, greedy, on the same model in one process.

For each dtype and batch size transformers gets its best of eager and scaled dot product attention
with the cache that grows and the static one, found in trials. Then both take turns for `--rounds`
rounds; the medians count. What is timed is everything from token ids to token ids, the pass over
the prompts included; seconds of the processor are beside those of the clock, since they suffer
less from what else runs. One JSON row a dtype and batch size on stdout, talk on stderr.

`python benchmarks/decode.py [--model RUN_OR_FOLDER] [--threads N]`
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from evaluate import make_model

from milepost.core.console import say, say_error
from milepost.core.environment import code_version
from milepost.core.errors import MilepostError
from milepost.core.files import strict
from milepost.inference.decoder import FastDecoder
from milepost.inference.load import load_model, model_folder
from milepost.inference.sampling import Decoding
from milepost.inference.stream import stream_tokens
from milepost.model.llama import Llama
from milepost.runs.events import utc_now

PEERS = tuple((attention, cache) for attention in ("eager", "sdpa") for cache in (None, "static"))

Generate = Callable[[list[list[int]]], list[list[int]]]
"""Token ids of prompts to the new ones of each."""


def main(words: list[str]) -> int:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="default: corpus-30m's shape, random weights")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: as torch takes by itself")
    arguments = parser.parse_args(words)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        with tempfile.TemporaryDirectory(prefix="milepost-decode-") as folder:
            arguments.model = model_folder(arguments.model or make_model(Path(folder)))
            for dtype in arguments.dtypes:
                _compare(arguments, dtype=dtype)
    except MilepostError as error:
        say_error(error)
        return error.exit_code
    return 0


def _compare(arguments: argparse.Namespace, *, dtype: str) -> None:
    theirs = {
        f"{attention}, {cache or 'growing'} cache": _theirs(
            arguments, dtype=dtype, attention=attention, cache=cache
        )
        for attention, cache in PEERS
    }
    compute_dtype = getattr(torch, dtype)
    plain = load_model(arguments.model).model
    loaded = load_model(arguments.model)
    vocab_size = loaded.tokenizer.vocab_size
    fast = FastDecoder(loaded.model, compute_dtype=compute_dtype, vocab_size=vocab_size)
    ours = {
        name: partial(
            _ours, model, count=arguments.new_tokens, vocab_size=vocab_size, dtype=compute_dtype
        )
        for name, model in (("milepost", fast), ("as it lies", plain))
    }
    for rows in arguments.batch_sizes:
        generator = torch.Generator().manual_seed(rows)
        shape = (rows, arguments.prompt_tokens)
        prompts = torch.randint(0, vocab_size, shape, generator=generator).tolist()
        _compare_on(prompts, ours, theirs, arguments=arguments, dtype=dtype)


def _compare_on(
    prompts: list[list[int]],
    ours: dict[str, Generate],
    theirs: dict[str, Generate],
    *,
    arguments: argparse.Namespace,
    dtype: str,
) -> None:
    num_tokens = len(prompts) * arguments.new_tokens
    trials = {}
    for name, generate in theirs.items():
        _timed(generate, prompts)  # the first time sets things up
        trials[name] = num_tokens / _timed(generate, prompts)[1]
        say(f"{dtype}, {len(prompts)} rows: {name}: {trials[name]:.1f} tokens/s")
    best = max(trials, key=lambda name: trials[name])
    arms = {"transformers": theirs[best], **ours}
    written = {name: _timed(generate, prompts)[0] for name, generate in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    processor: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(arguments.rounds):
        for name, generate in arms.items():
            _, clock, busy = _timed(generate, prompts)
            seconds[name].append(clock)
            processor[name].append(busy)
    rates = {name: num_tokens / statistics.median(values) for name, values in seconds.items()}
    busy_rates = {name: num_tokens / statistics.median(v) for name, v in processor.items()}
    row = {
        "question": "decode",
        "time": utc_now(),
        "code": code_version(),
        "command": " ".join(sys.argv),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "dtype": dtype,
        "rows": len(prompts),
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "tokens_per_second": rates,
        "ratio": rates["milepost"] / rates["transformers"],
        "tokens_per_processor_second": busy_rates,
        "processor_ratio": busy_rates["milepost"] / busy_rates["transformers"],
        "all_seconds": seconds,
        "transformers_best": best,
        "transformers_trials": trials,
        "same_tokens_fraction": {
            name: _same_fraction(written["milepost"], written[name])
            for name in ("as it lies", "transformers")
        },
    }
    print(json.dumps(strict(row)), flush=True)


def _same_fraction(ours: list[list[int]], theirs: list[list[int]]) -> float:
    pairs = [p for a, b in zip(ours, theirs, strict=True) for p in zip(a, b, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def _timed(generate: Generate, prompts: list[list[int]]) -> tuple[list[list[int]], float, float]:
    """The new tokens, seconds of the clock and of the processor."""
    started, busy = time.perf_counter(), time.process_time()
    written = generate(prompts)
    return written, time.perf_counter() - started, time.process_time() - busy


def _ours(
    model: Llama | FastDecoder,
    prompts: list[list[int]],
    *,
    count: int,
    vocab_size: int,
    dtype: torch.dtype,
) -> list[list[int]]:
    steps = stream_tokens(
        model,
        prompts,
        Decoding(count, temperature=0.0, top_k=None, top_p=None),
        end_ids=frozenset(),
        vocab_size=vocab_size,
        compute_dtype=dtype,
    )
    return [list(row) for row in zip(*([t.token_id for t in step] for step in steps), strict=True)]


def _theirs(
    arguments: argparse.Namespace, *, dtype: str, attention: str, cache: str | None
) -> Generate:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, dtype), attn_implementation=attention
    ).eval()
    model.generation_config.eos_token_id = None  # every answer has its full length
    chosen: dict[str, Any] = {} if cache is None else {"cache_implementation": cache}

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        ids = torch.tensor(prompts)
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=arguments.new_tokens,
            pad_token_id=0,
            **chosen,
        )
        return written[:, ids.shape[1] :].tolist()

    return generate


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
