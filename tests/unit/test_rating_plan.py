"""What a rater sees, in which order."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from milepost.core.errors import UsageError
from milepost.evaluation.rating_plan import Presentation, rating_plan, sample_steps


def samples(num_steps: int, num_prompts: int) -> list[dict[str, Any]]:
    """As a run records them: all prompts of a step, then the next step."""
    return [
        {"sample_id": f"{step}/{n}", "step": step, "prompt": f"p{n}", "completion": f"c{step}"}
        for step in range(0, 100 * num_steps, 100)
        for n in range(num_prompts)
    ]


def ids(plan: list[Presentation]) -> list[str]:
    return [presentation.sample_id for presentation in plan]


@pytest.mark.parametrize("num_prompts", [0, 1, 2, 3, 5, 19, 20, 21, 50])
@pytest.mark.parametrize("fraction", [0, 0.1, 0.5, 0.51, 1])
def test_every_sample_comes_and_the_second_time_is_far_from_the_first(
    num_prompts: int, fraction: float
) -> None:
    for rater in ("Ann", "Bob", "m1"):
        plan = rating_plan(samples(1, num_prompts), seed=rater, fraction_repeated=fraction)
        first = {p.sample_id: place for place, p in enumerate(plan) if p.repeat == 0}
        second = {p.sample_id: place for place, p in enumerate(plan) if p.repeat == 1}
        assert len(first) == num_prompts
        wanted = max(1, round(fraction * num_prompts)) if fraction and num_prompts else 0
        assert len(second) == wanted
        assert len(plan) == num_prompts + wanted
        apart = max(1, min(10, num_prompts // 2))
        assert all(place - first[sample] >= apart for sample, place in second.items())


def test_the_order_is_the_raters_own_and_the_same_each_time() -> None:
    ann = rating_plan(samples(5, 4), seed="Ann", fraction_repeated=0.2)
    assert ann == rating_plan(samples(5, 4), seed="Ann", fraction_repeated=0.2)
    assert ids(ann) != ids(rating_plan(samples(5, 4), seed="Bob", fraction_repeated=0.2))
    steps = [int(sample.split("/")[0]) for sample in ids(ann)]
    assert steps != sorted(steps)


def test_samples_that_come_later_leave_the_order_of_the_others() -> None:
    before = ids(rating_plan(samples(5, 4), seed="Ann", fraction_repeated=0))
    after = ids(rating_plan(samples(7, 4), seed="Ann", fraction_repeated=0))
    assert [sample for sample in after if sample in before] == before


@pytest.mark.parametrize("limit", [1, 3, 5, 7, 19, 20, 30])
def test_a_limit_takes_the_same_samples_for_all_raters_evenly_over_the_steps(limit: int) -> None:
    everything = samples(5, 4)
    chosen = [
        set(ids(rating_plan(everything, seed=rater, fraction_repeated=0, limit=limit)))
        for rater in ("Ann", "Bob")
    ]
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == min(limit, 20)
    by_step = Counter(sample.split("/")[0] for sample in chosen[0])
    assert max(by_step.values()) - min([by_step[str(100 * n)] for n in range(5)]) <= 1


def test_an_id_comes_once_and_lines_without_texts_are_left_out() -> None:
    lines = [
        *samples(1, 2),
        *samples(1, 1),
        {"sample_id": "x", "prompt": "p"},
        {"sample_id": 3, "prompt": "p", "completion": "c"},
        {"prompt": "p", "completion": "c"},
        {"sample_id": "free", "prompt": "p", "completion": "", "step": None},
    ]
    assert sorted(ids(rating_plan(lines, seed="Ann", fraction_repeated=0))) == [
        "0/0",
        "0/1",
        "free",
    ]


def test_equal_completions_of_two_steps_are_two_samples() -> None:
    lines = [
        {"sample_id": str(step), "step": step, "prompt": "p", "completion": "the the"}
        for step in (1, 2)
    ]
    assert len(rating_plan(lines, seed="Ann", fraction_repeated=0)) == 2


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        (None, None),
        ("all", [0, 100, 200]),
        ("latest", [200]),
        ("every:200", [0, 200]),
        ("100", [100]),
    ],
)
def test_steps_are_those_that_have_samples(text: str | None, steps: list[int] | None) -> None:
    assert sample_steps(samples(3, 2), text=text) == steps


def test_steps_limit_what_is_rated() -> None:
    plan = rating_plan(samples(3, 2), seed="Ann", fraction_repeated=0, steps=[100])
    assert sorted(ids(plan)) == ["100/0", "100/1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("150", "no sample of step 150"), ("every:7000x", "cannot be read")],
)
def test_steps_without_samples_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sample_steps(samples(3, 2), text=text)
