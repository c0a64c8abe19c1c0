"""The model card of an export: what it says, and that the hub can read it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from milepost.cli.main import run
from milepost.posttrain.model_card import model_card
from milepost.posttrain.parity import Parity
from milepost.runs.evaluations import Conditions, EvaluationRecord, EvaluationStore, Weights
from milepost.runs.events import EventWriter
from milepost.runs.layout import RunLayout
from tests.tiny_models import tiny_model, tiny_section, write_model_folder


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    write_model_folder(tmp_path / "model", tiny_model())
    return tmp_path / "model"


def export(model: Path, *words: str) -> int:
    return run(["export", str(model), "--to", str(model.parent / "out"), *words])


def test_the_card_says_what_the_records_say(model_folder: Path, tmp_path: Path) -> None:
    assert run(["import", str(model_folder), "--run", str(tmp_path / "run"), "--step", "40"]) == 0
    layout = RunLayout(tmp_path / "run")
    events = EventWriter(layout.events, segment=1)
    events.append("segment_started", ranks=2, device="a plain processor")
    events.append("step", step=40, tokens_seen=81_920)
    events.append("validation", step=40, loss_nats=3.25, bits_per_byte=1.125, tokens=600)
    EvaluationStore(tmp_path / "run").add(score_at(40), [])
    EvaluationStore(tmp_path / "run").add(score_at(20), [])
    assert export(tmp_path / "run", "--format", "hf") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for said in (
        "step 40 of 1,040 of the run `run`",
        "| tokens seen | 81,920 |",
        "| trained on | 2 x a plain processor |",
        "| validation loss | | | 3.2500 nats per token |",
        "| hellaswag acc | 5 | 100 | 0.4000 ± 0.0500 |",
        "| weights | bfloat16 |",
        "In training the end-of-text token stands before each document",
        "## License\n\nNot stated.",
    ):
        assert said in card
    assert card.count("hellaswag") == 1, "a score of another step"


def score_at(step: int, *, limit: int | None = None) -> EvaluationRecord:
    return EvaluationRecord(
        weights=Weights(f"{step}", "0", step, None),
        conditions=Conditions("hellaswag", "p", 5, limit, "0", "float32"),
        n=100,
        metrics={"acc": {"value": 0.4, "stderr": 0.05}},
        chance=0.25,
        majority=0.26,
        num_truncated=0,
        device="cpu",
        ranks=1,
        seconds=1.0,
        milepost="0",
        time="2026-01-01T00:00:00.000Z",
    )


def test_a_model_of_no_run_says_so(model_folder: Path) -> None:
    assert export(model_folder) == 0
    assert "no record says" in (model_folder.parent / "out" / "README.md").read_text()


def test_an_imported_model_is_not_said_to_be_trained(model_folder: Path, tmp_path: Path) -> None:
    assert run(["import", str(model_folder), "--run", str(tmp_path / "run")]) == 0
    assert export(tmp_path / "run") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "as it was taken from another model (see below), before any training" in card
    assert "| lineage: imported_sha256 |" in card
    for setting in (
        "In training",
        "learning rate",
        "global batch",
        "## Training",
        "Milepost trained",
    ):
        assert setting not in card


def test_a_part_of_a_benchmark_is_called_one(model_folder: Path, tmp_path: Path) -> None:
    assert run(["import", str(model_folder), "--run", str(tmp_path / "run"), "--step", "40"]) == 0
    EvaluationStore(tmp_path / "run").add(score_at(40, limit=100), [])
    assert export(tmp_path / "run") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| hellaswag acc | 5 | the first 100 | 0.4000 ± 0.0500 |" in card


@pytest.mark.parametrize("library", ["transformers", "gguf", "peft"])
def test_the_hub_reads_the_metadata(library: str) -> None:
    from huggingface_hub import ModelCard

    name = 'a: "b"\n---\n# | <img src=x> [c](d) `e`'
    card = model_card(
        name,
        model=tiny_section(),
        facts=None,
        source_sha256="ab",
        adapter=None,
        parity=Parity(0.0, 0.1, 1.0, 96, "float32"),
        library=library,
        usage="",
    )
    expected = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["llama", "milepost"],
    }
    assert yaml.safe_load(card.split("---\n")[1]) == expected
    read = ModelCard(card)
    assert {key: read.data.get(key) for key in expected} == expected
    assert read.data.license is None
    title = card.splitlines()[6]
    assert title == '# a: "b" --- # \\| \\<img src=x> \\[c](d) \\`e\\`'
