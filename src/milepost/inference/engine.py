"""Completions: prompts in, text out, with a KV cache and a random stream for each prompt.

In training the end-of-text token stands before each document, so it is put before each prompt
as well; an empty prompt is that token alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from milepost.core.errors import UsageError
from milepost.core.seeds import derive_seed
from milepost.inference.kv_cache import KVCache
from milepost.inference.sampling import Decoding, next_token
from milepost.model.llama import Llama
from milepost.text.tokenizer import Tokenizer

END_OF_TEXT = "end_of_text"
MAX_NEW_TOKENS = "max_new_tokens"
CONTEXT = "context"

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


@dataclass
class _Row:
    """One prompt on its way."""

    place: int
    prompt: str
    prompt_ids: list[int]
    generator: torch.Generator
    new_ids: list[int] = field(default_factory=list)
    stopped: str | None = None


@torch.no_grad()
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
    rows = _rows_of(prompts, tokenizer, model.config.max_position_embeddings, seed)
    # Neighbors of similar length waste the least padding.
    by_length = sorted(rows, key=lambda row: len(row.prompt_ids))
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        batch = by_length[start : start + _ROWS_AT_ONCE]
        _decode(model, tokenizer, batch, decoding=decoding, compute_dtype=compute_dtype)
    return [
        Completion(row.prompt, tokenizer.decode(row.new_ids), row.new_ids, row.stopped or "")
        for row in rows
    ]


@torch.no_grad()
def continue_likeliest(
    model: Llama,
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
        model: on any device.
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
    unused = torch.Generator()
    rows = [_Row(place, "", list(ids), unused) for place, ids in enumerate(prompts_ids)]
    decoding = Decoding(max_new_tokens, temperature=0.0, top_k=None, top_p=None)
    _decode(
        model, tokenizer, rows, decoding=decoding, compute_dtype=compute_dtype, stop_ids=stop_ids
    )
    return [row.new_ids for row in rows]


def _rows_of(prompts: Sequence[str], tokenizer: Tokenizer, context: int, seed: int) -> list[_Row]:
    rows = []
    seen: Counter[str] = Counter()
    for place, prompt in enumerate(prompts):
        prompt_ids = [tokenizer.end_of_text_id, *tokenizer.encode(prompt)]
        if len(prompt_ids) >= context:
            raise UsageError(
                f"prompt {place + 1} has {len(prompt_ids)} tokens with the end-of-text token "
                f"before it; the model's context is {context}",
                hint=f"shorten it to at most {context - 2} tokens",
            )
        stream = derive_seed(seed, "completion", prompt, seen[prompt])
        seen[prompt] += 1
        rows.append(_Row(place, prompt, prompt_ids, torch.Generator().manual_seed(stream)))
    return rows


def _decode(
    model: Llama,
    tokenizer: Tokenizer,
    rows: list[_Row],
    *,
    decoding: Decoding,
    compute_dtype: torch.dtype,
    stop_ids: frozenset[int] = frozenset(),
) -> None:
    """Fills `new_ids` and `stopped` of all rows: one prefill, then a token a row a pass."""
    context = model.config.max_position_embeddings
    ends = stop_ids | {tokenizer.end_of_text_id}
    longest = max(len(row.prompt_ids) for row in rows)
    device = model.head_weight.device
    cache = KVCache(
        model.config,
        num_rows=len(rows),
        capacity=min(context, longest + decoding.max_new_tokens),
        dtype=compute_dtype,
        device=device,
    )
    padding = tokenizer.end_of_text_id
    ids = [row.prompt_ids + [padding] * (longest - len(row.prompt_ids)) for row in rows]
    hidden_BTD = model(torch.tensor(ids, device=device), compute_dtype=compute_dtype, cache=cache)
    lengths = [len(row.prompt_ids) for row in rows]
    cache.cut(lengths)
    last_BD = hidden_BTD[range(len(rows)), [length - 1 for length in lengths]]
    while True:
        logits_BV = _logits(model, last_BD, vocab_size=tokenizer.vocab_size)
        for row, logits_V in zip(rows, logits_BV, strict=True):
            token_id = next_token(logits_V, decoding=decoding, generator=row.generator)
            _append(row, token_id, ends=ends, limit=decoding.max_new_tokens, context=context)
        going = [number for number, row in enumerate(rows) if row.stopped is None]
        if not going:
            return
        if len(going) < len(rows):
            cache.keep(going)
            rows = [rows[number] for number in going]
        newest_B1 = torch.tensor([[row.new_ids[-1]] for row in rows], device=device)
        last_BD = model(newest_B1, compute_dtype=compute_dtype, cache=cache)[:, -1]


def _append(row: _Row, token_id: int, *, ends: frozenset[int], limit: int, context: int) -> None:
    if token_id in ends:
        row.stopped = END_OF_TEXT
        return
    row.new_ids.append(token_id)
    if len(row.new_ids) == limit:
        row.stopped = MAX_NEW_TOKENS
    elif len(row.prompt_ids) + len(row.new_ids) == context:
        row.stopped = CONTEXT


def _logits(model: Llama, hidden_BD: Tensor, *, vocab_size: int) -> Tensor:
    """float32 on the CPU; rows that pad the vocabulary beyond the tokenizer's are left out."""
    weight_VD = model.head_weight[:vocab_size].to(hidden_BD.dtype)
    return F.linear(hidden_BD, weight_VD).float().cpu()
