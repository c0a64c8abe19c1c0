"""The demo's second half: its model learns to answer, and is asked before and after.

The questions are made of the facts of the addresses; the tuning is `milepost finetune`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap
from typing import Any

from milepost.config.recipe import load_recipe
from milepost.core.console import say, show
from milepost.core.files import write_atomically
from milepost.experiments.address_questions import as_instructions, make_questions
from milepost.experiments.exact_answers import (
    NEVER_ASKED,
    OTHER_WORDS,
    choose_questions,
    count_exact_answers,
)
from milepost.experiments.segment_process import run_with_progress
from milepost.experiments.sotu import read_facts
from milepost.runs.exact_answers import ExactAnswer, ExactAnswers, ExactCount
from milepost.trajectory.report import write_report
from milepost.trajectory.statistics.paired import score_interval

TUNING_RECIPE = "demo-sft"

ON_THE_CPU = {"CUDA_VISIBLE_DEVICES": ""}
"""The demo shows the same everywhere, and leaves GPUs to those who use them."""

_GAP = "  "
_MOST_LINES = 3


@dataclass(frozen=True)
class TuningResult:
    """What the second half showed.

    Attributes:
        run: of the fine-tuning.
        report: of that run.
        exact: every question with both answers.
        shown: those of the recipe.
    """

    run: Path
    report: Path
    exact: ExactAnswers
    shown: list[ExactAnswer]

    def as_plain(self) -> dict[str, Any]:
        """The result as JSON holds it."""
        return {
            "run": str(self.run),
            "report": str(self.report),
            "exact_answers": [
                asdict(count) | {"after_interval": list(_interval(count))}
                for count in self.exact.counts()
            ],
            "answers": [asdict(answer) for answer in self.shown],
        }


def tuned_folder(run: Path) -> Path:
    """Where the fine-tuning of a demo's run lies."""
    return run.with_name(f"{run.name}-tuned")


def tune_and_ask(base: Path, *, recipe: str = TUNING_RECIPE) -> TuningResult:
    """Fine-tunes a model on questions about the addresses, and counts exact answers.

    What was interrupted goes on where it was.

    Args:
        base: the finished run of the demo.
        recipe: packaged name or .toml file.

    Raises:
        MilepostError: a part failed.
    """
    run, data = tuned_folder(base), base.with_name(f"{base.name}-questions.jsonl")
    config = load_recipe(recipe)
    questions = make_questions(read_facts())
    write_atomically(data, as_instructions(questions.given))
    num_questions = sum(map(len, questions.given))
    say(f"6/8  fine-tune it on answers to {num_questions:,} questions about the addresses")
    run_with_progress(
        ["finetune", str(base), recipe, "--data", str(data), "--run", str(run)],
        what="fine-tune",
        run=run,
        last_step=config.last_step,
        environment=ON_THE_CPU,
    )
    asked = choose_questions(questions, data=data, fraction=config.finetune.held_out_fraction)
    say(f"7/8  ask both models {len(asked)} questions, each about another fact")
    exact = count_exact_answers(run, asked)
    say(f"     exact answers: {'; '.join(map(_in_words, exact.counts()))}")
    say("8/8  write the report of the fine-tuning")
    report = write_report(run)
    shown = [answer for answer in exact.answers if answer.question in config.finetune.questions]
    return TuningResult(run, report, exact, shown)


def show_tuning(result: TuningResult) -> None:
    """A few answers before and after, and how many were exact, for people."""
    _show_answers(result.shown)
    show("\nexact answers    before            after  95 % interval")
    for count in result.exact.counts():
        low, high = _interval(count)
        after = f"{count.after} of {count.n}"
        interval = f"{100 * low:.0f} to {100 * high:.0f} %"
        show(f"{count.group:<15}  {count.before:>6}  {after:>15}  {interval}")
    guessed = [
        f"{kind} {count.after} of {count.n}"
        for kind in ("who", "when", "order")
        for count in result.exact.counts(kind=kind)
        if count.group == NEVER_ASKED
    ]
    show(
        f"\n{OTHER_WORDS}: the fact was trained, but never in this wording.\n"
        f"{NEVER_ASKED}: no conversation held the fact, so it cannot be known. What is right was "
        f"guessed\nfrom facts beside it, as the years of a presidency: {', '.join(guessed)}."
    )


def _show_answers(answers: Sequence[ExactAnswer]) -> None:
    width = (get_terminal_size((100, 24)).columns - 2 * len(_GAP)) // 3
    show("")
    _show_row("question", "before", "after", width=width)
    group = None
    for answer in answers:
        if answer.group != group:
            group = answer.group
            show(f"-- {group} ".ljust(3 * width + 2 * len(_GAP), "-"))
        mark = "" if answer.after == answer.expected else f" (right: {answer.expected})"
        _show_row(answer.question, answer.before, answer.after + mark, width=width)


def _show_row(*cells: str, width: int) -> None:
    plain = ("".join(c if c.isprintable() else " " for c in cell) for cell in cells)
    columns = [
        wrap(
            " ".join(cell.split()) or "(nothing)", width, max_lines=_MOST_LINES, placeholder=" ..."
        )
        for cell in plain
    ]
    for parts in zip_longest(*columns, fillvalue=""):
        show(_GAP.join(f"{part:<{width}}" for part in parts).rstrip())


def _interval(count: ExactCount) -> tuple[float, float]:
    interval = score_interval(count.after, n=count.n)
    return interval.low, interval.high


def _in_words(count: ExactCount) -> str:
    return f"{count.group} {count.before} -> {count.after} of {count.n}"
