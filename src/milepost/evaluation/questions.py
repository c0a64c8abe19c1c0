"""Rows of the seven benchmarks as questions, worded to the character as lm-eval 0.4.13 words them.

One function a benchmark, from a row to a question. The YAML file of the harness's task of the
same name is the source of each wording.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from milepost.core.files import sha256_of_json
from milepost.evaluation.rows import Row, shown

BETWEEN = " "
"""Stands between what is asked and an answer."""

AFTER_SOLVED = "\n\n"
"""Stands after each solved question before the next one."""


@dataclass(frozen=True)
class Question:
    """What is asked, before it is tokens.

    Attributes:
        row: where it came from.
        own_id: the row's own name; None where it has none.
        contexts: what stands before each target.
        targets: the texts that are scored, without the space before them.
        choices: the texts by whose lengths `acc_norm` divides.
        gold: which choice is true.
        solved: the question with its true answer, as it stands before another question.
    """

    row: Row
    own_id: str | None
    contexts: tuple[str, ...]
    targets: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int
    solved: str


def questions_sha256(questions: Sequence[Question], *, solved: Sequence[Question] = ()) -> str:
    """Hash of what is asked: equal for the same rows, from whatever file and with whatever else.

    Args:
        questions: all that can be asked.
        solved: all that can stand solved before them.
    """
    asked = [[q.own_id, q.contexts, q.targets, q.gold] for q in questions]
    return sha256_of_json([asked, [q.solved for q in solved]])


def arc(row: Row) -> Question:
    """ARC, easy and challenge: the labels of the choices are letters or numbers."""
    choices, gold = _labelled(row)
    return _question(row, f"Question: {row.text('question')}\nAnswer:", choices, gold=gold)


def boolq(row: Row) -> Question:
    """BoolQ of SuperGLUE (`label`: 0 or 1) or as its authors gave it (`answer`: true or false)."""
    if "label" in row.fields:
        gold = row.place_of("label", among=(0, 1))
    else:
        gold = row.place_of("answer", among=(False, True))
    context = f"{row.text('passage')}\nQuestion: {row.text('question')}?\nAnswer:"
    return _question(row, context, ("no", "yes"), gold=gold)


def hellaswag(row: Row) -> Question:
    """HellaSwag: the texts are cleaned, and the second half of the context gets a capital."""
    activity, first, second = row.text("activity_label"), row.text("ctx_a"), row.text("ctx_b")
    context = _clean(f"{activity}: {first} {second.capitalize()}")
    endings = row.choices("endings")
    if isinstance(row.value("label"), int):
        gold = row.place_of("label", among=tuple(range(len(endings))))
    else:
        gold = row.place_of("label", among=tuple(map(str, range(len(endings)))))
    return _question(row, context, tuple(map(_clean, endings)), gold=gold)


def _clean(text: str) -> str:
    """Without the marks that WikiHow's pages left."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def openbookqa(row: Row) -> Question:
    """OpenBookQA: the sentence alone, to be ended."""
    choices, gold = _labelled(row)
    return _question(row, row.text("question_stem"), choices, gold=gold)


def _labelled(row: Row) -> tuple[tuple[str, ...], int]:
    """Choices that have labels, and which of them the answer's label means."""
    labels, choices = row.texts("choices", "label"), row.choices("choices", "text")
    if len(labels) != len(choices):
        row.refuse("choices", f"has {len(labels)} labels for {len(choices)} texts")
    key = row.text("answerKey").lstrip()
    if key not in labels:
        row.refuse("answerKey", f"is {shown(key)}, not one of {', '.join(map(shown, labels))}")
    return choices, labels.index(key)


def piqa(row: Row) -> Question:
    """PIQA: one of two ways to reach a goal."""
    context = f"Question: {row.text('goal')}\nAnswer:"
    choices = row.choice("sol1"), row.choice("sol2")
    return _question(row, context, choices, gold=row.place_of("label", among=(0, 1)))


def winogrande(row: Row) -> Question:
    """WinoGrande by partial evaluation (Trinh & Le 2018, arXiv 1806.02847).

    Each option is put into the sentence, and what follows it is scored.
    """
    gold = row.place_of("answer", among=("1", "2"))
    before, gap, after = row.text("sentence").partition("_")
    if not gap:
        row.refuse("sentence", "has no gap '_'")
    contexts = tuple(before + row.choice(option) for option in ("option1", "option2"))
    target = after.strip()
    # The harness writes neither answer nor empty line where a sentence ends with its gap.
    solved = contexts[gold] + (f"{BETWEEN}{target}{AFTER_SOLVED}" if target else "")
    return Question(row, None, contexts, (target, target), contexts, gold, solved)


def _question(row: Row, context: str, choices: tuple[str, ...], *, gold: int) -> Question:
    own_id = row.fields.get("id")
    return Question(
        row=row,
        own_id=own_id if isinstance(own_id, str) and own_id else None,
        contexts=(context,) * len(choices),
        targets=choices,
        choices=choices,
        gold=gold,
        solved=f"{context}{BETWEEN}{choices[gold]}{AFTER_SOLVED}",
    )
