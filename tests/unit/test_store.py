"""Checkpoints on disk: what is damage and what is not, who may read them, when room is short."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from milepost.checkpoint import store
from milepost.checkpoint.retention import Restorable, drop_old_train_states, newest_restorable
from milepost.checkpoint.state import Progress, TrainState
from milepost.checkpoint.store import (
    needed_bytes,
    refuse_if_full,
    remove_litter,
    save_checkpoint,
    verify_checkpoint,
    verify_model_files,
)
from milepost.core.errors import CheckpointError, StorageError
from milepost.core.files import exclusive_lock, json_document, write_json
from milepost.runs.events import EventWriter, read_history
from milepost.runs.layout import RunLayout

RUN_ID = "ab"
ROWS = 64


def state(step: int, *, rows: int = ROWS) -> TrainState:
    tensor = torch.arange(rows * 64, dtype=torch.float32).view(rows, 64) + step
    return TrainState(
        progress=Progress(step=step),
        weights={"w": tensor},
        moments={"exp_avg.w": tensor * 2, "exp_avg_sq.w": tensor * 3},
        optimizer_step=step,
    )


def save(layout: RunLayout, step: int, *, weights_dtype: str = "float32", rows: int = ROWS) -> Path:
    saved = save_checkpoint(
        layout,
        run_id=RUN_ID,
        state=state(step, rows=rows),
        model_files={"config.json": b"{}\n"},
        weights_dtype=weights_dtype,
    )
    folder = layout.checkpoint(step)
    assert verify_checkpoint(folder, run_id=RUN_ID, step=step) == saved.sha256
    return folder


@pytest.fixture
def layout(tmp_path: Path) -> RunLayout:
    """A run with checkpoints of steps 10 and 20."""
    layout = RunLayout(tmp_path / "run")
    for step in (10, 20):
        save(layout, step)
    return layout


def find(layout: RunLayout, *dropped: int) -> tuple[Restorable | None, list[tuple[int, str]]]:
    """What is found, and the steps set aside with their reasons."""
    aside: list[tuple[int, str]] = []
    found = newest_restorable(
        layout,
        run_id=RUN_ID,
        dropped=set(dropped),
        quarantined=lambda step, place, reason: aside.append((step, reason)),
    )
    return found, aside


@pytest.mark.parametrize("umask", [0o022, 0o027])
@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16"])
def test_every_file_has_the_permissions_of_a_new_file(
    tmp_path: Path, umask: int, weights_dtype: str
) -> None:
    before = os.umask(umask)
    try:
        folder = save(RunLayout(tmp_path), 10, weights_dtype=weights_dtype)
    finally:
        os.umask(before)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def test_a_file_that_grows_too_large_is_a_failing_disk_not_a_traceback(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path / "run")
    save(layout, 10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 10, hard))
    try:
        with pytest.raises(StorageError) as caught:
            save(layout, 20, rows=4096)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.message == f"cannot write {layout.checkpoint(20)}: file too large"
    assert [entry.name for entry in layout.checkpoints.iterdir()] == ["step-00000010"]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("place", ["manifest.json", "model.safetensors", "optimizer.safetensors"])
def test_a_checkpoint_that_cannot_be_read_now_stays_where_it_is(
    layout: RunLayout, monkeypatch: pytest.MonkeyPatch, number: int, place: str
) -> None:
    really = Path.open

    def fail(path: Path, *arguments, **options):
        if path.name == place:
            raise OSError(number, os.strerror(number))
        return really(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        # Python 3.14 reads bytes without Path.open.
        patch.setattr(Path, "read_bytes", lambda path: fail(path, "rb").read())
        with pytest.raises(StorageError, match=rf"cannot read .*{place}"):
            find(layout)
    found, aside = find(layout)
    assert found is not None and (found.step, aside) == (20, [])


def test_a_folder_that_cannot_be_listed_now_stays_where_it_is(
    layout: RunLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = Path.iterdir

    def fail(path: Path):
        if path.name == "step-00000020":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return really(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", fail)
        with pytest.raises(StorageError, match=r"cannot read .*step-00000020"):
            find(layout)
    assert not layout.quarantine.exists()


def _rewrite_version(folder: Path, version: object) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(json_document(json.loads(manifest.read_text()) | {"v": version}))


def test_a_checkpoint_of_a_later_version_is_refused_and_stays(layout: RunLayout) -> None:
    folder = layout.checkpoint(20)
    for place in (folder, folder / "train_state"):
        _rewrite_version(place, 2)
    with pytest.raises(CheckpointError) as caught:
        find(layout)
    assert caught.value.message == (
        f"{folder / 'manifest.json'} has schema version 2, this program reads 1"
    )
    assert "a later one" in str(caught.value.hint)
    assert folder.is_dir() and not layout.quarantine.exists()


@pytest.mark.parametrize("version", [0, -1, None, "2", True, 2.5])
def test_any_other_version_is_damage(layout: RunLayout, version: object) -> None:
    folder = layout.checkpoint(20)
    for place in (folder, folder / "train_state"):
        _rewrite_version(place, version)
    found, aside = find(layout)
    assert found is not None and found.step == 10
    assert [step for step, _ in aside] == [20]


@pytest.mark.parametrize("place", ["manifest.json", "train_state/manifest.json"])
def test_a_flipped_bit_of_a_version_is_damage(layout: RunLayout, place: str) -> None:
    manifest = layout.checkpoint(20) / place
    manifest.write_bytes(manifest.read_bytes().replace(b'"v": 1', b'"v": 3', 1))
    found, aside = find(layout)
    assert found is not None and found.step == 10
    assert [step for step, _ in aside] == [20]


def _rewrite_manifest(folder: Path, **changes: object) -> None:
    manifest = folder / "manifest.json"
    write_json(manifest, json.loads(manifest.read_bytes()) | changes)


def _name_in_manifest(folder: Path, name: str) -> None:
    files = json.loads((folder / "manifest.json").read_bytes())["files"]
    _rewrite_manifest(folder, files=files | {name: {"bytes": 1, "sha256": "0" * 64}})


NO_PLAIN_NAMES = ["", ".", "..", "/etc/passwd", "../x", "a/b", "a\0b", "a\nb", "a\udc80", "\ud800"]


@pytest.mark.parametrize("place", ["", "train_state"])
@pytest.mark.parametrize("name", [*NO_PLAIN_NAMES, "x" * 256, "\xe9" * 128])
def test_a_manifest_that_names_anything_but_a_file_beside_it_is_damage(
    layout: RunLayout, place: str, name: str
) -> None:
    folder = layout.checkpoint(20) / place
    _name_in_manifest(folder, name)
    found, aside = find(layout)
    assert found is not None and found.step == 10
    told = f"{folder / 'manifest.json'} names a file outside its folder: {name!r}"
    assert aside == [(20, told)]


@pytest.mark.parametrize("name", ["x" * 255, "\xe9" * 127, "a b", "..."])
def test_any_plain_name_that_a_folder_can_hold_is_looked_for(layout: RunLayout, name: str) -> None:
    folder = layout.checkpoint(20)
    _name_in_manifest(folder, name)
    _, aside = find(layout)
    assert aside == [(20, f"{folder / name} is missing")]


def test_a_lone_surrogate_in_a_manifest_is_read_as_it_was_written(layout: RunLayout) -> None:
    folder = layout.checkpoint(20)
    _rewrite_manifest(folder, note="\ud800")
    found, aside = find(layout)
    assert found is not None and (found.step, aside) == (20, [])
    _rewrite_manifest(folder, run_id="\ud800")
    _, aside = find(layout)
    told = f"{folder / 'manifest.json'}: run_id is '\\ud800', expected '{RUN_ID}'"
    assert aside == [(20, told)]


@pytest.mark.parametrize("depth", [400, 900])
def test_a_manifest_that_is_too_deep_is_damage(layout: RunLayout, depth: int) -> None:
    manifest = layout.checkpoint(20) / "manifest.json"
    nested = "[" * depth + "]" * depth
    manifest.write_text(manifest.read_text().replace('"v": 1', f'"v": 1, "note": {nested}', 1))
    found, aside = find(layout)
    assert found is not None and found.step == 10
    assert [step for step, _ in aside] == [20]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_that_takes_no_locks_is_told_with_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    told = f"cannot lock {tmp_path / '.lock'}: {os.strerror(number).lower()}"
    with (
        pytest.raises(StorageError, match=re.escape(told)),
        exclusive_lock(tmp_path / ".lock", what="the run"),
    ):
        pass


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.rename(path.parents[3] / path.name)
    path.symlink_to(path.parents[3] / path.name)


FILES = [
    "manifest.json",
    "model.safetensors",
    "train_state/manifest.json",
    "train_state/state.json",
    "train_state/optimizer.safetensors",
]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("replace", "reason"), [(_pipe, "is not a regular file"), (_link, "is a symbolic link")]
)
def test_pipes_and_links_are_damage_and_nothing_waits_for_them(
    layout: RunLayout, name: str, replace: Callable[[Path], None], reason: str
) -> None:
    folder = layout.checkpoint(20)
    replace(folder / name)
    if "/" not in name:
        with pytest.raises(CheckpointError, match=reason):
            verify_model_files(folder)
    found, aside = find(layout)
    assert found is not None and found.step == 10
    assert aside[0][0] == 20 and aside[0][1].endswith(f"{name} {reason}")


def test_a_train_state_that_is_a_link_is_not_followed(layout: RunLayout, tmp_path: Path) -> None:
    states = layout.checkpoint(20) / "train_state"
    states.rename(tmp_path / "elsewhere")
    states.symlink_to(tmp_path / "elsewhere")
    found, aside = find(layout)
    assert found is not None and found.step == 10
    assert aside == [(20, f"{states} is not a folder")]


def test_a_missing_train_state_is_damage_unless_it_was_dropped(layout: RunLayout) -> None:
    shutil.rmtree(layout.checkpoint(20) / "train_state")
    found, aside = find(layout, 20)
    assert found is not None and (found.step, aside) == (10, [])
    _, aside = find(layout)
    assert aside == [(20, f"{layout.checkpoint(20) / 'train_state'} is missing")]


def test_a_checkpoint_fits_in_the_bytes_that_are_asked_for(tmp_path: Path) -> None:
    spare = needed_bytes(0, weights_dtype="float32")
    for weights_dtype, bytes_per_parameter in (("float32", 12), ("bfloat16", 14)):
        folder = save(RunLayout(tmp_path / weights_dtype), 10, weights_dtype=weights_dtype)
        taken = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        asked = needed_bytes(ROWS * 64, weights_dtype=weights_dtype)
        assert asked - spare == bytes_per_parameter * ROWS * 64 < taken < asked


def test_a_disk_that_cannot_hold_a_checkpoint_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = RunLayout(tmp_path / "run")
    refuse_if_full(layout, state_bytes=1)
    monkeypatch.setattr(store, "free_bytes", lambda path: 100 << 20)
    refuse_if_full(layout, state_bytes=100 << 20)
    with pytest.raises(StorageError) as caught:
        refuse_if_full(layout, state_bytes=101 << 20)
    expected = f"{layout.root}: a checkpoint needs 101 MiB, 100 MiB are free"
    assert caught.value.message == expected
    monkeypatch.setattr(store, "free_bytes", lambda path: 8 << 20)
    with pytest.raises(StorageError, match="a checkpoint needs 8 MiB, 8 MiB are free"):
        save(layout, 10)


def test_what_killed_writers_left_goes_and_the_rest_stays(layout: RunLayout) -> None:
    layout.manifest.write_text("{}")
    (layout.root / ".manifest.json.123.tmp").write_text("{")
    (layout.root / ".notes.tmp").write_text("mine")
    (layout.checkpoints / ".saving-step-00000030-9").mkdir()
    (layout.checkpoints / ".deleted-train_state-00000010").mkdir()
    remove_litter(layout)
    assert sorted(e.name for e in layout.root.iterdir()) == [
        ".notes.tmp",
        "checkpoints",
        "manifest.json",
    ]
    assert sorted(e.name for e in layout.checkpoints.iterdir()) == [
        "step-00000010",
        "step-00000020",
    ]


def test_a_dropped_train_state_is_on_record_before_it_goes(
    layout: RunLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = EventWriter(layout.events, segment=1)
    seen: list[str] = []
    forced, renamed = os.fsync, Path.rename

    def note_fsync(descriptor: int) -> None:
        seen.append("fsync " + Path(f"/proc/self/fd/{descriptor}").readlink().name)
        forced(descriptor)

    def note_rename(path: Path, target: Path) -> Path:
        seen.append(f"rename {path.name}")
        return renamed(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)

    def record(step: int) -> None:
        events.append_durably("train_state_dropped", step=step)

    assert (
        drop_old_train_states(layout, good_step=20, keep=2, every_steps=None, record=record) == []
    )
    assert drop_old_train_states(layout, good_step=20, keep=1, every_steps=None, record=record) == [
        10
    ]
    assert seen.index("fsync events.jsonl") < seen.index("rename train_state")
    assert [e["step"] for e in read_history(layout.events).events] == [10]
    assert not (layout.checkpoint(10) / "train_state").exists()
    found, aside = find(layout, 10)
    assert found is not None and (found.step, aside) == (20, [])


UNSAFE = re.compile(
    r"\b(import|from)\s+(_?pickle|dill|cloudpickle|joblib|shelve|marshal)\b"
    r"|\btorch\.(load|save|package)\b"
    r"|\btorch\.distributed\.checkpoint\b"
    r"|allow_pickle\s*=\s*(?!False)"
    r"|\b(np|numpy)\.load\((?!.*allow_pickle=False)"
)


def test_nothing_in_the_product_can_unpickle() -> None:
    """A checkpoint of a stranger must not be able to run code (docs/faults.md, row 27)."""
    files = sorted((Path(__file__).parents[2] / "src" / "milepost").rglob("*.py"))
    assert len(files) > 50
    found = [
        f"{file.name}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if UNSAFE.search(line) and not line.lstrip().startswith("#")
    ]
    assert found == []


def test_a_save_that_fails_leaves_the_checkpoint_it_was_to_replace(
    layout: RunLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(layout, 3)
    manifest = (folder / "manifest.json").read_bytes()

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr("milepost.core.files.fsync_file", fail)
        with pytest.raises(StorageError, match="input/output error"):
            save(layout, 3, rows=2 * ROWS)
    assert (folder / "manifest.json").read_bytes() == manifest
    verify_checkpoint(folder, run_id=RUN_ID, step=3)
    save(layout, 3, rows=2 * ROWS)
    assert not [entry for entry in layout.checkpoints.iterdir() if entry.name.startswith(".")]
