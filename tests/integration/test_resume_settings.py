"""A run that stops and goes on has the bits of one that did not, under every setting there is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.training import events, logged_steps, train_here, validations

LAST_STEP = 12
STOP_AT = 7
SHORT = ("--train.total_steps", str(LAST_STEP), "--checkpoint.every_steps", "4")
COMPILES = (
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler is installed"),
)
SETTINGS = {
    "weights in bfloat16": ("--checkpoint.weights_dtype", "bfloat16"),
    "bfloat16": ("--train.precision", "bfloat16"),
    "float16": ("--train.precision", "float16"),
    "document attention": ("--data.document_attention", "true"),
    "recompute": ("--train.recompute", "block"),
    "compiled": ("--train.compile", "true"),
}


def train_with_and_without_a_stop(
    recipe: Path, data: Path, folder: Path, *setting: str
) -> tuple[Path, Path]:
    """Two run folders of the same settings: never stopped, and stopped between two saves."""
    whole, parts = folder / "whole", folder / "parts"
    train_here(recipe, whole, data, *SHORT, *setting)
    train_here(recipe, parts, data, *SHORT, *setting, "--train.stop_at_step", str(STOP_AT))
    train_here(recipe, parts, data, *SHORT, *setting)
    assert events(parts, "segment_started")[-1]["restored_step"] == STOP_AT
    return whole, parts


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def tensor_files(run: Path, step: int) -> dict[str, bytes]:
    """Every tensor file of a checkpoint, by its name."""
    folder = checkpoint(run, step)
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))
    }


def numbers(run: Path, step: int) -> dict[str, Any]:
    """The train state's numbers, but for the time it took."""
    state = json.loads((checkpoint(run, step) / "train_state" / "state.json").read_text())
    del state["progress"]["training_seconds"]
    return state


def assert_same_bits(run: Path, other: Path) -> None:
    """That `run`, which stopped and went on, is `other`, which did not."""
    steps = logged_steps(run)
    assert sorted(steps) == list(range(1, LAST_STEP + 1))
    assert steps == logged_steps(other)
    scales = [[e["loss_scale"] for e in events(r, "step")] for r in (run, other)]
    assert scales[0] == scales[1]
    assert validations(run).items() >= validations(other).items(), "one more where it stopped"
    assert tensor_files(run, LAST_STEP) == tensor_files(other, LAST_STEP)
    assert numbers(run, LAST_STEP) == numbers(other, LAST_STEP)


@pytest.mark.parametrize(
    "setting",
    ["bfloat16", "document attention", "recompute", pytest.param("compiled", marks=COMPILES)],
)
def test_a_run_goes_on_exactly(recipe: Path, tiny_data: Path, tmp_path: Path, setting: str) -> None:
    whole, parts = train_with_and_without_a_stop(recipe, tiny_data, tmp_path, *SETTINGS[setting])
    assert_same_bits(parts, whole)


@pytest.fixture(scope="module")
def plain(recipe: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with no setting changed."""
    run = tmp_path_factory.mktemp("plain") / "run"
    train_here(recipe, run, tiny_data, *SHORT)
    return run


def test_weights_in_bfloat16_are_for_use_and_the_masters_go_on(
    recipe: Path, tiny_data: Path, tmp_path: Path, plain: Path
) -> None:
    setting = SETTINGS["weights in bfloat16"]
    whole, parts = train_with_and_without_a_stop(recipe, tiny_data, tmp_path, *setting)
    assert_same_bits(parts, whole)
    assert logged_steps(parts) == logged_steps(plain), "how weights are kept changes no number"
    folder = checkpoint(parts, LAST_STEP)
    masters = load_file(folder / "train_state" / "masters.safetensors")
    own = load_file(checkpoint(plain, LAST_STEP) / "model.safetensors")
    rounded = load_file(folder / "model.safetensors")
    assert masters.keys() == own.keys() == rounded.keys()
    for name, master in masters.items():
        assert master.equal(own[name])
        assert rounded[name].equal(master.bfloat16())


def test_recomputing_activations_changes_no_number(
    recipe: Path, tiny_data: Path, tmp_path: Path, plain: Path
) -> None:
    train_here(recipe, tmp_path / "run", tiny_data, *SHORT, *SETTINGS["recompute"])
    assert logged_steps(tmp_path / "run") == logged_steps(plain)


@pytest.mark.parametrize("setting", ["bfloat16", "document attention"])
def test_settings_that_should_show_in_the_numbers_do(
    recipe: Path, tiny_data: Path, tmp_path: Path, plain: Path, setting: str
) -> None:
    one_step = ("--train.stop_at_step", "2")
    train_here(recipe, tmp_path / "run", tiny_data, *SHORT, *SETTINGS[setting], *one_step)
    assert logged_steps(tmp_path / "run")[2] != logged_steps(plain)[2]


def test_float16_goes_on_with_its_loss_scale_and_the_steps_it_has_held(
    recipe: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from milepost.train import step as update

    monkeypatch.setattr(update, "STEPS_TO_DOUBLE_SCALE", 5)
    setting = SETTINGS["float16"]
    whole, parts = train_with_and_without_a_stop(recipe, tiny_data, tmp_path, *setting)
    assert_same_bits(parts, whole)
    first = update.FIRST_LOSS_SCALE
    assert numbers(parts, LAST_STEP)["progress"]["loss_scale"] == first * 4, "at 5 and at 10"
    assert numbers(parts, LAST_STEP)["progress"]["steps_at_scale"] == 2
    assert [e["loss_scale"] for e in events(parts, "step")][STOP_AT - 1] == first * 2


def test_train_states_stay_on_the_newest_and_on_every_so_many_steps(
    recipe: Path, tiny_data: Path, tmp_path: Path, plain: Path
) -> None:
    run = tmp_path / "run"
    setting = ("--checkpoint.every_steps", "2", "--checkpoint.keep_train_state_every_steps", "6")
    steps = ("--train.total_steps", str(LAST_STEP))
    train_here(recipe, run, tiny_data, *steps, *setting, "--train.stop_at_step", str(STOP_AT))
    assert with_train_state(run) == [6, 7]
    train_here(recipe, run, tiny_data, *steps, *setting, "--checkpoint.keep_train_state", "1")
    assert with_train_state(run) == [6, 12]
    dropped = [event["step"] for event in events(run, "train_state_dropped")]
    assert dropped == [2, 4, 7, 8, 10]
    saved = sorted(int(folder.name[5:]) for folder in (run / "checkpoints").iterdir())
    assert saved == [2, 4, 6, 7, 8, 10, 12], "weights stay on every checkpoint"
    assert tensor_files(run, LAST_STEP) == tensor_files(plain, LAST_STEP)


def with_train_state(run: Path) -> list[int]:
    return sorted(int(state.parent.name[5:]) for state in run.glob("checkpoints/*/train_state"))
