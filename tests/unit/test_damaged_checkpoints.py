"""Checkpoints being read: what is damage and set aside, and what is not and stays."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from milepost.checkpoint.store import verify_model_files
from milepost.core.errors import CheckpointError, StorageError
from milepost.runs.layout import RunLayout
from tests.damage import edit_manifest, replace_by_pipe
from tests.small_checkpoints import RUN_ID, find, make_checkpoints


@pytest.fixture
def layout(tmp_path: Path) -> RunLayout:
    """A run with checkpoints of steps 10 and 20."""
    return make_checkpoints(tmp_path / "run", 10, 20)


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


def test_a_checkpoint_of_a_later_version_is_refused_and_stays(layout: RunLayout) -> None:
    folder = layout.checkpoint(20)
    for place in (folder, folder / "train_state"):
        edit_manifest(place, v=2)
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
        edit_manifest(place, v=version)
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


def _name_in_manifest(folder: Path, name: str) -> None:
    files = json.loads((folder / "manifest.json").read_bytes())["files"]
    edit_manifest(folder, files=files | {name: {"bytes": 1, "sha256": "0" * 64}})


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
    edit_manifest(folder, note="\ud800")
    found, aside = find(layout)
    assert found is not None and (found.step, aside) == (20, [])
    edit_manifest(folder, run_id="\ud800")
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
    ("replace", "reason"),
    [(replace_by_pipe, "is not a regular file"), (_link, "is a symbolic link")],
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
