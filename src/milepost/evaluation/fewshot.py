"""Solved questions before each question: the same ones, in the same order, as lm-eval 0.4.13 takes.

The harness draws with Python's own generator, seeded once a benchmark, so what one question gets
depends on how many were drawn for those before it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from milepost.core.errors import DataError
from milepost.evaluation.questions import Question

FEWSHOT_SEED = 1234
"""The harness's default, `--seed` of its command line."""


def solved_before(
    questions: Sequence[Question],
    train: Sequence[Question],
    *,
    num_fewshot: int,
    draws_one_more: bool,
) -> Iterator[str]:
    """The text before each question: so many solved ones of the training split.

    Args:
        questions: those that are asked, in order.
        train: those that can be solved ones.
        num_fewshot: how many; 0: the texts are empty.
        draws_one_more: one more is drawn, in case the question itself is among them. The harness
            does so where its task names no test split.

    Raises:
        DataError: there are too few to draw from.
    """
    if num_fewshot == 0:
        yield from ("" for _ in questions)
        return
    num_drawn = num_fewshot + draws_one_more
    if len(train) < num_drawn:
        raise DataError(
            f"{num_fewshot} solved questions are drawn from {num_drawn} or more rows, "
            f"the training rows are {len(train)}",
            hint="ask for fewer with --num-fewshot, or give all training rows",
        )
    generator = random.Random(FEWSHOT_SEED)
    for question in questions:
        drawn = generator.sample(train, num_drawn)
        if draws_one_more:
            drawn = [one for one in drawn if not _same_row(one, question)][:num_fewshot]
            if len(drawn) < num_fewshot:  # the row stands more than once in the training rows
                others = [one for one in train if not _same_row(one, question)]
                if len(others) < num_fewshot:
                    raise DataError(f"the training rows repeat {question.row.place}")
                drawn = generator.sample(others, num_fewshot)
        yield "".join(one.solved for one in drawn)


def _same_row(one: Question, other: Question) -> bool:
    return one.row.fields == other.row.fields
