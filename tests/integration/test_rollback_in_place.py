"""A rollback in place leaves what a start from the same checkpoint would, whatever is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from milepost.checkpoint.state import GuardNumbers
from milepost.config.schema import GuardsSection
from milepost.train import guarding
from milepost.train.guards import Verdict, judge
from milepost.train.rewinding import Rewinder
from tests.finetuning import LORA, Tuning
from tests.training import events, logged_steps, train_here, trained_sha256, write_recipe

WORDS = ("--train.total_steps", "20", "--checkpoint.every_steps", "5", "--guards.spike", "rollback")
BAD_UPDATE = 13

Train = Callable[[Path], Any]


class _Killed(BaseException):
    """In the place of a kill, once the rollback is recorded."""


def judge_one_badly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets one update of a run lead to a rollback, the first time it is judged in it."""
    seen = [0]

    def judged(
        loss_nats: float, grad_norm: float, *, numbers: GuardNumbers, config: GuardsSection
    ) -> Verdict:
        seen[0] += 1
        if seen[0] == BAD_UPDATE:
            return Verdict("roll_back", "spike", 9.0, numbers)
        return judge(loss_nats, grad_norm, numbers=numbers, config=config)

    monkeypatch.setattr(guarding, "judge", judged)


def trainings(tiny_data: Path, folder: Path) -> dict[str, Train]:
    tuning, recipe = Tuning(folder), write_recipe(folder)
    held_out = ("--finetune.held_out_fraction", "0.3")

    def pretrain(*more: str) -> Train:
        return lambda run: train_here(recipe, run, tiny_data, *WORDS, *more)

    def tune(*more: str) -> Train:
        return lambda run: tuning.train_here(run, *WORDS, *held_out, *more)

    return {
        "float32": pretrain(),
        "float16": pretrain("--train.precision", "float16"),
        "bfloat16 masters": pretrain("--checkpoint.weights_dtype", "bfloat16"),
        "adamw8bit": pretrain("--optimizer.name", "adamw8bit"),
        "lora": tune(*LORA),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "float32",
        "lora",
        pytest.param("float16", marks=pytest.mark.long),
        pytest.param("bfloat16 masters", marks=pytest.mark.long),
        pytest.param("adamw8bit", marks=pytest.mark.long),
    ],
)
def test_a_rollback_in_place_gives_the_bits_of_one_that_a_kill_left_to_the_next_start(
    kind: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "adamw8bit":
        pytest.importorskip("torchao")
    train = trainings(tiny_data, tmp_path)[kind]
    in_place, killed = tmp_path / "in-place", tmp_path / "killed"
    judge_one_badly(monkeypatch)
    train(in_place)
    assert [e["to_step"] for e in events(in_place, "rolled_back")] == [10]

    def die(self: Rewinder, state: object) -> None:
        raise _Killed

    with monkeypatch.context() as patch:
        judge_one_badly(patch)
        patch.setattr(Rewinder, "_restore", die)
        with pytest.raises(_Killed):
            train(killed)
    monkeypatch.undo()
    train(killed)
    assert len(events(killed, "rolled_back")) == 1
    assert logged_steps(killed) == logged_steps(in_place)
    assert trained_sha256(killed, 20) == trained_sha256(in_place, 20)
