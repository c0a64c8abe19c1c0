"""`milepost verify --replay` holds a run to its bits, and the certificate says what it found."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from milepost.cli.main import run as milepost
from tests.damage import edit_history
from tests.training import SHORT, left_beside, train_here

SAMPLED = ("--samples.every_steps", "2", "--samples.prompts", '["the"]')


def certificate_of(run: Path, *, steps: str, ranks: int) -> dict[str, Any]:
    path = run / "certificates" / f"replay-{steps}-ranks{ranks}.json"
    assert path.with_suffix(".txt").is_file()
    return json.loads(path.read_text())


def counts(certificate: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {part["name"]: (part["equal"], part["count"]) for part in certificate["compared"]}


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_replay_gives_the_same_bits_on_any_number_of_ranks(
    run: Path, ranks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert milepost(["verify", str(run), "--replay", "--ranks", str(ranks)]) == 0
    out = capsys.readouterr().out
    assert out.index("replay of steps 10 to 12") < out.index(f"run           {run}\n")
    assert "EQUAL: 3 of 3 steps, 21 of 21 weight tensors, 42 of 42 optimizer tensors" in out
    certificate = certificate_of(run, steps="9-12", ranks=ranks)
    assert certificate["verdict"] == "equal"
    assert all(equal == count > 0 for equal, count in counts(certificate).values())
    assert (certificate["then"][0]["ranks"], certificate["now"]["ranks"]) == (1, ranks)
    assert certificate["run_id"] == json.loads((run / "manifest.json").read_text())["run_id"]
    for part in certificate["compared"][1:3]:
        assert part["sha256_then"] == part["sha256_now"]
    assert certificate["command"] == f"milepost verify {run} --replay --ranks {ranks}"
    assert left_beside(run) == []
    assert milepost(["verify", str(run)]) == 0, "the run is as it was"


def test_a_log_that_differs_by_one_bit_is_named_and_ends_with_4(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_ulp_more(event: dict[str, Any]) -> dict[str, Any]:
        if event["kind"] == "step" and event["step"] == 11:
            event["loss_nats"] = math.nextafter(event["loss_nats"], math.inf)
        return event

    edit_history(run, one_ulp_more)
    assert milepost(["verify", str(run), "--replay", "--ranks", "1"]) == 4
    out, err = capsys.readouterr()
    certificate = certificate_of(run, steps="9-12", ranks=1)
    assert certificate["verdict"] == "different"
    assert counts(certificate)["events.jsonl"] == (2, 3)
    assert counts(certificate)["model.safetensors"] == (21, 21)
    assert certificate["compared"][0]["first_difference"]["place"] == "step 11, loss_nats"
    assert "DIFFERENT: first at step 11, loss_nats: was 0x1." in out
    assert "error" in err
    assert left_beside(run) == []


def test_what_a_certificate_says_of_the_run_is_read_before_the_training(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from milepost.experiments import replay

    def train_and_lose(words: list[str], *, run: Path, **options: Any) -> bool:
        shutil.copytree(original / "checkpoints" / last, run / "checkpoints" / last)
        shutil.copyfile(original / "events.jsonl", run / "events.jsonl")
        (original / "manifest.json").unlink()
        (original / "checkpoints" / "step-00000009" / "manifest.json").unlink()
        return True

    original, last = run, "step-00000012"
    hashes = {step: _sha256(run / "checkpoints" / f"step-{step:08d}") for step in (9, 12)}
    monkeypatch.setattr(replay, "run_segment", train_and_lose)
    assert milepost(["verify", str(run), "--replay", "--ranks", "1"]) == 0
    certificate = certificate_of(run, steps="9-12", ranks=1)
    assert {f"manifest of step {n}": h for n, h in hashes.items()}.items() <= certificate[
        "hashes"
    ].items()


def _sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()


@pytest.mark.long
def test_a_train_state_that_is_dropped_while_it_is_trained_again_is_left_out(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from milepost.experiments import replay

    really = replay.run_segment

    def training_drops_it(*arguments: Any, **options: Any) -> bool:
        shutil.rmtree(run / "checkpoints" / "step-00000012" / "train_state")
        return really(*arguments, **options)

    monkeypatch.setattr(replay, "run_segment", training_drops_it)
    assert milepost(["verify", str(run), "--replay", "--ranks", "1"]) == 0
    certificate = certificate_of(run, steps="9-12", ranks=1)
    assert list(counts(certificate)) == ["events.jsonl", "model.safetensors"]
    assert "has no train state any more" in certificate["notes"][0]


@pytest.mark.long
def test_an_override_before_the_range_is_applied_and_said(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train_here(recipe, run, tiny_data, *SHORT, "--train.stop_at_step", "9")
    changed = ("--optimizer.clip_grad_norm", "none")
    train_here(recipe, run, tiny_data, *SHORT, *changed, override=True)
    assert milepost(["verify", str(run), "--replay", "--ranks", "1"]) == 0
    notes = " ".join(certificate_of(run, steps="9-12", ranks=1)["notes"])
    assert "optimizer.clip_grad_norm = None" in notes
    assert "labelled approximate: overridden: optimizer.clip_grad_norm" in notes


@pytest.mark.long
def test_a_replay_from_the_first_step_compares_what_is_left(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert milepost(["verify", str(run), "--replay", "--from-step", "0", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    certificate = certificate_of(run, steps="0-3", ranks=told["replay"]["now"]["ranks"])
    assert told["replay"] == certificate
    assert [Path(name).suffix for name in told["certificate_files"]] == [".json", ".txt"]
    assert list(counts(certificate)) == ["events.jsonl", "model.safetensors"]
    assert "has no train state any more" in certificate["notes"][0]
    assert "Trained again from the first step" in certificate["claim"]


@pytest.mark.long
@pytest.mark.parametrize(
    "setting",
    [
        ("--train.precision", "bfloat16", "--train.compile", "true"),
        ("--train.precision", "float16"),
        ("--checkpoint.weights_dtype", "bfloat16", *SAMPLED),
    ],
    ids=["bfloat16 and compiled", "float16", "weights in bfloat16, with samples"],
)
def test_a_replay_is_exact_under_other_settings(
    recipe: Path, tiny_data: Path, tmp_path: Path, setting: tuple[str, ...]
) -> None:
    if "--train.compile" in setting and shutil.which("g++") is None:
        pytest.skip("no C++ compiler is installed")
    run = tmp_path / "run"
    train_here(recipe, run, tiny_data, *SHORT, *setting)
    assert milepost(["verify", str(run), "--replay", "--ranks", "2"]) == 0
    certificate = certificate_of(run, steps="9-12", ranks=2)
    assert certificate["verdict"] == "equal"
    has_masters = "train_state/masters.safetensors" in counts(certificate)
    assert has_masters == ("--checkpoint.weights_dtype" in setting)
