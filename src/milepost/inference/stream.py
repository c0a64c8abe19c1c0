"""Tokens and text as they are made: the one loop that decodes, a step at a time.

`engine` collects what it yields; `chat` and the server pass it on. Whoever closes the generator
ends the work, and what it held is freed. Nothing here prints or knows of turns and templates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from milepost.core.errors import UsageError
from milepost.core.seeds import derive_seed
from milepost.inference.decoder import Decoder, FastDecoder, PlainDecoder
from milepost.inference.kv_cache import KVCache
from milepost.inference.sampling import Decoding, next_tokens
from milepost.inference.text_stream import TextStream
from milepost.model.llama import Llama
from milepost.text.tokenizer import Tokenizer

END_OF_TEXT = "end_of_text"
MAX_NEW_TOKENS = "max_new_tokens"
CONTEXT = "context"
STOP = "stop"


@dataclass(frozen=True)
class SamplingOptions:
    """How an answer is written.

    Attributes:
        max_new_tokens: most tokens of an answer; the context may end it earlier.
        temperature: 0: the likeliest token each time.
        top_k: only the k likeliest tokens; None: all.
        top_p: only the likeliest tokens that together have this probability; None: all.
        seed: of the random draws.
        stop: texts that end an answer and are not part of it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.decoding  # looks at the ranges
        if "" in self.stop:
            raise UsageError("a stop text is empty", hint="give texts of one character or more")

    @property
    def decoding(self) -> Decoding:
        """The part that chooses tokens."""
        return Decoding(self.max_new_tokens, self.temperature, self.top_k, self.top_p)


@dataclass(frozen=True)
class NewToken:
    """One token of one row.

    Attributes:
        row: which prompt it follows.
        token_id: the token; where `stopped` is "end_of_text", the one that ended the row.
        stopped: why it is its row's last: "end_of_text", "max_new_tokens", "context"
            (max_position_embeddings), "stop" (`is_last` said so); None: the row goes on.
        log_probability: natural logarithm, of the model's own distribution before temperature,
            top_k and top_p; None where `num_likeliest` is None.
        likeliest: as many (token id, log probability) as asked for, the likeliest first.
    """

    row: int
    token_id: int
    stopped: str | None = None
    log_probability: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class NewText:
    """What one token adds to the text of its row.

    Attributes:
        row: which prompt it follows.
        text: often "": half a character, or what may become a stop text, is held back.
        token: the token.
        stopped: as `NewToken.stopped`; "stop" where a stop text was met.
    """

    row: int
    text: str
    token: NewToken
    stopped: str | None


@dataclass
class _Row:
    """One prompt on its way."""

    row: int
    prompt_ids: list[int]
    generator: torch.Generator
    limit: int
    num_new: int = 0


