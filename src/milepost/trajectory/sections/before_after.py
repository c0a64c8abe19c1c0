"""Before and after a fine-tuning, as the paper's Table V: questions, both answers, the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from milepost.runs.answers import Answer, length_in_words
from milepost.runs.exact_answers import ExactCount
from milepost.trajectory.collect import Trajectory
from milepost.trajectory.fields import finite, whole
from milepost.trajectory.finetuning import Conversations, Finetuning, Point, perplexity
from milepost.trajectory.samples import calmed, repeats_in_words, shown_characters
from milepost.trajectory.sections.text_table import Column, TextTable, numbers
from milepost.trajectory.sections.tuning import perplexity_words, trained_words
from milepost.trajectory.sections.wording import NONE, enumerate_words, plain, plural, signed
from milepost.trajectory.statistics.paired import score_interval
from milepost.trajectory.subject import Section

MAX_QUESTIONS_SHOWN = 20
MAX_LINES_SHOWN = 14
"""Of an answer; a base that was never taught to stop can write a word a line."""

_NO_ANSWERS = (
    "No questions have been answered yet: both models are asked when the fine-tuning is done."
)


@dataclass(frozen=True)
class ShownAnswer:
    """What one of the two models said.

    Attributes:
        who: "before" or "after".
        model: which one it is.
        text: cut to what a page can hold.
        num_cut_characters: left off at the end.
        length: in tokens, and how the answer ended.
        repetition: how much it repeats itself, in words; empty where nobody counted.
    """

    who: str
    model: str
    text: str
    num_cut_characters: int
    length: str
    repetition: str


@dataclass(frozen=True)
class Asked:
    """A question with the answers before and after."""

    question: str
    answers: tuple[ShownAnswer, ShownAnswer]


@dataclass(frozen=True)
class BeforeAfter:
    """What the section shows.

    Attributes:
        facts: (name, words) of what was tuned and on what.
        losses: None where no loss is on record.
        losses_note: what the losses are over.
        exact: answers that were right to the last letter; None where none were counted.
        asked: the questions.
        num_more: questions that are on record and not shown.
        asked_note: how the questions were asked, or why there are no answers.
    """

    facts: tuple[tuple[str, str], ...]
    losses: TextTable | None
    losses_note: str
    exact: TextTable | None
    asked: tuple[Asked, ...]
    num_more: int
    asked_note: str

    @property
    def has_repetition(self) -> bool:
        """Whether somebody counted how much any answer repeats itself."""
        return any(answer.repetition for asked in self.asked for answer in asked.answers)


def before_after_section(run: Trajectory, tuned: Finetuning) -> Section:
    """The section, which says so where there are no answers yet."""
    answers = tuned.answers.answers if tuned.answers else ()
    shown = answers[:MAX_QUESTIONS_SHOWN]
    limit = shown_characters(2 * len(shown))
    name = f"the tuned model at step {tuned.answers.step:,}" if tuned.answers else ""
    losses = _loss_table(tuned)
    content = BeforeAfter(
        facts=tuple(_facts(tuned)),
        losses=losses,
        losses_note=_losses_note(run, tuned) if losses else "",
        exact=_exact_table(tuned),
        asked=tuple(_asked(answer, tuned=name, limit=limit) for answer in shown),
        num_more=len(answers) - len(shown),
        asked_note=_asked_note(run, answers),
    )
    return Section("before-after", "Before and after", "sections/before_after.jinja", content)


def _asked(answer: Answer, *, tuned: str, limit: int) -> Asked:
    question = answer.question
    return Asked(
        question=question if len(question) <= limit else question[:limit] + "…",
        answers=(
            _shown(answer.before, who="before", model="the base", limit=limit),
            _shown(answer.after, who="after", model=tuned, limit=limit),
        ),
    )


def _shown(record: dict[str, Any], *, who: str, model: str, limit: int) -> ShownAnswer:
    text = calmed(record["completion"])
    shown = "\n".join(text[:limit].split("\n")[:MAX_LINES_SHOWN])
    return ShownAnswer(
        who=who,
        model=model,
        text=shown,
        num_cut_characters=len(text) - len(shown),
        length=length_in_words(record),
        repetition=repeats_in_words(record.get("quality")),
    )


def _asked_note(run: Trajectory, answers: Sequence[Answer]) -> str:
    if run.answers_problem:
        return f"The answers cannot be shown: {run.answers_problem}."
    if not answers:
        return _NO_ANSWERS
    decoding = answers[0].after.get("decoding")
    settings = decoding if isinstance(decoding, dict) else {}
    told = "Both models were asked with the same template"
    told += ", the likeliest token each time" if finite(settings.get("temperature")) == 0 else ""
    most = whole(settings.get("max_new_tokens"))
    return told + ("." if most is None else f", at most {plural(most, 'token')}.")


def _loss_table(tuned: Finetuning) -> TextTable | None:
    """Losses with both their ends; None where there is nothing on record."""
    named = (("held out", tuned.held_out), ("trained on", tuned.training))
    rows = tuple(_loss_row(name, points) for name, points in named if points)
    if not rows:
        return None
    columns = (Column("Answers"), *numbers("First", "Last", "Change"))
    return TextTable("Loss, nats per answer token", columns, rows, is_plain=True)


def _loss_row(name: str, points: Sequence[Point]) -> tuple[str, ...]:
    first, last = points[0], points[-1]
    change = NONE if len(points) < 2 else signed(last[1] - first[1], decimals=4)
    return (name, _loss_cell(first), NONE if len(points) < 2 else _loss_cell(last), change)


def _loss_cell(point: Point) -> str:
    """The loss; below it where it was taken, and its perplexity."""
    step, loss = point
    known = perplexity(loss)
    told = "" if known is None else f"\nperplexity {perplexity_words(known)}"
    return f"{plain(loss, decimals=4)}{told}\nstep {step:,}"


def _exact_table(tuned: Finetuning) -> TextTable | None:
    if tuned.exact is None:
        return None
    columns = (Column("Questions"), *numbers("Asked", "Before", "After", "95 % interval"))
    rows = tuple(_exact_row(count) for count in tuned.exact.counts())
    return TextTable("Exact answers", columns, rows, is_plain=True)


def _exact_row(count: ExactCount) -> tuple[str, ...]:
    interval = score_interval(count.after, n=count.n)
    shares = f"{100 * interval.low:.0f} to {100 * interval.high:.0f} %"
    return (count.group, *(f"{n:,}" for n in (count.n, count.before, count.after)), shares)


def _losses_note(run: Trajectory, tuned: Finetuning) -> str:
    """Over what the losses are."""
    sizes = run.validation.points("tokens")
    told = "No conversation is held out: the loss of the batches alone does not show whether other"
    if not tuned.held_out:
        return f"{told} questions are answered better."
    over = f" {sizes[-1][1]:,.0f} answer tokens" if sizes else " answers"
    return (
        f"Held out:{over} of conversations that are never trained on. A training batch's loss is"
        " of its own answers, before the update that they make."
    )


def _facts(tuned: Finetuning) -> Iterator[tuple[str, str]]:
    sha256 = "hash unknown" if tuned.base_sha256 is None else f"SHA-256 {tuned.base_sha256[:12]}"
    yield "Base", f"{tuned.base_name} ({sha256})"
    yield "Trained", _trained(tuned)
    yield "Conversations", _conversations(tuned)
    yield "Left out", _left_out(tuned.conversations)
    yield "Template", tuned.template


def _trained(tuned: Finetuning) -> str:
    told = trained_words(tuned)
    if tuned.lora is not None:
        on = enumerate_words([target.removesuffix("_proj") for target in tuned.lora.targets])
        share = 100 * tuned.num_trained / tuned.num_parameters
        told += f" ({share:.2g} %); alpha {tuned.lora.alpha:g}, projections {on}"
    return told


def _conversations(tuned: Finetuning) -> str:
    account = tuned.conversations
    known = ((account.num_trained, "trained on"), (account.num_held_out, "held out"))
    told = [f"{count:,} {what}" for count, what in known if count is not None]
    if account.num_rows is not None:
        told.append(f"of {plural(account.num_rows, 'row')} of {tuned.data_name}")
    return ", ".join(told) or "not on record"


def _left_out(account: Conversations) -> str:
    if not account.left_out:
        return "none"
    reasons = [f"{reason.replace('_', ' ')} ({n:,})" for reason, n in account.left_out.items()]
    return f"{sum(account.left_out.values()):,}: {', '.join(reasons)}"
