"""Tables of the rubric: a group of raters each, agreement and bias beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from milepost.runs.ratings import CRITERIA, RaterKind, RatingRecord
from milepost.trajectory.course import Course
from milepost.trajectory.example import load_example
from milepost.trajectory.ratings import RatingSummary, summarize_ratings
from milepost.trajectory.sections.findings import rubric_sentences
from milepost.trajectory.sections.rubric import Rubric, rubric_section
from milepost.trajectory.subject import Subject

SAMPLES = [{"sample_id": f"{step} {n}", "step": step} for step in (0, 100) for n in range(4)]


def records(rater: str, kind: RaterKind, scores: Sequence[int]) -> list[RatingRecord]:
    """One score a sample, the same for every criterion."""
    return [
        RatingRecord(sample["sample_id"], rater, kind, criterion, score, 0, "2026-01-05T09:00:00Z")
        for sample, score in zip(SAMPLES, scores, strict=True)
        for criterion in CRITERIA
    ]


def subject_of(ratings: RatingSummary | None) -> Subject:
    return Subject("a run", Course("a run", "a test", {}), None, None, (), (), ratings, "steps")


def content_of(ratings: RatingSummary) -> Rubric:
    section = rubric_section(subject_of(ratings))
    assert section is not None and isinstance(section.content, Rubric)
    return section.content


@pytest.fixture(scope="module")
def two_kinds() -> RatingSummary:
    rated = records("Ann", "person", [1, 2, 1, 2, 5, 6, 5, 6])
    rated += records("Bo", "person", [1, 2, 2, 2, 5, 6, 6, 6])
    rated += records("gpt-x", "model", [3, 4, 3, 4, 9, 9, 9, 9])
    return summarize_ratings(rated, SAMPLES)


def test_people_and_a_model_have_tables_of_their_own(two_kinds: RatingSummary) -> None:
    content = content_of(two_kinds)
    people, model = content.groups
    assert "people" in people.caption and "gpt-x" in model.caption
    assert content.is_of_several_kinds
    assert [row[0] for row in people.rows] == ["0", "100"]
    assert [row[7].split("\n")[0] for row in people.rows] == ["1.62", "5.62"]
    assert [row[7].split("\n")[0] for row in model.rows] == ["3.50", "9.00"]
    assert {row[8] for row in people.rows} == {"4"}


def test_agreement_and_bias_say_between_whom(two_kinds: RatingSummary) -> None:
    content = content_of(two_kinds)
    assert content.agreement is not None and content.biases is not None
    named = {row[0] for row in content.agreement.rows}
    assert any("people" in name for name in named) and "people and gpt-x" in named
    [model] = [row for row in content.biases.rows if row[0].startswith("gpt-x")]
    assert "against people" in model[0] and model[-1].startswith("+2.6")


def test_paper_prints_whole_points_without_intervals_and_counts() -> None:
    example = load_example("paper")
    subject = replace(subject_of(None), example=example)
    section = rubric_section(subject)
    assert section is not None
    [table] = section.content.groups
    assert table.rows[0] == ("2,700", "4", "4", "5", "2", "3", "3", "3.50")
    assert [column.name for column in table.columns][-1] == "Average"
    assert section.content.agreement is None and section.content.biases is None
    assert section.content.questions == (), "nobody knows what the paper's rater was asked"
    assert not section.content.has_intervals


def test_one_rater_has_no_alpha_and_the_reason_is_said() -> None:
    content = content_of(summarize_ratings(records("Ann", "person", [1, 2] * 4), SAMPLES))
    assert content.agreement is None and content.absences
    assert all(sentence.startswith("No alpha") for sentence in content.absences)


def test_ratings_that_do_not_count_are_counted() -> None:
    rated = records("Ann", "person", [1] * 8)[: len(CRITERIA)]
    stray = [replace(record, sample_id="of another run") for record in rated]
    ratings = summarize_ratings(stray, SAMPLES, num_bad_lines=2)
    content = content_of(ratings)
    assert content.groups == ()
    assert "2 lines that cannot be read" in content.left_out[0]
    assert "1 rated sample not of this run" in content.left_out[0]


def test_run_without_ratings_has_no_such_section() -> None:
    assert rubric_section(subject_of(None)) is None
    assert rubric_section(subject_of(summarize_ratings([], SAMPLES))) is None


def test_summary_gives_first_and_last_average_of_each_group(two_kinds: RatingSummary) -> None:
    sentences = rubric_sentences(subject_of(two_kinds))
    assert len(sentences) == 2
    assert sentences[0].endswith("went from 1.62 at step 0 to 5.62 at step 100.")
