"""A whole run with float8 products, emulated: continued, on two ranks, and changed on purpose."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from milepost.core.errors import UsageError
from tests.training import events, logged_steps, train, train_here, weights_sha256

pytest.importorskip("torchao", reason="float8 is not installed (extra lowbit)")

WORDS = (
    "--train.float8",
    "tensorwise",
    "--train.precision",
    "bfloat16",
    "--train.total_steps",
    "8",
    "--checkpoint.every_steps",
    "4",
)


def test_a_run_in_float8_is_continued_to_the_same_bits_on_one_rank_and_on_two(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train_here(recipe, whole, tiny_data, *WORDS)
    first = train(recipe, halves, tiny_data, *WORDS, "--train.stop_at_step", "5", "--ranks", "2")
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("float8 tensorwise: 7 of 7 products a block") == 1
    train_here(recipe, halves, tiny_data, *WORDS)
    assert logged_steps(halves) == logged_steps(whole)
    assert weights_sha256(halves, 8) == weights_sha256(whole, 8)
    started = events(halves, "segment_started")
    assert [(e["float8"], e["exactness"]) for e in started] == [("tensorwise", "exact")] * 2


def test_a_checkpoint_of_it_holds_what_one_of_bfloat16_holds_and_float8_can_be_left_on_purpose(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    plain, run = tmp_path / "plain", tmp_path / "run"
    train_here(recipe, plain, tiny_data, *WORDS[2:], "--train.stop_at_step", "4")
    train_here(recipe, run, tiny_data, *WORDS, "--train.stop_at_step", "4")
    kinds = [
        {name: (tensor.shape, tensor.dtype) for name, tensor in load_file(file).items()}
        for folder in (plain, run)
        for file in sorted((folder / "checkpoints" / "step-00000004").rglob("*.safetensors"))
    ]
    assert len(kinds) == 4 and kinds[:2] == kinds[2:]
    losses = [logged_steps(folder)[4][0] for folder in (plain, run)]
    assert losses[0] != losses[1]
    assert float.fromhex(losses[1]) == pytest.approx(float.fromhex(losses[0]), rel=5e-3)
    with pytest.raises(UsageError, match=r"train\.float8"):
        train_here(recipe, run, tiny_data, *WORDS[2:])
    train_here(recipe, run, tiny_data, *WORDS[2:], override=True)
    assert [e["field"] for e in events(run, "override")] == ["train.float8"]
    last = events(run, "segment_started")[-1]
    assert last["exactness"] == "approximate" and "train.float8" in last["reason"]


def test_a_precision_that_turns_out_to_be_another_is_refused_before_there_is_a_run(
    recipe: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milepost.train.precision._matmul_ratio", lambda device: 1.0)
    words = ("--train.float8", "rowwise", "--train.precision", "auto")
    with pytest.raises(UsageError, match=r"train\.precision is float32 here"):
        train_here(recipe, tmp_path / "run", tiny_data, *words)
    assert not (tmp_path / "run" / "run.json").exists()
    assert not list((tmp_path / "run").glob("*.json"))
