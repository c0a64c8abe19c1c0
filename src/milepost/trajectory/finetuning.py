"""What a fine-tuning started from, what it trained on what, and what that changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from milepost.config.schema import LoraSection
from milepost.planner.cost import count_parameters, count_trained
from milepost.runs.answers import STOPPED_BY_ITSELF, Answers, is_answer
from milepost.runs.exact_answers import ExactAnswers
from milepost.runs.layout import step_of_folder
from milepost.trajectory.collect import Trajectory
from milepost.trajectory.fields import text, whole

MAX_NATS = 50.0
"""A larger loss has no perplexity that tells anybody anything."""

Point = tuple[int, float]
"""A step and what was measured there."""


@dataclass(frozen=True)
class Conversations:
    """The account of the instruction data, as the manifest has it; None where it does not say.

    Attributes:
        num_rows: read.
        num_trained: conversations that are trained on.
        num_held_out: that are scored and never trained on.
        left_out: reason to count.
    """

    num_rows: int | None
    num_trained: int | None
    num_held_out: int | None
    left_out: dict[str, int]


@dataclass(frozen=True)
class Finetuning:
    """What a run that tuned a model is made of.

    Attributes:
        base: where the model lay.
        base_sha256: None where the manifest does not say.
        template: of the conversations.
        data: where they lay.
        num_parameters: of the model.
        num_trained: of those, or of the additions.
        lora: None where all weights are trained.
        conversations: that were read.
        held_out: (step, nats per answer token) of the held-out conversations.
        training: the same of the batches.
        answers: None where there are none.
        exact: to questions with one right answer; None where none were asked.
    """

    base: str
    base_sha256: str | None
    template: str
    data: str
    num_parameters: int
    num_trained: int
    lora: LoraSection | None
    conversations: Conversations
    held_out: list[Point]
    training: list[Point]
    answers: Answers | None
    exact: ExactAnswers | None

    @property
    def base_name(self) -> str:
        """'first at step 800' of a checkpoint of a run, else the name of the folder."""
        folder = Path(self.base)
        step = step_of_folder(folder)
        if step is None or len(folder.parts) < 3:
            return folder.name or self.base
        return f"{folder.parts[-3]} at step {step:,}"

    @property
    def data_name(self) -> str:
        """The name of the file, or of the hub's data set as it was given."""
        return self.data if "://" in self.data else Path(self.data).name

    @property
    def num_asked(self) -> int:
        """Questions that both models have answered."""
        return len(self.answers.answers) if self.answers else 0

    @property
    def num_stopped(self) -> tuple[int, int]:
        """Answers that the base, and that the tuned model, ended by itself."""
        asked = self.answers.answers if self.answers else ()
        return sum(has_stopped(a.before) for a in asked), sum(has_stopped(a.after) for a in asked)


def finetuning_of(run: Trajectory) -> Finetuning | None:
    """What there is to say; None for a run that tuned nothing."""
    config, lineage = run.manifest.config, run.manifest.lineage
    if config.finetune.template is None:
        return None
    return Finetuning(
        base=config.finetune.base,
        base_sha256=text(lineage.get("base_sha256")),
        template=config.finetune.template,
        data=config.finetune.data,
        num_parameters=count_parameters(config.model).total,
        num_trained=count_trained(config),
        lora=config.lora if config.lora.rank is not None else None,
        conversations=_conversations(lineage.get("conversations")),
        held_out=run.validation.points("loss_nats"),
        training=run.steps.points("loss_nats"),
        answers=run.answers,
        exact=run.exact_answers,
    )


def has_stopped(record: dict[str, Any]) -> bool:
    """Whether a model ended its answer by itself."""
    decoding = record.get("decoding")
    return isinstance(decoding, dict) and decoding.get("stopped") == STOPPED_BY_ITSELF


def perplexity(nats: float) -> float | None:
    """e to the loss; None where that is beyond all measure."""
    return math.exp(nats) if nats <= MAX_NATS else None


def other_samples(run: Trajectory) -> list[dict[str, Any]]:
    """Samples that can be followed along the steps: of a fine-tuning those that are no answers.

    Its checkpoints are adapters that differ, so their hashes are no setting of a sample.
    """
    if not run.is_finetuning:
        return run.samples
    return [sample | {"adapter": None} for sample in run.samples if not is_answer(sample)]


def numbers(tuned: Finetuning) -> dict[str, Any]:
    """The same for programs: losses in nats per answer token."""
    before, after = tuned.num_stopped
    lora = None
    if tuned.lora is not None:
        lora = {name: getattr(tuned.lora, name) for name in ("rank", "alpha", "targets")}
    return {
        "base": tuned.base,
        "base_sha256": tuned.base_sha256,
        "template": tuned.template,
        "data": tuned.data,
        "parameters": tuned.num_parameters,
        "trained_parameters": tuned.num_trained,
        "lora": lora,
        "conversations": asdict(tuned.conversations),
        "held_out_loss": _ends(tuned.held_out),
        "training_loss": _ends(tuned.training),
        "stopped_by_itself": {"asked": tuned.num_asked, "before": before, "after": after},
        "answers": [
            {
                "question": answer.question,
                "before": _answer_numbers(answer.before),
                "after": _answer_numbers(answer.after),
            }
            for answer in (tuned.answers.answers if tuned.answers else ())
        ],
        "exact_answers": [asdict(count) for count in (tuned.exact.counts() if tuned.exact else ())],
    }


def _ends(points: Sequence[Point]) -> dict[str, Any] | None:
    if not points:
        return None
    return {
        name: {"step": step, "loss_nats": loss, "perplexity": perplexity(loss)}
        for name, (step, loss) in (("first", points[0]), ("last", points[-1]))
    }


def _answer_numbers(record: dict[str, Any]) -> dict[str, Any]:
    token_ids = record.get("token_ids")
    return {
        "step": whole(record.get("step")),
        "completion": record["completion"],
        "tokens": len(token_ids) if isinstance(token_ids, list) else None,
        "stopped_by_itself": has_stopped(record),
    }


def _conversations(ledger: Any) -> Conversations:
    values = ledger if isinstance(ledger, dict) else {}
    counts = values.get("left_out")
    return Conversations(
        num_rows=whole(values.get("rows")),
        num_trained=whole(values.get("trained")),
        num_held_out=whole(values.get("held_out")),
        left_out={
            reason: count
            for reason, given in (counts if isinstance(counts, dict) else {}).items()
            if (count := whole(given)) is not None
        },
    )
