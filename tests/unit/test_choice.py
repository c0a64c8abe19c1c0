"""What memory decides: recomputed blocks, and the rows that a run may try."""

from __future__ import annotations

import json

import pytest

from milepost.cli.main import run as milepost
from milepost.config.recipe import load_recipe
from milepost.config.schema import Config
from milepost.core.errors import UsageError
from milepost.core.units import GIBIBYTE
from milepost.planner.choice import choose_recompute, rows_to_try, settle
from milepost.planner.memory import estimate_memory

AUTO = ("--train.microbatch_rows", "auto", "--train.recompute", "auto")


def recipe(*words: str, name: str = "dmas-1.7b") -> Config:
    return load_recipe(name, overrides=words)


def needed_bytes(recompute: str | int, *, rows: int = 8) -> int:
    words = ("--train.microbatch_rows", str(rows), "--train.recompute", str(recompute))
    return estimate_memory(recipe(*words)).total_bytes


def choose(memory_bytes: int) -> str | int:
    config = recipe("--train.microbatch_rows", "8", "--train.recompute", "auto")
    return choose_recompute(config, ranks=1, memory_bytes=memory_bytes)


def test_each_block_that_is_computed_again_frees_memory() -> None:
    needed = [needed_bytes(recompute) for recompute in ("none", *range(1, 36))]
    assert sorted(set(needed), reverse=True) == needed
    assert needed_bytes("block") == needed_bytes(36)


@pytest.mark.parametrize("wanted", [1, 7, 17])
def test_the_fewest_blocks_that_fit_are_chosen(wanted: int) -> None:
    enough = needed_bytes(wanted)
    assert choose(enough) == wanted
    assert choose(enough - 1) == wanted + 1


def test_no_block_where_all_fits_and_all_where_nothing_does() -> None:
    assert choose(needed_bytes("none")) == "none"
    assert choose(1) == "block"


def test_powers_of_two_that_fit_are_tried() -> None:
    config = recipe("--train.microbatch_rows", "auto")
    for most in (1, 2, 8):
        enough = estimate_memory(config, microbatch_rows=most).total_bytes
        expected = [rows for rows in (1, 2, 4, 8) if rows <= most]
        assert rows_to_try(config, ranks=1, memory_bytes=enough) == expected
    assert rows_to_try(config, ranks=1, memory_bytes=0) == [1], "the estimate may be too high"


def test_rows_deal_a_lane_out_evenly() -> None:
    words = ("--train.global_batch_tokens", str(2 * 12 * 1024), "--train.microbatch_rows", "auto")
    assert rows_to_try(recipe(*words), ranks=1, memory_bytes=2**60) == [1, 2, 4]


def test_a_second_lane_on_the_device_leaves_fewer_rows() -> None:
    config = recipe("--train.microbatch_rows", "auto")
    one, two = (rows_to_try(config, ranks=n, memory_bytes=48 * GIBIBYTE)[-1] for n in (1, 2))
    assert one < two


def test_a_plan_settles_what_it_can() -> None:
    settled = settle(recipe(*AUTO), ranks=1, memory_bytes=48 * GIBIBYTE)
    assert estimate_memory(settled).total_bytes <= 48 * GIBIBYTE
    unknown = settle(recipe(*AUTO), ranks=1, memory_bytes=None).train
    assert (unknown.microbatch_rows, unknown.recompute) == (4, "none"), "4,096 tokens"
    given = recipe("--train.microbatch_rows", "2", "--train.recompute", "3")
    assert settle(given, ranks=1, memory_bytes=1) == given


def test_the_plan_says_what_is_chosen_and_what_is_measured_later(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert milepost(["plan", "dmas-1.7b", "--gpu", "rtx4090", "--train.lanes", "1", *AUTO]) == 0
    out = capsys.readouterr().out
    assert "measured at the start" in out and "blocks recomputed (auto)" in out
    words = ["plan", "dmas-1.7b", "--gpu", "h100", *AUTO, "--json"]
    assert milepost(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recompute"] == "none" and found["microbatch_rows"] >= 4 and found["fits"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--train.recompute", "37"), "train.recompute: 37 is above model.num_hidden_layers 36"),
        (("--train.recompute", "0"), "train.recompute: 0"),
        (("--train.recompute", "all"), "train.recompute: 'all'"),
        (("--train.recompute", "true"), "train.recompute: True"),
        (("--train.microbatch_rows", "0"), "train.microbatch_rows: 0"),
        (("--train.microbatch_rows", "Auto"), "train.microbatch_rows: 'Auto'"),
        (
            ("--train.microbatch_rows", "auto", "--train.lanes", "1024"),
            "train.lanes: 512 rows a step cannot be dealt to 1024 lanes",
        ),
    ],
)
def test_what_cannot_be_is_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe(*words)
    assert said in caught.value.message
    assert "hint" in caught.value.message
