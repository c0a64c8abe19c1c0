"""A vocabulary that is no multiple of 64: the columns that pad the products are seen nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from milepost.cli.main import run as milepost
from milepost.data.prepare import prepare
from milepost.inference.load import load_model
from milepost.planner.cost import count_parameters
from milepost.posttrain.parity import logits_of
from tests.conftest import made_up_text
from tests.training import logged_steps, train_here, weights_sha256

VOCABULARY = 500  # padded to 512 in bfloat16
WORDS = ("--model.vocab_size", str(VOCABULARY), "--train.precision", "bfloat16", "--train.lanes")


@pytest.fixture(scope="module")
def odd_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_data`, with a vocabulary that is no multiple of 64."""
    folder = tmp_path_factory.mktemp("odd")
    for name, num_documents in (("train", 40), ("validation", 4)):
        (folder / name).mkdir()
        for number in range(num_documents):
            text = made_up_text(seed=number + len(name), num_words=400)
            (folder / name / f"{number}.txt").write_text(text)
    prepare(
        [folder / "train"],
        out=folder / "data",
        tokenizer=f"train:{VOCABULARY}",
        val_sources=[folder / "validation"],
        workers=1,
    )
    return folder / "data"


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, "pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


@pytest.mark.parametrize("is_tied", ["true", "false"])
def test_checkpoint_export_counts_and_logits_have_the_vocabulary(
    recipe: Path, odd_data: Path, tmp_path: Path, is_tied: str
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    words = (*WORDS, "1", "--model.tie_word_embeddings", is_tied, "--train.stop_at_step", "2")
    train_here(recipe, run, odd_data, *words)
    folder = run / "checkpoints" / "step-00000002"
    assert milepost(["export", str(folder), "--to", str(out), "--dtype", "float32"]) == 0
    model = load_model(folder).model
    for place in (folder, out):
        shapes = _shapes(place / "model.safetensors")
        assert {len_of for len_of, width in _matrices(shapes) if len_of > 100} == {VOCABULARY}
        assert json.loads((place / "config.json").read_text())["vocab_size"] == VOCABULARY
        num_stored = sum(torch.Size(shape).numel() for shape in shapes.values())
        assert num_stored == count_parameters(model.config).total
    moments = _shapes(folder / "train_state" / "optimizer.safetensors")
    sizes = {torch.Size(shape).numel() for shape in moments.values()}
    assert VOCABULARY * 32 in sizes and 512 * 32 not in sizes
    assert logits_of(model, torch.arange(8)[None]).shape == (1, 8, VOCABULARY)


def test_a_resume_is_exact_with_a_padded_head(recipe: Path, odd_data: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train_here(recipe, whole, odd_data, *WORDS, "2", "--train.stop_at_step", "10")
    train_here(recipe, halves, odd_data, *WORDS, "2", "--train.stop_at_step", "5")
    train_here(recipe, halves, odd_data, *WORDS, "2", "--train.stop_at_step", "10")
    assert logged_steps(halves) == logged_steps(whole)
    assert weights_sha256(halves, 10) == weights_sha256(whole, 10)


def _matrices(shapes: dict[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [shape for shape in shapes.values() if len(shape) == 2]
