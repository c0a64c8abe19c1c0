"""Several courses at one count of tokens: between points, never beyond them."""

from __future__ import annotations

import numpy as np
import pytest

from milepost.trajectory.course import Course, Curve
from milepost.trajectory.sections.comparison import compared_metrics, value_at
from tests.made_courses import curve, subject_of, told_by


@pytest.mark.parametrize(
    ("tokens", "value"), [(99, None), (100, 4.0), (150, 3.5), (200, 3.0), (201, None)]
)
def test_value_between_points_lies_on_their_line_and_none_lies_beyond(
    tokens: float, value: float | None
) -> None:
    assert value_at(curve([100, 200], [4.0, 3.0], tokens_per_step=1), tokens) == value


def test_courses_are_set_side_by_side_at_the_tokens_all_have_reached() -> None:
    short = Course("short", "a test", {"val/loss": curve([0, 100, 200], [8.0, 5.0, 4.0])})
    long = Course(
        "long",
        "a test",
        {"val/loss": curve([0, 300], [9.0, 3.0]), "eval/piqa/acc": curve([9], [1])},
    )
    [compared] = compared_metrics(subject_of(short, long))
    assert compared.tokens == 200_000 and compared.values == (4.0, 5.0)
    told = told_by(subject_of(short, long))
    assert told.sections[0].key == "comparison"
    assert told.sections[0].content.table.rows == (
        ("Validation loss (nats)", "200 K", "4.00", "5.00"),
    )
    assert told.paragraphs[-1] == (
        "Laid over it: long. At 200 K tokens, validation loss is 4.00 nats for short and 5.00 nats"
        " for long."
    )


def test_a_course_that_ends_before_the_others_begin_does_not_hide_what_they_share() -> None:
    names = ("own", "early", "late")
    steps = ([1, 2], [1000, 2000], [1500, 3000])
    courses = [
        Course(name, "a test", {"eval/piqa/acc": curve(at, [0.5, 0.7])})
        for name, at in zip(names, steps, strict=True)
    ]
    content = told_by(subject_of(*courses)).sections[0].content
    assert content.table.rows == (("PIQA (acc, %)", "2 M", "–", "70.0", "56.7"),)
    assert not any(note.startswith("At no count") for note in content.notes)


def test_the_main_course_is_among_those_compared_where_it_can_be() -> None:
    steps = ([0, 100], [50, 1000], [500, 2000])
    courses = [Course(str(at), "a test", {"val/loss": curve(at, [4.0, 3.0])}) for at in steps]
    [compared] = compared_metrics(subject_of(*courses))
    assert compared.tokens == 100_000 and compared.values[0] == 3.0


def test_course_without_tokens_is_named_and_not_compared() -> None:
    steps = np.array([1.0, 2.0])
    nothing = np.full(2, np.nan)
    silent = Course("silent", "a test", {"val/loss": Curve(steps, nothing, steps, nothing)})
    known = Course("known", "a test", {"val/loss": curve([1, 2], [4.0, 3.0])})
    content = told_by(subject_of(known, silent)).sections[0].content
    assert content.table is None
    assert content.notes == (
        "At no count of tokens do two courses have a value of validation loss.",
        "How many tokens were seen is not known of silent.",
    )


def test_courses_that_share_no_metric_say_so() -> None:
    one = Course("one", "a test", {"val/loss": curve([1, 2], [4.0, 3.0])})
    other = Course("other", "a test", {"eval/piqa/acc": curve([1, 2], [0.5, 0.6])})
    content = told_by(subject_of(one, other)).sections[0].content
    assert content.notes == ("The courses have no metric in common.",)
