"""Evaluation: records once and for all, what is there is not scored again, errors with reasons."""

from __future__ import annotations

import datetime
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from milepost.cli.evaluation_tables import tables
from milepost.cli.main import run
from milepost.core.errors import CheckpointError, DataError, DivergedError, StorageError, UsageError
from milepost.core.files import read_json, sha256_of_file, write_json
from milepost.distributed.devices import choose_scoring_ranks
from milepost.distributed.world import World
from milepost.evaluation.catalog import PAPER_BENCHMARKS, parse_tasks
from milepost.evaluation.evaluate import Evaluation, Request, evaluate
from milepost.evaluation.harness_files import write_harness_files
from milepost.inference.load import load_model
from milepost.runs.evaluations import Conditions, EvaluationStore, Weights, evaluation_key
from milepost.runs.layout import RunLayout
from tests.benchmark_rows import NUM_ROWS, write_rows
from tests.tiny_models import tiny_model, write_model_folder, write_tiny_run

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
TASKS = ("piqa", "boolq")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def layout(tmp_path: Path) -> RunLayout:
    return write_tiny_run(tmp_path / "run", 100, 200)


def asked(model: Path, rows: Path, **changes: object) -> Request:
    return replace(Request(model=model, tasks=TASKS, data_dir=rows, steps="all"), **changes)


def numbers(found: Evaluation) -> list[tuple[object, ...]]:
    """What may not depend on when and how fast a score was made."""
    names = ("key", "step", "benchmark", "n", "metrics", "items_sha256")
    return [tuple(line[name] for name in names) for line in found.lines]


def spoil(folder: Path) -> None:
    """Changes one bit of a checkpoint's weights."""
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def resign(folder: Path) -> None:
    """Makes a checkpoint's manifest true again after a file was changed."""
    manifest = read_json(folder / "manifest.json", error=CheckpointError)
    for name in manifest["files"]:
        file = folder / name
        manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)}
    write_json(folder / "manifest.json", manifest)


def test_every_checkpoint_and_task_gets_a_record_with_its_items(layout, rows) -> None:
    found = evaluate(asked(layout.root, rows), world=ALONE)
    assert [(line["step"], line["benchmark"]) for line in found.lines] == [
        (100, "piqa"),
        (100, "boolq"),
        (200, "piqa"),
        (200, "boolq"),
    ]
    assert len({line["key"] for line in found.lines}) == 4 and not found.was_stopped
    written = [json.loads(line) for line in layout.evaluations.read_text().splitlines()]
    assert written == found.lines
    line = written[0]
    manifest = layout.checkpoint(100) / "manifest.json"
    assert line["checkpoint_sha256"] == sha256_of_file(manifest)
    assert (line["n"], line["limit"], line["num_fewshot"]) == (NUM_ROWS, None, 0)
    assert (line["dtype"], line["chance"], line["majority"]) == ("float32", 0.5, 0.5)
    assert set(line["metrics"]) == {"acc", "acc_norm"} and set(written[1]["metrics"]) == {"acc"}
    items = EvaluationStore(layout.root).items(line)
    assert [item["id"] for item in items] == [str(number) for number in range(NUM_ROWS)]
    right = [item["chosen"] == item["gold"] for item in items]
    assert line["metrics"]["acc"]["value"] == sum(right) / NUM_ROWS
    assert all(len(item["loglikelihoods"]) == 2 for item in items)


def test_what_is_recorded_is_neither_scored_nor_loaded_again(layout, rows) -> None:
    first = evaluate(asked(layout.root, rows), world=ALONE)
    spoil(layout.checkpoint(100))  # would be refused if it were loaded
    again = evaluate(asked(layout.root, rows), world=ALONE)
    assert again.lines == first.lines and not again.new_items
    assert again.items_of(again.lines[2]) == first.items_of(first.lines[2])


