"""Paired tests between checkpoints: which are made, what they say, what is read for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from milepost.core.files import json_document, sha256_of_json
from milepost.runs.evaluations import Conditions, EvaluationRecord, EvaluationStore, Weights
from milepost.trajectory.collect import Trajectory, collect
from milepost.trajectory.opening import subject_of_run
from milepost.trajectory.sections import differences
from milepost.trajectory.sections.differences import (
    Difference,
    differences_of,
    differences_section,
    holm,
)
from milepost.trajectory.sections.work import as_numbers, work_out
from tests.made_runs import BATCH_TOKENS, RUN_ID, MadeRun, make_run


def score(made: MadeRun, step: int, benchmark: str, right: Sequence[bool]) -> None:
    """A record with an item a value."""
    accuracy = sum(right) / len(right)
    record = EvaluationRecord(
        weights=Weights(sha256_of_json(step), RUN_ID, step, step * BATCH_TOKENS),
        conditions=Conditions(benchmark, "made-1", 0, None, "d", "float32"),
        n=len(right),
        metrics={"acc": {"value": accuracy, "stderr": 0.01}},
        chance=0.5,
        majority=0.5,
        num_truncated=0,
        device="cpu",
        ranks=1,
        seconds=1.0,
        milepost="0.1.0",
        time="2026-01-05T09:00:00Z",
    )
    items = [
        {"id": str(n), "gold": 0, "loglikelihoods": [-1.0, -2.0], "chosen": int(not is_right)}
        for n, is_right in enumerate(right)
    ]
    EvaluationStore(made.layout.root).add(record, items)


def started(folder: Path) -> MadeRun:
    made = make_run(folder, total_steps=20)
    made.start()
    return made


def collected(made: MadeRun) -> Trajectory:
    return collect(made.layout.root)


def pairs(found: Sequence[Difference]) -> list[tuple[int, int, bool]]:
    return [(d.before.step, d.after.step, d.is_whole_course) for d in found]


def test_first_is_tested_against_last_and_each_checkpoint_against_the_next(tmp_path: Path) -> None:
    made = started(tmp_path)
    for step, num_right in ((5, 10), (10, 12), (20, 30)):
        score(made, step, "piqa", [n < num_right for n in range(40)])
    found = differences_of(collected(made))
    assert pairs(found) == [(5, 20, True), (5, 10, False), (10, 20, False)]
    section = differences_section(found)
    assert section is not None
    [row] = section.content.ends.rows
    assert row[:4] == ("PIQA\nacc, 40 items", "5 to 20", "25.0", "75.0")
    assert row[4].startswith("+50.0\n") and row[5:] == ("20\n0 lost", "< 0.0001", "better")
    verdicts = [row[-1] for row in section.content.between.rows]
    assert verdicts == ["no difference shown", "better"]
    assert "3 tests are made here" in section.content.note


def test_programs_get_the_tests_or_why_there_is_none(tmp_path: Path) -> None:
    made = started(tmp_path)
    for step in (5, 10):
        score(made, step, "piqa", [n < step for n in range(40)])
        score(made, step, "boolq", [True] * step)
    subject = subject_of_run(collected(made))
    found = json.loads(json_document(as_numbers(subject, work_out(subject))))["differences"]
    piqa, boolq = found
    assert (piqa["benchmark"], piqa["metric"]) == ("piqa", "acc")
    assert (piqa["before_step"], piqa["after_step"], piqa["num_gained"]) == (5, 10, 5)
    assert boolq["benchmark"] == "boolq" and "same items" in boolq["absence"]


def test_two_checkpoints_make_one_test(tmp_path: Path) -> None:
    made = started(tmp_path)
    for step, num_right in ((5, 30), (10, 10)):
        score(made, step, "piqa", [n < num_right for n in range(40)])
    section = differences_section(differences_of(collected(made)))
    assert section is not None and section.content.between is None
    assert section.content.ends.rows[0][-1] == "worse"
    assert "tests are made here" not in section.content.note


def test_other_items_are_not_compared_and_the_reason_is_said(tmp_path: Path) -> None:
    made = started(tmp_path)
    score(made, 5, "piqa", [True] * 10)
    score(made, 10, "piqa", [True] * 11)
    section = differences_section(differences_of(collected(made)))
    assert section is not None
    assert section.content.ends is None and section.content.note == ""
    [sentence] = section.content.absences
    assert sentence.startswith("No test for PIQA: ")


def test_items_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    made = started(tmp_path)
    made.evaluate(5, "piqa", acc=0.5)
    made.evaluate(10, "piqa", acc=0.5)
    section = differences_section(differences_of(collected(made)))
    assert section is not None and section.content.ends is None
    assert len(section.content.absences) == 1


def test_many_checkpoints_are_spread_and_items_are_read_once_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = started(tmp_path)
    for step in range(30):
        score(made, step, "piqa", [n < step for n in range(40)])
    monkeypatch.setattr(differences, "ITEMS_READ", 5 * 40)
    read: list[str] = []
    items = EvaluationStore.items

    def counted(store: EvaluationStore, line: dict[str, str]) -> list[dict[str, object]]:
        read.append(line["key"])
        return items(store, line)

    monkeypatch.setattr(EvaluationStore, "items", counted)
    found = differences_of(collected(made))
    assert pairs(found)[0] == (0, 29, True)
    assert len(found) == 5 and len(read) == len(set(read)) == 5


def test_score_of_one_checkpoint_has_no_such_section(tmp_path: Path) -> None:
    made = started(tmp_path)
    score(made, 5, "piqa", [True] * 10)
    assert differences_section(differences_of(collected(made))) is None


@pytest.mark.parametrize(
    ("p_values", "holds"),
    [
        ([0.04], [True]),
        ([0.04, 0.03], [False, False]),
        ([0.04, 0.02], [True, True]),
        ([0.9, 0.001, 0.02, 0.04], [False, True, False, False]),
        ([], []),
    ],
)
def test_many_tests_need_smaller_p_values(p_values: list[float], holds: list[bool]) -> None:
    """Holm: 0.05 / 4 = 0.0125 for the smallest of four, then 0.05 / 3 = 0.0167."""
    assert holm(p_values) == holds
