"""Loading models: from runs, checkpoints and foreign folders; damage and hostility refused."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from milepost.core.errors import CheckpointError, UsageError
from milepost.inference.load import load_model
from tests.tiny_models import random_ids, tiny_model, write_model_folder, write_tiny_run


@pytest.fixture
def folder(tmp_path):
    write_model_folder(tmp_path / "model", tiny_model())
    return tmp_path / "model"


def test_a_run_gives_its_latest_checkpoint_or_the_one_asked_for(tmp_path) -> None:
    layout = write_tiny_run(tmp_path / "run", 100, 200, 20)
    for step, path, expected in (
        (None, layout.root, 200),
        (20, layout.root, 20),
        (None, layout.checkpoint(100), 100),
    ):
        loaded = load_model(path, step=step)
        assert loaded.step == expected and loaded.folder == layout.checkpoint(expected)
        wanted = tiny_model(seed=expected)
        assert torch.equal(loaded.model.head_weight, wanted.head_weight)
        assert torch.equal(loaded.model(random_ids(1, 5)), wanted(random_ids(1, 5)))


def test_steps_that_are_not_there_are_named_with_those_that_are(tmp_path) -> None:
    layout = write_tiny_run(tmp_path / "run", 100, 200)
    with pytest.raises(CheckpointError) as caught:
        load_model(layout.root, step=150)
    assert caught.value.message == f"{layout.root} has no checkpoint of step 150"
    assert caught.value.hint == "there are checkpoints of steps 100, 200"
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        load_model(write_tiny_run(tmp_path / "new").root)
    with pytest.raises(UsageError, match="is one model, it has no step 7"):
        load_model(layout.checkpoint(100), step=7)


def test_what_is_no_model_is_said(tmp_path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(UsageError, match="is neither a run nor a model"):
        load_model(tmp_path)


def test_a_changed_bit_in_a_checkpoint_is_found(tmp_path) -> None:
    layout = write_tiny_run(tmp_path / "run", 100)
    file = layout.checkpoint(100) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has changed"):
        load_model(layout.root)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_files_become_float32_masters(tmp_path, dtype: torch.dtype) -> None:
    model = tiny_model(tie_word_embeddings=True)
    write_model_folder(tmp_path, model, dtype=dtype)
    loaded = load_model(tmp_path).model
    assert load_model(tmp_path).step is None
    for name, parameter in model.named_parameters():
        assert loaded.get_parameter(name).dtype == torch.float32
        assert torch.equal(loaded.get_parameter(name), parameter.to(dtype).float())


def _rewrite(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def _widen(weights) -> None:
    weights[Q_PROJ] = torch.zeros(32, 33)


def _as_integers(weights) -> None:
    weights[Q_PROJ] = torch.zeros(32, 32, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_widen, f"{Q_PROJ} has shape [32, 33], config.json says [32, 32]"),
        (_as_integers, f"{Q_PROJ} has type I32"),
        (lambda w: w.pop(Q_PROJ), f"lacks {Q_PROJ}"),
        (lambda w: w.update(extra=torch.zeros(1)), "has the unknown tensor extra"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(folder, change, message: str) -> None:
    _rewrite(folder, change)
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert message in caught.value.message
    assert caught.value.hint


def test_a_head_beside_tied_embeddings_and_old_rotary_buffers_do_no_harm(tmp_path) -> None:
    write_model_folder(tmp_path, tiny_model(tie_word_embeddings=True))
    _rewrite(
        tmp_path,
        lambda w: w.update(
            {
                "lm_head.weight": torch.zeros(280, 32),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
            }
        ),
    )
    load_model(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, b"\xff" * 7 + b"\x7f" + b"x" * 64, b"PK\x03\x04" + b"0" * 99]
)
def test_a_file_that_is_not_safetensors_is_refused(folder, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read as safetensors"):
        load_model(folder)


def test_a_truncated_file_is_refused(folder) -> None:
    file = folder / "model.safetensors"
    for size in (1, file.stat().st_size // 2, file.stat().st_size - 1):
        os.truncate(file, size)
        with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
            load_model(folder)


def test_a_pickle_is_never_read(folder) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert "pytorch_model.bin, a pickle, which can run code" in caught.value.message
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        load_model(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_links_and_pipes_are_refused(folder, tmp_path, name: str) -> None:
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match="is a symbolic link") as caught:
        load_model(folder)
    assert "cp -rL" in (caught.value.hint or "")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        load_model(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "weights.bin"])
def test_an_index_cannot_name_files_elsewhere(folder, name: str) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = {"weight_map": {Q_PROJ: name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"only \.safetensors files beside it are read"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    with pytest.raises(CheckpointError, match="has no weight_map"):
        load_model(folder)


def test_a_config_that_is_damaged_or_foreign_is_refused(folder) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    with pytest.raises(UsageError, match="attention_bias is True"):
        load_model(folder)
    # Sizes that memory could not hold are compared with the file before anything is allocated.
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 2**24}))
    with pytest.raises(CheckpointError, match="has shape"):
        load_model(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not a JSON object"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        load_model(folder)


def test_a_tokenizer_of_another_model_is_refused(tmp_path) -> None:
    write_model_folder(tmp_path, tiny_model(vocab_size=100))
    with pytest.raises(CheckpointError, match="the tokenizer has 280 tokens, the model's"):
        load_model(tmp_path)
