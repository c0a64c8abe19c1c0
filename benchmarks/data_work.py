"""The work that `data.py` times, each in a process of its own: one JSON line on stdout.

python benchmarks/data_work.py encode NAME TEXTS.parquet SECONDS
python benchmarks/data_work.py prepare SOURCE OUT
python benchmarks/data_work.py peer NAME TEXTS.parquet CACHE
python benchmarks/data_work.py open FOLDER
python benchmarks/data_work.py order TOKENS
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from milepost.text.byte_level import gpt2_tokenizer_json

BATCH_TEXTS = 64
NUM_WORKERS = 2
SAME_BYTES = 2_000_000
"""So much text is compared between the encoders by the hash of its ids."""

Encode = Callable[[list[str]], Sequence[Sequence[int]] | list[np.ndarray]]


def encode(name: str, texts: str, seconds: str) -> dict[str, Any]:
    """Encodes texts once each, until so many seconds of processor time are over."""
    batches = pyarrow.parquet.ParquetFile(texts).iter_batches(BATCH_TEXTS, columns=["text"])
    started = time.process_time()
    encode_batch = ENCODERS[name]()
    opening = time.process_time() - started
    worked, num_bytes, num_tokens, digest, hashed = 0.0, 0, 0, hashlib.sha256(), 0
    for batch in batches:
        strings = batch.column("text").to_pylist()
        started = time.process_time()
        ids = [np.asarray(i, dtype=np.uint32) for i in encode_batch(strings)]
        worked += time.process_time() - started
        num_bytes += sum(len(text.encode()) for text in strings)
        num_tokens += sum(map(len, ids))
        if hashed < SAME_BYTES:
            digest.update(np.concatenate(ids).tobytes())
            hashed = num_bytes
        if worked >= float(seconds) and hashed >= SAME_BYTES:
            break
    return {
        "encoder": name,
        "megabytes_per_cpu_second": num_bytes / 1e6 / worked,
        "bytes": num_bytes,
        "tokens": num_tokens,
        "cpu_seconds": worked,
        "opening_cpu_seconds": opening,
        "ids_sha256": digest.hexdigest(),
    }


def _milepost() -> Encode:
    from milepost.text.fast_encoder import open_fast_encoder
    from milepost.text.tokenizer import load_tokenizer

    return open_fast_encoder(load_tokenizer("gpt2")).encode_batch


def _milepost_plain() -> Encode:
    from milepost.text.tokenizer import load_tokenizer

    return load_tokenizer("gpt2").encode_batch


def _tiktoken() -> Encode:
    import tiktoken

    from milepost.text.byte_level import GPT2_PATTERN, gpt2_ranks

    encoding = tiktoken.Encoding(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=gpt2_ranks(), special_tokens={}
    )
    return lambda texts: [encoding.encode_ordinary(text) for text in texts]


def _tokenizers() -> Encode:
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core each
    content = gpt2_tokenizer_json() | {"added_tokens": []}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]


ENCODERS: dict[str, Callable[[], Encode]] = {
    "milepost": _milepost,
    "milepost without fastokens": _milepost_plain,
    "tiktoken": _tiktoken,
    "tokenizers": _tokenizers,
}


def prepare(source: str, out: str) -> dict[str, Any]:
    """`milepost data prepare`, with what each part of it worked."""
    from milepost.data import preparation
    from milepost.data.prepare import prepare as prepare_data

    assembling: list[tuple[float, float]] = []
    assemble = preparation.assemble

    def timed(*arguments: Any, **named: Any) -> Any:
        started, worked = time.perf_counter(), time.process_time()
        assembled = assemble(*arguments, **named)
        assembling.append((time.perf_counter() - started, time.process_time() - worked))
        return assembled

    preparation.assemble = timed
    started = time.perf_counter()
    summary = prepare_data([source], out=Path(out), tokenizer="gpt2", workers=NUM_WORKERS)
    seconds = time.perf_counter() - started
    return _work(summary.train["num_bytes"], summary.train["num_tokens"], seconds) | {
        "workers": NUM_WORKERS,
        "assembling_seconds": sum(seconds for seconds, _ in assembling),
        "assembling_cpu_seconds": sum(cpu_seconds for _, cpu_seconds in assembling),
        "fingerprint": summary.train["fingerprint"],
    }


def peer(name: str, texts: str, cache: str) -> dict[str, Any]:
    """`datasets.map` over the same texts, batched, with as many processes; imports not timed."""
    os.environ |= {"HF_HOME": cache, "HF_HUB_OFFLINE": "1"}
    import datasets

    datasets.disable_progress_bars()
    encode_batch, end_of_text = ENCODERS[name](), 50256

    def ids_of(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        encoded = encode_batch(batch["text"])
        return {"ids": [np.array([*i, end_of_text], dtype=np.uint16) for i in encoded]}

    started = time.perf_counter()
    rows = datasets.load_dataset("parquet", data_files=texts, split="train", cache_dir=cache)
    num_bytes = sum(len(text.encode()) for text in rows["text"])
    loaded = time.perf_counter()
    mapped = rows.map(ids_of, batched=True, num_proc=NUM_WORKERS, remove_columns=rows.column_names)
    seconds = time.perf_counter() - loaded  # without its own copy of the source, in its favor
    num_tokens = sum(len(column) for column in mapped.with_format("numpy")["ids"])
    return _work(num_bytes, num_tokens, seconds) | {
        "peer": f"datasets.map with {name}",
        "versions": {"datasets": datasets.__version__},
        "loading_seconds": loaded - started,
        "workers": NUM_WORKERS,
    }


def _work(num_bytes: int, num_tokens: int, seconds: float) -> dict[str, Any]:
    ours, theirs = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "bytes": num_bytes,
        "tokens": num_tokens,
        "seconds": seconds,
        "megabytes_per_second": num_bytes / 1e6 / seconds,
        "tokens_per_second": num_tokens / seconds,
        "parent_cpu_seconds": ours.ru_utime + ours.ru_stime,
        "worker_cpu_seconds": theirs.ru_utime + theirs.ru_stime,
        # The largest worker stands for each: more than the real peak, never less.
        "peak_bytes": 1024 * (_own_peak_kib() + NUM_WORKERS * theirs.ru_maxrss),
    }


def _own_peak_kib() -> int:
    """Since this program began; ru_maxrss has that of the process it was forked from as well."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) for line in status.open() if line.startswith("VmHWM:"))


