"""Checkpoints being written: who may read them, when room is short, what killed writers left."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

from milepost.checkpoint import store
from milepost.checkpoint.store import (
    needed_bytes,
    refuse_if_full,
    remove_litter,
    verify_checkpoint,
)
from milepost.core.errors import StorageError
from milepost.runs.layout import RunLayout
from tests.small_checkpoints import ROWS, RUN_ID, make_checkpoints, save


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


def test_a_save_that_fails_leaves_the_checkpoint_it_was_to_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = RunLayout(tmp_path / "run")
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


def test_what_killed_writers_left_goes_and_the_rest_stays(tmp_path: Path) -> None:
    layout = make_checkpoints(tmp_path / "run", 10, 20)
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
