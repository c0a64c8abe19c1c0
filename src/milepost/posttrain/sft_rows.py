"""Conversations as training rows: tokenized, only answers trained, packed without touching.

What is trained is told by the template's answers, never by token ids: so the end-of-text token,
which also fills the rows up, is trained behind each answer and nowhere else. Positions go on over
a row: rotary attention knows distances alone, so a conversation is the same wherever it begins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from milepost.core.errors import DataError, UsageError
from milepost.data.batch import Batch
from milepost.data.order import row_ids
from milepost.posttrain.first_fit import first_fit
from milepost.posttrain.instructions import Conversation
from milepost.posttrain.ledger import REASONS, Drop, Ledger
from milepost.text.chat_template import ChatTemplate, EncodedChat, Message
from milepost.text.tokenizer import Tokenizer

NOT_TRAINED = -100
"""Target of a position that is not trained; Hugging Face's number. The loss takes any below 0."""

PADDING = 0
"""Segment of a position that holds nothing."""


@dataclass(frozen=True)
class SftRows:
    """Rows of T positions; batches are a function of the step.

    Attributes:
        input_ids: int32 [R, T], filled up with the end-of-text id.
        target_ids: int32 [R, T], the next token where it belongs to an answer, its end-of-text
            token included; else NOT_TRAINED.
        segment_ids: int32 [R, T], 1, 2, ... by conversation, PADDING behind the last. Attention
            stays where they are equal. End-of-text tokens cannot tell conversations apart: one
            stands behind each answer of several turns.
        num_conversations: in all rows.
        fingerprint: identifies the rows and their order.
    """

    input_ids: np.ndarray
    target_ids: np.ndarray
    segment_ids: np.ndarray
    num_conversations: int
    fingerprint: str

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """Tokens that are trained."""
        return int((self.target_ids >= 0).sum())

    @property
    def filled_fraction(self) -> float:
        """Positions that hold something."""
        return float((self.segment_ids != PADDING).mean())

    def batch(self, data_step: int, *, seed: int, rows_per_step: int) -> Batch:
        """The global batch of a step; each row comes once an epoch, in an order of the epoch.

        A batch that is larger than all rows holds some of them more than once.
        """
        rows = row_ids(
            fingerprint=self.fingerprint,
            seed=seed,
            data_step=data_step,
            rows_per_step=rows_per_step,
            num_rows=self.num_rows,
        )
        return Batch(self.input_ids[rows], self.target_ids[rows], self.segment_ids[rows])


def build_rows(
    conversations: Sequence[Conversation],
    *,
    ledger: Ledger,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    sequence_length: int,
    seed: int,
) -> tuple[SftRows, Ledger]:
    """Rows of T positions, several conversations to a row where they fit.

    Args:
        conversations: one or more.
        ledger: of where they came from.
        template: one that `check_rows` has seen.
        tokenizer: of the model.
        sequence_length: T.
        seed: of the run; says which conversations come to share a row.

    Returns:
        The rows, none where no conversation can be used, and the ledger with those that cannot.
    """
    chats: list[EncodedChat] = []
    drops: list[Drop] = []
    for conversation in conversations:
        one = _encode(conversation, template, tokenizer, sequence_length)
        if isinstance(one, Drop):
            drops.append(one)
        else:
            chats.append(one)
    rows = _pack(chats, sequence_length, tokenizer.end_of_text_id, seed)
    return rows, ledger.with_drops(tuple(drops))


def check_rows(
    conversations: Sequence[Conversation],
    *,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    sequence_length: int,
) -> None:
    """Looks whether there will be rows: until the first conversation that can be used.

    Args:
        conversations: one or more; see `build_rows` for all of them.

    Raises:
        UsageError: the template does not train the end-of-text token behind an answer.
        DataError: not one conversation can be used.
    """
    _check_template(template, tokenizer)
    drops: list[Drop] = []
    for conversation in conversations:
        one = _encode(conversation, template, tokenizer, sequence_length)
        if not isinstance(one, Drop):
            return
        drops.append(one)
    first = drops[0]
    seen = f"the first one, {first.source}:{first.line}: {first.what}"
    if all(drop.reason == "too_long" for drop in drops):
        raise DataError(
            f"none of {len(drops)} conversations fits a row of {sequence_length} tokens",
            hint=f"raise data.sequence_length; {seen}",
        )
    reasons = Ledger(len(drops), tuple(drops)).counts
    said = ", ".join(f"{count:,} {REASONS[reason]}" for reason, count in reasons.items())
    raise DataError(f"none of {len(drops)} conversations can be used: {said}", hint=seen)


