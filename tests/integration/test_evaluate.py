"""`milepost evaluate` as processes, and evaluation inside a training run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from milepost.core.errors import CheckpointError, DataError, UsageError
from milepost.evaluation.evaluate import Request, evaluate
from milepost.evaluation.tasks import never_stop
from milepost.runs.evaluations import EvaluationStore
from tests.benchmark_rows import write_rows
from tests.evaluations import ALONE
from tests.tiny_models import write_tiny_run
from tests.training import (
    environment,
    events,
    logged_steps,
    train,
    train_here,
    weights_sha256,
    write_recipe,
)

pytestmark = pytest.mark.usefixtures("own_cache")


def command(model: Path, rows: Path, *more: str, tasks: str = "piqa,boolq") -> list[str]:
    base = [sys.executable, "-m", "milepost.cli.main", "evaluate", str(model)]
    return [*base, "--tasks", tasks, "--data-dir", str(rows), *more]


def evaluated(
    model: Path, rows: Path, *more: str, tasks: str = "piqa,boolq"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(model, rows, *more, tasks=tasks),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


def items_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "items").iterdir()}


def scored_by(ranks: int, model: Path, rows: Path, out: Path) -> tuple[Any, ...]:
    """Bytes of the items files, and the keys and metrics of the records."""
    words = ("--ranks", str(ranks), "--out", str(out), "--steps", "all", "--json")
    done = evaluated(model, rows, *words)
    assert done.returncode == 0, done.stderr
    lines = json.loads(done.stdout)["evaluations"]
    assert [line["ranks"] for line in lines] == [ranks] * 4
    return items_of(out), [(line["key"], line["metrics"]) for line in lines]


@pytest.mark.parametrize(
    "ranks", [2, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 3, 4))]
)
def test_any_number_of_ranks_gives_the_bits_of_one(tmp_path: Path, ranks: int) -> None:
    rows = write_rows(tmp_path / "rows", num_rows=60)
    layout = write_tiny_run(tmp_path / "run", 100, 200)
    request = Request(layout.root, tasks=("piqa", "boolq"), data_dir=rows, steps="all")
    alone = evaluate(request, world=ALONE)
    expected = items_of(layout.root), [(line["key"], line["metrics"]) for line in alone.lines]
    assert scored_by(ranks, layout.root, rows, tmp_path / "out") == expected


def test_what_is_wrong_is_said_once_with_its_code(tmp_path: Path, rows: Path) -> None:
    layout = write_tiny_run(tmp_path / "run", 100)
    file = layout.checkpoint(100) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = evaluated(layout.root, rows, "--ranks", "2")
    assert done.returncode == CheckpointError.exit_code, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "has changed" in errors[0] and "Traceback" not in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_evaluation_goes_on_where_it_was(
    tmp_path: Path, rows: Path, signum: signal.Signals
) -> None:
    layout = write_tiny_run(tmp_path / "run", *range(1, 30))
    words = ("--steps", "all", "--ranks", "2")
    process = subprocess.Popen(
        command(layout.root, rows, *words), env=environment(), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while len(EvaluationStore(layout.root).latest()) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signum)
    _, talk = process.communicate(timeout=30)
    assert process.returncode == (-9 if signum == signal.SIGKILL else 75), talk
    num_before = len(EvaluationStore(layout.root).latest())
    assert 5 <= num_before < 58
    done = evaluated(layout.root, rows, *words)
    assert done.returncode == 0, done.stderr
    assert f"{58 - num_before} scored now, {num_before} were there" in done.stderr
    assert not [file for file in layout.items.iterdir() if not file.name.endswith(".gz")] or (
        signum == signal.SIGKILL
    )


def evaluating(rows: Path, *, every_steps: int = 10) -> list[str]:
    words = ["--evaluation.every_steps", str(every_steps), "--evaluation.data_dir", str(rows)]
    return [*words, "--evaluation.tasks", '["piqa", "boolq"]', "--evaluation.limit", "4"]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def test_training_is_the_same_to_the_bit_with_evaluation(
    tmp_path: Path, tiny_data: Path, rows: Path
) -> None:
    recipe = write_recipe(tmp_path)
    for name, words in (("plain", []), ("scored", evaluating(rows))):
        train_here(recipe, tmp_path / name, tiny_data, "--train.total_steps", "20", *words)
    assert logged_steps(tmp_path / "plain") == logged_steps(tmp_path / "scored")
    assert weights_sha256(tmp_path / "plain", 20) == weights_sha256(tmp_path / "scored", 20)
    assert not (tmp_path / "plain" / "evaluations.jsonl").exists()


def test_evaluation_in_training_records_each_interval_and_the_end(
    tmp_path: Path, tiny_data: Path, rows: Path
) -> None:
    run = tmp_path / "run"
    words = ["--train.total_steps", "15", *evaluating(rows)]
    train_here(write_recipe(tmp_path), run, tiny_data, *words)
    lines = records(run)
    assert [(line["step"], line["benchmark"]) for line in lines] == [
        (step, task) for step in (0, 10, 15) for task in ("piqa", "boolq")
    ]
    assert all(line["checkpoint_sha256"] is None and line["n"] == 4 for line in lines)
    assert lines[2]["tokens_seen"] == 10 * 256 and lines[2]["limit"] == 4
    told = events(run, "evaluation")
    assert [(e["step"], e["benchmark"], e["key"]) for e in told] == [
        (line["step"], line["benchmark"], line["key"]) for line in lines
    ]
    assert told[0]["metrics"] == lines[0]["metrics"]
    # The float32 checkpoint holds the same weights: the verb gives the same answers.
    request = Request(run, tasks=("piqa", "boolq"), data_dir=rows, limit=4, steps="10,15")
    found = evaluate(request, world=ALONE)
    hashes = {(line["step"], line["benchmark"]): line["items_sha256"] for line in lines}
    for line in found.lines:
        assert line["items_sha256"] == hashes[line["step"], line["benchmark"]]
        assert line["checkpoint_sha256"] is not None


def test_a_resumed_run_makes_up_only_for_what_is_missing(
    tmp_path: Path, tiny_data: Path, rows: Path
) -> None:
    run, recipe = tmp_path / "run", write_recipe(tmp_path)
    words = ["--train.total_steps", "20", *evaluating(rows)]
    train_here(recipe, run, tiny_data, *words, "--train.stop_at_step", "10")
    log = (run / "events.jsonl").read_text().splitlines()
    kept = [
        line
        for line in log
        if not (
            json.loads(line)["kind"] == "evaluation" and '"boolq"' in line and '"step":10' in line
        )
    ]
    assert len(kept) == len(log) - 1
    (run / "events.jsonl").write_text("\n".join(kept) + "\n")
    train_here(recipe, run, tiny_data, *words)
    second = [(e["step"], e["benchmark"]) for e in events(run, "evaluation") if e["segment"] == 2]
    assert second == [(10, "boolq"), (20, "piqa"), (20, "boolq")]


def test_a_run_whose_tasks_cannot_be_had_ends_before_the_first_step(
    tmp_path: Path, tiny_data: Path, rows: Path
) -> None:
    recipe = write_recipe(tmp_path)
    with pytest.raises(DataError, match="winogrande"):
        words = [*evaluating(rows), "--evaluation.tasks", '["winogrande"]']
        train_here(recipe, tmp_path / "run", tiny_data, *words)
    with pytest.raises(UsageError, match="there is no task 'piqaa'"):
        words = [*evaluating(rows), "--evaluation.tasks", '["piqaa"]']
        train_here(recipe, tmp_path / "run", tiny_data, *words)
    assert not events(tmp_path / "run", "step")


@pytest.mark.long
def test_compiled_bfloat16_training_on_two_ranks_keeps_its_bits(
    tmp_path: Path, tiny_data: Path, rows: Path
) -> None:
    recipe = write_recipe(tmp_path)
    settings = ["--train.compile", "true", "--train.precision", "bfloat16", "--ranks", "2"]
    settings += ["--train.total_steps", "10"]
    for name, words in (("plain", []), ("scored", evaluating(rows, every_steps=2))):
        done = train(recipe, tmp_path / name, tiny_data, *settings, *words, timeout=280)
        assert done.returncode == 0, done.stderr
    assert logged_steps(tmp_path / "plain") == logged_steps(tmp_path / "scored")
    assert weights_sha256(tmp_path / "plain", 10) == weights_sha256(tmp_path / "scored", 10)
    assert [e["step"] for e in events(tmp_path / "scored", "evaluation")][::2] == [
        0,
        2,
        4,
        6,
        8,
        10,
    ]
    assert records(tmp_path / "scored")[0]["dtype"] == "bfloat16"


@pytest.mark.long
def test_the_harness_itself_asks_and_this_engine_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from milepost.cli.evaluate_harness import evaluate_with_harness

    file = tmp_path / "rows.json"
    file.write_text('{"q": "the", "a": "state", "b": "union", "gold": 0}\n' * 3)
    (tmp_path / "sky.yaml").write_text(
        f"""
task: sky
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{[a, b]}}}}"
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    layout = write_tiny_run(tmp_path / "run", 100, 200)
    was_stopped = evaluate_with_harness(
        layout.root,
        adapter=None,
        tasks=["sky"],
        steps="all",
        limit=2,
        num_fewshot=None,
        dtype="auto",
        include_path=tmp_path,
        output_path=tmp_path / "results",
        log_samples=True,
        as_json=True,
        world=ALONE,
        stop_requested=never_stop,
    )
    shown = json.loads(capsys.readouterr().out)["harness"]
    assert not was_stopped and [result["step"] for result in shown] == [100, 200]
    assert shown[0]["results"]["sky"]["sample_len"] == 2
    written = sorted(file.name.split("_")[0] for file in (tmp_path / "results").rglob("*.json*"))
    assert written == ["results", "results", "samples", "samples"]
    assert not layout.evaluations.exists()
