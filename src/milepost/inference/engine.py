"""Completions: prompts in, text out, with a KV cache and a random stream for each prompt.

In training the end-of-text token stands before each document, so it is put before each prompt
as well; an empty prompt is that token alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from milepost.core.errors import UsageError
from milepost.inference.decoder import FastDecoder
from milepost.inference.sampling import Decoding
from milepost.inference.stream import END_OF_TEXT, NewToken, row_seeds, stream_tokens
from milepost.model.frozen_copy import frozen_copy
from milepost.model.llama import Llama
from milepost.model.lora import has_lora
from milepost.text.tokenizer import Tokenizer

_ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Completion:
    """What the model wrote after a prompt.

    Attributes:
        prompt: as it was given.
        text: of `token_ids`.
        token_ids: new tokens, without the end-of-text token.
        stopped: why: "end_of_text", "max_new_tokens", or "context" (max_position_embeddings).
    """

    prompt: str
    text: str
    token_ids: list[int]
    stopped: str


def complete(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    compute_dtype: torch.dtype = torch.float32,
) -> list[Completion]:
    """Continues each prompt.

    A prompt's random stream depends on the seed, the prompt and how often the same prompt came
    before it, not on its neighbors; the global random state is not touched.

    Args:
        model: on any device.
        tokenizer: the one the model was trained with.
        prompts: texts; "" begins a new document.
        max_new_tokens: most tokens of a completion; the context may end it earlier.
        temperature: 0: greedy.
        top_k: only the k likeliest tokens.
        top_p: only the likeliest tokens that together have this probability.
        seed: of the random streams.
        compute_dtype: of the forward pass; logits are float32.

    Returns:
        One completion a prompt, in order.

    Raises:
        UsageError: a setting is out of range, or a prompt leaves no room in the context.
        DivergedError: the logits are not finite.
    """
    decoding = Decoding(max_new_tokens, temperature, top_k, top_p)
    prompts_ids = _ids_of(prompts, tokenizer, context=model.config.max_position_embeddings)
    decoder = decoder_beside(model, compute_dtype=compute_dtype, vocab_size=tokenizer.vocab_size)
    seeds = row_seeds(prompts, seed=seed)
    written: dict[int, _Written] = {}
    # Neighbors of similar length waste the least padding.
    by_length = sorted(range(len(prompts)), key=lambda place: len(prompts_ids[place]))
    for start in range(0, len(prompts), _ROWS_AT_ONCE):
        batch = by_length[start : start + _ROWS_AT_ONCE]
        steps = stream_tokens(
            decoder,
            [prompts_ids[place] for place in batch],
            decoding,
            end_ids=frozenset({tokenizer.end_of_text_id}),
            vocab_size=tokenizer.vocab_size,
            seeds=[seeds[place] for place in batch],
            compute_dtype=compute_dtype,
        )
        written |= zip(batch, _collected(steps, num_rows=len(batch)), strict=True)
    return [
        Completion(prompt, tokenizer.decode(row.ids), row.ids, row.stopped)
        for prompt, row in ((prompt, written[place]) for place, prompt in enumerate(prompts))
    ]


def decoder_beside(
    model: Llama, *, compute_dtype: torch.dtype, vocab_size: int
) -> Llama | FastDecoder:
    """What `stream_tokens` decodes a model with that others may go on to train afterwards.

    On the CPU a `FastDecoder` of a copy, good until the model changes; with LoRA's additions, and
    on a GPU, where a copy would want memory that training counts on, the model itself.
    """
    if model.head_weight.device.type != "cpu" or has_lora(model):
        return model
    copied = frozen_copy(model, compute_dtype)
    return FastDecoder(copied, compute_dtype=compute_dtype, vocab_size=vocab_size)


def continue_likeliest(
    model: Llama | FastDecoder,
    tokenizer: Tokenizer,
    prompts_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    compute_dtype: torch.dtype = torch.float32,
) -> list[list[int]]:
    """The likeliest token after each prompt, again and again; all prompts are one batch.

    The last bits of a row may depend on the rows beside it, so whoever needs the same bits again
    gives the same batch.

    Args:
        model: on any device; see `decoder_beside`.
        tokenizer: the one the model was trained with.
        prompts_ids: token ids of each prompt, with whatever stands before a text; not empty,
            shorter than the model's context.
        max_new_tokens: most tokens of a continuation.
        stop_ids: tokens that end it as the end-of-text token does.
        compute_dtype: of the forward pass; logits are float32.

    Returns:
        The new tokens of each prompt, without the one that ended it.

    Raises:
        DivergedError: the logits are not finite.
    """
    steps = stream_tokens(
        model,
        prompts_ids,
        Decoding(max_new_tokens, temperature=0.0, top_k=None, top_p=None),
        end_ids=stop_ids | {tokenizer.end_of_text_id},
        vocab_size=tokenizer.vocab_size,
        compute_dtype=compute_dtype,
    )
    return [row.ids for row in _collected(steps, num_rows=len(prompts_ids))]


def _ids_of(prompts: Sequence[str], tokenizer: Tokenizer, *, context: int) -> list[list[int]]:
    prompts_ids = []
    for number, prompt in enumerate(prompts, start=1):
        prompt_ids = [tokenizer.end_of_text_id, *tokenizer.encode(prompt)]
        if len(prompt_ids) >= context:
            raise UsageError(
                f"prompt {number} has {len(prompt_ids)} tokens with the end-of-text token "
                f"before it; the model's context is {context}",
                hint=f"shorten it to at most {context - 2} tokens",
            )
        prompts_ids.append(prompt_ids)
    return prompts_ids


@dataclass
class _Written:
    """What one row wrote, without the token that ended it."""

    ids: list[int] = field(default_factory=list)
    stopped: str = ""


def _collected(steps: Iterable[list[NewToken]], *, num_rows: int) -> list[_Written]:
    rows = [_Written() for _ in range(num_rows)]
    for token in itertools.chain.from_iterable(steps):
        if token.stopped is not None:
            rows[token.row].stopped = token.stopped
        if token.stopped != END_OF_TEXT:
            rows[token.row].ids.append(token.token_id)
    return rows
