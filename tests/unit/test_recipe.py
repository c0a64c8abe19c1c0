"""Overrides from the command line, and the config as a run's manifest keeps it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from milepost.config.problems import ConfigError
from milepost.config.recipe import config_from_toml, load_recipe
from milepost.core.errors import CheckpointError, UsageError
from milepost.core.files import sha256_of_json
from milepost.runs.layout import RunLayout
from milepost.runs.manifest import RunManifest, read_run_manifest, write_run_manifest
from milepost.trajectory.provenance import recipe_toml


@pytest.mark.parametrize("text", ["2024", "true", "1e3", "none", "[1]", "first", ""])
def test_a_text_is_taken_as_it_stands(text: str) -> None:
    config = load_recipe("demo", overrides=["--run.name", text, f"--data.path={text}"])
    assert (config.run.name, config.data.path) == (text, text)


def test_none_unsets_what_can_be_unset() -> None:
    assert load_recipe("demo").optimizer.clip_grad_norm == 1.0
    words = ["--optimizer.clip_grad_norm", "none", "--train.stop_at_step", "none"]
    config = load_recipe("demo", overrides=words)
    assert config.optimizer.clip_grad_norm is None
    assert config.train.stop_at_step is None


def test_none_is_a_word_like_any_other_elsewhere() -> None:
    assert load_recipe("demo", overrides=["--train.recompute", "none"]).train.recompute == "none"
    with pytest.raises(ConfigError, match=r"train\.lanes: 'none'"):
        load_recipe("demo", overrides=["--train.lanes", "none"])


def test_an_override_of_an_unknown_field_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean train\.lanes"):
        load_recipe("demo", overrides=["--train.lane", "2"])
    with pytest.raises(ConfigError, match="did you mean train"):
        load_recipe("demo", overrides=["--trains.lanes", "2"])


def write_manifest(folder: Path) -> RunLayout:
    layout = RunLayout(folder)
    manifest = RunManifest(
        run_id="ab",
        created="2026-01-01T00:00:00.000Z",
        config=load_recipe("demo"),
        recipe="demo",
        data_fingerprint="cd",
        validation_fingerprint=None,
        tokenizer_sha256="ef",
        environment={},
    )
    write_run_manifest(layout, manifest)
    assert read_run_manifest(layout) == manifest
    return layout


def test_a_run_made_before_a_field_existed_is_read_with_its_default(tmp_path: Path) -> None:
    layout = write_manifest(tmp_path)
    values = json.loads(layout.manifest.read_text())
    del values["config"]["samples"]["top_k"]
    values["config_sha256"] = sha256_of_json(values["config"])
    layout.manifest.write_text(json.dumps(values))
    assert read_run_manifest(layout).config == load_recipe("demo")


def test_an_edited_config_is_refused(tmp_path: Path) -> None:
    layout = write_manifest(tmp_path)
    values = json.loads(layout.manifest.read_text())
    values["config"]["optimizer"]["learning_rate"] *= 2
    layout.manifest.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="the config does not match its hash"):
        read_run_manifest(layout)


def test_a_recipe_unsets_a_field_with_none_and_the_written_one_is_the_same() -> None:
    config = load_recipe("demo", overrides=["--optimizer.clip_grad_norm", "none"])
    assert config.optimizer.clip_grad_norm is None
    assert config_from_toml(recipe_toml(config), source="a written recipe") == config


def test_none_is_a_text_where_a_field_cannot_be_unset() -> None:
    with pytest.raises(UsageError, match=r"optimizer\.learning_rate"):
        config_from_toml('[optimizer]\nlearning_rate = "none"\n', source="a recipe")


def test_additions_to_a_model_that_is_not_there_are_refused() -> None:
    with pytest.raises(UsageError, match="LoRA adds to a model that is there already"):
        load_recipe("demo", overrides=["--lora.rank", "8"])
    assert load_recipe("sft-alpaca", overrides=["--lora.rank", "8"]).lora.rank == 8
