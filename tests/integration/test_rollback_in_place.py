"""A rollback in place leaves what a start from the same checkpoint would, whatever is trained,
and wherever the run began.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from milepost.checkpoint.audit import audit
from milepost.checkpoint.state import GuardNumbers
from milepost.config.schema import GuardsSection
from milepost.core.errors import DivergedError
from milepost.posttrain.imported_run import import_model
from milepost.runs.layout import RunLayout
from milepost.runs.lineage import parse_parent
from milepost.text.tokenizer import load_tokenizer
from milepost.train import guarding
from milepost.train.gradients import LaneGradients
from milepost.train.guards import Verdict, judge
from milepost.train.rewinding import Rewinder
from tests.finetuning import LORA, Tuning
from tests.tiny_models import tiny_model, write_model_folder
from tests.training import events, logged_steps, train_here, trained_sha256, write_recipe

WORDS = ("--train.total_steps", "20", "--checkpoint.every_steps", "5", "--guards.spike", "rollback")
BAD_UPDATE = 13

FIRST_STEP = 3
FAR = ("--checkpoint.every_steps", "20", "--checkpoint.keep_train_state", "1")
"""No checkpoint is between the first step and the bad update."""

IMPORTED = (
    *("--data.sequence_length", "32", "--train.global_batch_tokens", "256"),
    *("--train.precision", "float32", "--train.compile", "false", "--schedule.warmup_steps", "5"),
)

Train = Callable[[Path], Any]


class _Killed(BaseException):
    """In the place of a kill, once the rollback is recorded."""


def die(self: Rewinder, state: object) -> None:
    raise _Killed


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


def training(kind: str, tiny_data: Path, folder: Path) -> Train:
    tuning, recipe = Tuning(folder), write_recipe(folder)
    held_out = ("--finetune.held_out_fraction", "0.3")

    def pretrain(*more: str) -> Train:
        return lambda run: train_here(recipe, run, tiny_data, *WORDS, *more)

    def tune(*more: str) -> Train:
        return lambda run: tuning.train_here(run, *WORDS, *held_out, *more)

    def branch(restore: str) -> Train:
        parent = folder / "parent"
        pretrain("--train.stop_at_step", str(FIRST_STEP))(parent)
        begin_with = parse_parent(f"{parent}:{FIRST_STEP}", restore=restore)
        return lambda run: train_here(recipe, run, tiny_data, *WORDS, *FAR, begin_with=begin_with)

    def go_on_from_import(run: Path) -> None:
        if not run.exists():
            model, tokenizer = folder / "model", load_tokenizer(str(tiny_data / "tokenizer"))
            write_model_folder(model, tiny_model(vocab_size=512), tokenizer=tokenizer)
            words = (*WORDS, *FAR, *IMPORTED)
            import_model(model, run=run, data=tiny_data, step=FIRST_STEP, overrides=words)
        train_here(run / "recipe.toml", run, tiny_data)

    made: dict[str, Callable[[], Train]] = {
        "float32": lambda: pretrain(),
        "float16": lambda: pretrain("--train.precision", "float16"),
        "bfloat16 masters": lambda: pretrain("--checkpoint.weights_dtype", "bfloat16"),
        "adamw8bit": lambda: pretrain("--optimizer.name", "adamw8bit"),
        "lora": lambda: tune(*LORA),
        "branch": lambda: branch("full"),
        "branch with other data": lambda: branch("weights,schedule"),
        "branch of weights": lambda: branch("weights"),
        "import": lambda: go_on_from_import,
    }
    return made[kind]()


TO_STEP = {"branch": 3, "branch with other data": 3, "branch of weights": 0, "import": 3}
"""Where it is not the last checkpoint."""


@pytest.mark.parametrize(
    "kind",
    [
        "float32",
        "lora",
        "branch",
        "branch of weights",
        "import",
        pytest.param("branch with other data", marks=pytest.mark.long),
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
    train = training(kind, tiny_data, tmp_path)
    in_place, killed = tmp_path / "in-place", tmp_path / "killed"
    judge_one_badly(monkeypatch)
    train(in_place)
    assert [e["to_step"] for e in events(in_place, "rolled_back")] == [TO_STEP.get(kind, 10)]

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


def test_a_branch_with_a_checkpoint_of_its_own_rolls_back_to_its_parent_in_place_and_after_a_kill(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = training("branch", tiny_data, tmp_path)
    recipe, parent = tmp_path / "tiny.toml", tmp_path / "parent"
    in_place, killed = tmp_path / "in-place", tmp_path / "killed"
    begin_with = parse_parent(f"{parent}:{FIRST_STEP}", restore="full")
    for run in (in_place, killed):
        stop = ("--train.stop_at_step", "6")
        train_here(recipe, run, tiny_data, *WORDS, *FAR, *stop, begin_with=begin_with)
    judge_one_badly(monkeypatch)
    train_here(recipe, in_place, tiny_data, *WORDS, *FAR)  # its manifest names the parent
    (back,) = events(in_place, "rolled_back")
    assert (back["from_step"], back["to_step"], back["first_data_step"]) == (18, 3, 3)
    assert [e["step"] for e in events(in_place, "checkpoint_quarantined")] == [6]
    assert audit(RunLayout(in_place), wait=lambda: None).findings == []
    judge_one_badly(monkeypatch)
    monkeypatch.setattr(Rewinder, "_restore", die)
    with pytest.raises(_Killed):
        train(killed)
    monkeypatch.undo()
    train_here(recipe, killed, tiny_data, *WORDS, *FAR)
    assert logged_steps(killed) == logged_steps(in_place)
    assert trained_sha256(killed, 20) == trained_sha256(in_place, 20)


def test_a_branch_whose_parent_is_gone_stops_and_says_so(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, run = training("branch", tiny_data, tmp_path), tmp_path / "run"
    judge_one_badly(monkeypatch)
    original = Rewinder.rewind

    def rewind(self: Rewinder, **given: Any) -> Any:
        shutil.rmtree(tmp_path / "parent")
        return original(self, **given)

    monkeypatch.setattr(Rewinder, "rewind", rewind)
    with pytest.raises(DivergedError, match="step-00000003, which the run was made from, is gone"):
        train(run)
    assert events(run, "rolled_back") == []
    assert events(run, "guard_stopped")[0]["step"] == 16


@pytest.mark.parametrize(
    "kind", ["lora", "branch", pytest.param("adamw8bit", marks=pytest.mark.long)]
)
def test_a_batch_that_was_skipped_stays_so_after_a_kill_whatever_is_trained(
    kind: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "adamw8bit":
        pytest.importorskip("torchao")
    train = training(kind, tiny_data, tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    plant_nan(monkeypatch, at=(8, 9), die_at=None)
    train(whole)
    assert len({e["step"] for e in events(whole, "batch_skipped")}) == 1
    plant_nan(monkeypatch, at=(8, 9), die_at=12)
    with pytest.raises(_Killed):
        train(killed)
    monkeypatch.undo()
    train(killed)
    assert len(events(killed, "batch_skipped")) == 2
    assert logged_steps(killed) == logged_steps(whole)
    assert trained_sha256(killed, 20) == trained_sha256(whole, 20)


def plant_nan(monkeypatch: pytest.MonkeyPatch, *, at: tuple[int, ...], die_at: int | None) -> None:
    """Puts a NaN into the gradients of the updates that are reckoned `at`-th from here on."""
    really, count = LaneGradients.sum_all, [0]

    def sum_all(self: LaneGradients, **given: Any) -> Any:
        count[0] += 1
        if count[0] == die_at:
            raise _Killed
        flat = really(self, **given)
        if count[0] in at:
            flat[7] = float("nan")
        return flat

    monkeypatch.setattr(LaneGradients, "sum_all", sum_all)
