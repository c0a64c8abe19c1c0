"""Text from tokens that come one at a time: never half a character, never part of a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from milepost.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_LONGEST_PART = 3
"""Bytes of a UTF-8 character that is not whole yet, so as many replacement characters."""

_CONTEXT_TOKENS = 4
"""Decoded again before new ones, since a tokenizer may treat the first of a text differently."""


class TextStream:
    """The text of one answer as far as later tokens cannot change it.

    All that `add` and `finish` return, one after the other, is the text of the tokens up to the
    first stop text.

    Attributes:
        is_stopped: a stop text was met; nothing more comes.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = ()) -> None:
        """Begins an answer.

        Args:
            tokenizer: that of the token ids.
            stop: texts that end the answer and are not part of it; none is empty.
        """
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._window: list[int] = []
        self._num_given = 0  # characters of the window's text that are past or in `_held`
        self._held = ""

    def add(self, token_id: int) -> str:
        """Takes a token; returns what is certain of the text and was not given before."""
        if self.is_stopped:
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        # An unfinished character shows as replacement characters at the end.
        unsure = len(text) - len(text.rstrip(_REPLACEMENT))
        certain = len(text) - min(unsure, _LONGEST_PART)
        self._held += text[self._num_given : certain]
        self._num_given = max(self._num_given, certain)
        if not unsure:
            self._window = self._window[-_CONTEXT_TOKENS:]
            self._num_given = len(self._tokenizer.decode(self._window))
        return self._release(self._first_that_may_stop())

    def finish(self) -> str:
        """No token comes after: returns what was held back."""
        if self.is_stopped:
            return ""
        self._held += self._tokenizer.decode(self._window)[self._num_given :]
        self._window, self._num_given = [], 0
        place = self._first_stop()
        return self._release(len(self._held) if place is None else place)

    def _release(self, length: int) -> str:
        """The first characters of what is held, and only those once a stop text was met."""
        given, self._held = self._held[:length], self._held[length:]
        return given

    def _first_stop(self) -> int | None:
        """Where the first stop text begins in what is held."""
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        self.is_stopped = bool(places)
        return min(places, default=None)

    def _first_that_may_stop(self) -> int:
        """How much of what is held cannot be part of a stop text."""
        place = self._first_stop()
        if place is not None:
            return place
        longest = max(map(len, self._stop), default=0)
        for start in range(max(0, len(self._held) - longest + 1), len(self._held)):
            if any(stop.startswith(self._held[start:]) for stop in self._stop):
                return start
        return len(self._held)
