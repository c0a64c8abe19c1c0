"""What a certificate says: the first place where bits differ, and on what they were compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from milepost.core.errors import CheckpointError
from milepost.core.files import read_json, sha256_of_file, write_json
from milepost.experiments.certificate import (
    WIDTH,
    Certificate,
    changes_between,
    facts_of,
    write_certificate,
)
from milepost.experiments.comparison import (
    Compared,
    compare_checkpoints,
    compare_numbers,
    compare_steps,
    compare_tensors,
)
from milepost.runs.layout import RunLayout

MODEL = "model.safetensors"
FIELDS = ("loss_nats", "batch_sha256")
NAN = float("nan")
STARTED = {
    "ranks": 2,
    "threads": 1,
    "compile": True,
    "precision": "bfloat16",
    "exactness": "exact",
    "reason": "deterministic kernels, fixed order of sums",
    "versions": {
        "device": "a plain processor",
        "torch": "2.13.0",
        "cuda": None,
        "milepost": "0.1.0",
        "python": "3.11.7",
    },
}


def model_folder(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir()
    save_file(tensors, folder / MODEL)
    facts = {"sha256": sha256_of_file(folder / MODEL)}
    write_json(folder / "manifest.json", {"files": {MODEL: facts}})
    return folder


def numbers_folder(folder: Path, **changes: Any) -> Path:
    progress = {"step": 9, "tokens_seen": 72, "training_seconds": 1.5, "loss_scale": 1.0}
    document = {"progress": progress | changes, "optimizer_step": 9}
    path = folder / "train_state" / "state.json"
    write_json(path, document)
    facts = {"sha256": sha256_of_file(path)}
    write_json(path.with_name("manifest.json"), {"files": {path.name: facts}})
    return folder


def certificate(*compared: Compared, **changes: Any) -> Certificate:
    values: dict[str, Any] = {
        "run": "runs/first",
        "run_id": "ab" * 16,
        "from_step": 10,
        "to_step": 20,
        "compared": list(compared),
        "hashes": {"weights of step 20": "0" * 64},
        "then": [facts_of(STARTED)],
        "now": facts_of(STARTED | {"ranks": 1}),
        "notes": [],
        "time": "2026-01-05T09:00:00.000Z",
        "command": "milepost verify runs/first --replay",
        "seconds": 61.0,
        "training_seconds": 50.0,
    }
    return Certificate(**(values | changes))


def steps(logged: Mapping[int, dict[str, Any]]) -> Compared:
    then = {n: {"loss_nats": 2.5, "batch_sha256": "ab"} for n in (11, 12, 13)}
    return compare_steps(then, then | dict(logged), steps=[11, 12, 13], fields=FIELDS)


EQUAL_STEPS = steps({})


@pytest.mark.parametrize(
    ("logged", "place", "what"),
    [
        (
            {12: {"loss_nats": 2.5000000000000004, "batch_sha256": "ab"}},
            "step 12, loss_nats",
            "was 0x1.4000000000000p+1 (2.5) and is 0x1.4000000000001p+1 (2.5000000000000004)",
        ),
        (
            {13: {"loss_nats": 2.5, "batch_sha256": "cd"}},
            "step 13, batch_sha256",
            "was ab and is cd",
        ),
        ({11: {"loss_nats": None, "batch_sha256": "ab"}}, "step 11, loss_nats", "and is None"),
    ],
)
def test_the_first_step_that_differs_is_named_with_every_bit(
    logged: dict[int, dict[str, Any]], place: str, what: str
) -> None:
    compared = steps(logged)
    assert (compared.equal, compared.count) == (2, 3)
    assert compared.first_difference is not None
    assert compared.first_difference.place == place
    assert what in compared.first_difference.what


def test_a_step_that_was_not_reached_differs() -> None:
    then = {11: {"loss_nats": 2.5}, 12: {"loss_nats": 2.5}}
    compared = compare_steps(then, {11: then[11]}, steps=[11, 12], fields=["loss_nats"])
    assert compared.first_difference is not None
    assert compared.first_difference.what == "was not reached"


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (torch.tensor([1.0, 2.5, 3.0]), "1 of 3 elements differ, by 0.5 at most"),
        (torch.tensor([1.0, 2.0, -0.0]), "1 of 3 elements differ, by 3 at most"),
        (torch.tensor([1.0, 2.0]), "was float32 [3] and is float32 [2]"),
        (torch.tensor([1.0, 2.0, 3.0]).double(), "was float32 [3] and is float64 [3]"),
    ],
)
def test_the_first_tensor_that_differs_is_named(
    tmp_path: Path, other: torch.Tensor, what: str
) -> None:
    same, first = torch.ones(2, 2), torch.tensor([1.0, 2.0, 3.0])
    then = model_folder(tmp_path / "then", a=same, b=first)
    now = model_folder(tmp_path / "now", a=same, b=other)
    compared = compare_tensors(then, now, name=MODEL)
    assert (compared.equal, compared.count) == (1, 2)
    assert compared.first_difference is not None
    assert compared.first_difference.place == "b"
    assert compared.first_difference.what == what


def test_bits_are_compared_not_values(tmp_path: Path) -> None:
    then = model_folder(tmp_path / "then", a=torch.tensor([0.0]), b=torch.tensor([NAN]))
    now = model_folder(tmp_path / "now", a=torch.tensor([-0.0]), b=torch.tensor([NAN]))
    compared = compare_tensors(then, now, name=MODEL)
    assert (compared.equal, compared.count) == (1, 2)
    assert compared.first_difference is not None
    assert compared.first_difference.place == "a", "zero is equal to minus zero, its bits are not"


def test_a_tensor_that_only_one_has_differs(tmp_path: Path) -> None:
    then = model_folder(tmp_path / "then", a=torch.ones(2), b=torch.ones(2))
    now = model_folder(tmp_path / "now", a=torch.ones(2), c=torch.ones(2))
    compared = compare_tensors(then, now, name=MODEL)
    assert (compared.equal, compared.count) == (1, 3)
    assert compared.first_difference is not None
    assert compared.first_difference.what == "is only in the run"


def test_equal_files_are_equal_tensor_by_tensor(tmp_path: Path) -> None:
    then = model_folder(tmp_path / "then", a=torch.ones(2), b=torch.zeros(3))
    now = model_folder(tmp_path / "now", a=torch.ones(2), b=torch.zeros(3))
    [compared] = compare_checkpoints(then, now)
    assert (compared.equal, compared.count, compared.unit) == (2, 2, "weight tensors")
    assert compared.sha256_then == compared.sha256_now


def test_a_missing_file_is_damage_not_a_difference(tmp_path: Path) -> None:
    then = model_folder(tmp_path / "then", a=torch.ones(2))
    now = model_folder(tmp_path / "now", a=torch.ones(2))
    write_json(now / "manifest.json", {"files": {}})
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        compare_tensors(then, now, name=MODEL)


def test_the_time_that_training_took_is_no_difference(tmp_path: Path) -> None:
    then = numbers_folder(tmp_path / "then")
    compared = compare_numbers(then, numbers_folder(tmp_path / "now", training_seconds=9.0))
    assert compared.is_equal
    compared = compare_numbers(then, numbers_folder(tmp_path / "other", tokens_seen=73))
    assert (compared.equal, compared.count) == (3, 4)
    assert compared.first_difference is not None
    assert compared.first_difference.place == "tokens_seen"


def test_an_equal_certificate_counts_what_was_equal() -> None:
    made = certificate(EQUAL_STEPS, Compared(MODEL, "weight tensors", 21, 21, None))
    assert made.verdict == "EQUAL: 3 of 3 steps, 21 of 21 weight tensors."
    assert made.as_plain()["verdict"] == "equal"


def test_a_verdict_names_the_first_step_and_the_first_tensor(tmp_path: Path) -> None:
    then = model_folder(tmp_path / "then", a=torch.ones(2))
    now = model_folder(tmp_path / "now", a=torch.zeros(2))
    differing_steps = steps({12: {"loss_nats": 2.75, "batch_sha256": "ab"}})
    tensors = compare_tensors(then, now, name=MODEL)
    both = certificate(differing_steps, tensors).verdict
    assert both.startswith("DIFFERENT: first at step 12, loss_nats: was 0x1.4000000000000p+1 (2.5)")
    assert "In the checkpoint first at model.safetensors, a: 2 of 2 elements differ" in both
    only_log = certificate(differing_steps, Compared(MODEL, "weight tensors", 1, 1, None)).verdict
    assert only_log.endswith("The checkpoint is equal.")
    only_tensors = certificate(EQUAL_STEPS, tensors).verdict
    assert only_tensors.startswith("DIFFERENT: every step is equal; first at model.safetensors, a:")


def test_what_is_another_machine_now_is_said() -> None:
    then = facts_of(STARTED)
    versions = STARTED["versions"] | {"torch": "2.14.0", "cuda": "13.0"}  # type: ignore[operator]
    now = facts_of(STARTED | {"versions": versions, "ranks": 1})
    expected = ["torch was 2.13.0, is 2.14.0", "CUDA was none, is 13.0"]
    assert changes_between([then, then], now) == expected
    assert changes_between([then], facts_of(STARTED | {"ranks": 1})) == [], "ranks may change"


def test_facts_that_a_log_lacks_are_unknown() -> None:
    made = certificate(EQUAL_STEPS, then=[facts_of({"ranks": 2})])
    assert "device" in made.as_text()
    assert "unknown" in made.as_text()


def test_the_text_can_be_read_on_a_terminal(tmp_path: Path) -> None:
    note = "Segment 2 of the run is labelled approximate: " + "a long reason " * 10
    made = certificate(EQUAL_STEPS, notes=[note])
    _, text = write_certificate(RunLayout(tmp_path), made)
    assert text.name == "replay-10-20-ranks1.txt"
    lines = text.read_text().splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert all(line == line.rstrip() for line in lines)
    document = read_json(text.with_suffix(".json"), error=CheckpointError)
    assert document["claim"] in " ".join(" ".join(lines).split())
    assert document["then"][0]["ranks"] == 2
