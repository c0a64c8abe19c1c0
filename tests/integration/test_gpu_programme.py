"""benchmarks/gpu.py: rehearsals of its questions on the CPU with a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training import TINY_RECIPE, environment

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = "train.global_batch_tokens=256"


def _ask(folder: Path, question: str, *words: str) -> list[dict[str, Any]]:
    """The rows of one question."""
    recipe = folder / "tiny.toml"
    recipe.write_text(TINY_RECIPE)
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), question, "--allow-cpu"]
    command += ["--recipe", str(recipe), "--folder", str(folder / "work"), "--override", SMALL]
    done = subprocess.run([*command, *words], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_a_step_is_measured_with_every_microbatch_recomputation_and_optimizer(
    tmp_path: Path,
) -> None:
    pytest.importorskip("torchao")
    words = ("--steps", "1", "--microbatches", "2", "4", "--recompute", "none", "1")
    rows = _ask(tmp_path, "step", *words, "--optimizers", "adamw", "adamw8bit")
    names = ("optimizer", "deterministic", "recompute", "microbatch_rows")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("adamw", True, "none", 2),
        ("adamw", True, "none", 4),
        ("adamw", True, 1, 2),
        ("adamw", True, 1, 4),
        ("adamw", False, "none", 2),
        ("adamw8bit", True, "none", 2),
        ("adamw8bit", False, "none", 2),
    ]
    planned = {name: row["planned_bytes"] for name, row in zip("abcdefg", rows, strict=True)}
    assert planned["f"] < planned["a"] < planned["b"] and planned["c"] < planned["a"]
    assert {row["planned_to_peak"] for row in rows} == {None}  # nobody counts on the CPU


def test_float8_is_held_against_bfloat16_in_rate_and_in_loss(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    words = ("--steps", "1", "--rounds", "2", "--kinds", "rowwise", "--curve-steps", "6")
    curve = ("--curve-recipe", str(tmp_path / "tiny.toml"), "--curve-override", SMALL)
    rows = _ask(tmp_path, "float8", *words, *curve)
    by_question: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_question.setdefault(row["question"], []).append(row)
    assert [row["float8"] for row in by_question["float8"]] == ["none", "rowwise"] * 2
    (rates,) = by_question["float8-rates"]
    found = rates["tokens_per_second"]
    assert rates["ratio_to_bfloat16"]["rowwise"] == found["rowwise"] / found["none"]
    plain, eight = (row["losses_nats"] for row in by_question["float8-curve"])
    assert len(plain) == len(eight) == 6 and plain != eight
    (curves,) = by_question["float8-curves"]
    mean = curves["mean_of_last_losses_nats"]
    assert curves["difference_nats"]["rowwise"] == mean["rowwise"] - mean["none"]
    assert abs(curves["difference_nats"]["rowwise"]) < 0.01


def test_a_profile_says_where_the_time_goes(tmp_path: Path) -> None:
    (row,) = _ask(tmp_path, "profile", "--steps", "1")
    assert {"products", "head and loss", "lanes", "optimizer"} <= set(row["seconds_a_step"])
    assert all(seconds > 0 for seconds in row["seconds_a_step"].values())
    assert row["longest_kernels"][0]["seconds_a_step"] > 0
    assert row["idle_share"] is row["waits_a_step"] is row["synchronizations"] is None


@pytest.mark.long
@pytest.mark.parametrize("question", ["resume", "certificate"])
def test_a_run_is_killed_and_replayed(tmp_path: Path, question: str) -> None:
    # So many that it is killed seconds before its end.
    words = ("--steps", "160", "--override", "train.total_steps=160")
    (row,) = _ask(tmp_path, question, *words)
    assert row["is_exact" if question == "resume" else "is_equal"]


@pytest.mark.long
def test_the_peers_take_turns(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    words = ("--steps", "1", "--rounds", "1", "--contenders", "milepost", "transformers")
    *turns, last = _ask(tmp_path, "peers", *words)
    assert [turn["name"] for turn in turns] == ["milepost", "transformers"]
    assert last["ratio_to_fastest_peer"]["transformers"] == 1


def test_spans_are_summed_by_part_and_kind_and_gaps_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from on_gpu.profile import Span, idle_share, kind_of, time_by_group

    kernels = [
        Span("nvjet_tst_128x256_gemm", 0, 2e6),
        Span("nvjet_tst_128x256_gemm", 4e6, 5e6),  # of the head, by where it stands
        Span("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", 5e6, 6e6),
        Span("triton_red_fused_add_mul_3", 5.5e6, 7e6),  # beside the one before
        Span("something", 9e6, 10e6),
    ]
    parts = [Span("head and loss", 3e6, 5e6), Span("optimizer", 8.5e6, 8.6e6)]
    assert time_by_group(kernels, parts=parts) == {
        "products": 2.0,
        "norms, rotary, SwiGLU and the like": 1.5,
        "head and loss": 1.0,
        "attention": 1.0,
        "other": 1.0,
    }
    assert idle_share(kernels) == pytest.approx(0.4)  # 2 to 4 and 7 to 9 of 10
    assert kind_of("Memcpy HtoD (Pinned -> Device)") == "copies"
