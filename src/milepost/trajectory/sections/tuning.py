"""A fine-tuning in sentences: what is trained, the loss on answers, and who stops by itself."""

from __future__ import annotations

from collections.abc import Sequence

from milepost.core.units import format_count
from milepost.runs.exact_answers import ExactAnswers
from milepost.trajectory.collect import Trajectory
from milepost.trajectory.finetuning import Finetuning, Point, perplexity
from milepost.trajectory.sections.wording import plural, times


def tuned_sentence(tuned: Finetuning) -> str:
    """What is tuned, and which of its weights."""
    return f"The run tunes the model “{tuned.base_name}”: {trained_words(tuned)}."


def trained_words(tuned: Finetuning) -> str:
    """How many weights are trained, and of how many."""
    if tuned.lora is None:
        return f"all {plural(tuned.num_parameters, 'parameter')} are trained"
    return (
        f"LoRA of rank {tuned.lora.rank:,} trains {plural(tuned.num_trained, 'parameter')} beside"
        f" {tuned.num_parameters:,} that stay as they are"
    )


def changed_sentences(trajectory: Trajectory, tuned: Finetuning) -> list[str]:
    """What the tuning changed: the loss on answers, and whether the model stops by itself."""
    if tuned.held_out:
        told = [_way("Held-out loss on answers", tuned.held_out)]
    elif trajectory.manifest.validation_fingerprint is None:
        told = ["No conversation is held out, so no loss tells how it answers others."]
        told += [_way("Training loss", tuned.training)] if tuned.training else []
    else:
        told = ["There is no validation on record."]
    return [*told, *_asked(trajectory, tuned)]


def _way(name: str, losses: Sequence[Point]) -> str:
    first, last = losses[0], losses[-1]
    if len(losses) == 1:
        return f"{name} was {_with_perplexity(first)}, the only one on record."
    told = f"{name} went from {_with_perplexity(first)} to {_with_perplexity(last)}"
    lowest = min(losses, key=lambda point: point[1])
    if lowest[1] < last[1]:
        told += f"; the lowest was {lowest[1]:.4f} at step {lowest[0]:,}"
    return told + "."


def _with_perplexity(point: Point) -> str:
    step, loss = point
    known = perplexity(loss)
    told = "" if known is None else f" (perplexity {perplexity_words(known)})"
    return f"{loss:.4f} nats per token{told} at step {step:,}"


def perplexity_words(value: float) -> str:
    """'3.42', '294.6', '26.5 K'."""
    return format_count(value) if value >= 10_000 else f"{value:,.2f}"


def _asked(trajectory: Trajectory, tuned: Finetuning) -> list[str]:
    if trajectory.answers_problem:
        return ["The answers before and after cannot be read."]
    exact = [f"Exact answers: {exact_words(tuned.exact)}."] if tuned.exact else []
    if tuned.answers is None or not tuned.num_asked:
        return exact
    before, after = tuned.num_stopped
    step = tuned.answers.step
    which = "" if step == trajectory.last_step else f" of step {step:,}"
    return [
        f"Asked {plural(tuned.num_asked, 'question')}, the base stopped by itself"
        f" {times(before)}, the tuned model{which} {times(after)}.",
        *exact,
    ]


def exact_words(exact: ExactAnswers) -> str:
    """'trained 287 of 300, before 0; never asked 13 of 50, before 0'."""
    return "; ".join(
        f"{count.group} {count.after:,} of {count.n:,}, before {count.before:,}"
        for count in exact.counts()
    )
