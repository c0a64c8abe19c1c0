"""Exports of fine-tuning runs: the additions, the chat template, and what the card says of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from milepost.cli.main import run
from milepost.inference.load import load_model
from tests.finetuning import LORA, TEMPLATE, Tuning

FORMS = ("hf", "gguf", "adapter")


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory) -> Tuning:
    return Tuning(tmp_path_factory.mktemp("tuning"))


@pytest.fixture(scope="module")
def adapted(tuning: Tuning, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps of LoRA; to be read only."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    tuning.train_here(folder, *LORA)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_a_tuned_run_is_exported_with_its_template_and_its_settings(
    adapted: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--to", str(out), "--format", form, "--dtype", "float32"]
    assert run(["export", str(adapted), *words]) == 0
    assert capsys.readouterr().err.endswith(": 100 %\n")
    card = (out / "README.md").read_text()
    assert "step 12 of 12 of the run" in card and "which Milepost trained from another" in card
    assert "| what was trained | LoRA of rank 8, alpha 16, on q_proj" in card
    assert "in the form of its chat template" in card
    assert "before each document" not in card
    assert "| lineage: base_sha256 |" in card
    if form != "gguf":
        assert (out / "chat_template.jinja").read_text() == TEMPLATE
    if form == "hf":
        expected = load_model(adapted).model.state_dict()
        found = load_model(out).model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_tuned_checkpoint_is_imported_with_its_additions_in_the_weights(
    adapted: Path, tmp_path: Path
) -> None:
    checkpoint = adapted / "checkpoints" / "step-00000012"
    assert run(["import", str(checkpoint), "--run", str(tmp_path / "run")]) == 0
    expected = load_model(adapted).model.state_dict()
    found = load_model(tmp_path / "run").model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    imported = tmp_path / "run" / "checkpoints" / "step-00000000"
    assert (imported / "chat_template.jinja").read_text() == TEMPLATE
    assert not list(imported.glob("adapter*"))
