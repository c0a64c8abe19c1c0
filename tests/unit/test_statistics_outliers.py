"""Checkpoints whose scores stand out: planted ones are found, smooth curves raise no alarm."""

from __future__ import annotations

import numpy as np
import pytest

from milepost.trajectory.benchmarks import Evaluation, Score, Series, Setting
from milepost.trajectory.outliers import MIN_CHECKPOINTS, THRESHOLD, odd_checkpoints

BENCHMARKS = {  # items and chance of the paper's seven
    "hellaswag": (10_042, 0.25),
    "arc_easy": (2_376, 0.25),
    "arc_challenge": (1_172, 0.25),
    "piqa": (1_838, 0.5),
    "winogrande": (1_267, 0.5),
    "openbookqa": (500, 0.25),
    "boolq": (3_270, 0.5),
}


def evaluation(step: int, right: int, num_items: int, *, chance: float) -> Evaluation:
    share = right / num_items
    error = float(np.sqrt(share * (1 - share) / (num_items - 1)))
    return Evaluation(
        key=None,
        step=step,
        tokens_seen=None,
        device=None,
        checkpoint_sha256=None,
        num_items=num_items,
        scores={"acc": Score(share, error)},
        chance=chance,
        majority=None,
        num_truncated=None,
    )


def course(
    steps: np.ndarray, rng: np.random.Generator, *, random_at: tuple[int, ...] = ()
) -> list[Series]:
    """Smooth curves with the noise of their items; random weights at some of the steps."""
    made = []
    for name, (num_items, chance) in BENCHMARKS.items():
        gained = (0.3 if chance < 0.5 else 0.15) * (1 - np.exp(-steps / 12_000))
        shares = np.where(np.isin(steps, random_at), chance, chance + gained)
        pairs = zip(steps.tolist(), rng.binomial(num_items, shares).tolist(), strict=True)
        scores = tuple(evaluation(int(s), k, num_items, chance=chance) for s, k in pairs)
        made.append(Series(Setting(name, "one", 0, None, "x", "float32"), scores))
    return made


def steps_of(num: int) -> np.ndarray:
    return np.arange(1, num + 1) * 100


def test_random_weights_among_good_checkpoints_are_found_and_only_they() -> None:
    series = course(steps_of(100), np.random.default_rng(0), random_at=(6000,))
    (odd,) = odd_checkpoints(series)
    assert odd.step == 6000 and odd.z > 2 * THRESHOLD
    assert "hellaswag" in odd.benchmarks and len(odd.benchmarks) >= 4
    assert odd.words.startswith("HellaSwag 2") and "where its neighbors lead to 3" in odd.words
    assert odd.words.count("neighbors") == 3 and odd.words.endswith("more")


def test_one_wrong_benchmark_is_enough_and_is_named() -> None:
    series = course(steps_of(60), np.random.default_rng(1))
    piqa = next(n for n, one in enumerate(series) if one.setting.benchmark == "piqa")
    scores = list(series[piqa].evaluations)
    scores[30] = evaluation(scores[30].step, 0, 1_838, chance=0.5)
    series[piqa] = Series(series[piqa].setting, tuple(scores))
    (odd,) = odd_checkpoints(series)
    assert (odd.step, odd.benchmarks) == (3100, ("piqa",))
    assert odd.words.startswith("PIQA 0.0 % where its neighbors lead to 5")


def test_two_wrong_ones_side_by_side_are_both_found() -> None:
    series = course(steps_of(100), np.random.default_rng(2), random_at=(6000, 6100))
    assert [odd.step for odd in odd_checkpoints(series)] == [6000, 6100]


def test_a_curve_that_is_steep_and_unevenly_scored_is_not_odd() -> None:
    # HellaSwag in Table IV of arXiv 2412.13335, with the error of its 10,042 items.
    steps = (2700, 3300, 5100, 7500, 15700, 20000, 23900, 35000, 40500, 43250)
    shares = (31.9, 32.9, 37.7, 40.5, 46.9, 49.6, 50.2, 52.5, 53.2, 56.1)
    pairs = zip(steps, shares, strict=True)
    scores = tuple(evaluation(s, round(100.42 * k), 10_042, chance=0.25) for s, k in pairs)
    series = Series(Setting("hellaswag", "one", 0, None, "x", "float32"), scores)
    assert odd_checkpoints([series]) == []


def test_too_short_a_course_is_not_judged() -> None:
    for num, count in ((MIN_CHECKPOINTS - 1, 0), (MIN_CHECKPOINTS, 1)):
        # Late in training, where random weights are far off.
        steps = 40_000 + steps_of(num)
        series = course(steps, np.random.default_rng(3), random_at=(40_300,))
        assert len(odd_checkpoints(series)) == count


def test_scores_that_never_move_are_not_odd() -> None:
    scores = tuple(evaluation(step, 0, 100, chance=0.25) for step in range(100, 2000, 100))
    series = Series(Setting("hellaswag", "one", 0, None, "x", "float32"), scores)
    assert odd_checkpoints([series]) == []
    assert odd_checkpoints([]) == []


def test_scores_without_an_error_are_held_against_their_own_scatter() -> None:
    series = course(steps_of(60), np.random.default_rng(4), random_at=(4000,))
    bare = [
        Series(
            one.setting,
            tuple(
                Evaluation(**{**vars(e), "scores": {"acc": Score(e.main_score.value, None)}})
                for e in one.evaluations
            ),
        )
        for one in series
    ]
    assert 4000 in [odd.step for odd in odd_checkpoints(bare)]


@pytest.mark.parametrize("num", [10, 50, 450])
def test_smooth_curves_raise_no_alarm(num: int) -> None:
    rng = np.random.default_rng(num)
    found = [len(odd_checkpoints(course(steps_of(num), rng))) for _ in range(3)]
    assert sum(found) == 0


@pytest.mark.long
def test_smooth_curves_raise_less_than_one_alarm_in_ten_long_runs() -> None:
    rng = np.random.default_rng(9)
    found = [len(odd_checkpoints(course(steps_of(450), rng))) for _ in range(60)]
    assert sum(found) <= 6