@pytest.mark.parametrize("damage", ["delete", "truncate", "flip"])
def test_a_score_whose_items_file_is_not_whole_is_made_again(layout, rows, damage) -> None:
    first = evaluate(asked(layout.root, rows), world=ALONE)
    file = EvaluationStore(layout.root).items_file(first.lines[1]["key"])
    content = file.read_bytes()
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(content[:-3] if damage == "truncate" else content[:-1] + b"\x01")
    again = evaluate(asked(layout.root, rows), world=ALONE)
    assert list(again.new_items) == [first.lines[1]["key"]]
    assert numbers(again) == numbers(first) and file.read_bytes() == content


def test_a_torn_line_and_a_foreign_one_are_passed_over(layout, rows) -> None:
    first = evaluate(asked(layout.root, rows), world=ALONE)
    text = layout.evaluations.read_text()
    layout.evaluations.write_text('[1]\n{"v":1}\n' + text[:-40])
    again = evaluate(asked(layout.root, rows), world=ALONE)
    assert list(again.new_items) == [first.lines[-1]["key"]]
    assert numbers(again) == numbers(first)
    assert layout.evaluations.read_text().endswith("}\n")


def test_of_two_records_of_a_key_the_later_counts(layout, rows) -> None:
    request = asked(layout.root, rows, tasks=("piqa",), steps=None)
    line = evaluate(request, world=ALONE).lines[0]
    with layout.evaluations.open("a") as file:
        file.write(json.dumps(line | {"seconds": 77.0}) + "\n")
    assert evaluate(request, world=ALONE).lines[0]["seconds"] == 77.0


def test_a_stop_loses_at_most_the_task_at_hand(layout, rows, tmp_path) -> None:
    whole = evaluate(asked(layout.root, rows, out=tmp_path / "whole"), world=ALONE)
    answers = iter([False] * 3)

    def stop_soon() -> bool:
        return next(answers, True)

    cut = evaluate(asked(layout.root, rows), world=ALONE, stop_requested=stop_soon)
    assert cut.was_stopped and 0 < len(cut.lines) < 4
    rest = evaluate(asked(layout.root, rows), world=ALONE)
    assert len(rest.new_items) == 4 - len(cut.lines)
    assert numbers(rest) == numbers(whole) and not rest.was_stopped


def test_a_checkpoint_that_has_changed_is_refused_and_the_others_stay(layout, rows, capsys) -> None:
    spoil(layout.checkpoint(200))
    with pytest.raises(CheckpointError, match=r"step-00000200.*has changed"):
        evaluate(asked(layout.root, rows), world=ALONE)
    assert {line["step"] for line in EvaluationStore(layout.root).latest().values()} == {100}


def test_weights_that_are_not_finite_are_refused_and_nothing_is_recorded(layout, rows) -> None:
    folder = layout.checkpoint(200)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    resign(folder)
    with pytest.raises(DivergedError):
        evaluate(asked(layout.root, rows, steps="200"), world=ALONE)
    assert not layout.evaluations.exists() and not layout.items.exists()