def stream_text(
    model: Llama | FastDecoder,
    tokenizer: Tokenizer,
    prompts_ids: Sequence[Sequence[int]],
    options: SamplingOptions,
    *,
    num_likeliest: int | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> Generator[list[NewText], None, None]:
    """Continues all prompts side by side and gives their text as it comes.

    Args:
        model: on any device; a `FastDecoder` gives the same tokens sooner, and brings its own
            compute dtype and vocabulary.
        tokenizer: the one the model was trained with.
        prompts_ids: token ids of each prompt, with whatever stands before a text.
        options: of all rows.
        num_likeliest: see `stream_tokens`.
        compute_dtype: of the forward pass; logits are float32.

    Yields:
        One list a step: what each row that was still going wrote. A row's last has `stopped`.
        All texts of a row one after the other are its answer.

    Raises:
        UsageError: a prompt leaves no room in the context.
        DivergedError: the logits are not finite.
    """
    streams = [TextStream(tokenizer, stop=options.stop) for _ in prompts_ids]
    pieces = [""] * len(streams)

    def is_last(row: int, token_id: int) -> bool:
        pieces[row] = streams[row].add(token_id)
        return streams[row].is_stopped

    tokens = stream_tokens(
        model,
        prompts_ids,
        options.decoding,
        end_ids=frozenset({tokenizer.end_of_text_id}),
        vocab_size=tokenizer.vocab_size,
        seeds=row_seeds(prompts_ids, seed=options.seed),
        num_likeliest=num_likeliest,
        compute_dtype=compute_dtype,
        is_last=is_last,
    )
    try:
        for step in tokens:
            new = []
            for token in step:
                text = "" if token.stopped == END_OF_TEXT else pieces[token.row]
                if token.stopped:
                    text += streams[token.row].finish()
                new.append(NewText(token.row, text, token, token.stopped))
            yield new
    finally:
        tokens.close()


@torch.inference_mode()
def stream_tokens(
    model: Llama | FastDecoder,
    prompts_ids: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    end_ids: frozenset[int],
    vocab_size: int,
    seeds: Sequence[int] | None = None,
    num_likeliest: int | None = None,
    compute_dtype: torch.dtype = torch.float32,
    is_last: Callable[[int, int], bool] | None = None,
) -> Generator[list[NewToken], None, None]:
    """Continues all prompts side by side: one pass over the prompts, then a token a row a pass.

    Args:
        model: on any device; a `FastDecoder` gives the same tokens sooner, and brings its own
            compute dtype and vocabulary.
        prompts_ids: token ids of each prompt; not empty, shorter than the model's context.
        decoding: how tokens are chosen.
        end_ids: tokens that end a row.
        vocab_size: of the tokenizer; ids beyond it pad the model's vocabulary and are not drawn.
        seeds: of each row's own random stream; None at temperature 0.
        num_likeliest: log probabilities of the token and of so many of the likeliest are given
            as well; None: of none.
        compute_dtype: of the forward pass; logits are float32.
        is_last: asked with row and token after each token that does not end its row by itself.

    Yields:
        One list a step, a token of each row that was still going, in order of rows.

    Raises:
        UsageError: a prompt is empty or leaves no room in the context.
        DivergedError: the logits are not finite.
    """
    assert seeds is not None or decoding.temperature == 0, "draws need seeds"
    decoder: Decoder = (
        PlainDecoder(model, compute_dtype=compute_dtype, vocab_size=vocab_size)
        if isinstance(model, Llama)
        else model
    )
    context = decoder.config.max_position_embeddings
    _check_prompts(prompts_ids, context=context)
    rows = [
        _Row(row, list(ids), _generator(seeds, row), decoding.max_new_tokens)
        for row, ids in enumerate(prompts_ids)
    ]
    if not rows:
        return
    cache, last_BD = _prefilled(decoder, rows, max_new_tokens=decoding.max_new_tokens)
    while True:
        chosen, logits_BV = _choose(decoder, last_BD, rows, decoding, num_likeliest)
        new = [
            _new_token(row, token_id, end_ids=end_ids, context=context, is_last=is_last)
            for row, token_id in zip(rows, chosen, strict=True)
        ]
        yield new if num_likeliest is None else _with_likeliest(new, logits_BV, num_likeliest)
        going = [place for place, token in enumerate(new) if token.stopped is None]
        if not going:
            return
        if len(going) < len(rows):
            cache.keep(going)
            rows = [rows[place] for place in going]
        newest_B = torch.tensor([new[place].token_id for place in going], device=last_BD.device)
        last_BD = decoder.step(newest_B, cache)


def row_seeds(names: Sequence[Sequence[int] | str], *, seed: int) -> list[int]:
    """A seed for each row's random stream.

    It depends on the seed, the row's name and how often the same name came before it, not on
    its neighbors.
    """
    seen: Counter[Sequence[int] | str] = Counter()
    seeds = []
    for given in names:
        name = given if isinstance(given, str) else tuple(given)
        text = name if isinstance(name, str) else " ".join(map(str, name))
        seeds.append(derive_seed(seed, "completion", text, seen[name]))
        seen[name] += 1
    return seeds


def _prefilled(
    decoder: Decoder, rows: list[_Row], *, max_new_tokens: int
) -> tuple[KVCache, Tensor]:
    """All prompts in one pass: their cache, and the hidden state [B, D] of each one's last."""
    lengths = [len(row.prompt_ids) for row in rows]
    longest = max(lengths)
    cache = KVCache(
        decoder.config,
        num_rows=len(rows),
        capacity=min(decoder.config.max_position_embeddings, longest + max_new_tokens),
        dtype=decoder.compute_dtype,
        device=decoder.device,
    )
    # What pads a row on the right is cut off below, so it may be any id.
    ids = [row.prompt_ids + [0] * (longest - len(row.prompt_ids)) for row in rows]
    hidden_BTD = decoder.read(torch.tensor(ids, device=decoder.device), cache)
    cache.cut(lengths)
    return cache, hidden_BTD[range(len(rows)), [length - 1 for length in lengths]]


def _choose(
    decoder: Decoder,
    last_BD: Tensor,
    rows: list[_Row],
    decoding: Decoding,
    num_likeliest: int | None,
) -> tuple[list[int], Tensor | None]:
    """The next token of each row; and the logits, unless nobody needs them."""
    if decoding.temperature == 0 and num_likeliest is None:
        return decoder.likeliest(last_BD), None
    logits_BV = decoder.logits(last_BD)
    generators = [row.generator for row in rows]
    return next_tokens(logits_BV, decoding=decoding, generators=generators), logits_BV


def _new_token(
    row: _Row,
    token_id: int,
    *,
    end_ids: frozenset[int],
    context: int,
    is_last: Callable[[int, int], bool] | None,
) -> NewToken:
    row.num_new += 1
    if token_id in end_ids:
        stopped: str | None = END_OF_TEXT
    elif is_last is not None and is_last(row.row, token_id):
        stopped = STOP
    elif row.num_new == row.limit:
        stopped = MAX_NEW_TOKENS
    elif len(row.prompt_ids) + row.num_new == context:
        stopped = CONTEXT
    else:
        stopped = None
    return NewToken(row.row, token_id, stopped)


def _with_likeliest(new: list[NewToken], logits_BV: Tensor | None, count: int) -> list[NewToken]:
    assert logits_BV is not None
    nats_BV = logits_BV.log_softmax(dim=1)
    values_BC, ids_BC = nats_BV.topk(min(count, nats_BV.shape[1]), dim=1)
    likeliest = zip(ids_BC.tolist(), values_BC.tolist(), strict=True)
    return [
        replace(
            token,
            log_probability=float(nats_BV[place, token.token_id]),
            likeliest=tuple(zip(ids, values, strict=True)),
        )
        for place, (token, (ids, values)) in enumerate(zip(new, likeliest, strict=True))
    ]


def _generator(seeds: Sequence[int] | None, row: int) -> torch.Generator:
    generator = torch.Generator()
    return generator if seeds is None else generator.manual_seed(seeds[row])


def _check_prompts(prompts_ids: Sequence[Sequence[int]], *, context: int) -> None:
    for number, ids in enumerate(prompts_ids, start=1):
        if not ids:
            raise UsageError(
                f"prompt {number} has no tokens", hint="begin it with the end-of-text token"
            )
        if len(ids) >= context:
            raise UsageError(
                f"prompt {number} has {len(ids)} tokens; the model's context is {context}",
                hint=f"shorten it to at most {context - 1} tokens",
            )
