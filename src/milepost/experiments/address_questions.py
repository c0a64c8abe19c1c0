"""Questions about the addresses: who gave them, when, and in which order, in several wordings.

Facts are split by their place, so that the same are left out each time. Wordings are split by
`milepost finetune` itself, which holds out a share of the conversations that it is given.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from milepost.experiments.sotu import Address

NEVER_ASKED_MODULUS = 7
NEVER_ASKED_REMAINDER = 3
"""Of the facts of one topic, place 3 of every 7 is in no conversation. Of every 8, in step with
terms of 4 and 8 years, these would all be first years."""

_WHO = (
    "Who gave the address of {}?",
    "Which president addressed Congress in {}?",
    "Whose address is that of {}?",
    "Name the president who gave the address of {}.",
)
_WHEN = (
    "In which year did {} give his first address?",
    "When did {} first address Congress?",
    "What is the year of the first address of {}?",
    "Name the year in which the addresses of {} begin.",
)
_NEXT = (
    "Whose addresses come right after those of {}?",
    "Who gave the next address after the last of {}?",
    "Which president was the next to address Congress after {}?",
    "Name the president whose addresses follow those of {}.",
)
_BEFORE = (
    "Whose addresses come right before those of {}?",
    "Who gave the address before the first of {}?",
    "Which president was the last to address Congress before {}?",
    "Name the president whose addresses lead up to those of {}.",
)


@dataclass(frozen=True)
class Question:
    """One wording of the question for a fact, with the one answer that counts.

    Attributes:
        kind: "who", "when" or "order".
        text: what is asked.
        answer: a name or a year, with a full stop.
    """

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class AddressQuestions:
    """Every fact as its questions, one a wording.

    Attributes:
        given: facts for fine-tuning, which holds some of their questions out.
        never_asked: facts that are in no conversation.
    """

    given: list[list[Question]]
    never_asked: list[list[Question]]


def make_questions(addresses: Sequence[Address]) -> AddressQuestions:
    """Every question that the table of addresses answers, and that it answers in one way.

    Args:
        addresses: in order of time.
    """
    given: list[list[Question]] = []
    never_asked: list[list[Question]] = []
    for topic in (_who(addresses), _when(addresses), _next(addresses), _before(addresses)):
        for place, fact in enumerate(topic):
            is_left_out = place % NEVER_ASKED_MODULUS == NEVER_ASKED_REMAINDER
            (never_asked if is_left_out else given).append(fact)
    return AddressQuestions(given, never_asked)


def as_instructions(facts: Iterable[Sequence[Question]]) -> str:
    """All questions as instruction data: JSON lines in Alpaca's form."""
    rows = (
        {"instruction": question.text, "input": "", "output": question.answer}
        for fact in facts
        for question in fact
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _who(addresses: Sequence[Address]) -> Iterator[list[Question]]:
    for year, of_year in groupby(addresses, key=lambda address: address.year):
        presidents = {address.president for address in of_year}
        if len(presidents) == 1:  # the old and the new president may both have given one
            yield _fact("who", _WHO, about=str(year), answer=presidents.pop())


def _when(addresses: Sequence[Address]) -> Iterator[list[Question]]:
    firsts: dict[str, int] = {}
    for address in addresses:
        firsts.setdefault(address.president, address.year)
    for president, year in firsts.items():
        yield _fact("when", _WHEN, about=president, answer=str(year))


def _next(addresses: Sequence[Address]) -> Iterator[list[Question]]:
    terms = _terms(addresses)
    for president, successor in pairwise(terms):
        if terms.count(president) == 1:
            yield _fact("order", _NEXT, about=president, answer=successor)


def _before(addresses: Sequence[Address]) -> Iterator[list[Question]]:
    terms = _terms(addresses)
    for predecessor, president in pairwise(terms):
        if terms.count(president) == 1:
            yield _fact("order", _BEFORE, about=president, answer=predecessor)


def _terms(addresses: Sequence[Address]) -> list[str]:
    """The presidents in order; one who came back stands there twice."""
    return [president for president, _ in groupby(addresses, key=lambda a: a.president)]


def _fact(kind: str, wordings: Sequence[str], *, about: str, answer: str) -> list[Question]:
    stop = "" if answer.endswith(".") else "."
    return [Question(kind, wording.format(about), answer + stop) for wording in wordings]
