"""An adapter and its base, wherever the two lie: every verb finds them in the same way."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from milepost.api.catalog import Catalog
from milepost.cli.main import run
from milepost.core.errors import CheckpointError, UsageError
from milepost.evaluation.checkpoints import (
    checkpoint_from_plain,
    find_checkpoints,
    load_verified,
)
from milepost.inference.load import (
    FoundModel,
    adapter_sha256,
    find_model,
    find_models,
    identify,
    load_found,
    load_model,
)
from milepost.model.llama import Llama
from milepost.model.lora import add_lora, base_sha256, lora_layers
from milepost.runs.layout import RunLayout
from milepost.runs.records import read_samples
from tests.adapters import save_adapter
from tests.damage import approve, edit_manifest, flip
from tests.tiny_models import random_ids, tiny_model, write_model_folder, write_tiny_run

FIRST_SEED = 3


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_model_folder(tmp_path / "base", tiny_model())
    return tmp_path / "base"


def _tuned(seed: int) -> tuple[Llama, str]:
    """The base with additions that change what it says; and the hash of the base."""
    model = tiny_model()
    sha256 = base_sha256(model)
    add_lora(model, rank=2, alpha=8, dropout=0, targets=["q_proj", "down_proj"], seed=seed)
    for _, layer in lora_layers(model):
        layer.lora_B.weight.data.normal_(generator=torch.Generator().manual_seed(seed))
    return model, sha256


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    model, sha256 = _tuned(FIRST_SEED)
    save_adapter(tmp_path / "adapter", model, base=str(base), base_sha256=sha256)
    return tmp_path / "adapter"


@pytest.fixture
def tuning(tmp_path: Path, base: Path) -> RunLayout:
    """A run whose two checkpoints are adapters."""
    layout = write_tiny_run(tmp_path / "tuning", 10, 20)
    for step in (10, 20):
        model, sha256 = _tuned(FIRST_SEED + step)
        save_adapter(tmp_path / f"of-{step}", model, base=str(base), base_sha256=sha256)
        folder = layout.checkpoint(step)
        for name in ("config.json", "model.safetensors"):
            (folder / name).unlink()
        shutil.copytree(tmp_path / f"of-{step}", folder, dirs_exist_ok=True)
        names = {file.name for file in folder.iterdir() if file.is_file()} - {"manifest.json"}
        edit_manifest(folder, files=dict.fromkeys(names))
        approve(folder)
    return layout


def _logits(model: Llama) -> torch.Tensor:
    with torch.no_grad():
        return model(random_ids(1, 8)) @ model.head_weight.T


def test_an_adapter_brings_its_base_and_a_base_takes_an_adapter(base, adapter) -> None:
    expected = _logits(_tuned(FIRST_SEED)[0])
    for found in (load_model(adapter), load_model(base, adapter=adapter)):
        # Added into the weights in place of beside them: float32, 2 layers.
        torch.testing.assert_close(_logits(found.model), expected, atol=1e-5, rtol=1e-4)
        assert found.folder == adapter
    assert not torch.allclose(_logits(load_model(base).model), expected, atol=1e-2)


def test_a_base_that_moved_is_said_by_every_verb_in_the_same_words(
    tmp_path, base, adapter, monkeypatch, capsys
) -> None:
    base.rename(tmp_path / "moved")
    error = (
        f"error: {adapter} is an adapter, and its base is not at {base}\n"
        f"hint: give the folder of its base as the model, with --adapter {adapter}, or name it in "
        "adapter_config.json (base_model_name_or_path)\n"
    )
    verbs = [
        ["chat", str(adapter)],
        ["serve", str(adapter), "--port", "0"],
        ["sample", str(adapter)],
        ["probe", str(adapter), "--prompt", "The"],
        ["export", str(adapter), "--to", str(tmp_path / "out")],
    ]
    for words in verbs:
        assert run(words) == 4, words
        assert capsys.readouterr().err == error
    with pytest.raises(CheckpointError, match="its base is not at") as caught:  # evaluate
        find_checkpoints(adapter, steps=None, dtype="auto")
    assert f"error: {caught.value.message}\nhint: {caught.value.hint}\n" == error


def test_a_base_that_moved_is_named_beside_its_adapter(
    tmp_path, base, adapter, monkeypatch, capsys
) -> None:
    moved = str(base.rename(tmp_path / "moved"))
    beside = [moved, "--adapter", str(adapter)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("The\n"))
    verbs = [
        ["chat", *beside, "--raw", "--max-new-tokens", "2"],
        ["sample", *beside, "--prompt", "The", "--max-new-tokens", "2"],
        ["probe", *beside, "--prompt", "The", "--max-new-tokens", "2"],
        ["export", *beside, "--to", str(tmp_path / "out"), "--dtype", "float32"],
    ]
    for words in verbs:
        assert run(words) == 0, (words, capsys.readouterr().err)
    (checkpoint,) = find_checkpoints(Path(moved), steps=None, dtype="auto", adapter=adapter)
    again = checkpoint_from_plain(json.loads(json.dumps(checkpoint.as_plain())))
    expected = _logits(_tuned(FIRST_SEED)[0])
    for model in (
        load_verified(again).model,
        load_model(tmp_path / "out").model,
        load_found(Catalog(Path(moved), adapter=adapter).latest.find()).model,
    ):
        torch.testing.assert_close(_logits(model), expected, atol=1e-5, rtol=1e-4)


def test_a_step_is_that_of_the_adapters_run_where_there_is_one(tmp_path, base, tuning) -> None:
    first, last = tuning.checkpoint(10), tuning.checkpoint(20)
    assert find_model(tuning.root) == FoundModel(base, last)
    assert find_model(tuning.root, step=10) == FoundModel(base, first)
    assert find_model(base, adapter=tuning.root, step=10) == FoundModel(base, first)
    assert find_model(base, adapter=last) == FoundModel(base, last)
    found = find_models(base, steps="all", adapter=tuning.root)
    assert [model.step for model in found] == [10, 20]
    other = write_tiny_run(tmp_path / "other", 1, 2)
    assert find_model(other.root, adapter=tuning.root, step=10).base == other.checkpoint(2)
    assert find_model(other.root, adapter=first, step=1) == FoundModel(other.checkpoint(1), first)
    with pytest.raises(UsageError, match="--steps needs a run"):
        find_models(base, steps="all", adapter=last)


def test_the_names_of_a_served_adapter_are_those_of_its_run(base, tuning) -> None:
    for catalog in (Catalog(tuning.root), Catalog(base, adapter=tuning.root)):
        assert [model.name for model in catalog.models()] == ["tuning", "tuning:10", "tuning:20"]
        assert catalog.find("tuning:10").find() == FoundModel(base, tuning.checkpoint(10))


def test_samples_of_an_adapter_are_recorded_in_its_run_with_its_hash(base, tuning) -> None:
    words = ["--prompt", "The", "--max-new-tokens", "2", "--steps", "10"]
    assert run(["sample", str(base), "--adapter", str(tuning.root), *words]) == 0
    assert run(["sample", str(tuning.root), *words]) == 0
    lines, _ = read_samples(tuning.samples)
    hashes = {line["adapter"] for line in lines}
    assert hashes == {adapter_sha256(find_model(tuning.root, step=10))}
    assert [line["step"] for line in lines] == [10, 10] and adapter_sha256(FoundModel(base)) is None


def test_what_names_a_model_is_the_adapter_and_its_base(base, adapter, tuning) -> None:
    named = identify(FoundModel(base, adapter))
    assert named == identify(find_model(adapter)) != identify(FoundModel(base))
    flip(base / "model.safetensors")
    assert identify(FoundModel(base, adapter)) != named
    before = identify(find_model(tuning.root))
    flip(base / "model.safetensors")
    assert identify(find_model(tuning.root)) == before, "its manifest names a checkpoint"


@pytest.mark.parametrize("of", ["base", "adapter"])
def test_base_and_adapter_are_held_to_their_manifests(tmp_path, tuning, of: str) -> None:
    layout = write_tiny_run(tmp_path / "run", 5)
    weights = {
        "base": layout.checkpoint(5) / "model.safetensors",
        "adapter": tuning.checkpoint(20) / "adapter_model.safetensors",
    }[of]
    flip(weights)
    with pytest.raises(CheckpointError, match=f"{weights} has changed"):
        load_model(layout.root, adapter=tuning.root)


def test_what_does_not_go_together_is_refused(tmp_path, base, adapter, capsys) -> None:
    with pytest.raises(UsageError, match="is an adapter itself"):
        find_model(adapter, adapter=adapter)
    with pytest.raises(UsageError, match=f"there is no adapter in {base}"):
        find_model(base, adapter=base)
    with pytest.raises(UsageError, match="no adapter in nowhere: it is not a folder"):
        find_model(base, adapter=Path("nowhere"))
    with pytest.raises(UsageError, match="is neither a run nor a model"):
        find_model(tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config["base_model_name_or_path"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is an adapter, and does not name its base"):
        find_model(adapter)
    write_model_folder(base, tiny_model(seed=2))
    with pytest.raises(CheckpointError, match="was trained on another base"):
        load_model(base, adapter=adapter)
