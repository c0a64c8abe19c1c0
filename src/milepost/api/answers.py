"""Answers a request: prompts to tokens, what is asked about them, and the completions in pieces."""

from __future__ import annotations

import functools
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from milepost.api.catalog import NamedModel
from milepost.api.library import Library, ServedModel
from milepost.api.prompt_scores import ScoredToken, score_prompts
from milepost.api.refusals import RefusedError, too_long
from milepost.api.requests import Request
from milepost.core.errors import DataError
from milepost.core.seeds import derive_seed
from milepost.inference.stream import (
    CONTEXT,
    END_OF_TEXT,
    MAX_NEW_TOKENS,
    STOP,
    NewText,
    SamplingOptions,
    stream_text,
)
from milepost.inference.text_stream import TextStream
from milepost.text.chat_template import vicuna

ROWS_AT_ONCE = 16
POSITIONS_AT_ONCE = 1 << 14
"""Of the completions that a request has decoded side by side; more come one batch after the other.

A position takes 147 kB of cache in the recipe dmas-1.7b, float32: 2.4 GB for so many."""


@dataclass(frozen=True)
class Opened:
    """A request that will be answered.

    Attributes:
        model: the name of the model, with its step.
        fingerprint: of the model.
        prompt_tokens: tokens of all prompts.
    """

    model: str
    fingerprint: str
    prompt_tokens: int


@dataclass(frozen=True)
class TokenScore:
    """A token as a client sees it.

    Attributes:
        text: of the token alone; one that is no whole character is named by its id.
        offset: characters of the completion's text before it.
        log_probability: natural logarithm; None where nothing stands before it.
        likeliest: text and log probability of the likeliest, and of the token itself.
    """

    text: str
    offset: int
    log_probability: float | None
    likeliest: dict[str, float] | None


@dataclass(frozen=True)
class Piece:
    """A part of one completion.

    Attributes:
        choice: which completion.
        text: what is added to its text, perhaps "".
        tokens: their scores, where they were asked for.
        num_tokens: how many tokens were made for it.
        finish_reason: "stop" (end of text, a stop text) or "length" in the last piece.
    """

    choice: int
    text: str
    tokens: tuple[TokenScore, ...] = ()
    num_tokens: int = 0
    finish_reason: str | None = None


Told = Opened | Piece


@dataclass(frozen=True)
class _Prompt:
    """Token ids of a prompt.

    Attributes:
        ids: with what stands before a text.
        num_hidden: how many of the first are not the client's and are never echoed.
    """

    ids: tuple[int, ...]
    num_hidden: int

    @property
    def own_ids(self) -> tuple[int, ...]:
        """The client's."""
        return self.ids[self.num_hidden :]


def answer(
    request: Request, *, wanted: NamedModel, library: Library, fresh_seed: int
) -> Generator[Told, None, None]:
    """Answers step by step; closing it ends the work.

    Args:
        request: what is asked.
        wanted: the model that its name means.
        library: where models are read.
        fresh_seed: of the draws where the request names none.

    Yields:
        `Opened`, then pieces; of each completion the last has a finish_reason.

    Raises:
        RefusedError: the prompt does not fit or cannot be read, or there is no such model.
        DivergedError: the logits are not finite.
    """
    served = library.get(wanted)
    prompts = _prompts(request, served)
    yield Opened(served.name, served.fingerprint, sum(len(prompt.ids) for prompt in prompts))
    rows = [prompt for prompt in prompts for _ in range(request.num_choices)]
    seed = fresh_seed if request.seed is None else request.seed
    num_at_once = _rows_at_once(request, prompts, context=served.context)
    for start in range(0, len(rows), num_at_once):
        batch = _Batch(
            request,
            served,
            rows[start : start + num_at_once],
            first_choice=start,
            # A prompt that comes again in another batch is to be continued in another way.
            seed=derive_seed(seed, "rows", start) if start else seed,
        )
        yield from batch.answer()


