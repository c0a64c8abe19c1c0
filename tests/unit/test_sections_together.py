"""What the page says of metrics that move together, on the paper's tables and on made courses."""

from __future__ import annotations

import json

import pytest

from milepost.core.files import json_document
from milepost.trajectory.course import Course
from milepost.trajectory.example import load_example
from milepost.trajectory.sections.all import Told
from milepost.trajectory.sections.together import pairs_of
from milepost.trajectory.sections.work import as_numbers, work_out
from milepost.trajectory.subject import Subject
from tests.made_courses import curve, subject_of, told_by


@pytest.fixture(scope="module")
def paper() -> Subject:
    example = load_example("paper")
    return Subject(example.title, example.course, None, example, (), (), None, "steps")


@pytest.fixture(scope="module")
def told(paper: Subject) -> Told:
    return told_by(paper)


def test_papers_tables_give_what_the_paper_does_not_quite_print(told: Told) -> None:
    content = next(s.content for s in told.sections if s.key == "together")
    assert content.printed == (
        "The source prints these correlations of the average score: 0.928 with training steps,"
        " −0.945 with validation loss, 0.963 with HellaSwag. Its own tables give 0.930, −0.956,"
        " 0.966. The logarithm of the steps alone, which knows nothing of the model, gives 0.969."
    )
    with_scores = {row[0].split("\n")[0]: row for row in content.coefficients.rows[:3]}
    assert [row[2].split("\n")[0] for row in with_scores.values()] == ["0.930", "−0.956", "0.966"]
    assert {row[1] for row in with_scores.values()} == {"10"}
    assert {row[7].split("\n")[0] for row in with_scores.values()} == {"0.969"}


def test_programs_get_the_same_numbers(paper: Subject) -> None:
    numbers = json.loads(json_document(as_numbers(paper, work_out(paper))))
    with_scores = {
        pair["x"]: pair["pearson"]["value"]
        for pair in numbers["correlations"]
        if pair["y"] == "rubric/published/average"
    }
    assert {x: round(r, 3) for x, r in with_scores.items()} == {
        "steps": 0.930,
        "val/loss": -0.956,
        "eval/hellaswag/acc_norm": 0.966,
    }
    assert numbers["metrics"]["val/loss"]["last"]["value"] == 2.47
    assert numbers["loss_law"]["metric"] == "val/loss" and numbers["loss_law"]["n"] == 10
    assert numbers["differences"] == numbers["jumps"] == numbers["compared"] == []


def test_papers_table_4_stands_with_the_decimals_it_has(told: Told) -> None:
    table = next(s.content for s in told.sections if s.key == "together").values
    assert table.rows[0] == ("2,700", "3.00", "31.9", "3.50")
    assert table.rows[-1] == ("43,250", "2.47", "56.1", "6.83")
    assert len(table.rows) == 10


def test_summary_names_the_limit_of_the_correlation_it_gives(told: Told) -> None:
    [sentence] = [p for p in told.paragraphs if "go together" in p]
    assert "HellaSwag and the average score go together over 10 points (r = 0.966" in sentence
    assert "a trend with training time may be all of it" in sentence


def test_what_all_conclusions_end_with_is_said_once(told: Told) -> None:
    content = next(s.content for s in told.sections if s.key == "together")
    assert "not independent" in content.caution
    assert not any("not independent" in conclusion for conclusion in content.conclusions)
    assert all(conclusion.endswith(".") for conclusion in content.conclusions)


def test_loss_between_two_validations_lies_on_their_line_and_that_is_said() -> None:
    losses = curve([0, 70, 140, 210], [8.0, 6.0, 5.0, 4.5])
    scores = curve([35, 105, 175, 400], [0.25, 0.30, 0.31, 0.40])
    course = Course("made", "a test", {"val/loss": losses, "eval/piqa/acc": scores})
    [pair] = pairs_of(subject_of(course))
    assert pair.x.values == {35: 7.0, 105: 5.5, 175: 4.75} and pair.correlation.n == 3
    content = next(s.content for s in told_by(subject_of(course)).sections if s.key == "together")
    assert [row[1:] for row in content.values.rows] == [
        ("≈ 7.00", "25.0"),
        ("≈ 5.50", "30.0"),
        ("≈ 4.75", "31.0"),
        ("–", "40.0"),
    ]
    assert content.note == (
        "≈: the validation loss was not measured at this step; it is taken from the straight line"
        " between the two measurements around it."
    )
    assert content.is_between


def test_loss_measured_at_three_of_the_steps_is_not_interpolated() -> None:
    losses = curve([0, 100, 200, 300], [8.0, 6.0, 5.0, 4.5])
    scores = curve([100, 150, 200, 300], [0.25, 0.30, 0.31, 0.40])
    course = Course("made", "a test", {"val/loss": losses, "eval/piqa/acc": scores})
    [pair] = pairs_of(subject_of(course))
    assert not pair.x.is_between and pair.correlation.n == 3


def test_one_point_and_constant_series_have_no_r_and_the_reason_is_said() -> None:
    losses = curve([100, 200, 300], [4.0, 3.0, 2.0])
    curves = {
        "val/loss": losses,
        "eval/boolq/acc": curve([100, 200, 300], [0.62, 0.62, 0.62]),
        "eval/piqa/acc": curve([300], [0.6]),
    }
    told = told_by(subject_of(Course("made", "a test", curves)))
    content = next(s.content for s in told.sections if s.key == "together")
    assert content.coefficients is None
    said = " ".join(content.conclusions)
    assert "one of the two is constant" in said and "there is one point only" in said


def test_course_without_loss_and_benchmark_has_no_such_section() -> None:
    course = Course("made", "a test", {"train/grad_norm": curve([1, 2], [0.5, 0.4])})
    assert [s.key for s in told_by(subject_of(course)).sections] == []


def test_import_says_from_where_to_where_each_metric_went() -> None:
    curves = {
        "val/loss": curve([100, 300], [3.12346, 2.5]),
        "eval/piqa/acc": curve([300], [0.61]),
        "lambada ppl": curve([100, 300], [80.5, 43]),
        "perf/mfu_fraction": curve([100], [0.4]),
    }
    course = Course("OLMo", "a CSV file", curves, restarts=(150,))
    assert told_by(subject_of(course)).paragraphs[:2] == [
        "The numbers come from a CSV file. Training was started anew at step 150.",
        "Validation loss went from 3.1235 nats at step 100 to 2.5000 nats at step 300. PIQA is"
        " 61.0 % at step 300, the only value. Lambada ppl went from 80.50 at step 100 to 43.00 at"
        " step 300.",
    ]
