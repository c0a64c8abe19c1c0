"""Runs that are killed, stopped and moved between ranks end in the same bits."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.training import (
    events,
    kill_group,
    logged_steps,
    start,
    train,
    wait_for_step,
    weights_sha256,
    write_recipe,
)

LAST_STEP = 30


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that nothing happened to."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    result = train(recipe, run, tiny_data, "--ranks", "2")
    assert result.returncode == 0, result.stderr
    return run


def assert_same_bits(run: Path, other: Path) -> None:
    steps, others = logged_steps(run), logged_steps(other)
    assert sorted(steps) == list(range(1, LAST_STEP + 1))
    differing = [step for step in steps if steps[step] != others[step]]
    assert differing == []
    assert weights_sha256(run, LAST_STEP) == weights_sha256(other, LAST_STEP)


def test_one_rank_gives_the_bits_of_two(
    recipe: Path, tiny_data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    result = train(recipe, run, tiny_data, "--ranks", "1")
    assert result.returncode == 0, result.stderr
    assert_same_bits(run, undisturbed)
    validations = [(e["step"], e["loss_nats"].hex()) for e in events(run, "validation")]
    assert validations == [
        (e["step"], e["loss_nats"].hex()) for e in events(undisturbed, "validation")
    ]


def test_four_lanes_give_the_same_bits_on_one_and_four_ranks(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    for ranks in (1, 4):
        run = tmp_path / str(ranks)
        options = ("--ranks", str(ranks), "--train.lanes", "4", "--train.stop_at_step", "6")
        result = train(recipe, run, tiny_data, *options)
        assert result.returncode == 0, result.stderr
        assert logged_steps(run) == logged_steps(tmp_path / "1")
        assert weights_sha256(run, 6) == weights_sha256(tmp_path / "1", 6)


def test_a_run_goes_from_one_rank_to_two_and_back_with_a_kill_at_each_change(
    recipe: Path, tiny_data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for ranks, until in (("1", 8), ("2", 19)):
        process = start(recipe, run, tiny_data, "--ranks", ranks)
        wait_for_step(run, until)
        kill_group(process)
    result = train(recipe, run, tiny_data, "--ranks", "1")
    assert result.returncode == 0, result.stderr
    assert_same_bits(run, undisturbed)
    for replayed in events(run, "replayed"):
        assert replayed["equal"] == replayed["compared"] > 0
    assert "exact: " in result.stderr


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(s, marks=pytest.mark.long) for s in range(1, 20))]
)
def test_kills_at_random_moments_lose_no_bit(
    recipe: Path, tiny_data: Path, undisturbed: Path, tmp_path: Path, seed: int
) -> None:
    run, source = tmp_path / "run", random.Random(seed)
    for number in range(4):
        process = start(recipe, run, tiny_data, "--ranks", str(source.choice([1, 2])))
        if number % 2 == 0:  # some kills come while it trains or saves, others wherever
            wait_for_step(run, 5 * number + source.randint(1, 4))
            time.sleep(source.uniform(0.0, 0.05))
        else:
            time.sleep(source.uniform(0.5, 5.0))
        if process.poll() is None:
            kill_group(process)
        else:
            process.communicate()
    result = train(recipe, run, tiny_data)
    assert result.returncode == 0, result.stderr
    assert len(events(run, "segment_started")) >= 2, "no kill met the training"
    assert_same_bits(run, undisturbed)


def test_sigterm_saves_and_leaves_with_75(
    recipe: Path, tiny_data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(recipe, run, tiny_data, "--ranks", "2")
    wait_for_step(run, 7)
    os.kill(process.pid, signal.SIGTERM)
    _, talk = process.communicate(timeout=30)
    assert process.returncode == 75, talk
    stopped_at = events(run, "segment_ended")[-1]["step"]
    assert events(run, "segment_ended")[-1]["reason"] == "stop requested"
    assert events(run, "checkpoint_saved")[-1]["step"] == stopped_at
    result = train(recipe, run, tiny_data)
    assert result.returncode == 0, result.stderr
    assert_same_bits(run, undisturbed)
    assert events(run, "replayed") == [], "nothing was lost, so nothing is run again"


def test_a_second_interrupt_leaves_at_once_with_130(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(recipe, run, tiny_data, "--ranks", "2")
    wait_for_step(run, 3)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
    process.communicate(timeout=30)
    assert process.returncode in (130, 75), "75: the first interrupt was quicker"


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize(
    ("call", "when"),
    [("rename", 11), ("fsync", 9)]  # while old train state is dropped; in the first save
    + [
        pytest.param(call, when, marks=pytest.mark.long)
        for call in ("rename", "fsync", "unlink", "unlinkat")
        for when in range(1, 30, 3)
    ],
)
def test_a_kill_inside_a_save_loses_no_bit(
    recipe: Path, tiny_data: Path, undisturbed: Path, tmp_path: Path, call: str, when: int
) -> None:
    from tests.training import command, environment

    run = tmp_path / "run"
    inject = f"inject={call}:signal=SIGKILL:when={when}"
    traced = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", inject]
    killed = subprocess.run(
        [*traced, *command(recipe, run, tiny_data, "--ranks", "1")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    if (call, when) in (("rename", 11), ("fsync", 9)):
        assert "was ended by SIGKILL" in killed.stderr
    result = train(recipe, run, tiny_data, "--ranks", "1")
    assert result.returncode == 0, result.stderr
    assert_same_bits(run, undisturbed)
    litter = [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]
    assert litter == []


def test_a_finished_run_says_so_and_writes_nothing(
    recipe: Path, tiny_data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    before = (run / "events.jsonl").read_bytes()
    result = train(recipe, run, tiny_data)
    assert result.returncode == 0
    assert "done, all 30 steps" in result.stderr
    assert (run / "events.jsonl").read_bytes() == before
