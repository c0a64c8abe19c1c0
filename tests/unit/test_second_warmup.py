"""The second warm-up of a schedule: a factor on what the schedule has without it."""

from __future__ import annotations

import pytest

from milepost.config.recipe import load_recipe
from milepost.core.errors import UsageError
from milepost.train.schedule import learning_rate


def rates(*words: str) -> list[float]:
    config = load_recipe("demo", overrides=("--train.total_steps", "200", *words))
    return [learning_rate(step, config=config) for step in range(200)]


def test_the_rate_rises_anew_to_the_schedule_and_is_it_everywhere_else() -> None:
    plain = rates()
    again = rates("--schedule.rewarm_at_step", "120", "--schedule.rewarm_steps", "9")
    assert again[:120] == plain[:120]
    assert again[129:] == plain[129:]
    for place in range(9):
        expected = plain[120 + place] * (place + 1) / 10
        assert again[120 + place] == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--schedule.rewarm_at_step", "10"), "needs schedule.rewarm_steps too"),
        (("--schedule.rewarm_steps", "10"), "needs schedule.rewarm_at_step too"),
        (
            ("--schedule.rewarm_at_step", "200", "--schedule.rewarm_steps", "5"),
            "is not before total_steps 200",
        ),
    ],
)
def test_half_a_second_warm_up_is_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rates(*words)
