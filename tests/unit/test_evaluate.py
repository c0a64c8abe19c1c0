"""Evaluation: records once and for all, what is there is not scored again, errors with reasons."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from milepost.core.errors import CheckpointError, DivergedError, StorageError
from milepost.core.files import read_json, sha256_of_file, write_json
from milepost.evaluation.evaluate import Evaluation, evaluate
from milepost.inference.load import load_model
from milepost.runs.evaluations import Conditions, EvaluationStore, Weights, evaluation_key
from tests.benchmark_rows import NUM_ROWS
from tests.damage import approve, flip
from tests.evaluations import ALONE, asked
from tests.tiny_models import tiny_model, write_model_folder

pytestmark = pytest.mark.usefixtures("own_cache")


def numbers(found: Evaluation) -> list[tuple[object, ...]]:
    """What may not depend on when and how fast a score was made."""
    names = ("key", "step", "benchmark", "n", "metrics", "items_sha256")
    return [tuple(line[name] for name in names) for line in found.lines]


def test_every_checkpoint_and_task_gets_a_record_with_its_items(tiny_run, rows) -> None:
    found = evaluate(asked(tiny_run.root, rows), world=ALONE)
    assert [(line["step"], line["benchmark"]) for line in found.lines] == [
        (100, "piqa"),
        (100, "boolq"),
        (200, "piqa"),
        (200, "boolq"),
    ]
    assert len({line["key"] for line in found.lines}) == 4 and not found.was_stopped
    written = [json.loads(line) for line in tiny_run.evaluations.read_text().splitlines()]
    assert written == found.lines
    line = written[0]
    manifest = tiny_run.checkpoint(100) / "manifest.json"
    assert line["checkpoint_sha256"] == sha256_of_file(manifest)
    assert (line["n"], line["limit"], line["num_fewshot"]) == (NUM_ROWS, None, 0)
    assert (line["dtype"], line["chance"], line["majority"]) == ("float32", 0.5, 0.5)
    assert set(line["metrics"]) == {"acc", "acc_norm"} and set(written[1]["metrics"]) == {"acc"}
    items = EvaluationStore(tiny_run.root).items(line)
    assert [item["id"] for item in items] == [str(number) for number in range(NUM_ROWS)]
    right = [item["chosen"] == item["gold"] for item in items]
    assert line["metrics"]["acc"]["value"] == sum(right) / NUM_ROWS
    assert all(len(item["loglikelihoods"]) == 2 for item in items)


def test_what_is_recorded_is_neither_scored_nor_loaded_again(tiny_run, rows) -> None:
    first = evaluate(asked(tiny_run.root, rows), world=ALONE)
    flip(tiny_run.checkpoint(100) / "model.safetensors")  # would be refused if it were loaded
    again = evaluate(asked(tiny_run.root, rows), world=ALONE)
    assert again.lines == first.lines and not again.new_items
    assert again.items_of(again.lines[2]) == first.items_of(first.lines[2])


@pytest.mark.parametrize("damage", ["delete", "truncate", "flip"])
def test_a_score_whose_items_file_is_not_whole_is_made_again(tiny_run, rows, damage) -> None:
    first = evaluate(asked(tiny_run.root, rows), world=ALONE)
    file = EvaluationStore(tiny_run.root).items_file(first.lines[1]["key"])
    content = file.read_bytes()
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(content[:-3] if damage == "truncate" else content[:-1] + b"\x01")
    again = evaluate(asked(tiny_run.root, rows), world=ALONE)
    assert list(again.new_items) == [first.lines[1]["key"]]
    assert numbers(again) == numbers(first) and file.read_bytes() == content


def test_a_torn_line_and_a_foreign_one_are_passed_over(tiny_run, rows) -> None:
    first = evaluate(asked(tiny_run.root, rows), world=ALONE)
    text = tiny_run.evaluations.read_text()
    tiny_run.evaluations.write_text('[1]\n{"v":1}\n' + text[:-40])
    again = evaluate(asked(tiny_run.root, rows), world=ALONE)
    assert list(again.new_items) == [first.lines[-1]["key"]]
    assert numbers(again) == numbers(first)
    assert tiny_run.evaluations.read_text().endswith("}\n")


def test_of_two_records_of_a_key_the_later_counts(tiny_run, rows) -> None:
    request = asked(tiny_run.root, rows, tasks=("piqa",), steps=None)
    line = evaluate(request, world=ALONE).lines[0]
    with tiny_run.evaluations.open("a") as file:
        file.write(json.dumps(line | {"seconds": 77.0}) + "\n")
    assert evaluate(request, world=ALONE).lines[0]["seconds"] == 77.0


def test_a_stop_loses_at_most_the_task_at_hand(tiny_run, rows, tmp_path) -> None:
    whole = evaluate(asked(tiny_run.root, rows, out=tmp_path / "whole"), world=ALONE)
    answers = iter([False] * 3)

    def stop_soon() -> bool:
        return next(answers, True)

    cut = evaluate(asked(tiny_run.root, rows), world=ALONE, stop_requested=stop_soon)
    assert cut.was_stopped and 0 < len(cut.lines) < 4
    rest = evaluate(asked(tiny_run.root, rows), world=ALONE)
    assert len(rest.new_items) == 4 - len(cut.lines)
    assert numbers(rest) == numbers(whole) and not rest.was_stopped


def test_a_checkpoint_that_has_changed_is_refused_and_the_others_stay(
    tiny_run, rows, capsys
) -> None:
    flip(tiny_run.checkpoint(200) / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"step-00000200.*has changed"):
        evaluate(asked(tiny_run.root, rows), world=ALONE)
    assert {line["step"] for line in EvaluationStore(tiny_run.root).latest().values()} == {100}


def test_weights_that_are_not_finite_are_refused_and_nothing_is_recorded(tiny_run, rows) -> None:
    folder = tiny_run.checkpoint(200)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    approve(folder)
    with pytest.raises(DivergedError):
        evaluate(asked(tiny_run.root, rows, steps="200"), world=ALONE)
    assert not tiny_run.evaluations.exists() and not tiny_run.items.exists()


def test_records_that_cannot_be_written_are_a_storage_error(tiny_run, rows, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        evaluate(asked(tiny_run.root, rows, out=tmp_path / "file"), world=ALONE)


def test_another_tokenizer_among_the_checkpoints_is_refused(tiny_run, rows) -> None:
    folder = tiny_run.checkpoint(200)
    content = read_json(folder / "tokenizer.json", error=CheckpointError)
    content["model"]["merges"].pop()
    write_json(folder / "tokenizer.json", content)
    approve(folder)
    with pytest.raises(CheckpointError, match="another tokenizer"):
        evaluate(asked(tiny_run.root, rows), world=ALONE)


def test_a_foreign_model_is_recorded_only_where_it_is_told(tmp_path, rows) -> None:
    folder = tmp_path / "model"
    write_model_folder(folder, tiny_model())
    shown = evaluate(asked(folder, rows, steps=None), world=ALONE)
    assert shown.store is None and sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    kept = evaluate(asked(folder, rows, steps=None, out=tmp_path / "scores"), world=ALONE)
    assert [line["metrics"] for line in kept.lines] == [line["metrics"] for line in shown.lines]
    assert (tmp_path / "scores" / "evaluations.jsonl").exists()
    moved = shutil.copytree(folder, tmp_path / "moved")
    again = evaluate(asked(moved, rows, steps=None, out=tmp_path / "scores"), world=ALONE)
    assert not again.new_items, "the name of the folder is no part of the score"
    flip(moved / "model.safetensors")
    other = evaluate(asked(moved, rows, steps=None, out=tmp_path / "scores"), world=ALONE)
    assert len(other.new_items) == 2


def test_a_checkpoint_of_a_run_is_recorded_in_the_run(tiny_run, rows) -> None:
    found = evaluate(asked(tiny_run.checkpoint(100), rows, steps=None), world=ALONE)
    assert tiny_run.evaluations.exists() and found.lines[0]["step"] == 100
    assert not evaluate(asked(tiny_run.root, rows, steps="100"), world=ALONE).new_items


def test_auto_takes_the_dtype_of_the_file_and_each_dtype_has_a_key(tmp_path, rows) -> None:
    folder = tmp_path / "model"
    write_model_folder(folder, tiny_model(), dtype=torch.bfloat16)
    request = asked(folder, rows, steps=None, tasks=("piqa",), out=tmp_path / "scores")
    auto = evaluate(request, world=ALONE).lines[0]
    assert auto["dtype"] == "bfloat16"
    assert not evaluate(replace(request, dtype="bfloat16"), world=ALONE).new_items
    single = evaluate(replace(request, dtype="float32"), world=ALONE).lines[0]
    assert single["dtype"] == "float32" and single["key"] != auto["key"]


def test_the_key_holds_all_that_can_change_a_score_and_no_more() -> None:
    weights = Weights(checkpoint_sha256="a", run_id="r", step=1, tokens_seen=10)
    conditions = Conditions("piqa", "p", 0, None, "d", "float32")
    key = evaluation_key(weights, conditions)
    for changes in (
        {"benchmark": "boolq"},
        {"protocol": "q"},
        {"num_fewshot": 1},
        {"limit": 5},
        {"data_sha256": "e"},
        {"dtype": "bfloat16"},
    ):
        assert evaluation_key(weights, replace(conditions, **changes)) != key
    assert evaluation_key(replace(weights, checkpoint_sha256="b"), conditions) != key
    assert evaluation_key(replace(weights, step=None, tokens_seen=3), conditions) == key
    training = replace(weights, checkpoint_sha256=None)
    keys = {
        evaluation_key(weights, conditions)
        for weights in (training, replace(training, step=2), replace(training, run_id="s"))
    }
    assert len(keys) == 3 and key not in keys


def test_a_score_is_that_of_the_model_that_is_loaded(tiny_run, rows) -> None:
    found = evaluate(asked(tiny_run.root, rows, tasks=("boolq",), steps="100"), world=ALONE)
    loaded = load_model(tiny_run.root, step=100)
    context = "the union is 0\nQuestion: is it 0?\nAnswer:"
    ids = torch.tensor([loaded.tokenizer.encode(context)])
    with torch.no_grad():
        hidden = loaded.model(ids)[0, -1]
        logits = torch.log_softmax(hidden @ loaded.model.head_weight.t(), dim=0)
    answers = [loaded.tokenizer.encode(text) for text in (" no", " yes")]
    for answer, value in zip(
        answers, found.items_of(found.lines[0])[0]["loglikelihoods"], strict=True
    ):
        if len(answer) == 1:
            assert abs(float(logits[answer[0]]) - value) < 1e-5
        else:
            assert value < float(logits[answer[0]])
