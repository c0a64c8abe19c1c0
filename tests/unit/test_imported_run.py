"""`milepost import`: a model of another program as a run that can be trained further."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from milepost.checkpoint.audit import audit
from milepost.cli.main import run
from milepost.config.recipe import load_recipe
from milepost.core.errors import UsageError
from milepost.inference.load import load_model
from milepost.model.init import initialize
from milepost.model.llama import Llama
from milepost.posttrain.weight_shards import write_weights
from milepost.runs.layout import RunLayout
from milepost.runs.lineage import parse_parent
from milepost.runs.manifest import read_run_manifest
from milepost.text.tokenizer import load_tokenizer
from milepost.trajectory.collect import collect
from milepost.trajectory.provenance import commands
from tests.tiny_models import tiny_model, write_model_folder
from tests.training import logged_steps, train_here, weights_sha256, write_recipe

pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    write_model_folder(tmp_path / "model", tiny_model(tie_word_embeddings=False))
    return tmp_path / "model"


def import_(folder: Path, *words: str, to: Path | None = None) -> int:
    return run(["import", str(folder), "--run", str(to or folder.parent / "run"), *words])


def settings_of(recipe: Path) -> list[str]:
    """The recipe's settings as words of a command line, but for the architecture."""
    config = load_recipe(str(recipe)).model_dump(mode="json")
    sections = ("data", "train", "optimizer", "schedule", "checkpoint", "validation")
    words = []
    for section in sections:
        for name, value in config[section].items():
            if f"{section}.{name}" != "data.path":
                text = "none" if value is None else json.dumps(value).strip('"')
                words += [f"--{section}.{name}", text]
    return words


def test_an_imported_model_trains_as_one_that_began_with_its_weights(
    tmp_path: Path, tiny_data: Path
) -> None:
    recipe = write_recipe(tmp_path)
    config = load_recipe(str(recipe))
    model = Llama(config.model)
    initialize(model, config=config.model, seed=config.run.seed)
    tokenizer = load_tokenizer(str(tiny_data / "tokenizer"))
    write_model_folder(tmp_path / "model", model, tokenizer=tokenizer)
    words = [*settings_of(recipe), "--train.stop_at_step", "3"]
    assert import_(tmp_path / "model", "--data", str(tiny_data), *words) == 0
    train_here(tmp_path / "run" / "recipe.toml", tmp_path / "run", tiny_data)
    train_here(recipe, tmp_path / "scratch", tiny_data, "--train.stop_at_step", "3")
    assert logged_steps(tmp_path / "run") == logged_steps(tmp_path / "scratch")
    assert weights_sha256(tmp_path / "run", 3) == weights_sha256(tmp_path / "scratch", 3)
    found = audit(RunLayout(tmp_path / "run"), wait=lambda: None)
    assert (found.findings, found.notes) == ([], [])


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_of_any_type_become_float32_weights_of_the_same_values(
    tmp_path: Path, is_tied: bool, dtype: torch.dtype
) -> None:
    model = tiny_model(tie_word_embeddings=is_tied)
    write_model_folder(tmp_path / "model", model)
    (tmp_path / "model" / "model.safetensors").unlink()
    write_weights(
        tmp_path / "model",
        model.state_dict(),
        dtype=dtype,
        max_bytes=10_000,
        on_written=lambda num_bytes: None,
    )
    assert import_(tmp_path / "model") == 0
    imported = load_model(tmp_path / "run").model.state_dict()
    assert set(imported) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(imported[name], tensor.to(dtype).float())


