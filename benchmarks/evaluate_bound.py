"""How many items a second matrix products alone would allow.

Counted are the floating-point operations of all products but attention's: of the least that
predicts every answer's tokens (each token of the tree of all texts once, the last block and the
head at the places of answers), of Milepost's rows, and of lm-evaluation-harness (each different
text whole, without padding; answers of one token share a pass). They are set against the best
rate that two processes of one thread reach side by side on these shapes, with `torch.mm` or with
a packed weight. Over the harness's items a second from `evaluate.py` it is a ratio. One JSON row
a benchmark and dtype on stdout.

`python benchmarks/evaluate_bound.py --data-dir DIR [--limit 256]`
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from evaluate import THREADS

from milepost.config.recipe import load_recipe
from milepost.config.schema import ModelSection
from milepost.core.environment import code_version
from milepost.core.files import strict
from milepost.evaluation.benchmarks import open_benchmark
from milepost.evaluation.packing import ROW_TOKENS, Pair, count_shared, plan_rows
from milepost.model.packed_weight import packed
from milepost.runs.events import utc_now
from milepost.text.tokenizer import load_tokenizer

TOKENS = 1024
"""Rows of the products that are timed, as many as a batch has."""


def main(words: Sequence[str]) -> int:
    """Counts, times and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="rows of the benchmarks")
    parser.add_argument("--benchmarks", nargs="+", default=["hellaswag", "boolq"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--limit", type=int, default=256, help="items; default: 256")
    arguments = parser.parse_args(words)
    config = load_recipe("corpus-30m", overrides=()).model
    tokenizer = load_tokenizer("gpt2")
    rates = {dtype: _best_rates(config, dtype=dtype) for dtype in arguments.dtypes}
    for benchmark in arguments.benchmarks:
        items = open_benchmark(
            benchmark,
            tokenizer=tokenizer,
            context_length=config.max_position_embeddings,
            data_dir=arguments.data_dir,
            limit=arguments.limit,
        ).items
        pairs = [Pair(c.context_ids, c.target_ids) for item in items for c in item.choices]
        operations = {
            name: count / len(items) / 1e9 for name, count in _operations(pairs, config).items()
        }
        for dtype, found in rates.items():
            row = {
                "question": "evaluate_bound",
                "time": utc_now(),
                "code": code_version(),
                "command": " ".join(sys.argv),
                "torch": torch.__version__,
                "benchmark": benchmark,
                "dtype": dtype,
                "items": len(items),
                "gflop_per_item": operations,
                "gflop_per_second_of_each_process": found,
                "items_per_second_at_most": THREADS * max(found.values()) / operations["least"],
            }
            print(json.dumps(strict(row)), flush=True)
    return 0


def _operations(pairs: list[Pair], config: ModelSection) -> dict[str, int]:
    inputs = [pair.input_ids for pair in pairs]
    texts = [pair.context_ids + pair.target_ids for pair in pairs]
    # A place is a beginning of a text; equal beginnings are one place.
    places = {
        text[:end]
        for text, pair in zip(texts, pairs, strict=True)
        for end in range(len(pair.context_ids), len(text))
    }
    shared, previous = 0, ()
    for sequence in sorted(inputs):
        shared += count_shared(previous, sequence)
        previous = sequence
    num_least = sum(map(len, inputs)) - shared
    num_in_rows = sum(row[-1].stop for row in plan_rows(inputs, max_tokens=ROW_TOKENS))
    # Answers of one token share a pass; other texts are read whole, one by one.
    once = {pair.input_ids for pair in pairs if len(pair.target_ids) == 1}
    longer = [pair.input_ids for pair in pairs if len(pair.target_ids) > 1]
    num_harness = sum(map(len, [*once, *longer]))
    width, head_dim = config.hidden_size, config.head_dim
    keys_values = 2 * 2 * width * config.num_key_value_heads * head_dim
    queries_out = 2 * 2 * width * config.num_attention_heads * head_dim
    block = keys_values + queries_out + 2 * 3 * width * config.intermediate_size
    head = 2 * width * config.vocab_size
    at_each_token = (config.num_hidden_layers - 1) * block + keys_values
    at_each_place = block - keys_values + head
    return {
        "least": num_least * at_each_token + len(places) * at_each_place,
        "milepost": num_in_rows * at_each_token + len(places) * at_each_place,
        "lm-eval": num_harness * (config.num_hidden_layers * block + head),
    }


def _best_rates(config: ModelSection, *, dtype: str) -> dict[str, float]:
    """By shape the slower process's GFLOP a second, all processes at work at once."""
    width, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    shapes = [(width, width), (width, inner), (inner, width), (width, vocabulary)]
    with ProcessPoolExecutor(THREADS, mp_context=get_context("spawn")) as pool:
        tasks = [pool.submit(_rates, shapes, dtype) for _ in range(THREADS)]
        found = [task.result() for task in tasks]
    return {name: min(rates[name] for rates in found) for name in found[0]}


@torch.inference_mode()
def _rates(shapes: list[tuple[int, int]], dtype: str) -> dict[str, float]:
    torch.set_num_threads(1)
    found = {}
    for num_in, num_out in shapes:
        x = torch.randn(TOKENS, num_in).to(getattr(torch, dtype))
        weight = torch.randn(num_out, num_in).to(x.dtype)
        result = torch.empty(TOKENS, num_out, dtype=x.dtype)
        operations = 2 * TOKENS * num_in * num_out / 1e9
        shape = f"{TOKENS} x {num_in} x {num_out}"
        as_it_lies = partial(torch.mm, x, weight.t(), out=result)
        found[f"torch.mm {shape}"] = operations / _seconds(as_it_lies)
        found[f"packed {shape}"] = operations / _seconds(partial(packed(weight), x))
    return found


def _seconds(product: Callable[[], object]) -> float:
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
