"""One rank, two, four and eight give the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training import (
    logged_steps,
    train,
    train_here,
    validations,
    weights_sha256,
)


@pytest.mark.parametrize(
    ("lanes", "ranks", "precision"),
    [
        ("2", "2", "float32"),
        ("4", "4", "bfloat16"),
        pytest.param("4", "2", "bfloat16", marks=pytest.mark.long),
        pytest.param("4", "4", "float32", marks=pytest.mark.long),
        pytest.param("8", "8", "float32", marks=pytest.mark.long),
    ],
)
def test_any_number_of_ranks_gives_the_bits_of_one(
    recipe: Path, tiny_data: Path, tmp_path: Path, lanes: str, ranks: str, precision: str
) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    rows = "1" if lanes == "8" else "2"  # 8 rows a step
    words = ("--train.lanes", lanes, "--train.microbatch_rows", rows, "--train.stop_at_step", "10")
    words += ("--train.precision", precision)
    train_here(recipe, one, tiny_data, *words)
    result = train(recipe, many, tiny_data, *words, "--ranks", ranks)
    assert result.returncode == 0, result.stderr
    assert sorted(logged_steps(many)) == list(range(1, 11))
    assert logged_steps(many) == logged_steps(one)
    assert validations(many) == validations(one)
    assert weights_sha256(many, 10) == weights_sha256(one, 10)
