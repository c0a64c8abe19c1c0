"""A run with `train.microbatch_rows = "auto"` keeps its number for life."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from milepost.cli.main import run as milepost
from milepost.core.errors import MilepostError, UsageError
from milepost.train.forward_timing import ForwardTiming
from tests.training import (
    SHORT,
    events,
    kill_group,
    logged_steps,
    start,
    train,
    train_here,
    wait_for_step,
    weights_sha256,
)

AUTO = ("--train.microbatch_rows", "auto", "--train.recompute", "auto")


def stored(run: Path) -> dict[str, Any]:
    return json.loads((run / "manifest.json").read_text())["config"]["train"]


def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it was measured again")

    monkeypatch.setattr(ForwardTiming, "__init__", refuse)


@pytest.fixture(scope="module")
def made(
    recipe: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A run on two ranks, and what was said."""
    folder = tmp_path_factory.mktemp("auto")
    run = folder / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        done = train(recipe, run, tiny_data, *SHORT, *AUTO, "--ranks", "2")
    assert done.returncode == 0, done.stderr
    return run, done.stderr


def test_it_is_measured_once_by_one_rank_and_said_in_one_line(made: tuple[Path, str]) -> None:
    run, said = made
    (line,) = [line for line in said.splitlines() if line.startswith("microbatch: ")]
    assert "probed in" in line and "remembered in" in line
    assert "recompute: none, as planned for" in said
    assert stored(run)["microbatch_rows"] in (1, 2, 4)
    assert stored(run)["recompute"] == "none"


def test_the_bits_are_those_of_a_run_with_that_number(
    made: tuple[Path, str], recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run, _ = made
    rows = str(stored(run)["microbatch_rows"])
    same = tmp_path / "same"
    train_here(recipe, same, tiny_data, *SHORT, "--train.microbatch_rows", rows)
    assert logged_steps(same) == logged_steps(run)
    assert weights_sha256(same, 12) == weights_sha256(run, 12)


def test_a_killed_run_goes_on_with_its_number_and_never_measures_again(
    recipe: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    process = start(recipe, run, tiny_data, *AUTO, "--ranks", "2")
    wait_for_step(run, 7)
    kill_group(process)
    before = stored(run)
    no_probe(monkeypatch)
    train_here(recipe, run, tiny_data, *AUTO)
    assert stored(run) == before
    assert events(run, "segment_started")[-1]["exactness"] == "exact"
    assert events(run, "override") == []
    undisturbed = tmp_path / "undisturbed"
    rows = str(before["microbatch_rows"])
    train_here(recipe, undisturbed, tiny_data, "--train.microbatch_rows", rows)
    assert logged_steps(run) == logged_steps(undisturbed)


def test_a_replay_takes_the_runs_number(
    made: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(made[0], run)
    no_probe(monkeypatch)
    assert milepost(["verify", str(run), "--replay", "--ranks", "1"]) == 0


def test_another_number_is_refused_or_makes_the_run_approximate(
    made: tuple[Path, str], recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    half = ("--train.stop_at_step", "6")
    train_here(recipe, run, tiny_data, *SHORT, *AUTO, *half)
    rows = stored(run)["microbatch_rows"]
    other = ("--train.microbatch_rows", "2" if rows == 4 else "4")
    with pytest.raises(UsageError, match=r"train\.microbatch_rows: the run has"):
        train_here(recipe, run, tiny_data, *SHORT, *other)
    done = train(recipe, run, tiny_data, *SHORT, *other, "--override", "--ranks", "1")
    assert done.returncode == 0, done.stderr
    last = events(run, "segment_started")[-1]
    assert last["exactness"] == "approximate"
    assert "overridden: train.microbatch_rows" in last["reason"]


def test_memory_that_does_not_suffice_is_said(
    recipe: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> float:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(ForwardTiming, "pass_seconds", full)
    with pytest.raises(MilepostError, match="out of memory with the smallest microbatch"):
        train_here(recipe, tmp_path / "run", tiny_data, *AUTO)
    assert not (tmp_path / "run" / "manifest.json").exists()