def test_the_run_says_where_it_comes_from_and_is_whole(model_folder: Path) -> None:
    assert import_(model_folder, "--step", "40", "--optimizer.learning_rate", "3e-5") == 0
    layout = RunLayout(model_folder.parent / "run")
    manifest = read_run_manifest(layout)
    assert manifest.lineage["imported_from"] == str(model_folder)
    assert len(manifest.lineage["imported_sha256"]) == 64
    assert manifest.config.optimizer.learning_rate == 3e-5
    assert manifest.config.train.precision != "auto" and manifest.config.train.compile != "auto"
    assert load_recipe(str(layout.root / "recipe.toml")) == manifest.config
    found = audit(layout, wait=lambda: None)
    assert (found.findings, found.notes, found.num_train_states) == ([], [], 1)
    assert load_model(layout.root).step == 40


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--model.num_hidden_layers", "3"], 2, "the architecture is that of the model folder"),
        (["--step", "500", "--train.total_steps", "500"], 2, "the import begins at step 500"),
        (["--train.lane", "4"], 2, "train.lanes"),
        (["--step=-1"], 2, "--step is -1"),
        (["--lora.rank", "4"], 2, "LoRA adds to a model that is there already"),
        (["--lora.alpha", "4"], 2, "are settings of milepost finetune"),
        (["--finetune.base", "x"], 2, "are settings of milepost finetune"),
        (["--optimizer.name", "adamw8bit"], 2, "begins with the moments of adamw"),
        (["--data.path", "data"], 2, "give --data data in place of --data.path"),
    ],
)
def test_settings_that_cannot_be_are_refused_and_leave_nothing(
    model_folder: Path, words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert import_(model_folder, *words) == code
    assert said in capsys.readouterr().err
    assert [entry.name for entry in model_folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_another_architecture_is_refused_by_name(
    model_folder: Path,
    changes: dict[str, Any],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | changes))
    assert import_(model_folder) == 2
    assert said in capsys.readouterr().err
    assert [entry.name for entry in model_folder.parent.iterdir()] == ["model"]


def test_a_pickle_is_refused_and_never_read(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model_folder / "model.safetensors").unlink()
    marker = model_folder.parent / "marker"
    payload = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    (model_folder / "pytorch_model.bin").write_bytes(payload)
    assert import_(model_folder) == 4
    assert "a pickle, which can run code when read" in capsys.readouterr().err
    assert not marker.exists()


def test_a_model_without_a_tokenizer_is_refused_with_what_to_do(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model_folder / "tokenizer.json").rename(model_folder / "tokenizer.model")
    assert import_(model_folder) == 2
    said = capsys.readouterr().err
    assert "has no tokenizer.json" in said and "AutoTokenizer" in said


def test_data_of_another_tokenizer_is_refused(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = json.loads((tiny_data / "tokenizer" / "tokenizer.json").read_bytes())
    other["model"]["merges"].reverse()
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    write_model_folder(tmp_path / "model", tiny_model(vocab_size=512), tokenizer=tokenizer)
    assert import_(tmp_path / "model", "--data", str(tiny_data)) == 3
    said = capsys.readouterr().err
    assert "was made with another tokenizer than the model's" in said
    assert f"--tokenizer {tmp_path}/model/tokenizer.json" in said


def test_rows_that_no_token_has_cannot_be_trained_further(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(str(tiny_data / "tokenizer"))
    write_model_folder(tmp_path / "model", tiny_model(vocab_size=576), tokenizer=tokenizer)
    assert import_(tmp_path / "model", "--data", str(tiny_data)) == 2
    assert "576 rows for 512 tokens" in capsys.readouterr().err
    assert import_(tmp_path / "model") == 0


def test_a_run_without_data_says_so_where_it_is_trained(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(str(tiny_data / "tokenizer"))
    write_model_folder(tmp_path / "model", tiny_model(vocab_size=512), tokenizer=tokenizer)
    assert import_(tmp_path / "model") == 0
    recipe, made = tmp_path / "run" / "recipe.toml", tmp_path / "run"
    words = ("--optimizer.learning_rate", "0.5")
    with pytest.raises(UsageError, match="was imported without data") as refused:
        train_here(recipe, made, tiny_data, *words)
    assert f"--from {made} --restore weights" in str(refused.value.hint)
    capsys.readouterr()
    assert run(["train", str(recipe), "--run", str(made)]) == 2
    assert "was imported without data" in capsys.readouterr().err, "not that data.path is missing"


def test_a_run_without_data_is_a_parent_of_one_that_has_them(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(str(tiny_data / "tokenizer"))
    write_model_folder(tmp_path / "model", tiny_model(vocab_size=512), tokenizer=tokenizer)
    assert import_(tmp_path / "model") == 0
    made = tmp_path / "run"
    assert commands(collect(made), recipe="recipe.toml") == [
        f"milepost import {tmp_path / 'model'} --run run-again"
    ]
    stop = ("--train.stop_at_step", "1", "--train.global_batch_tokens", "384")
    begin_with = parse_parent(str(made), restore="weights")
    capsys.readouterr()
    train_here(made / "recipe.toml", tmp_path / "child", tiny_data, *stop, begin_with=begin_with)
    told = capsys.readouterr().err
    assert "restored: weights only" in told and "is not the data of the parent" not in told


def test_what_is_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert import_(tmp_path, to=tmp_path / "run") == 2
    assert "has no config.json" in capsys.readouterr().err
    assert import_(tmp_path / "owner" / "name", to=tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "is not a folder" in said and "on this machine" in said


def test_a_run_and_a_filled_folder_are_refused(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert import_(model_folder) == 0
    assert import_(model_folder) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    made = model_folder.parent / "run"
    assert import_(made, to=made.parent / "second") == 2
    assert "is a run already" in capsys.readouterr().err
