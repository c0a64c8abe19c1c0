"""Questions as token ids: the same ids, cut at the same place, as lm-eval 0.4.13's `hf` model."""

from __future__ import annotations

from collections.abc import Iterable

from milepost.core.errors import DataError, UsageError
from milepost.evaluation.items import Choice, Item
from milepost.evaluation.questions import BETWEEN, Question
from milepost.text.tokenizer import Tokenizer


def encode_questions(
    asked: Iterable[tuple[Question, str]], *, tokenizer: Tokenizer, context_length: int
) -> tuple[tuple[Item, ...], int]:
    """Items of questions.

    Args:
        asked: each question with the text before it.
        tokenizer: of the model.
        context_length: of the model, tokens; longer contexts are cut from the left.

    Returns:
        The items in order, and how many choices were cut.

    Raises:
        DataError: a choice has no tokens of its own.
        UsageError: a choice alone is longer than the model's context.
    """
    encoder = _Encoder(tokenizer, context_length)
    items: list[Item] = []
    taken: set[str] = set()
    for number, (question, before) in enumerate(asked):
        item_id = str(number) if question.own_id is None else question.own_id
        if item_id in taken:
            item_id = f"{item_id}#{number}"
        taken.add(item_id)
        items.append(Item(item_id, question.gold, encoder.choices(question, before)))
    return tuple(items), encoder.num_truncated


class _Encoder:
    """Turns questions into choices and counts those that were cut."""

    def __init__(self, tokenizer: Tokenizer, context_length: int) -> None:
        self._tokenizer = tokenizer
        self._context_length = context_length
        self.num_truncated = 0

    def choices(self, question: Question, before: str) -> tuple[Choice, ...]:
        ids_of = {context: self._context_ids(before + context) for context in question.contexts}
        made = []
        for context, target, choice in zip(
            question.contexts, question.targets, question.choices, strict=True
        ):
            whole = before + context + BETWEEN + target
            target_ids = self._target_ids(before + context, whole, num_before=len(ids_of[context]))
            self._check(question, target_ids)
            made.append(self._fit(ids_of[context], target_ids, num_characters=len(choice)))
        return tuple(made)

    def _context_ids(self, context: str) -> list[int]:
        """Ids of what stands before a target; white space at its end goes to the target."""
        text = context.rstrip()
        return self._encode(text) if text else [self._tokenizer.beginning_id]

    def _target_ids(self, context: str, whole: str, *, num_before: int) -> list[int]:
        if not context.strip():
            return self._tokenizer.encode(whole)
        # Where a token spans the border, the whole does not begin with the context's own ids;
        # the harness then takes these and the rest of the whole all the same.
        return self._encode(whole)[num_before:]

    def _encode(self, text: str) -> list[int]:
        """The ids of a text with what the tokenizer's own template puts around it."""
        before, after = self._tokenizer.ids_around
        return [*before, *self._tokenizer.encode(text), *after]

    def _check(self, question: Question, target_ids: list[int]) -> None:
        row = question.row
        if not target_ids:
            raise DataError(
                f"{row.place}: a choice has no tokens of its own, one token spans it and the "
                "text before it",
                hint="this tokenizer cannot tell the choices apart: leave the benchmark out",
            )
        if len(target_ids) > self._context_length:
            raise UsageError(
                f"{row.place}: a choice has {len(target_ids)} tokens, "
                f"the model's context {self._context_length}",
                hint="leave this benchmark out, or score a model with a longer context",
            )

    def _fit(self, context_ids: list[int], target_ids: list[int], *, num_characters: int) -> Choice:
        # The last token is only predicted, never read.
        excess = len(context_ids) + len(target_ids) - (self._context_length + 1)
        if excess > 0:
            self.num_truncated += 1
            context_ids = context_ids[excess:]
        return Choice(tuple(context_ids), tuple(target_ids), num_characters)
