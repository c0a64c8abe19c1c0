"""Ratings of a run put together by step, people and models apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from milepost.runs.ratings import CRITERIA, RaterKind, RatingRecord, append_rating, read_ratings
from milepost.trajectory.ratings import summarize_ratings

SAMPLES: list[dict[str, Any]] = [
    {"sample_id": f"s{step}-{n}", "step": step, "prompt": "p", "completion": "c"}
    for step in (100, 200)
    for n in range(2)
]


def six(
    sample: str, score: int, *, rater: str = "Ann", kind: RaterKind = "person", repeat: int = 0
) -> list[RatingRecord]:
    """One score for all criteria but the last, which gets one more."""
    return [
        RatingRecord(
            sample_id=sample,
            rater=rater,
            rater_kind=kind,
            criterion=criterion,
            score=score + (criterion == CRITERIA[-1]),
            repeat=repeat,
            time="2026-01-05T09:00:00.000Z",
        )
        for criterion in CRITERIA
    ]


def test_people_are_pooled_and_each_model_is_by_itself() -> None:
    records = [
        *six("s100-0", 2),
        *six("s100-0", 4, rater="Bob"),
        *six("s200-0", 6, rater="m2", kind="model"),
        *six("s100-0", 7, rater="m1", kind="model"),
    ]
    groups = summarize_ratings(records, SAMPLES).groups
    assert [(g.raters, g.rater_kind, g.steps) for g in groups] == [
        ("people (2 raters)", "person", (100,)),
        ("judge m1", "model", (100,)),
        ("judge m2", "model", (200,)),
    ]
    assert groups[0].means["coherence"] == (3.0,)


def test_a_model_with_the_name_of_a_person_stays_a_model() -> None:
    records = [*six("s100-0", 2, rater="Ann"), *six("s100-1", 9, rater="Ann", kind="model")]
    groups = summarize_ratings(records, SAMPLES).groups
    assert [g.rater_kind for g in groups] == ["person", "model"]
    assert groups[0].means["depth"] == (2.0,)


def test_means_go_over_repeats_then_raters_then_samples() -> None:
    records = [
        *six("s100-0", 2),
        *six("s100-0", 4, repeat=1),  # Ann: 3
        *six("s100-0", 5, rater="Bob"),  # the sample: 4
        *six("s100-1", 8),  # the step: 6
        *six("s200-1", 1, rater="Bob"),
    ]
    (group,) = summarize_ratings(records, SAMPLES).groups
    assert group.steps == (100, 200)
    assert group.means["fluency"] == (6.0, 1.0)
    assert group.means[CRITERIA[-1]] == (7.0, 2.0)
    assert group.averages == pytest.approx((6 + 1 / 6, 1 + 1 / 6))
    assert group.counts == (2, 1)
    assert group.intervals == (None, None)


def test_an_average_of_enough_samples_has_an_interval_that_is_the_same_each_time() -> None:
    samples = [{"sample_id": f"s{n}", "step": 7} for n in range(30)]
    records = [record for n in range(30) for record in six(f"s{n}", n % 10)]
    (group,) = summarize_ratings(records, samples).groups
    (interval,) = group.intervals
    assert interval is not None
    # The standard error of the mean is 2.87 / sqrt(30) = 0.52, so 95 % is the mean +- 1.03.
    assert interval.low == pytest.approx(group.averages[0] - 1.03, abs=0.12)
    assert interval.high == pytest.approx(group.averages[0] + 1.03, abs=0.12)
    assert summarize_ratings(records, samples).groups == (group,)


def test_what_is_not_whole_or_not_known_is_counted_and_left_out() -> None:
    records = [*six("s100-0", 5), *six("s100-1", 5)[:-1], *six("gone", 5), *six("lost", 1)]
    foreign = {"sample_id": ["not", "a", "name"], "step": 100}
    summary = summarize_ratings(records, [*SAMPLES, foreign, {}], num_bad_lines=3)
    assert summary.groups[0].counts == (1,)
    assert summary.num_incomplete == 1
    assert summary.num_unknown_samples == 2
    assert summary.num_bad_lines == 3


@pytest.mark.parametrize("records", [[], six("s100-0", 5)[:2], six("gone", 5)])
def test_without_a_usable_rating_there_is_no_group(records: list[RatingRecord]) -> None:
    assert summarize_ratings(records, SAMPLES).groups == ()


@pytest.mark.parametrize("of", [{"step": None}, {"step": 100, "adapter": "0f3a9c51"}])
def test_a_sample_that_is_not_of_a_step_takes_part_in_agreement_only(of: dict[str, Any]) -> None:
    sample = {"sample_id": "free"} | of
    records = [*six("free", 5), *six("free", 6, rater="Bob")]
    summary = summarize_ratings(records, [sample])
    assert summary.groups == ()
    assert summary.num_unknown_samples == 0
    assert summary.agreement[0].num_samples == 1


def test_the_later_of_two_lines_counts_and_bad_lines_are_counted(tmp_path: Path) -> None:
    log = tmp_path / "ratings.jsonl"
    for record in (*six("s100-0", 2), *six("s100-0", 9)[:1]):
        append_rating(log, record)
    whole = log.read_text().splitlines()[0]
    foreign = [
        whole.replace('"score":2', '"score":11'),
        whole.replace('"score":2', '"score":true'),
        whole.replace("coherence", "wit"),
        whole.replace('"person"', '"crowd"'),
        whole.replace('"v":1', '"v":2'),
        whole[:40],
    ]
    log.write_text(log.read_text() + "\n".join(foreign) + "\n")
    records, num_bad = read_ratings(log)
    assert num_bad == len(foreign)
    assert {r.criterion: r.score for r in records} | {"creativity": 3} == {
        "coherence": 9,
        "fluency": 2,
        "relevance": 2,
        "factual_accuracy": 2,
        "depth": 2,
        "creativity": 3,
    }


def test_a_person_and_a_model_of_one_name_keep_their_ratings(tmp_path: Path) -> None:
    log = tmp_path / "ratings.jsonl"
    for record in (*six("s100-0", 2), *six("s100-0", 9, kind="model")):
        append_rating(log, record)
    records, _ = read_ratings(log)
    assert [r.rater_kind for r in records] == ["person"] * 6 + ["model"] * 6
