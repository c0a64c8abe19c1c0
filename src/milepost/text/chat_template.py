"""Conversations as the text a model reads, and as its token ids.

The template is jinja, the same text that a checkpoint holds as chat_template.jinja, so what is
trained, what is chatted with and what transformers renders are one thing. A message never
becomes a control token, whatever it holds: control tokens are put in by the template alone.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import numpy as np

from milepost.core.errors import DataError, UsageError
from milepost.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import jinja2

Role = Literal["system", "user", "assistant"]

DEFAULT_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""Vicuna 1.1's system sentence (Zheng et al. 2023), for conversations that bring none."""

VICUNA = "vicuna-1.1"
VICUNA_JINJA = (
    '{%- set system = "' + DEFAULT_SYSTEM + '" %}\n'
    "{%- set turns = messages %}\n"
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {%- set system = messages[0]['content'] | trim %}\n"
    "    {%- set turns = messages[1:] %}\n"
    "{%- endif %}\n"
    "{{- system + ' ' if system else '' }}\n"
    "{%- for message in turns %}\n"
    "    {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}\n"
    "        {{- raise_exception('user and assistant take turns, and the user begins') }}\n"
    "    {%- elif message['role'] == 'user' %}\n"
    "        {{- 'USER: ' + message['content'] | trim }}\n"
    "    {%- else %}\n"
    "        {{- ' ASSISTANT:' }}\n"
    "        {%- generation %}\n"
    "            {{- ' ' + message['content'] | trim + eos_token }}\n"
    "        {%- endgeneration %}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {%- if messages[-1]['role'] != 'user' %}\n"
    "        {{- raise_exception('there is no question to answer: the last message is not of "
    "the user') }}\n"
    "    {%- endif %}\n"
    "    {{- ' ASSISTANT:' }}\n"
    "{%- endif %}\n"
)
"""Vicuna 1.1 (Zheng et al. 2023) with the tokenizer's end-of-text token behind each answer:
`SYSTEM USER: question ASSISTANT: answer<|endoftext|>`. The generation block is what is trained."""

_MARK = re.compile("\0\\[([a-z]+)\\]\0")
_MARKS = {name: f"\0[{name}]\0" for name in ("end", "beginning", "answer", "other")}
"""What stands in the rendered text for control tokens and the borders of answers; messages
hold no NUL, so none of these can come from a message."""

_FAILURES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What the expressions of a template raise beside jinja's own errors."""

_BREAK = "\0"
"""Stands inside what only looks like a control token, in a message, until it is rendered."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as a model reads it.

    Attributes:
        ids: int32 [n].
        is_answer: bool [n], True for the tokens of answers and the end-of-text token behind
            each: what fine-tuning trains.
    """

    ids: np.ndarray
    is_answer: np.ndarray


@dataclass(frozen=True)
class _Piece:
    """A part of a rendered conversation.

    Attributes:
        text: empty for a control token.
        control: which control token: "end", "beginning", or its name; None for a text.
        is_answer: whether it is trained.
    """

    text: str
    control: str | None
    is_answer: bool


