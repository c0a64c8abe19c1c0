"""A whole run with the 8-bit optimizer: continued, and changed to the other one."""

from __future__ import annotations

from pathlib import Path

import pytest

from milepost.core.errors import UsageError
from tests.training import events, logged_steps, train_here, weights_sha256

pytest.importorskip("torchao", reason="the 8-bit optimizer is not installed (extra lowbit)")

WORDS = (
    "--optimizer.name",
    "adamw8bit",
    "--train.total_steps",
    "8",
    "--checkpoint.every_steps",
    "4",
)


def test_a_run_with_8_bit_moments_is_continued_to_the_same_bits(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train_here(recipe, whole, tiny_data, *WORDS)
    train_here(recipe, halves, tiny_data, *WORDS, "--train.stop_at_step", "5")
    train_here(recipe, halves, tiny_data, *WORDS)
    assert logged_steps(halves) == logged_steps(whole)
    assert weights_sha256(halves, 8) == weights_sha256(whole, 8)
    assert {event["exactness"] for event in events(halves, "segment_started")} == {"exact"}


def test_a_run_can_change_to_the_other_optimizer_on_purpose(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train_here(recipe, run, tiny_data, *WORDS, "--train.stop_at_step", "5")
    with pytest.raises(UsageError, match=r"optimizer\.name"):
        train_here(recipe, run, tiny_data, *WORDS[2:])
    train_here(recipe, run, tiny_data, *WORDS[2:], override=True)
    told = [(e["field"], e["old"], e["new"]) for e in events(run, "override")]
    assert told == [("optimizer.name", "adamw8bit", "adamw")]
    assert events(run, "segment_started")[-1]["exactness"] == "approximate"
    assert sorted(logged_steps(run)) == list(range(1, 9))