def test_records_that_cannot_be_written_are_a_storage_error(layout, rows, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        evaluate(asked(layout.root, rows, out=tmp_path / "file"), world=ALONE)


def test_another_tokenizer_among_the_checkpoints_is_refused(layout, rows) -> None:
    folder = layout.checkpoint(200)
    content = read_json(folder / "tokenizer.json", error=CheckpointError)
    content["model"]["merges"].pop()
    write_json(folder / "tokenizer.json", content)
    resign(folder)
    with pytest.raises(CheckpointError, match="another tokenizer"):
        evaluate(asked(layout.root, rows), world=ALONE)


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
    spoil(moved)
    other = evaluate(asked(moved, rows, steps=None, out=tmp_path / "scores"), world=ALONE)
    assert len(other.new_items) == 2


def test_a_checkpoint_of_a_run_is_recorded_in_the_run(layout, rows) -> None:
    found = evaluate(asked(layout.checkpoint(100), rows, steps=None), world=ALONE)
    assert layout.evaluations.exists() and found.lines[0]["step"] == 100
    assert not evaluate(asked(layout.root, rows, steps="100"), world=ALONE).new_items


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


def test_task_names_are_read() -> None:
    assert parse_tasks(["boolq, piqa", "boolq"]) == ("boolq", "piqa")
    assert parse_tasks(["paper"]) == PAPER_BENCHMARKS and len(PAPER_BENCHMARKS) == 7
    assert parse_tasks(["piqa,paper"])[0] == "piqa"
    with pytest.raises(UsageError) as caught:
        parse_tasks(["hellaswagg"])
    assert caught.value.message == "there is no task 'hellaswagg'"
    assert (caught.value.hint or "").startswith("did you mean hellaswag? tasks: ")
    with pytest.raises(UsageError) as caught:
        parse_tasks(["ARC-Easy"])
    assert "did you mean arc_easy?" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="no task is named"):
        parse_tasks([","])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "boolqq"], "did you mean boolq?"),
        (["--limit", "0"], "--limit 0 leaves no item"),
        (["--num-fewshot", "-1"], "--num-fewshot -1 cannot be"),
        (["--dtype", "float64"], "--dtype 'float64' cannot be"),
        (["--log-samples"], "--log-samples needs a place"),
        (["--prepared", "data"], "--prepared is for heldout, which is not among the tasks"),
        (["--tasks", "piqa", "--prepared", "data"], "add heldout to --tasks"),
        (["--model", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_a_wrong_command_is_refused_before_a_process_is_started(
    layout, capsys, words: list[str], message: str
) -> None:
    model = [] if "--model" in words else [str(layout.root)]
    assert run(["evaluate", *model, *words]) == 2
    talk = capsys.readouterr().err
    assert message in talk and "\nhint: " in talk and "Traceback" not in talk


def test_missing_rows_and_foreign_models_are_named(layout, rows, tmp_path) -> None:
    with pytest.raises(DataError, match="hellaswag"):
        evaluate(asked(layout.root, rows, tasks=("hellaswag",)), world=ALONE)
    with pytest.raises(UsageError, match="heldout"):
        write_model_folder(tmp_path / "model", tiny_model())
        request = asked(tmp_path / "model", rows, steps=None, tasks=("heldout",))
        evaluate(request, world=ALONE)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(UsageError, match="model_type is 'gpt2'"):
        evaluate(asked(tmp_path / "model", rows, steps=None), world=ALONE)
    with pytest.raises(UsageError, match="--steps needs a run"):
        evaluate(asked(tmp_path / "model", rows), world=ALONE)


def test_solved_items_are_refused_where_a_task_has_none(layout, rows) -> None:
    with pytest.raises(UsageError, match="boolq_reasoned has no solved items"):
        evaluate(asked(layout.root, rows, tasks=("boolq_reasoned",), num_fewshot=2), world=ALONE)


@pytest.mark.parametrize(
    ("requested", "num_gpus", "rank_bytes", "expected"),
    [(None, 2, 1, 2), (None, 0, 1 << 60, 1), (3, 0, 1, 3), (1, 2, 1, 1)],
)
def test_ranks_are_one_a_gpu_or_as_many_as_fit(requested, num_gpus, rank_bytes, expected) -> None:
    chosen = choose_scoring_ranks(requested=requested, num_gpus=num_gpus, rank_bytes=rank_bytes)
    assert chosen == expected


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(UsageError, match="--ranks 3 cannot be"):
        choose_scoring_ranks(requested=3, num_gpus=2, rank_bytes=1)


def test_one_model_is_a_table_of_tasks_and_many_are_a_table_a_task(layout, rows) -> None:
    found = evaluate(asked(layout.root, rows), world=ALONE)
    one = "\n".join(tables(found.lines[:2]))
    assert one.startswith("step 100, float32, 0-shot\n  task   items  ")
    assert "\n  piqa       6  " in one and " ± " in one
    many = tables(found.lines)
    assert many[0].startswith("piqa: 6 items, chance 0.5000, majority 0.5000, float32, 0-shot")
    assert [line.split()[:2] for line in many[2:4]] == [["step", "100"], ["step", "200"]]


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"piqa": 5, "boolq": 5}, "float32, 0-shot, the first 5 items"),
        ({"piqa": 4, "boolq": 3}, "float32, 0-shot"),
        ({"piqa": 5, "boolq": 3}, "float32, 0-shot, at most the first 5 items"),
    ],
)
def test_a_table_names_the_limit_where_it_has_left_something_out(counts, words) -> None:
    levels = {"chance": 0.5, "majority": 0.5, "num_truncated": 0, "metrics": {}}
    same = levels | {"step": 1, "dtype": "float32", "num_fewshot": 0, "limit": 5}
    lines = [same | {"benchmark": name, "n": n} for name, n in counts.items()]
    assert tables(lines)[0] == f"step 1, {words}"


