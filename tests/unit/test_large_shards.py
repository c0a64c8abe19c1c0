"""A hundred gigabytes of shards, which are holes: opened at once, read with next to no wait."""

from __future__ import annotations

import importlib.util
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from milepost.config.recipe import load_recipe
from milepost.core.errors import DataError
from milepost.data.loader import Loader
from milepost.data.shards import open_prepared

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NUM_BYTES = 100 * 10**9
TOKENS_PER_SECOND = 53_700  # of dmas-1.7b at 55 % of an H100's peak in bf16


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparse")
    load("data_inputs").write_sparse_shards(folder, num_bytes=NUM_BYTES)
    return folder


@pytest.fixture
def loader(folder: Path) -> Iterator[Loader]:
    config = load_recipe("dmas-1.7b", overrides=())
    length, rows = config.data.sequence_length, config.rows_per_step
    shards = open_prepared(folder).train
    with Loader(shards, seed=1, sequence_length=length, rows_per_step=rows) as loader:
        yield loader


def seconds_of(work: Callable[[], Any]) -> float:
    """Processor time, the best of five: what else the machine does is not counted."""
    measured = []
    for _ in range(5):
        started = time.process_time()
        work()
        measured.append(time.process_time() - started)
    return min(measured)


def test_a_hundred_gigabytes_are_opened_in_under_a_second(folder: Path) -> None:
    assert open_prepared(folder).train.num_tokens == NUM_BYTES // 2
    assert seconds_of(lambda: open_prepared(folder)) < 1


def test_they_are_opened_and_read_from_in_little_memory(folder: Path, loader: Loader) -> None:
    """No table of the 49 million rows, which would take 390 MB."""
    assert loader.num_rows > 48_000_000
    tracemalloc.start()
    try:
        open_prepared(folder)
        batch = loader.batch(10_000)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < batch.nbytes + (16 << 20)


def test_a_batch_costs_less_than_a_hundredth_of_the_step_it_is_for(loader: Loader) -> None:
    """Were it not read ahead. The tokens are holes, so this is the work without the disk."""
    config = load_recipe("dmas-1.7b", overrides=())
    step_seconds = config.train.global_batch_tokens / TOKENS_PER_SECOND
    steps = iter(range(100, 105))
    assert seconds_of(lambda: loader.batch(next(steps))) < 0.01 * step_seconds


def test_they_are_still_held_against_their_hashes(folder: Path) -> None:
    with pytest.raises(DataError, match="other bytes than its manifest says"):
        next(open_prepared(folder).train.verify())
