"""A conversation at the terminal or through a pipe: questions, answers, commands."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from milepost.cli.chat_commands import COMMANDS, help_lines, parse_value
from milepost.core import console
from milepost.core.errors import MilepostError, UsageError
from milepost.inference.chat_model import ChatModel
from milepost.inference.conversation import Conversation, Turn
from milepost.inference.stream import (
    CONTEXT,
    MAX_NEW_TOKENS,
    SamplingOptions,
    stream_text,
)
from milepost.runs.layout import RunLayout
from milepost.runs.steps import available_steps, describe_steps, is_run
from milepost.text.chat_template import vicuna

INTERRUPTED = "interrupted"

_WHY_CUT = {
    MAX_NEW_TOKENS: "cut off after {tokens} tokens; /max-new-tokens allows more",
    CONTEXT: "cut off: the model's context is full; /reset begins anew",
    INTERRUPTED: "stopped after {tokens} tokens",
}

_NEXT_SPEAKER = "USER:"
"""Where a model that was never taught to end an answer goes on with the next question."""


@dataclass(frozen=True)
class Exchange:
    """A question and its answer, as they are recorded.

    Attributes:
        step: of the checkpoint that answered.
        question: as it was typed.
        answer: as far as it came.
        stopped: why it ended; see `NewToken.stopped`, or "interrupted".
        num_tokens: of the answer.
        seconds: from question to end.
    """

    step: int | None
    question: str
    answer: str
    stopped: str
    num_tokens: int
    seconds: float


class ChatSession:
    """One conversation from its first question to its end."""

    def __init__(
        self,
        opened: ChatModel,
        options: SamplingOptions,
        *,
        is_raw: bool,
        is_silent: bool,
        load: Callable[[int], ChatModel],
        steps_of: Path,
    ) -> None:
        """Begins with nothing said.

        Args:
            opened: the model.
            options: how it answers; commands change them.
            is_raw: each line is a text to continue, without template and history.
            is_silent: answers are kept for `record` only.
            load: the model at another step.
            steps_of: the run that has the steps.
        """
        self._opened = opened
        self._options = options
        self._is_raw = is_raw
        self._is_silent = is_silent
        self._load = load
        self._steps_of = steps_of
        self._conversation = Conversation(opened.template or vicuna())
        self._exchanges: list[Exchange] = []

    def set_system(self, text: str | None) -> None:
        """Tells the model something before the conversation; None: what its template says."""
        self._conversation.system = text

    def record(self) -> dict[str, Any]:
        """What was said, and how."""
        return {
            "model": str(self._opened.folder),
            "template": None if self._is_raw else (self._opened.template or vicuna()).name,
            "options": asdict(self._options),
            "exchanges": [asdict(exchange) for exchange in self._exchanges],
        }

    def run(self) -> None:
        """Takes lines until they end or /quit.

        Raises:
            MilepostError: through a pipe, whatever goes wrong; at a terminal it is said and the
                conversation goes on.
        """
        self._introduce()
        while True:
            try:
                line = console.ask("> ")
                if line is None or not self._take(line):
                    return
            except KeyboardInterrupt:
                if not console.is_terminal():
                    raise
                console.say("\nCtrl-D or /quit ends")
            except MilepostError as error:
                if not console.is_terminal():
                    raise
                console.say_error(error)

    def _introduce(self) -> None:
        decoder = self._opened.decoder
        console.say(
            f"{self._opened.folder}: a context of {decoder.config.max_position_embeddings:,} "
            f"tokens, computed in {str(decoder.compute_dtype).removeprefix('torch.')}"
        )
        if self._is_raw:
            console.say("raw: each line is continued as it is, with no memory of the ones before")
        elif self._opened.template is None:
            console.warn(
                "the model's files hold no chat template, so it was not tuned to converse; it is "
                "asked in Vicuna 1.1, and cut off where it goes on as the user. --raw has it "
                "continue texts instead"
            )
        if console.is_terminal():
            console.say("Ctrl-C stops an answer, Ctrl-D ends, /help shows the commands")

    def _take(self, line: str) -> bool:
        """One line; False where it ends the conversation."""
        if line.startswith("/"):
            return self._obey(line)
        if line.strip():
            self._answer(line)
        return True

    def _obey(self, line: str) -> bool:
        """One command; False where it ends the conversation."""
        name, _, argument = line[1:].strip().partition(" ")
        argument = argument.strip()
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            raise UsageError(
                f"there is no command /{name}",
                hint=f"did you mean /{near[0]}?" if near else "/help shows all",
            )
        if COMMANDS[name].field is not None:
            self._set(name, argument)
        elif name == "help":
            for text in help_lines():
                console.say(text)
        elif name == "reset":
            self._conversation.turns.clear()
            console.say("the conversation is forgotten")
        elif name == "system":
            self._set_system(argument)
        elif name == "step":
            self._change_step(argument)
        elif name == "settings":
            console.say(", ".join(f"{key} {value}" for key, value in self._settings().items()))
        return name != "quit"

    def _set(self, name: str, argument: str) -> None:
        field, value = parse_value(name, argument)
        self._options = replace(self._options, **{field: value})
        console.say(f"{name} {self._settings()[name]}")

    def _settings(self) -> dict[str, Any]:
        fields = {name: command.field for name, command in COMMANDS.items() if command.field}
        values = {name: getattr(self._options, field) for name, field in fields.items()}
        return {name: "off" if value is None else value for name, value in values.items()}

    def _set_system(self, text: str) -> None:
        if self._is_raw:
            raise UsageError("there is no template to put it in", hint="start without --raw")
        self.set_system(text or None)
        console.say("the model is told so before the conversation" if text else "as the template")

    def _change_step(self, argument: str) -> None:
        if not is_run(self._steps_of):
            raise UsageError(
                f"{self._steps_of} is one model, it has no steps", hint="start with a run"
            )
        steps = describe_steps(available_steps(RunLayout(self._steps_of)))
        if not argument:
            console.say(f"step {self._opened.step}; {steps}")
            return
        if not (argument.isascii() and argument.isdigit()):
            raise UsageError(f"/step is given {argument!r}", hint=steps)
        self._opened = self._load(int(argument))
        kept = "; the conversation goes on" if self._conversation.turns else ""
        console.say(f"now step {self._opened.step}{kept}")

    def _answer(self, question: str) -> None:
        started = time.monotonic()
        answer, stopped, num_tokens = self._stream(self._prompt_ids(question))
        seconds = round(time.monotonic() - started, 3)
        if stopped in _WHY_CUT:
            console.say(f"({_WHY_CUT[stopped].format(tokens=num_tokens)})")
        elif not answer:
            console.say("(the model ended its answer before the first word)")
        if answer and not self._is_raw:
            self._conversation.turns.append(Turn(question, answer))
        self._exchanges.append(
            Exchange(self._opened.step, question, answer, stopped, num_tokens, seconds)
        )

    def _prompt_ids(self, question: str) -> list[int]:
        tokenizer, config = self._opened.tokenizer, self._opened.decoder.config
        if self._is_raw:
            return [tokenizer.end_of_text_id, *tokenizer.encode(question)]
        ids, num_forgotten = self._conversation.prompt_ids(
            question,
            tokenizer=tokenizer,
            context=config.max_position_embeddings,
            max_new_tokens=self._options.max_new_tokens,
        )
        if num_forgotten:
            turns = "the first turn" if num_forgotten == 1 else f"the first {num_forgotten} turns"
            console.say(f"(the context is full: {turns} of the conversation left it)")
        return ids

    def _stream(self, prompt_ids: list[int]) -> tuple[str, str, int]:
        """Shows an answer as it comes; its text, why it ended, and how many tokens it had."""
        answer, stopped, num_tokens = "", INTERRUPTED, 0
        speaks_for_both = not self._is_raw and self._opened.template is None
        steps = stream_text(
            self._opened.decoder,
            self._opened.tokenizer,
            [prompt_ids],
            replace(self._options, stop=(_NEXT_SPEAKER,) if speaks_for_both else ()),
        )
        try:
            for (new,) in steps:
                num_tokens += 1
                # The template has a space before each answer, which is no part of it.
                text = new.text if self._is_raw or answer else new.text.lstrip()
                answer += text
                self._show(text)
                stopped = new.stopped or stopped
        except KeyboardInterrupt:
            steps.close()
            if not console.is_terminal():  # nobody is there to ask the next question
                raise
        self._show("\n")
        return answer if self._is_raw else answer.rstrip(), stopped, num_tokens

    def _show(self, text: str) -> None:
        """A part of an answer; a model can write bytes that steer a terminal."""
        if text and not self._is_silent:
            plain = (c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
            console.show_piece("".join(plain))