def test_harness_files_hold_the_scores_and_the_texts(layout, rows, tmp_path) -> None:
    found = evaluate(asked(layout.root, rows, steps=None), world=ALONE)
    now = datetime.datetime(2026, 1, 5, 8, 59, 58)
    files = write_harness_files(
        found, folder=tmp_path / "lm", model=Path("runs/one"), now=now, log_samples=True
    )
    assert [file.name for file in files] == [
        "results_2026-01-05T08-59-58.json",
        "samples_piqa_2026-01-05T08-59-58.jsonl",
        "samples_boolq_2026-01-05T08-59-58.jsonl",
    ]
    assert files[0].parent.name == "runs__one"
    results = json.loads(files[0].read_text())
    piqa = results["results"]["piqa"]
    assert piqa["acc,none"] == found.lines[0]["metrics"]["acc"]["value"]
    assert piqa["acc_norm_stderr,none"] == found.lines[0]["metrics"]["acc_norm"]["stderr"]
    assert results["n-samples"]["piqa"] == {"original": NUM_ROWS, "effective": NUM_ROWS}
    sample = json.loads(files[1].read_text().splitlines()[1])
    assert sample["arguments"]["gen_args_0"] == {
        "arg_0": "Question: the state of 1\nAnswer:",
        "arg_1": " the union",
    }
    items = found.items_of(found.lines[0])
    assert sample["filtered_resps"][0][0] == str(items[1]["loglikelihoods"][0])
    assert sample["acc"] == float(items[1]["chosen"] == items[1]["gold"])


def test_harness_files_have_the_harness_own_fields(layout, rows, tmp_path) -> None:
    schema = pytest.importorskip("lm_eval.result_schema")
    found = evaluate(asked(layout.root, rows), world=ALONE)
    files = write_harness_files(
        found,
        folder=tmp_path,
        model=Path("run"),
        now=datetime.datetime(2026, 1, 5),
        log_samples=True,
    )
    assert [file.parent.name for file in files[::3]] == [
        "run__step-00000100",
        "run__step-00000200",
    ]
    results = json.loads(files[0].read_text())
    own = {"milepost_version"}
    assert set(results) - own <= set(schema.EvalResults.__annotations__)
    assert set(results["config"]) <= set(schema._EvalConfig.__annotations__)
    assert set(results["n-samples"]["boolq"]) == set(schema._SampleCount.__annotations__)
    sample = json.loads(files[1].read_text().splitlines()[0])
    assert set(sample) == {*schema.SampleResult.__annotations__, "acc", "acc_norm"}


def test_a_score_is_that_of_the_model_that_is_loaded(layout, rows) -> None:
    found = evaluate(asked(layout.root, rows, tasks=("boolq",), steps="100"), world=ALONE)
    loaded = load_model(layout.root, step=100)
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