def _check_template(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    """Refuses a template that would make a model which never stops."""
    example = (Message("user", "question"), Message("assistant", "answer"))
    chat = template.encode(example, tokenizer=tokenizer, add_generation_prompt=False)
    if _num_ended(chat, tokenizer) == 0:
        raise UsageError(
            f"the chat template {template.name} does not mark the end-of-text token as a part of "
            "the answer, so a model would never learn to stop",
            hint="put {% generation %} before the answer and {% endgeneration %} behind its "
            "eos_token",
        )


def _num_ended(chat: EncodedChat, tokenizer: Tokenizer) -> int:
    """Stretches of trained tokens with an end-of-text token behind what is said in them."""
    borders = np.flatnonzero(np.diff(chat.is_answer, prepend=False, append=False))
    num_ended = 0
    for start, stop in borders.reshape(-1, 2):
        ids = chat.ids[start:stop]
        ends = np.flatnonzero(ids == tokenizer.end_of_text_id)
        if len(ends) and ends[-1] > 0:
            # Some templates put a line break behind it.
            num_ended += not tokenizer.decode(ids[ends[-1] + 1 :]).strip()
    return num_ended


def _encode(
    conversation: Conversation, template: ChatTemplate, tokenizer: Tokenizer, sequence_length: int
) -> EncodedChat | Drop:
    def drop(reason: str, what: str) -> Drop:
        return Drop(conversation.source, conversation.line, reason, what)

    messages = conversation.messages
    try:
        chat = template.encode(messages, tokenizer=tokenizer, add_generation_prompt=False)
    except DataError as error:
        return drop("refused", error.message)
    num_tokens = len(chat.ids) - 1  # the last token is only predicted
    if num_tokens > sequence_length:
        return drop("too_long", f"{num_tokens} tokens in a row of {sequence_length}")
    num_answers = sum(message.role == "assistant" for message in messages)
    num_ended = _num_ended(chat, tokenizer)
    if num_ended < num_answers:
        return drop("never_ends", f"{num_ended} of {num_answers} answers have an end-of-text token")
    return chat


def _pack(chats: Sequence[EncodedChat], length: int, padding_id: int, seed: int) -> SftRows:
    # In the order of the file a row would hold neighbors, which are often of one kind.
    order: np.ndarray = np.empty(0, dtype=np.int64)
    if chats:
        order = row_ids(
            fingerprint="packing",
            seed=seed,
            data_step=0,
            rows_per_step=len(chats),
            num_rows=len(chats),
        )
    rows = first_fit([len(chats[place].ids) - 1 for place in order], capacity=length)
    inputs = np.full((len(rows), length), padding_id, dtype=np.int32)
    targets = np.full_like(inputs, NOT_TRAINED)
    segments = np.full_like(inputs, PADDING)
    for row, places in enumerate(rows):
        start = 0
        for segment, place in enumerate(places, start=1):
            chat = chats[order[place]]
            stop = start + len(chat.ids) - 1
            inputs[row, start:stop] = chat.ids[:-1]
            targets[row, start:stop] = np.where(chat.is_answer[1:], chat.ids[1:], NOT_TRAINED)
            segments[row, start:stop] = segment
            start = stop
    fingerprint = _fingerprint(inputs, targets, segments)
    return SftRows(inputs, targets, segments, len(chats), fingerprint)


def _fingerprint(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256(f"milepost rows 1 {arrays[0].shape}".encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array, dtype="<i4").tobytes())
    return digest.hexdigest()
