"""The resume laboratory with real processes: its arms, its restarts, its report, its refusals."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from milepost.cli.main import run
from milepost.core.errors import CheckpointError, UsageError
from milepost.core.files import exclusive_lock
from milepost.experiments.lab.arms import all_arms, choose_arms
from milepost.experiments.lab.laboratory import NotExact, report_laboratory, run_laboratory
from milepost.experiments.lab.page import as_plain, write_page
from milepost.experiments.lab.results import collect_results
from milepost.experiments.lab.running import Job, jobs_of, status_of, words_of
from milepost.experiments.lab.setting import Setting, make_setting
from tests.training import events, kill_group, logged_steps, start_words

AT, AFTER = 10, 20


def make(recipe: Path, data: Path, out: Path, *words: str, **changes: Any) -> Setting:
    """The tiny recipe's laboratory: 30 steps, restarted at step 10."""
    from milepost.config.recipe import load_recipe

    config = load_recipe(str(recipe), overrides=("--data.path", str(data), *words))
    values = {"name": str(recipe), "out": out, "at": AT, "steps_after": AFTER, "num_seeds": 1}
    return make_setting(config, **(values | changes))


@pytest.fixture(scope="module")
def laboratory(recipe: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """One seed, the full restore and the one without moments; to be read only."""
    out = tmp_path_factory.mktemp("lab") / "lab"
    setting = make(recipe, tiny_data, out, "--validation.every_steps", "5")
    run_laboratory(setting, only="moments")
    return setting


def events_bytes(setting: Setting) -> dict[str, bytes]:
    """Every history of a laboratory."""
    return {str(p): p.read_bytes() for p in sorted(setting.out.glob("seed-*/*/events.jsonl"))}


def test_the_full_restore_is_the_parent_bit_for_bit_and_lost_moments_show(
    laboratory: Setting,
) -> None:
    seed_folder = laboratory.out / "seed-1337"
    parent = logged_steps(seed_folder / "parent")
    assert sorted(parent) == list(range(1, AT + AFTER + 1)), "never interrupted"
    assert len(events(seed_folder / "parent", "segment_started")) == 1
    assert logged_steps(seed_folder / "full") == {s: parent[s] for s in range(AT + 1, 31)}
    arms, _ = choose_arms(laboratory, only="moments", num_gpus=0)
    results = collect_results(laboratory, arms)
    full, moments = results.of("full"), results.of("moments")
    assert full is not None and moments is not None
    assert [run.has_parents_bits for run in full.runs] == [True]
    assert full.measures("val/loss")[0].is_equal and full.measures("train/loss")[0].is_equal
    found = moments.measures("val/loss")[0]
    assert not found.is_equal
    curve = moments.runs[0].curves["val/loss"]
    assert curve.steps.tolist() == [0, 5, 10, 15, 20]
    parents = results.parents[1337].curves["val/loss"]
    assert curve.values[0] == parents.values[0], "the restored weights are the same"


def test_what_is_done_is_not_done_again(laboratory: Setting) -> None:
    before = events_bytes(laboratory)
    finished = run_laboratory(laboratory, only="full")
    assert finished.results.num_done == finished.results.num_runs == 3, "what is there is shown"
    assert events_bytes(laboratory) == before


def test_the_report_and_its_data_hold_the_arms(laboratory: Setting) -> None:
    page = laboratory.report.read_text()
    assert "had the parent&#39;s bits in every one of 20 steps" in page
    assert "Moments lost" in page and "<svg" in page
    assert "<script" not in page and "http" not in page.replace("http-equiv", "").replace(
        "http://www.w3.org", ""
    )
    rows = list(csv.DictReader((laboratory.report.parent / "curves.csv").open()))
    assert {row["arm"] for row in rows} == {"parent", "full", "moments"}
    full = [row for row in rows if row["arm"] == "full" and row["metric"] == "train/loss"]
    assert len(full) == AFTER and {float(row["difference"]) for row in full} == {0.0}
    arms, _ = choose_arms(laboratory, only="moments", num_gpus=0)
    plain = as_plain(collect_results(laboratory, arms), left_out={})
    assert plain["arms"]["full"]["has_parents_bits"] == [True]
    json.dumps(plain, allow_nan=False)


def test_bits_that_differ_are_an_error_and_the_report_is_written(
    laboratory: Setting, tmp_path: Path
) -> None:
    shutil.copytree(laboratory.out, tmp_path / "lab")
    log = tmp_path / "lab" / "seed-1337" / "full" / "events.jsonl"
    lines = log.read_text().splitlines()
    places = [n for n, line in enumerate(lines) if '"kind":"step"' in line]
    event = json.loads(lines[places[4]])
    event["loss_nats"] += 1e-9
    lines[places[4]] = json.dumps(event)
    log.write_text("\n".join(lines) + "\n")
    copy = Setting(
        tmp_path / "lab",
        laboratory.name,
        laboratory.config,
        laboratory.at,
        laboratory.steps_after,
        laboratory.num_seeds,
    )
    with pytest.raises(NotExact, match="full of seed 1337 does not have the parent's bits"):
        run_laboratory(copy, only="full")
    assert "Only 0 of 1 restart" in copy.report.read_text()


def test_the_folder_of_another_recipe_is_refused(
    laboratory: Setting, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    other = make(recipe, tiny_data, laboratory.out, "--optimizer.learning_rate", "1e-3")
    with pytest.raises(UsageError, match="is another laboratory") as refused:
        run_laboratory(other, only="full")
    assert "optimizer.learning_rate: there 0.003, here 0.001" in refused.value.message
    assert "validation.every_steps: there 5, here 10" in refused.value.message
    earlier = make(
        recipe, tiny_data, laboratory.out, "--validation.every_steps", "5", at=5, steps_after=20
    )
    with pytest.raises(UsageError, match=r"--at: there 10, here 5$"):
        run_laboratory(earlier, only="full")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    with pytest.raises(UsageError, match="holds something else"):
        run_laboratory(make(recipe, tiny_data, tmp_path / "full"), only="full")


def test_a_parent_without_its_train_state_is_said_with_the_steps_that_have_one(
    laboratory: Setting, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(laboratory.out, tmp_path / "lab")
    checkpoints = tmp_path / "lab" / "seed-1337" / "parent" / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000010" / "train_state")
    setting = make(recipe, tiny_data, tmp_path / "lab", "--validation.every_steps", "5")
    with pytest.raises(CheckpointError, match="no train state at step 10") as refused:
        run_laboratory(setting, only="data")
    assert "train states of steps 20, 25, 30" in str(refused.value.hint)


def test_an_arm_that_diverges_is_a_result(laboratory: Setting, tmp_path: Path) -> None:
    shutil.copytree(laboratory.out, tmp_path / "lab")
    log = tmp_path / "lab" / "seed-1337" / "moments" / "events.jsonl"
    kept = [e for e in map(json.loads, log.read_text().splitlines()) if e.get("step", 0) <= 17]
    ended = {"v": 1, "kind": "segment_ended", "time": kept[-1]["time"], "segment": 1}
    kept.append(ended | {"reason": "diverged", "step": 17, "training_seconds": 1.0})
    log.write_text("".join(json.dumps(event) + "\n" for event in kept))
    copy = Setting(tmp_path / "lab", "tiny", laboratory.config, AT, AFTER, 1)
    arms, _ = choose_arms(copy, only="moments", num_gpus=0)
    results = collect_results(copy, arms)
    moments = results.of("moments")
    assert moments is not None and moments.num_diverged == 1
    assert results.num_done == results.num_runs, "it is not trained again"
    write_page(results, left_out={})
    assert "1 of 1 seed diverged" in copy.report.read_text()


def test_a_full_restore_that_diverges_where_its_parent_did_not_is_not_exact(
    laboratory: Setting, tmp_path: Path
) -> None:
    shutil.copytree(laboratory.out, tmp_path / "lab")
    log = tmp_path / "lab" / "seed-1337" / "full" / "events.jsonl"
    log.write_text(log.read_text().replace('"reason":"done"', '"reason":"diverged"'))
    with pytest.raises(NotExact, match="full of seed 1337"):
        run_laboratory(replace(laboratory, out=tmp_path / "lab"), only="full")


def test_the_report_of_a_laboratory_is_written_while_another_process_is_at_work(
    laboratory: Setting, tmp_path: Path
) -> None:
    out = tmp_path / "lab"
    shutil.copytree(laboratory.out, out)
    shutil.rmtree(out / "report")
    log = out / "seed-1337" / "moments" / "events.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:12]))
    with exclusive_lock(out / ".lock", what="the laboratory"):
        results = report_laboratory(out)
    assert (results.num_done, results.num_runs) == (2, 3)
    assert results.setting == replace(laboratory, out=out)
    assert "2 of 3 runs are done" in results.setting.report.read_text()
    assert run(["lab", "report", str(tmp_path)]) == 2


@pytest.mark.long
def test_killed_in_the_middle_of_an_arm_it_goes_on_with_that_arm(
    recipe: Path, tiny_data: Path, laboratory: Setting, tmp_path: Path
) -> None:
    out = tmp_path / "lab"
    words = [sys.executable, "-m", "milepost.cli.main", "lab", "resume", str(recipe)]
    words += ["--at", str(AT), "--steps-after", str(AFTER), "--seeds", "1", "--only", "moments"]
    words += ["--out", str(out), "--data.path", str(tiny_data), "--validation.every_steps", "5"]
    process = start_words(words)
    arm = out / "seed-1337" / "moments"
    deadline = time.monotonic() + 300
    while not any(event["step"] >= 17 for event in events(arm, "step")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    kill_group(process)
    done = [out / "seed-1337" / name / "events.jsonl" for name in ("parent", "full")]
    before = [log.read_bytes() for log in done]
    again = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    assert "2 of 3 runs are done already" in again.stderr
    assert [log.read_bytes() for log in done] == before
    undisturbed = laboratory.out / "seed-1337" / "moments"
    assert logged_steps(arm) == logged_steps(undisturbed)


def test_every_arm_is_a_command_that_can_be_given_by_hand(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    setting = make(recipe, tiny_data, tmp_path / "lab")
    jobs = {job.name: job for job in jobs_of(setting, all_arms(setting), seed=1338)}
    told = {name: " ".join(words_of(job, setting)) for name, job in jobs.items()}
    parent = tmp_path / "lab" / "seed-1338" / "parent"
    assert f"--run {parent} --ranks 1 --run.seed 1338" in told["parent"]
    assert "--from" not in told["parent"]
    assert f"--from {parent}:10 --restore full --ranks 1" in told["full"]
    assert "--restore weights,schedule,data" in told["moments"]
    assert "--schedule.rewarm_at_step 10 --schedule.rewarm_steps 5" in told["warmup"]
    assert "--restore weights,optimizer,schedule" in told["data"]
    assert (
        "--restore full" in told["validation"] and "--validation.tokens 1200" in told["validation"]
    )
    assert "--train.total_steps 40" in told["schedule"]
    assert "--ranks 2" in told["ranks"]
    assert "--optimizer.name adamw8bit" in told["lowbit"]
    assert (
        "--restore weights --" in told["restart"] and "--train.stop_at_step 20" in told["restart"]
    )
    assert all(
        words in told["authors"] for words in ("total_steps 40", "tokens 1200", "schedule,data")
    )


def test_a_run_that_has_not_begun_or_was_killed_is_not_over(
    laboratory: Setting, tmp_path: Path
) -> None:
    done = laboratory.out / "seed-1337" / "moments"
    assert status_of(Job(1337, None, done, AT, 30)) == ("done", 30)
    assert status_of(Job(1337, None, done, AT, 31)) == ("begun", 30)
    assert status_of(Job(1337, None, tmp_path, AT, 30)) == ("absent", AT)


@pytest.mark.parametrize(
    ("changes", "words", "message", "hint"),
    [
        ({"at": 30}, (), "--at 30 is not inside the run, which has 30 steps", "from 1 to 10"),
        ({"at": 400}, (), "--at 400 is not inside the run", "or a longer run"),
        ({"at": 0}, (), "--at 0 is not inside the run", ""),
        ({"steps_after": 21}, (), "with 21 steps after it does not fit", "earlier --at"),
        ({"steps_after": 5}, (), "leaves fewer than 20 to look at", ""),
        ({"at": 7}, (), "--at 7 is not a multiple of checkpoint.every_steps 5", "--at 5"),
        ({"at": 5}, (), "not a multiple of validation.every_steps 10", "a divisor of 5"),
        ({"num_seeds": 0}, (), "--seeds is 0", "1 to 10"),
        ({"num_seeds": 11}, (), "--seeds is 11", "1 to 10"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused_before_anything_is_trained(
    recipe: Path,
    tiny_data: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    words: tuple[str, ...],
    message: str,
    hint: str,
) -> None:
    with pytest.raises(UsageError) as refused:
        make(recipe, tiny_data, tmp_path / "lab", *words, **changes)
    assert message in refused.value.message
    assert hint in str(refused.value.hint)
    assert not (tmp_path / "lab").exists()


def test_arms_that_cannot_be_are_left_out_or_refused_where_they_are_asked_for(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    setting = make(
        recipe, tiny_data, tmp_path, "--train.lanes", "1", "--validation.tokens", "10000000"
    )
    arms, left_out = choose_arms(setting, only=None, num_gpus=0)
    assert "there is one rank at most" in left_out["ranks"]
    assert "twice validation.tokens are 20,000,000" in left_out["validation"]
    assert not {"ranks", "validation", "authors"} & {arm.name for arm in arms}
    with pytest.raises(UsageError, match="the arm ranks cannot be trained"):
        choose_arms(setting, only="ranks", num_gpus=0)
    with pytest.raises(UsageError, match="there is no arm 'momentum'") as refused:
        choose_arms(setting, only="momentum", num_gpus=0)
    assert "moments, warmup, data" in str(refused.value.hint)
    two = make(recipe, tiny_data, tmp_path / "two")
    assert choose_arms(two, only=None, num_gpus=1)[1]["ranks"] == "there is one GPU"


def test_a_fine_tuning_recipe_is_refused_at_the_command_line(tmp_path: Path) -> None:
    words = ["lab", "resume", "sft-alpaca", "--at", "10", "--out", str(tmp_path / "lab")]
    assert run(words) == 2
