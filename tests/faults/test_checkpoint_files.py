"""Rows 6 to 10, 27, 28 and 35: checkpoints that were cut short, changed, mixed up or made to harm.

In most tests the run goes on in this process. What damage is, to the last byte, is asked of
`verify_checkpoint`, which every start asks.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from milepost.checkpoint.store import verify_checkpoint
from milepost.core.errors import CheckpointError, MilepostError
from milepost.core.files import json_document, sha256_of_file
from tests.damage import Payload, approve, cut, flip
from tests.training import Course, events

NEWEST, BEFORE = "step-00000015", "step-00000010"
STATE_FILES = ["optimizer.safetensors", "state.json", "manifest.json"]


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def check_verified(folder: Path) -> None:
    verify_checkpoint(folder, run_id=None, step=None)


def test_every_file_of_a_checkpoint_that_is_cut_short_is_named(stopped: Path) -> None:
    folder = stopped / "checkpoints" / NEWEST
    for path in files_of(folder):
        content = path.read_bytes()
        try:
            for size in (0, 1, len(content) // 2, len(content) - 1):
                path.write_bytes(content[:size])
                with pytest.raises(CheckpointError, match=path.name):
                    check_verified(folder)
        finally:
            path.write_bytes(content)
        check_verified(folder)


def test_a_flipped_bit_is_found_wherever_it_is(stopped: Path) -> None:
    """At 25 places of each file, its first and last byte among them: 200 and more in all."""
    folder, source = stopped / "checkpoints" / NEWEST, random.Random(7)
    num_flips = 0
    for path in files_of(folder):
        content = path.read_bytes()
        places = {0, len(content) - 1, *source.sample(range(len(content)), 23)}
        try:
            for place in places:
                flipped = bytearray(content)
                flipped[place] ^= 1 << source.randrange(8)
                path.write_bytes(flipped)
                with pytest.raises(CheckpointError):
                    check_verified(folder)
                num_flips += 1
        finally:
            path.write_bytes(content)
    check_verified(folder)
    assert num_flips >= 200


def add(path: Path) -> None:
    path.with_name("extra.bin").write_bytes(b"extra")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", cut),
        ("model.safetensors", flip),
        ("config.json", Path.unlink),
        ("manifest.json", flip),
        ("manifest.json", Path.unlink),
        ("manifest.json", add),
        *((f"train_state/{name}", flip) for name in STATE_FILES),
        ("train_state/optimizer.safetensors", Path.unlink),
        ("train_state/state.json", add),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(
    name: str, damage: Callable[[Path], None], short: Course, half: Path
) -> None:
    damage(half / "checkpoints" / NEWEST / name)
    short.finish(half)
    assert [event["step"] for event in events(half, "checkpoint_quarantined")] == [15]
    assert (half / "quarantine" / NEWEST).is_dir()
    assert events(half, "segment_started")[-1]["restored_step"] == 10
    assert events(half, "replayed")[-1]["equal"] == 5


@pytest.mark.parametrize("damage", [cut, pytest.param(flip, marks=pytest.mark.long)])
def test_a_start_says_which_file_is_damaged_and_goes_on_exactly(
    damage: Callable[[Path], None], shipped: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shipped.train_here(run, "--train.stop_at_step", "25")
    damage(run / "checkpoints" / "step-00000025" / "model.safetensors")
    again = shipped.train(run)
    assert again.returncode == 0, again.stderr
    (said,) = [line for line in again.stderr.splitlines() if line.startswith("warning: ")]
    assert "checkpoint 25 is damaged and was set aside" in said and "model.safetensors" in said
    shipped.check(run)


def swap(one: Path, other: Path) -> None:
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


@pytest.mark.parametrize("name", ["model.safetensors", "train_state", "train_state/state.json", ""])
def test_what_was_swapped_between_two_checkpoints_is_found_in_both(
    name: str, short: Course, half: Path
) -> None:
    checkpoints = half / "checkpoints"
    swap(checkpoints / NEWEST / name, checkpoints / BEFORE / name)
    with pytest.raises(CheckpointError, match="none of the 3 known checkpoints"):
        short.train_here(half)
    aside = [event["step"] for event in events(half, "checkpoint_quarantined")]
    assert aside == [15, 10], "the train state of step 5 was dropped, its weights are whole"


def test_a_checkpoint_of_another_run_is_damage(short: Course, half: Path) -> None:
    place = half / "checkpoints" / NEWEST
    shutil.rmtree(place)
    shutil.copytree(short.undisturbed / "checkpoints" / "step-00000030", place)
    short.train_here(half, "--train.stop_at_step", "16")
    assert "run_id is" in events(half, "checkpoint_quarantined")[0]["reason"]


def test_with_every_checkpoint_damaged_nothing_starts_over_however_often_it_is_tried(
    short: Course, half: Path
) -> None:
    for folder in (half / "checkpoints").iterdir():
        flip(folder / "model.safetensors")
    before = len(events(half, "step"))
    with pytest.raises(CheckpointError, match="none of the 3 known checkpoints can be used"):
        short.train_here(half)
    done = short.train(half)
    assert done.returncode == 4, done.stderr
    assert "none of the 3 known checkpoints can be used" in done.stderr
    assert "hint: look at" in done.stderr and "never starts over" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(events(half, "step")) == before


def test_strays_among_the_checkpoints_do_no_harm(short: Course, half: Path, tmp_path: Path) -> None:
    checkpoints = half / "checkpoints"
    (checkpoints / "step-99").mkdir()
    (checkpoints / "step-00000020.bak").mkdir()
    (checkpoints / "step-٠٠٠٠٠٠٢٠").mkdir()
    (checkpoints / "step-00000021\n").mkdir()
    (checkpoints / "notes.txt").write_text("mine")
    (checkpoints / "step-00000098").write_text("a file")
    outside = shutil.copytree(checkpoints / NEWEST, tmp_path / "outside")
    (checkpoints / "step-00000099").symlink_to(outside)
    (checkpoints / "step-00000100").symlink_to("/etc")
    (checkpoints / "step-\udcff").mkdir()
    (checkpoints / ".saving-step-00000020-1").mkdir()
    short.train_here(half)
    assert events(half, "segment_started")[-1]["restored_step"] == 15
    assert not (checkpoints / ".saving-step-00000020-1").exists()
    assert (checkpoints / "notes.txt").read_text() == "mine"
    check_verified(outside)


@pytest.mark.parametrize("content", ["nothing", "an older checkpoint", "a foreign manifest"])
def test_a_folder_that_poses_as_the_newest_checkpoint_is_set_aside(
    content: str, short: Course, half: Path
) -> None:
    newest = half / "checkpoints" / "step-00000099"
    if content == "an older checkpoint":
        shutil.copytree(half / "checkpoints" / NEWEST, newest)
    else:
        (newest / "train_state").mkdir(parents=True)
    if content == "a foreign manifest":
        facts = {"bytes": 4, "sha256": "0" * 64}
        manifest = {"v": 1, "step": 99, "files": {"../../../../etc/passwd": facts}}
        (newest / "manifest.json").write_text(json_document(manifest))
    short.finish(half)
    assert [event["step"] for event in events(half, "checkpoint_quarantined")] == [99]
    assert events(half, "segment_started")[-1]["restored_step"] == 15


def approve_all(folder: Path) -> None:
    """A checkpoint's manifests, and the link from the outer to the inner."""
    approve(folder / "train_state")
    belongs = sha256_of_file(folder / "train_state" / "manifest.json")
    approve(folder, train_state_manifest_sha256=belongs)