def open_shards(folder: str) -> dict[str, Any]:
    """Opens prepared data and reads a first batch."""
    from milepost.config.recipe import load_recipe
    from milepost.data.loader import Loader
    from milepost.data.shards import open_prepared

    config = load_recipe("dmas-1.7b", overrides=())
    before = _own_peak_kib()
    started = time.perf_counter()
    data = open_prepared(Path(folder))
    loader = Loader(
        data.train,
        seed=1,
        sequence_length=config.data.sequence_length,
        rows_per_step=config.rows_per_step,
    )
    opened = time.perf_counter() - started
    with loader:
        loader.batch(10_000)
        seconds = time.perf_counter() - started
    return {
        "bytes": sum(shard.tokens.size_bytes for shard in data.train.shards),
        "shards": len(data.train.shards),
        "rows": loader.num_rows,
        "open_seconds": opened,
        "open_and_first_batch_seconds": seconds,
        "more_memory_bytes": 1024 * (_own_peak_kib() - before),
    }


def order(num_tokens: str) -> dict[str, Any]:
    """The rows of some batches out of so many tokens, the first and far ones."""
    from milepost.config.recipe import load_recipe
    from milepost.data.order import row_ids

    config = load_recipe("dmas-1.7b", overrides=())
    num_rows, rows_per_step = int(num_tokens) // config.data.sequence_length, config.rows_per_step
    before = _own_peak_kib()
    last = num_rows // rows_per_step - 1
    steps = [last * place // 99 for place in range(100)]
    started = time.process_time()
    found = [
        row_ids(
            fingerprint="f",
            seed=1,
            data_step=step,
            rows_per_step=rows_per_step,
            num_rows=num_rows,
        )
        for step in steps
    ]
    seconds = time.process_time() - started
    assert len(np.unique(np.concatenate(found))) == len(steps) * rows_per_step
    return {
        "tokens": int(num_tokens),
        "rows": num_rows,
        "microseconds_per_row": 1e6 * seconds / (len(steps) * rows_per_step),
        "batch_seconds": seconds / len(steps),
        "more_memory_bytes": 1024 * (_own_peak_kib() - before),
    }


WORK: dict[str, Callable[..., dict[str, Any]]] = {
    "encode": encode,
    "prepare": prepare,
    "peer": peer,
    "open": open_shards,
    "order": order,
}

if __name__ == "__main__":
    print(json.dumps(WORK[sys.argv[1]](*sys.argv[2:])))
