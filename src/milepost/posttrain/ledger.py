"""What became of the rows of instruction data: how many were used, and why the others were not."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

REASONS = {
    "empty_question": "with an empty question",
    "no_answer": "without an answer",
    "not_text": "with a message that is not text",
    "no_turns": "without messages",
    "unknown_role": "with an unknown role",
    "out_of_order": "with turns out of order",
    "unread_field": "with a field that is not read (history, tool_calls)",
    "unusable_character": "with a NUL character or half a character",
    "refused": "refused by the chat template",
    "never_ends": "with an answer that the chat template does not end",
    "too_long": "longer than a row",
}
"""Every reason a conversation may be left out for, as it is said after a number of them."""

LISTED_DROPS = 100
"""Drops of one reason that are listed one by one; the counts hold them all."""


@dataclass(frozen=True)
class Drop:
    """One conversation that was left out.

    Attributes:
        source: the file it came from.
        line: its line, or its row in a table or list, from 1.
        reason: one of `REASONS`.
        what: what was seen, for people.
    """

    source: str
    line: int
    reason: str
    what: str


@dataclass(frozen=True)
class Ledger:
    """The account of all rows that were read.

    Attributes:
        num_rows: read.
        drops: those that were left out, in order.
    """

    num_rows: int
    drops: tuple[Drop, ...] = ()

    @property
    def num_used(self) -> int:
        """Rows that became conversations which are used."""
        return self.num_rows - len(self.drops)

    @property
    def counts(self) -> dict[str, int]:
        """How many were left out for each reason that occurred, most frequent first."""
        return dict(Counter(drop.reason for drop in self.drops).most_common())

    def with_drops(self, drops: tuple[Drop, ...]) -> Ledger:
        """The account after more of its rows were left out."""
        return Ledger(self.num_rows, self.drops + drops)

    def summary(self) -> str:
        """One line for people: "17,998 of 18,001 rows used; left out: 3 without an answer"."""
        line = f"{self.num_used:,} of {self.num_rows:,} rows used"
        if not self.drops:
            return line
        reasons = ", ".join(f"{count:,} {REASONS[reason]}" for reason, count in self.counts.items())
        return f"{line}; left out: {reasons}"

    def record(self) -> dict[str, Any]:
        """As JSON: counts by reason, and the first drops of each reason with their places."""
        seen: Counter[str] = Counter()
        listed = []
        for drop in self.drops:
            seen[drop.reason] += 1
            if seen[drop.reason] <= LISTED_DROPS:
                listed.append(asdict(drop))
        return {
            "rows": self.num_rows,
            "used": self.num_used,
            "left_out": self.counts,
            "listed": listed,
        }