APPROVED = [
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "train_state/optimizer.safetensors",
    "train_state/state.json",
]


@pytest.mark.parametrize("name", APPROVED)
def test_a_pickle_in_the_place_of_a_file_is_never_unpickled(
    name: str, short: Course, half: Path, tmp_path: Path
) -> None:
    from milepost.inference.load import load_model

    folder, marker = half / "checkpoints" / NEWEST, tmp_path / "marker"
    (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    approve_all(folder)
    if name.startswith("train_state/") or name == "model.safetensors":
        with pytest.raises(CheckpointError, match=Path(name).name):
            short.train_here(half)
    else:  # the run has its own config and tokenizer; who loads the model has not
        short.train_here(half, "--train.stop_at_step", "16")
    if not name.startswith("train_state/"):
        with pytest.raises(MilepostError, match=name):
            load_model(folder)
    assert not marker.exists()


def test_pickles_beside_the_files_are_damage_and_stay_closed(
    short: Course, half: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    content = pickle.dumps(Payload(marker))
    for name in ("pytorch_model.bin", "optimizer.pt", "train_state/rng.npy", "train_state/a.pkl"):
        (half / "checkpoints" / NEWEST / name).write_bytes(content)
    short.finish(half)
    assert [event["step"] for event in events(half, "checkpoint_quarantined")] == [15]
    assert not marker.exists()


def safetensors(header: bytes, data: bytes = b"", *, header_bytes: int | None = None) -> bytes:
    size = len(header) if header_bytes is None else header_bytes
    return struct.pack("<Q", size) + header + data


def tensor(*, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


def header_of(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


HOSTILE = {
    "a header of 2^63 bytes": safetensors(b"{}", header_bytes=2**63),
    "a header longer than the file": safetensors(b"{}", header_bytes=10**6),
    "a header of blanks": safetensors(b" " * (32 << 20)),
    "a header that is nested": safetensors(b'{"a":' * 100_000),
    "no header": b"\x00" * 8,
    "two tensors in one place": safetensors(
        header_of(a=tensor(shape=[4], start=0, end=16), b=tensor(shape=[4], start=0, end=16)),
        b"x" * 16,
    ),
    "a shape that overflows": safetensors(
        header_of(a=tensor(shape=[2**62, 4], start=0, end=16)), b"x" * 16
    ),
    "a shape beyond any memory": safetensors(
        header_of(a=tensor(shape=[2**40], start=0, end=2**42)), b"x" * 16
    ),
    "ends before they begin": safetensors(
        header_of(a=tensor(shape=[4], start=16, end=0)), b"x" * 16
    ),
    "a name that stands twice": safetensors(
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b"x" * 8,
    ),
    "nothing that the model needs": safetensors(
        header_of(a=tensor(shape=[4], start=0, end=16)), b"x" * 16
    ),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("name", ["model.safetensors", "train_state/optimizer.safetensors"])
def test_a_hostile_tensor_file_with_a_manifest_to_match_is_refused(
    name: str, content: bytes, short: Course, half: Path
) -> None:
    folder = half / "checkpoints" / NEWEST
    (folder / name).write_bytes(content)
    approve_all(folder)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError):
        short.train_here(half)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib
    assert grown_kib << 10 < 2 * len(content) + (64 << 20)


HOSTILE_NUMBERS = {
    "nothing": "{}",
    "a list": "[]",
    "a text": '{"progress": "far", "optimizer_step": 15}',
    "infinity": '{"progress": {"step": 15}, "optimizer_step": Infinity}',
    "NaN": '{"progress": {"step": 15}, "optimizer_step": NaN}',
    "5000 digits": '{"progress": {"step": 15}, "optimizer_step": ' + "1" * 5000 + "}",
    "a fraction": '{"progress": {"step": 15.5}, "optimizer_step": 15}',
    "below zero": '{"progress": {"step": -1}, "optimizer_step": 15}',
    "another step": '{"progress": {"step": 29}, "optimizer_step": 29}',
    "an unknown field": '{"progress": {"step": 15, "lr": 1}, "optimizer_step": 15}',
}


@pytest.mark.parametrize("text", HOSTILE_NUMBERS.values(), ids=HOSTILE_NUMBERS)
def test_hostile_numbers_with_a_manifest_to_match_are_refused(
    text: str, short: Course, half: Path
) -> None:
    folder = half / "checkpoints" / NEWEST
    (folder / "train_state" / "state.json").write_text(text)
    approve_all(folder)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        short.train_here(half)


def test_a_hard_link_to_a_file_elsewhere_leaves_that_file_as_it_was(
    short: Course, half: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere.safetensors"
    place = half / "checkpoints" / NEWEST / "model.safetensors"
    place.rename(elsewhere)
    place.hardlink_to(elsewhere)
    before = elsewhere.read_bytes()
    short.finish(half)
    assert elsewhere.read_bytes() == before


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("events.jsonl", r"cannot read .*events\.jsonl: it is not a regular file"),
        ("manifest.json", "is not a run folder: it has no manifest"),
    ],
)
def test_a_pipe_or_folder_in_the_place_of_a_run_s_record_is_refused_at_once(
    name: str, reason: str, make: Callable[[Path], None], short: Course, half: Path
) -> None:
    (half / name).unlink()
    make(half / name)
    with pytest.raises(MilepostError, match=reason):
        short.train_here(half)


def test_a_run_that_a_later_version_wrote_is_refused_with_both_versions(
    short: Course, half: Path
) -> None:
    for place in (half / "checkpoints").glob("step-*/**/manifest.json"):
        place.write_text(json_document(json.loads(place.read_text()) | {"v": 7}))
    with pytest.raises(CheckpointError, match="has schema version 7, this program reads") as caught:
        short.train_here(half)
    assert "a later one" in str(caught.value.hint)
    assert not (half / "quarantine").exists()


def test_a_train_state_from_before_there_were_guards_goes_on_exactly(
    short: Course, half: Path
) -> None:
    folder = half / "checkpoints" / NEWEST
    place = folder / "train_state" / "state.json"
    numbers = json.loads(place.read_bytes())
    for name in ("guards", "data_shift"):
        del numbers["progress"][name]
    place.write_text(json.dumps(numbers))
    approve(folder / "train_state")
    sha256 = sha256_of_file(folder / "train_state" / "manifest.json")
    approve(folder, train_state_manifest_sha256=sha256)
    short.finish(half)
    assert events(half, "segment_started")[-1]["restored_step"] == 15