class ChatTemplate:
    """A chat template in jinja, as transformers renders it.

    Attributes:
        name: what it is called in messages.
        source: the jinja text, as a checkpoint keeps it.
    """

    def __init__(self, source: str, *, name: str) -> None:
        """Parses the template.

        Raises:
            UsageError: it does not parse.
        """
        import jinja2

        self.name = name
        self.source = source
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(
                f"the chat template {name} does not parse: line {error.lineno}: {error.message}",
                hint="mend it, or use vicuna-1.1",
            ) from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, eos: str) -> str:
        """The text of a conversation.

        Args:
            messages: one or more.
            add_generation_prompt: whether to end where the next answer begins.
            eos: what stands for control tokens, at the end of an answer or at the beginning.

        Raises:
            DataError: the template refuses the conversation, or a message holds a NUL character.
        """
        _check(messages)
        rendered = self._rendered(messages, add_generation_prompt=add_generation_prompt)
        pieces = _split(rendered, controls=())
        return "".join(eos if piece.control else piece.text for piece in pieces)

    def encode(
        self, messages: Sequence[Message], *, tokenizer: Tokenizer, add_generation_prompt: bool
    ) -> EncodedChat:
        """The token ids of a conversation.

        Where an answer begins, the tokens before it are those of the prompt alone: training sees
        the tokens that generation will. Control tokens are those that the template puts in.

        Raises:
            DataError: as `render`, or a message holds a lone surrogate.
        """
        _check(messages)
        shielded = [Message(m.role, _shielded(m.content, tokenizer)) for m in messages]
        rendered = self._rendered(shielded, add_generation_prompt=add_generation_prompt)
        ids: list[int] = []
        is_answer: list[bool] = []
        for run in _runs(_split(rendered, controls=tokenizer.control_ids)):
            for piece, piece_ids in zip(run, _encode_run(run, tokenizer), strict=True):
                ids += piece_ids
                is_answer += [piece.is_answer] * len(piece_ids)
        return EncodedChat(np.array(ids, dtype=np.int32), np.array(is_answer, dtype=bool))

    def _rendered(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """What the template makes of messages, with marks."""
        import jinja2

        try:
            return self._template.render(
                messages=[{"role": m.role, "content": m.content} for m in messages],
                add_generation_prompt=add_generation_prompt,
                eos_token=_MARKS["end"],
                bos_token=_MARKS["beginning"],
            )
        except (jinja2.TemplateError, *_FAILURES) as error:
            raise DataError(
                f"the chat template {self.name} refuses this conversation: "
                f"{error or type(error).__name__}",
                hint="mend the template, or use vicuna-1.1",
            ) from error


@functools.cache
def vicuna() -> ChatTemplate:
    """Vicuna 1.1, with which Milepost fine-tunes by default."""
    return ChatTemplate(VICUNA_JINJA, name=VICUNA)


def load_template(spec: str) -> ChatTemplate:
    """A chat template by name or path.

    Args:
        spec: "vicuna-1.1", or the path of a file in jinja.

    Raises:
        UsageError: there is none of that name, or it does not parse.
    """
    if spec == VICUNA:
        return vicuna()
    try:
        source = Path(spec).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UsageError(
            f"the chat template {spec!r} cannot be read: {reason}",
            hint=f"give {VICUNA}, or the path of a .jinja file",
        ) from error
    return ChatTemplate(source, name=Path(spec).name)


def render(
    messages: Sequence[Message], *, add_generation_prompt: bool, eos: str = "<|endoftext|>"
) -> str:
    """The text of a conversation in Vicuna 1.1; see `ChatTemplate.render`."""
    return vicuna().render(messages, add_generation_prompt=add_generation_prompt, eos=eos)


def encode(
    messages: Sequence[Message], *, tokenizer: Tokenizer, add_generation_prompt: bool
) -> EncodedChat:
    """The token ids of a conversation in Vicuna 1.1; see `ChatTemplate.encode`."""
    return vicuna().encode(
        messages, tokenizer=tokenizer, add_generation_prompt=add_generation_prompt
    )


@functools.cache
def _environment() -> jinja2.Environment:
    """Jinja set up as transformers does: templates of others are code that is not trusted."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class AnswerBorders(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %}: marks put around what is between."""

        tags: set[str] = {"generation"}  # noqa: RUF012 (as its base has it)

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_marked")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _marked(self, caller: jinja2.runtime.Macro) -> str:
            return _MARKS["answer"] + caller() + _MARKS["other"]

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[AnswerBorders, "jinja2.ext.loopcontrols"],
    )
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _raise_exception(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise DataError("the conversation has no message", hint="begin with a question")
    for message in messages:
        if "\0" in message.content:
            place = message.content.index("\0")
            raise DataError(
                f"a message of the {message.role} holds a NUL character at character {place}",
                hint="take it out",
            )


def _shielded(content: str, tokenizer: Tokenizer) -> str:
    """A message in which nothing looks like a control token to `_split`, which undoes it."""
    return _pattern(frozenset(tokenizer.control_ids)).sub(
        lambda match: match[0][0] + _BREAK + match[0][1:], content
    )


@functools.lru_cache(maxsize=16)
def _pattern(controls: frozenset[str]) -> re.Pattern[str]:
    """What finds control tokens in a text; a name of one character is only text."""
    names = sorted((name for name in controls if len(name) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def _split(rendered: str, *, controls: Collection[str]) -> Iterator[_Piece]:
    """The parts of what a template rendered, at its marks and control tokens."""
    pattern = _pattern(frozenset(controls))
    is_answer = False
    for number, part in enumerate(_MARK.split(rendered)):
        if number % 2 == 0:
            start = 0
            for match in pattern.finditer(part):
                yield from _text(part[start : match.start()], is_answer)
                yield _Piece("", match[0], is_answer)
                start = match.end()
            yield from _text(part[start:], is_answer)
        elif part in ("answer", "other"):
            is_answer = part == "answer"
        else:
            yield _Piece("", part, is_answer)


def _text(text: str, is_answer: bool) -> Iterator[_Piece]:
    if text:
        yield _Piece(text.replace(_BREAK, ""), None, is_answer)


def _runs(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces of text that stand side by side together, each control token alone."""
    run: list[_Piece] = []
    for piece in pieces:
        if piece.control:
            if run:
                yield run
            yield [piece]
            run = []
        else:
            run.append(piece)
    if run:
        yield run


def _encode_run(run: Sequence[_Piece], tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of each piece of a run."""
    if run[0].control:
        own = {"end": tokenizer.end_of_text_id, "beginning": tokenizer.beginning_id}
        return [[(tokenizer.control_ids | own)[run[0].control]]]
    ids: list[list[int]] = []
    done: list[int] = []
    text = ""
    for piece in run:
        text += piece.text
        whole = tokenizer.encode(text)
        if whole[: len(done)] == done:
            ids.append(whole[len(done) :])
        else:  # a token would span the border, which generation cannot make
            ids.append(tokenizer.encode(piece.text))
        done += ids[-1]
    return ids
