"""How scores are shown: tables for people, and files as the harness writes them."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from milepost.cli.evaluation_tables import tables
from milepost.evaluation.evaluate import evaluate
from milepost.evaluation.harness_files import write_harness_files
from tests.benchmark_rows import NUM_ROWS
from tests.evaluations import ALONE, asked

pytestmark = pytest.mark.usefixtures("own_cache")


def test_one_model_is_a_table_of_tasks_and_many_are_a_table_a_task(tiny_run, rows) -> None:
    found = evaluate(asked(tiny_run.root, rows), world=ALONE)
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


def test_harness_files_hold_the_scores_and_the_texts(tiny_run, rows, tmp_path) -> None:
    found = evaluate(asked(tiny_run.root, rows, steps=None), world=ALONE)
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


def test_harness_files_have_the_harness_own_fields(tiny_run, rows, tmp_path) -> None:
    schema = pytest.importorskip("lm_eval.result_schema")
    found = evaluate(asked(tiny_run.root, rows), world=ALONE)
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
