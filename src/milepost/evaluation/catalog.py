"""The tasks by name: which there are, what a list of names means, how one is opened."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from milepost.core.errors import UsageError
from milepost.data.shards import ShardSet
from milepost.evaluation.benchmarks import BENCHMARKS, open_benchmark
from milepost.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from milepost.evaluation.tasks import Task

PAPER = "paper"
PAPER_BENCHMARKS = tuple(BENCHMARKS)
"""The seven that the paper's model is scored on."""

HELDOUT = "heldout"
REASONED = "boolq_reasoned"
TASK_NAMES = (*PAPER_BENCHMARKS, HELDOUT, REASONED)


def parse_tasks(texts: Sequence[str]) -> tuple[str, ...]:
    """The tasks that lists of names mean, each once, in the order in which they are named.

    Args:
        texts: names with commas between; "paper" stands for the paper's seven.

    Raises:
        UsageError: there is no such task; the nearest name is suggested. Or none is named.
    """
    named = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    if not named:
        raise UsageError("no task is named", hint=f"tasks: {', '.join((PAPER, *TASK_NAMES))}")
    found: dict[str, None] = {}
    for name in named:
        if name not in (PAPER, *TASK_NAMES):
            raise _unknown(name)
        found |= dict.fromkeys(PAPER_BENCHMARKS if name == PAPER else (name,))
    return tuple(found)


def _unknown(name: str) -> UsageError:
    close = difflib.get_close_matches(name.lower().replace("-", "_"), (PAPER, *TASK_NAMES), n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    return UsageError(
        f"there is no task {name!r}", hint=f"{guess}tasks: {', '.join((PAPER, *TASK_NAMES))}"
    )


def open_task(
    name: str,
    *,
    tokenizer: Tokenizer,
    context_length: int,
    data_dir: Path | None,
    limit: int | None,
    num_fewshot: int,
    validation: ShardSet | None,
) -> Task:
    """A task that is ready to be scored.

    Args:
        name: of `TASK_NAMES`.
        tokenizer: of the models that will be scored.
        context_length: of those models, tokens.
        data_dir: folder of the benchmarks' rows; None: from the hub.
        limit: the first so many items; None: all.
        num_fewshot: solved items before each question.
        validation: the shards that `heldout` is made of; None where there are none.

    Raises:
        UsageError: the task cannot be had in this form.
        DataError: rows are missing or damaged.
    """
    from milepost.evaluation.choice_task import ChoiceTask
    from milepost.evaluation.heldout import open_heldout

    if name in (HELDOUT, REASONED) and num_fewshot:
        raise UsageError(
            f"{name} has no solved items to put before a question",
            hint=f"leave {name} out of the tasks, or --num-fewshot",
        )
    if name == REASONED:
        from milepost.evaluation.reasoned import open_reasoned

        return open_reasoned(
            tokenizer=tokenizer, context_length=context_length, data_dir=data_dir, limit=limit
        )
    if name == HELDOUT:
        if validation is None:
            raise UsageError(
                "heldout is made of a run's validation documents, and there are none here",
                hint="give a run whose data has a validation split, or its data with --prepared "
                "DIR, or leave heldout out of the tasks",
            )
        return ChoiceTask(
            open_heldout(
                validation, tokenizer=tokenizer, context_length=context_length, limit=limit
            )
        )
    return ChoiceTask(
        open_benchmark(
            name,
            tokenizer=tokenizer,
            context_length=context_length,
            data_dir=data_dir,
            limit=limit,
            num_fewshot=num_fewshot,
        )
    )
