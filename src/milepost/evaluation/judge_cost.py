"""What judging costs, and where it stops."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from milepost.core.errors import UsageError
from milepost.evaluation.judge_replies import Reply


@dataclass(frozen=True)
class Prices:
    """Money for a million tokens, in whatever currency; what is asked and what is said."""

    asked: float
    said: float

    def of(self, tokens: tuple[int, int]) -> float:
        """The price of so many tokens asked and said."""
        return (tokens[0] * self.asked + tokens[1] * self.said) / 1e6


def parse_prices(text: str) -> Prices:
    """Reads `IN,OUT`.

    Raises:
        UsageError: the text is not two prices.
    """
    try:
        asked, said = (float(part) for part in text.split(","))
    except ValueError:
        asked = said = -1.0
    if not (0 <= asked < float("inf") and 0 <= said < float("inf")):
        raise UsageError(
            f"--prices {text!r} is not two prices",
            hint="give those of a million tokens in and out, such as 2.50,10",
        )
    return Prices(asked, said)


class BudgetSpentError(Exception):
    """The next question could cost more than what is left."""


class Budget:
    """Counts what was spent and keeps it under a limit, with several questions under way.

    Before a question is sent, the most that it can cost is set aside; when its reply is there, what
    it did cost is counted in its place.
    """

    def __init__(self, *, prices: Prices | None, limit: float | None) -> None:
        """Nothing is spent yet.

        Args:
            prices: None: only tokens are counted.
            limit: needs prices; None: no limit.
        """
        assert limit is None or prices is not None
        self.num_asked_tokens = 0
        self.num_said_tokens = 0
        self.num_uncounted = 0
        self._prices = prices
        self._limit = limit
        self._spent = 0.0
        self._set_aside = 0.0
        self._changed = asyncio.Condition()

    @property
    def cost(self) -> float | None:
        """Money spent; None without prices. A reply without counts is taken at its most."""
        return None if self._prices is None else self._spent

    async def set_aside(self, most_tokens: tuple[int, int]) -> float:
        """Waits until a question of at most so many tokens fits.

        Returns:
            What was set aside, for `settle`.

        Raises:
            BudgetSpentError: it does not fit, with nothing else under way.
        """
        most = 0.0 if self._prices is None else self._prices.of(most_tokens)
        async with self._changed:
            while self._limit is not None and self._spent + self._set_aside + most > self._limit:
                if self._set_aside == 0:
                    raise BudgetSpentError
                await self._changed.wait()
            self._set_aside += most
        return most

    async def settle(self, amount: float, *, reply: Reply | None) -> None:
        """Counts a reply in the place of what was set aside for it; None: there is none."""
        async with self._changed:
            self._set_aside = max(0.0, self._set_aside - amount)
            tokens = None if reply is None else reply.tokens
            if tokens is not None:
                self.num_asked_tokens += tokens[0]
                self.num_said_tokens += tokens[1]
                self._spent += 0.0 if self._prices is None else self._prices.of(tokens)
            elif reply is not None:
                self.num_uncounted += 1
                self._spent += amount
            self._changed.notify_all()
