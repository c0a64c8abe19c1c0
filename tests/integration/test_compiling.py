"""Compiled code is kept for the next start, what it cost is told; a short run does not compile."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from milepost.config.recipe import load_recipe
from milepost.train import precision
from tests.training import events, train

CPU = torch.device("cpu")


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler is installed")
def test_the_next_start_takes_up_what_the_first_compiled(
    recipe: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    run, words = tmp_path / "run", ("--train.compile", "true", "--train.precision", "bfloat16")
    first = train(recipe, run, tiny_data, *words, "--train.stop_at_step", "2")
    assert first.returncode == 0, first.stderr
    second = train(recipe, run, tiny_data, *words, "--train.stop_at_step", "4")
    assert second.returncode == 0, second.stderr
    compiled, taken_up = events(run, "compiled")
    assert (compiled["step"], taken_up["step"]) == (1, 3)
    assert compiled["parts"] == taken_up["parts"] > 0
    assert (compiled["parts_from_cache"], taken_up["parts_from_cache"]) == (0, taken_up["parts"])
    assert compiled["seconds"] > taken_up["seconds"] > 0
    assert "; the next start takes it up" in first.stderr + first.stdout
    assert "compiled code of an earlier start was taken up in" in second.stderr + second.stdout


def test_a_run_that_does_not_compile_tells_nothing_of_it(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = train(recipe, run, tiny_data, "--train.stop_at_step", "1")
    assert done.returncode == 0, done.stderr
    assert events(run, "compiled") == [] and len(events(run, "step")) == 1


@pytest.mark.parametrize(("steps", "is_compiled"), [("30", False), ("100000", True)])
def test_on_a_cpu_only_a_run_that_wins_it_back_compiles(
    steps: str, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_has_compiler", lambda: True)
    config = load_recipe("corpus-30m", overrides=("--train.total_steps", steps))
    assert precision.resolve_compile("auto", config=config, device=CPU) is is_compiled
    monkeypatch.setattr(precision, "_has_compiler", lambda: False)
    assert precision.resolve_compile("auto", config=config, device=CPU) is False