def _rows_at_once(request: Request, prompts: Sequence[_Prompt], *, context: int) -> int:
    num_new = context if request.max_tokens is None else request.max_tokens
    longest = max(len(prompt.ids) for prompt in prompts) + num_new
    return max(1, min(ROWS_AT_ONCE, POSITIONS_AT_ONCE // min(longest, context)))


def _prompts(request: Request, served: ServedModel) -> list[_Prompt]:
    num_free = 0 if request.max_tokens == 0 else 1
    found: list[_Prompt] = []
    refuse = functools.partial(
        too_long, context=served.context, num_free=num_free, param=_param(request)
    )
    # Megabytes take seconds to encode, in which nobody else is answered.
    for number, text in enumerate(_texts(request), start=1):
        fewest = served.tokenizer.fewest_tokens(text)
        if fewest > served.context:
            raise refuse(f"at least {fewest}", where=_where(request, number))
    for number, prompt in enumerate(_encoded(request, served), start=1):
        if len(prompt.ids) > served.context - num_free:
            raise refuse(str(len(prompt.ids)), where=_where(request, number))
        found.append(prompt)
    return found


def _texts(request: Request) -> list[str]:
    """What is to be encoded: each prompt that is a text; of a chat all messages as one."""
    if request.messages is not None:
        return ["".join(message.content for message in request.messages)]
    return [prompt if isinstance(prompt, str) else "" for prompt in request.prompts]


def _param(request: Request) -> str:
    return "prompt" if request.messages is None else "messages"


def _where(request: Request, number: int) -> str:
    if request.messages is not None:
        return "the conversation"
    return "the prompt" if len(request.prompts) < 2 else f"prompt {number}"


def _encoded(request: Request, served: ServedModel) -> Generator[_Prompt, None, None]:
    tokenizer = served.tokenizer
    try:
        if request.messages is not None:
            chat = (served.template or vicuna()).encode(
                request.messages, tokenizer=tokenizer, add_generation_prompt=True
            )
            yield _Prompt(tuple(chat.ids.tolist()), 0)
        for prompt in request.prompts:
            if isinstance(prompt, str):
                # As in training and in `milepost sample`, where it stands before each document.
                yield _Prompt((tokenizer.end_of_text_id, *tokenizer.encode(prompt)), 1)
            else:
                _check_ids(prompt, vocab_size=tokenizer.vocab_size)
                yield _Prompt(prompt, 0)
    except DataError as error:
        raise RefusedError(error.message, param=_param(request)) from error


def _check_ids(ids: Sequence[int], *, vocab_size: int) -> None:
    if max(ids) >= vocab_size:
        raise RefusedError(
            f"token id {max(ids)} is not in the vocabulary of {vocab_size}", param="prompt"
        )


class _Batch:
    """Completions that are decoded side by side."""

    def __init__(
        self,
        request: Request,
        served: ServedModel,
        prompts: Sequence[_Prompt],
        *,
        first_choice: int,
        seed: int,
    ) -> None:
        self._request = request
        self._served = served
        self._prompts = prompts
        self._first_choice = first_choice
        self._seed = seed
        self._offsets = [_Offsets(served) for _ in prompts]
        # An answer begins with the space that the template leaves to it.
        self._is_blank = [request.messages is not None] * len(prompts)

    def answer(self) -> Generator[Piece, None, None]:
        """The pieces of all of them."""
        if self._request.echo:
            yield from self._echo()
        if self._request.max_tokens == 0:
            return
        steps = stream_text(
            self._served.decoder,
            self._served.tokenizer,
            [prompt.ids for prompt in self._prompts],
            self._options(),
            num_likeliest=self._request.num_likeliest,
        )
        try:
            for step in steps:
                yield from [self._piece(new) for new in step]
        finally:
            steps.close()

    def _options(self) -> SamplingOptions:
        request = self._request
        return SamplingOptions(
            # A chat's answer ends where the context does.
            max_new_tokens=request.max_tokens or self._served.context,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            seed=self._seed,
            stop=request.stop,
        )

    def _piece(self, new: NewText) -> Piece:
        text = new.text
        if self._is_blank[new.row]:
            text = text.lstrip()
            self._is_blank[new.row] = not text
        tokens: tuple[TokenScore, ...] = ()
        if new.token.log_probability is not None:
            token = ScoredToken(new.token.token_id, new.token.log_probability, new.token.likeliest)
            tokens = (self._offsets[new.row].add(token),)
        return Piece(
            choice=self._first_choice + new.row,
            text=text,
            tokens=tokens,
            num_tokens=1,
            finish_reason=_FINISH_REASONS[new.stopped] if new.stopped else None,
        )

    def _echo(self) -> Generator[Piece, None, None]:
        scored: list[list[ScoredToken]] = [[] for _ in self._prompts]
        if self._request.num_likeliest is not None:
            scored = score_prompts(
                self._served.decoder.model,
                [prompt.ids for prompt in self._prompts],
                num_likeliest=self._request.num_likeliest,
                vocab_size=self._served.tokenizer.vocab_size,
                compute_dtype=self._served.decoder.compute_dtype,
            )
        for row, (prompt, tokens) in enumerate(zip(self._prompts, scored, strict=True)):
            add = self._offsets[row].add
            yield Piece(
                choice=self._first_choice + row,
                text=self._served.tokenizer.decode(prompt.own_ids),
                tokens=tuple(add(token) for token in tokens[prompt.num_hidden :]),
                finish_reason="length" if self._request.max_tokens == 0 else None,
            )


_FINISH_REASONS = {END_OF_TEXT: "stop", STOP: "stop", MAX_NEW_TOKENS: "length", CONTEXT: "length"}


class _Offsets:
    """Says where in the text each token begins, and what it is called."""

    def __init__(self, served: ServedModel) -> None:
        self._tokenizer = served.tokenizer
        self._stream = TextStream(served.tokenizer, stop=())
        self._num_characters = 0

    def add(self, token: ScoredToken) -> TokenScore:
        """The next token of a completion."""
        offset = self._num_characters
        self._num_characters += len(self._stream.add(token.token_id))
        likeliest = None
        if token.log_probability is not None:
            both = (*token.likeliest, (token.token_id, token.log_probability))
            likeliest = dict[str, float]()
            for token_id, value in both:
                likeliest.setdefault(self._name(token_id), value)
        return TokenScore(self._name(token.token_id), offset, token.log_probability, likeliest)

    def _name(self, token_id: int) -> str:
        text = self._tokenizer.decode([token_id])
        return f"token_id:{token_id}" if "\ufffd" in text or not text else text
