"""The seven benchmarks of the paper's Figure 2, with the numbers of lm-evaluation-harness 0.4.13.

Each is defined here once: where its rows lie on the hub, which split is scored, how a row is
asked, and which metrics the harness gives for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import milepost
from milepost.core.errors import UsageError
from milepost.core.files import sha256_of_json
from milepost.evaluation import questions as q
from milepost.evaluation.encoding import encode_questions
from milepost.evaluation.fewshot import solved_before
from milepost.evaluation.item_cache import load_items, save_items, user_cache_folder
from milepost.evaluation.items import ItemSet
from milepost.evaluation.questions import Question, questions_sha256
from milepost.evaluation.row_files import RowFile, hub_row_files, local_row_file
from milepost.evaluation.rows import Row, read_rows
from milepost.text.tokenizer import Tokenizer

PROTOCOL = "lm-eval-0.4.13"
"""Whose numbers these are. A change here that moves one adds a suffix: `lm-eval-0.4.13+1`."""

FEWSHOT_SPLIT = "train"
"""Where solved questions are drawn from, as the harness does wherever there is a training split."""

HUB_REVISION = "refs%2Fconvert%2Fparquet"
"""The hub keeps every public dataset there as CONFIG/SPLIT/0000.parquet, whatever its own form."""


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark is.

    Attributes:
        name: as the harness calls its task.
        repository: of the dataset on the hub.
        config: of the dataset; "*": it has only one.
        split: which is scored.
        question: from a row to what is asked.
        metrics: those the harness gives.
        draws_one_more: see `fewshot.solved_before`.
    """

    name: str
    repository: str
    config: str
    split: str
    question: Callable[[Row], Question]
    metrics: tuple[str, ...]
    draws_one_more: bool

    def source(self, split: str) -> str:
        """Where a split lies on the hub."""
        place = f"{self.repository}@{HUB_REVISION}/{self.config}/{split}/*.parquet"
        return f"hf://datasets/{place}"


_BOTH = ("acc", "acc_norm")
_ARC = "allenai/ai2_arc"

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("hellaswag", "Rowan/hellaswag", "*", "validation", q.hellaswag, _BOTH, True),
        Benchmark("arc_easy", _ARC, "ARC-Easy", "test", q.arc, _BOTH, False),
        Benchmark("arc_challenge", _ARC, "ARC-Challenge", "test", q.arc, _BOTH, False),
        Benchmark("boolq", "aps/super_glue", "boolq", "validation", q.boolq, ("acc",), True),
        Benchmark("openbookqa", "allenai/openbookqa", "main", "test", q.openbookqa, _BOTH, False),
        Benchmark("piqa", "baber/piqa", "*", "validation", q.piqa, _BOTH, True),
        Benchmark(
            "winogrande",
            "allenai/winogrande",
            "winogrande_xl",
            "validation",
            q.winogrande,
            ("acc",),
            True,
        ),
    )
}


def open_benchmark(
    name: str,
    *,
    tokenizer: Tokenizer,
    context_length: int,
    data_dir: Path | None,
    limit: int | None,
    num_fewshot: int = 0,
) -> ItemSet:
    """The items of a benchmark, tokenized once and then taken from this user's cache.

    Args:
        name: of `BENCHMARKS`.
        tokenizer: of the models that will be scored.
        context_length: of these models, tokens.
        data_dir: folder of files of rows (see `rows.find_row_file`); None: the hub, once.
        limit: the first so many items; None: all.
        num_fewshot: solved questions before each one.

    Raises:
        UsageError: a number is out of range; a choice is longer than the context.
        DataError: the rows are missing, damaged, or not those of the benchmark.
    """
    benchmark = BENCHMARKS[name]
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} items leaves none", hint="1 or more, or no limit")
    if num_fewshot < 0:
        raise UsageError(f"{num_fewshot} solved questions cannot be given", hint="0 or more")
    fewshot_split = FEWSHOT_SPLIT if num_fewshot else None
    with (
        _row_files(benchmark, benchmark.split, data_dir=data_dir) as files,
        _row_files(benchmark, fewshot_split, data_dir=data_dir) as train_files,
    ):
        key = sha256_of_json(
            {
                "milepost": milepost.__version__,
                "protocol": PROTOCOL,
                "benchmark": name,
                "tokenizer": [tokenizer.sha256, tokenizer.ids_around, tokenizer.beginning_id],
                "context_length": context_length,
                "rows": [[file.sha256 for file in split] for split in (files, train_files)],
                "limit": limit,
                "num_fewshot": num_fewshot,
            }
        )
        path = user_cache_folder() / "items" / key
        items = load_items(path, key=key)
        if items is None:
            items = _make_items(
                benchmark,
                _read(benchmark, files),
                train=_read(benchmark, train_files),
                tokenizer=tokenizer,
                context_length=context_length,
                limit=limit,
                num_fewshot=num_fewshot,
            )
            save_items(path, items, key=key)
        return items


def read_questions(benchmark: Benchmark, *, data_dir: Path | None) -> list[Question]:
    """All questions of the split that is scored, in the order of its rows.

    Raises:
        DataError: the rows are missing, damaged, or not those of the benchmark.
    """
    with _row_files(benchmark, benchmark.split, data_dir=data_dir) as files:
        return _read(benchmark, files)


def _make_items(
    benchmark: Benchmark,
    questions: list[Question],
    *,
    train: list[Question],
    tokenizer: Tokenizer,
    context_length: int,
    limit: int | None,
    num_fewshot: int,
) -> ItemSet:
    asked = questions[:limit]
    before = solved_before(
        asked, train, num_fewshot=num_fewshot, draws_one_more=benchmark.draws_one_more
    )
    items, num_truncated = encode_questions(
        zip(asked, before, strict=True), tokenizer=tokenizer, context_length=context_length
    )
    return ItemSet(
        benchmark=benchmark.name,
        protocol=PROTOCOL,
        num_fewshot=num_fewshot,
        limit=limit,
        data_sha256=questions_sha256(questions, solved=train),
        metrics=benchmark.metrics,
        items=items,
        num_truncated=num_truncated,
    )


@contextlib.contextmanager
def _row_files(
    benchmark: Benchmark, split: str | None, *, data_dir: Path | None
) -> Iterator[list[RowFile]]:
    """The files of a split, for the block; none where no split is needed."""
    if split is None:
        yield []
    elif data_dir is not None:
        yield [local_row_file(data_dir, benchmark=benchmark.name, split=split)]
    else:
        folder = user_cache_folder() / "benchmarks" / f"{benchmark.name}_{split}"
        with hub_row_files(benchmark.source(split), folder=folder) as files:
            yield files


def _read(benchmark: Benchmark, files: list[RowFile]) -> list[Question]:
    return [benchmark.question(row) for file in files for row in read_rows(file.name, file.path)]
