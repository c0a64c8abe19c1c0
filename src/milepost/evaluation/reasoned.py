"""BoolQ with reasons: the model writes a line about the passage first, then answers.

The plain format leaves no room to reason; here the answer is scored after what the model itself
said. The wording is this project's own, so the numbers compare with themselves and with each
other over the steps, not with published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from milepost.core.errors import DivergedError, UsageError
from milepost.distributed.reduce import gather_in_rank_order
from milepost.distributed.world import World
from milepost.evaluation.benchmarks import BENCHMARKS, read_questions
from milepost.evaluation.items import Choice, Item, ItemResult
from milepost.evaluation.metrics import item_results, majority
from milepost.evaluation.questions import Question, questions_sha256
from milepost.evaluation.scoring import score_items
from milepost.evaluation.tasks import never_stop, tell_nobody
from milepost.inference.decoder import FastDecoder
from milepost.inference.engine import continue_likeliest, decoder_beside
from milepost.model.llama import Llama
from milepost.text.tokenizer import Tokenizer

BENCHMARK = "boolq_reasoned"
PROTOCOL = "boolq-reasoned-1, one greedy line of at most 64 tokens"
"""Changes whenever the same rows could give other numbers."""

MAX_REASON_TOKENS = 64
FEWEST_PROMPT_TOKENS = 64
"""Less of a passage and its question is not worth asking."""

_PROMPT = "{passage}\nQuestion: {question}?\nReasoning: The passage says that"
_ANSWER = "\nAnswer:"
_CHOICES = ("no", "yes")

BATCH_ROWS = 16
"""Prompts that are continued side by side; fixed, as the last bits may depend on it."""

_DECODING_SHARE = 0.9
"""Of the time; the rest is the scoring of the answers."""


@dataclass(frozen=True)
class ReasonedBoolq:
    """BoolQ with reasons, ready to be scored; a `Task`.

    Attributes:
        prompts_ids: of each item, up to where its reason begins.
        golds: 0 for no, 1 for yes.
        answer_ids: of the text between a reason and the choices.
        choices_ids: of " no" and " yes".
        newline_ids: tokens that hold the end of a line and so end a reason.
    """

    limit: int | None
    data_sha256: str
    num_truncated: int
    prompts_ids: tuple[tuple[int, ...], ...]
    golds: tuple[int, ...]
    answer_ids: tuple[int, ...]
    choices_ids: tuple[tuple[int, ...], ...]
    newline_ids: frozenset[int]
    benchmark: str = BENCHMARK
    protocol: str = PROTOCOL
    num_fewshot: int = 0
    metrics: tuple[str, ...] = ("acc",)

    @property
    def num_items(self) -> int:
        """To be scored."""
        return len(self.golds)

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1 / len(_CHOICES)

    @property
    def majority(self) -> float:
        """Accuracy of always giving the commonest answer."""
        return majority(self._items([[]] * self.num_items))

    def score(
        self,
        model: Llama,
        *,
        tokenizer: Tokenizer,
        compute_dtype: torch.dtype,
        world: World,
        stop_requested: Callable[[], bool] = never_stop,
        tell: Callable[[float], None] = tell_nobody,
    ) -> list[ItemResult] | None:
        """See `Task.score`; each result has its `rationale` among its extras."""
        reasons = self._reasons(
            model,
            tokenizer=tokenizer,
            compute_dtype=compute_dtype,
            world=world,
            stop_requested=stop_requested,
            tell=lambda done: tell(_DECODING_SHARE * done),
        )
        if reasons is None:
            return None
        items = self._items(reasons)
        loglikelihoods = score_items(
            model,
            items,
            compute_dtype=compute_dtype,
            world=world,
            stop_requested=stop_requested,
            tell=lambda done: tell(_DECODING_SHARE + (1 - _DECODING_SHARE) * done),
        )
        if loglikelihoods is None:
            return None
        results = item_results(items, loglikelihoods)
        return [
            replace(result, extra={"rationale": tokenizer.decode(ids)})
            for result, ids in zip(results, reasons, strict=True)
        ]

    def _items(self, reasons: Sequence[Sequence[int]]) -> tuple[Item, ...]:
        items = []
        for number, (gold, reason) in enumerate(zip(self.golds, reasons, strict=True)):
            context_ids = (*self.prompts_ids[number], *reason, *self.answer_ids)
            choices = tuple(
                Choice(context_ids, ids, num_characters=len(text))
                for text, ids in zip(_CHOICES, self.choices_ids, strict=True)
            )
            items.append(Item(item_id=str(number), gold=gold, choices=choices))
        return tuple(items)

    def _reasons(
        self,
        model: Llama,
        *,
        tokenizer: Tokenizer,
        compute_dtype: torch.dtype,
        world: World,
        stop_requested: Callable[[], bool],
        tell: Callable[[float], None],
    ) -> list[list[int]] | None:
        """Token ids of every item's reason on every rank; None where a rank was asked to stop.

        Raises:
            DivergedError: on every rank, where the logits were not finite on one.
        """
        batches = self._batches()[world.rank :: world.size]
        decoder = decoder_beside(
            model, compute_dtype=compute_dtype, vocab_size=tokenizer.vocab_size
        )
        written = torch.full((self.num_items, MAX_REASON_TOKENS), -1, dtype=torch.int64)
        is_stopping = False
        failure: DivergedError | None = None
        for done, batch in enumerate(batches):
            if is_stopping := stop_requested():
                break
            try:
                continued = self._continue(decoder, tokenizer, batch, compute_dtype=compute_dtype)
            except DivergedError as error:  # the other ranks wait below
                failure = error
                break
            for number, ids in zip(batch, continued, strict=True):
                written[number, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            tell((done + 1) / len(batches))
        flags = torch.tensor([int(is_stopping), int(failure is not None)])
        own = torch.cat([written.flatten(), flags]).to(world.device)
        gathered = gather_in_rank_order(own, world=world).cpu()
        if gathered[:, -1].any():
            raise failure or _diverged_elsewhere()
        if gathered[:, -2].any():
            return None
        # Where a rank has nothing it has -1, below every id.
        rows = gathered[:, :-2].amax(dim=0).view(self.num_items, MAX_REASON_TOKENS).tolist()
        return [[token_id for token_id in row if token_id >= 0] for row in rows]

    def _continue(
        self,
        decoder: Llama | FastDecoder,
        tokenizer: Tokenizer,
        batch: Sequence[int],
        *,
        compute_dtype: torch.dtype,
    ) -> list[list[int]]:
        return continue_likeliest(
            decoder,
            tokenizer,
            [self.prompts_ids[number] for number in batch],
            max_new_tokens=MAX_REASON_TOKENS,
            stop_ids=self.newline_ids,
            compute_dtype=compute_dtype,
        )

    def _batches(self) -> list[list[int]]:
        """Numbers of items that are continued together: of like length, from the items alone."""
        by_length = sorted(range(self.num_items), key=lambda n: (len(self.prompts_ids[n]), n))
        starts = range(0, self.num_items, BATCH_ROWS)
        return [by_length[start : start + BATCH_ROWS] for start in starts]


def open_reasoned(
    *, tokenizer: Tokenizer, context_length: int, data_dir: Path | None, limit: int | None
) -> ReasonedBoolq:
    """Opens the rows of BoolQ for this way of asking.

    Args:
        tokenizer: of the models that will be scored.
        context_length: of these models, tokens.
        data_dir: folder of files of rows; None: from the hub, once.
        limit: the first so many items; None: all.

    Raises:
        UsageError: the model's context is too short.
        DataError: the rows are missing or damaged.
    """
    answer_ids = _ids_after(tokenizer, "it is", _ANSWER)
    choices_ids = tuple(_ids_after(tokenizer, _ANSWER, f" {choice}") for choice in _CHOICES)
    # The last token of a choice is not read.
    behind = MAX_REASON_TOKENS + len(answer_ids) + max(map(len, choices_ids)) - 1
    room = context_length - behind
    if room < FEWEST_PROMPT_TOKENS:
        raise UsageError(
            f"{BENCHMARK} needs a context of at least {FEWEST_PROMPT_TOKENS + behind} tokens, the"
            f" model has {context_length}",
            hint="leave it out of the tasks",
        )
    questions = read_questions(BENCHMARKS["boolq"], data_dir=data_dir)
    prompts = [_prompt_ids(question, tokenizer) for question in questions[:limit]]
    return ReasonedBoolq(
        limit=limit,
        data_sha256=questions_sha256(questions),
        num_truncated=len(_CHOICES) * sum(1 + len(ids) > room for ids in prompts),
        prompts_ids=tuple((tokenizer.beginning_id, *ids[1 - room :]) for ids in prompts),
        golds=tuple(question.gold for question in questions[:limit]),
        answer_ids=answer_ids,
        choices_ids=choices_ids,
        newline_ids=_newline_ids(tokenizer),
    )


def _diverged_elsewhere() -> DivergedError:
    return DivergedError(
        "the model's logits are not finite on another rank",
        hint="its weights are damaged or beyond what the dtype holds: take an earlier checkpoint, "
        "or score it in float32",
    )


def _prompt_ids(question: Question, tokenizer: Tokenizer) -> list[int]:
    row = question.row
    return tokenizer.encode(
        _PROMPT.format(passage=row.text("passage"), question=row.text("question"))
    )


def _ids_after(tokenizer: Tokenizer, before: str, text: str) -> tuple[int, ...]:
    """Ids of a text that goes on after another: some tokenizers begin a text with a space."""
    return tuple(tokenizer.encode(before + text)[len(tokenizer.encode(before)) :])


def _newline_ids(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(n for n in range(tokenizer.vocab_size) if "\n" in tokenizer.decode([n]))
