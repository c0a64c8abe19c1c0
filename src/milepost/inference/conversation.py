"""What was said so far, and how much of it a model's context takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from milepost.core.errors import UsageError
from milepost.text.chat_template import ChatTemplate, Message
from milepost.text.tokenizer import Tokenizer

_ROOM_FRACTION = 0.25
"""Of the context at most, which is kept free for an answer; more is used where it is free."""


@dataclass(frozen=True)
class Turn:
    """A question with its answer."""

    question: str
    answer: str


class Conversation:
    """Turns that grow at one end and are forgotten at the other.

    Attributes:
        system: what the model is told first; None: what the template says by itself.
        turns: as far as they are not forgotten.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self.system: str | None = None
        self.turns: list[Turn] = []
        self._template = template

    def prompt_ids(
        self, question: str, *, tokenizer: Tokenizer, context: int, max_new_tokens: int
    ) -> tuple[list[int], int]:
        """The tokens after which the answer begins.

        Turns that leave no room for an answer are forgotten, the first ones first.

        Args:
            question: not in `turns` yet.
            tokenizer: of the model.
            context: of the model, in tokens.
            max_new_tokens: most tokens of the answer; a quarter of the context is kept free at
                most.

        Returns:
            (token ids, how many turns were forgotten).

        Raises:
            UsageError: the question alone fills the context; nothing is forgotten.
            DataError: the template refuses a message.
        """
        most = context - max(1, min(max_new_tokens, int(context * _ROOM_FRACTION)))
        for num_forgotten in range(len(self.turns) + 1):
            messages = [*self._messages(num_forgotten), Message("user", question)]
            ids = self._template.encode(
                messages, tokenizer=tokenizer, add_generation_prompt=True
            ).ids.tolist()
            if len(ids) <= most:
                del self.turns[:num_forgotten]
                return ids, num_forgotten
        raise UsageError(
            f"the question takes {len(ids)} tokens with the template; of the model's context of "
            f"{context}, {most} are for questions",
            hint="ask a shorter one",
        )

    def _messages(self, first: int) -> Iterator[Message]:
        if self.system is not None:
            yield Message("system", self.system)
        for turn in self.turns[first:]:
            yield Message("user", turn.question)
            yield Message("assistant", turn.answer)
