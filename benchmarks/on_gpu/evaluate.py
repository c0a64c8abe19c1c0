"""Seconds of scoring the seven benchmarks with a model of the recipe's shape and first weights.

Making token ids is timed apart. Where lm-evaluation-harness is installed, it scores the first
`--peer-items` of each benchmark as well, at its best of a few batch sizes; where it is not, the
row says null.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from milepost.evaluation.benchmarks import BENCHMARKS, open_benchmark
from milepost.evaluation.items import Item
from milepost.evaluation.scoring import score_items
from milepost.model.llama import Llama
from milepost.text.tokenizer import load_tokenizer
from milepost.train.precision import DTYPES
from on_gpu.parity import oracle_of
from on_gpu.setting import Setting, new_model, open_setting, show_row, tell, wait

QUESTION = "how many seconds do the seven benchmarks take?"
RECIPE = "dmas-1.7b"
STEPS = 0
PEER_BATCH_SIZES = (8, 32, 128)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the rows lie, and how many."""
    parser.add_argument("--rows", type=Path, required=True, help="folder of the benchmarks' rows")
    parser.add_argument("--limit", type=int, help="items of each; default: all")
    parser.add_argument("--peer-items", type=int, default=256, help="default: 256")


def answer(arguments: argparse.Namespace) -> int:
    """A row a benchmark, then one with the sum."""
    setting = open_setting(arguments)
    model = new_model(setting.config, device=setting.device)
    seconds = 0.0
    for name in BENCHMARKS:
        started = time.perf_counter()
        items = open_benchmark(
            name,
            tokenizer=load_tokenizer("gpt2"),
            context_length=setting.config.model.max_position_embeddings,
            data_dir=arguments.rows,
            limit=arguments.limit,
        ).items
        encode_seconds = time.perf_counter() - started
        _score(model, items[:64], setting=setting)  # kernels are loaded by the first call
        score_seconds = _score(model, items, setting=setting)
        seconds += score_seconds
        peer = _peer_rate(model, items[: arguments.peer_items], setting=setting)
        rate = len(items) / score_seconds
        tell(f"{name}: {len(items)} items in {score_seconds:.1f} s")
        show_row(
            "evaluate",
            setting=setting,
            benchmark=name,
            precision=setting.config.train.precision,
            items=len(items),
            encode_seconds=encode_seconds,
            score_seconds=score_seconds,
            items_per_second=rate,
            lm_eval_items_per_second=peer,
            ratio=None if peer is None else rate / peer,
        )
    on_gpu = setting.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(setting.device) if on_gpu else None
    show_row("evaluate", setting=setting, score_seconds=seconds, peak_allocated_bytes=peak)
    return 0


def _score(model: Llama, items: Sequence[Item], *, setting: Setting) -> float:
    wait(setting.device)
    started = time.perf_counter()
    dtype = DTYPES[setting.config.train.precision]
    score_items(model, items, compute_dtype=dtype, world=setting.world)
    return time.perf_counter() - started


def _peer_rate(model: Llama, items: Sequence[Item], *, setting: Setting) -> float | None:
    """Items a second of lm-evaluation-harness on the same token ids; None without it."""
    if importlib.util.find_spec("lm_eval") is None:
        return None
    from lm_eval.models.huggingface import HFLM

    tokenizer = load_tokenizer("gpt2")
    for name, content in tokenizer.files().items():
        (setting.folder / name).write_bytes(content)
    oracle = oracle_of(model, end_of_text_id=tokenizer.end_of_text_id)
    oracle.to(DTYPES[setting.config.train.precision])
    harness = HFLM(oracle, tokenizer=_hf_tokenizer(setting.folder))
    pairs = [(list(c.context_ids), list(c.target_ids)) for item in items for c in item.choices]
    requests = [((str(number), ""), *pair) for number, pair in enumerate(pairs)]
    best = 0.0
    for size in PEER_BATCH_SIZES:
        harness.batch_size_per_gpu = size
        started = time.perf_counter()
        harness._loglikelihood_tokens(requests, disable_tqdm=True)
        best = max(best, len(items) / (time.perf_counter() - started))
    return best


def _hf_tokenizer(folder: Path) -> object:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)
