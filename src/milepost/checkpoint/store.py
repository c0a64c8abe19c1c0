"""Checkpoints on disk: written whole or not at all, verified before they are used.

A checkpoint folder is a Hugging Face model folder with `train_state/` in it. Each of the two
has a manifest with sizes and hashes that is written last; the folder gets its name by a rename.
Safetensors and JSON only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from milepost.checkpoint.state import TrainState, progress_from_plain
from milepost.checkpoint.tensor_files import read_tensors, write_bytes, write_tensors
from milepost.core.errors import CheckpointError, StorageError
from milepost.core.files import (
    as_storage_error,
    as_utf8,
    folder_bytes,
    free_bytes,
    json_document,
    plain_file,
    publish_folder,
    read_json,
    remove_unfinished,
    sha256_of_file,
    storage_errors,
    system_error,
    write_json,
)
from milepost.planner.disk import checkpoint_bytes
from milepost.runs.layout import RunLayout

SCHEMA_VERSION = 1
MODEL_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
"""PEFT's name for the weights of an adapter; a checkpoint holds the one or the other."""

STATE_FOLDER = "train_state"
MANIFEST = "manifest.json"
SPARE_BYTES = 4 << 20
"""Room for the event log and the file system's own when a save is judged to fit."""

_VERSION_HINT = "use the version of Milepost that wrote it, or a later one"
_TEMPORARY = re.compile(r"^\.(saving|deleted)-")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LaterVersionError(CheckpointError):
    """A later version of Milepost wrote the checkpoint: not damage, and not ours to move."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """What a save wrote; `sha256` identifies the model part."""

    step: int
    sha256: str
    num_bytes: int
    seconds: float


def save_checkpoint(
    layout: RunLayout,
    *,
    run_id: str,
    state: TrainState,
    model_files: dict[str, bytes],
    weights_dtype: str,
    weights_file: str = MODEL_FILE,
) -> SavedCheckpoint:
    """Writes one checkpoint; call on one rank only.

    Args:
        layout: the run folder.
        run_id: of the run's manifest; a checkpoint of another run is refused later.
        state: weights, moments and numbers.
        model_files: config, tokenizer and the like, by file name.
        weights_dtype: of the model file; with "bfloat16" the train state holds the masters.
        weights_file: `MODEL_FILE`, or `ADAPTER_FILE` where an adapter is what is trained.

    Raises:
        StorageError: it does not fit or cannot be written; nothing of it is left.
    """
    started = time.monotonic()
    step = state.progress.step
    final = layout.checkpoint(step)
    temporary = layout.checkpoints / f".saving-{final.name}-{os.getpid()}"
    num_parameters = sum(tensor.numel() for tensor in state.weights.values())
    refuse_if_full(layout, state_bytes=needed_bytes(num_parameters, weights_dtype=weights_dtype))
    try:
        with storage_errors(final):
            (temporary / STATE_FOLDER).mkdir(parents=True)
            _write_files(temporary, model_files)
            _write_weights(temporary / weights_file, state, weights_dtype=weights_dtype)
            _write_train_state(temporary / STATE_FOLDER, state, weights_dtype=weights_dtype)
            identity = {"v": SCHEMA_VERSION, "run_id": run_id, "step": step}
            state_sha256 = _write_manifest(temporary / STATE_FOLDER, identity)
            sha256 = _write_manifest(
                temporary, identity | {"train_state_manifest_sha256": state_sha256}
            )
            # A step that is trained again after damage may have a checkpoint already.
            publish_folder(temporary, final=final, doomed=final.with_name(f".deleted-{final.name}"))
            num_bytes = folder_bytes(final)
    except SafetensorError as error:
        if failure := system_error(error):
            raise as_storage_error(failure, what=str(final)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return SavedCheckpoint(step, sha256, num_bytes, time.monotonic() - started)


def _write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        write_bytes(folder / name, content)


def _write_weights(path: Path, state: TrainState, *, weights_dtype: str) -> None:
    dtype = _DTYPES[weights_dtype]
    weights = {name: t.to("cpu", dtype).contiguous() for name, t in state.weights.items()}
    write_tensors(path, weights, metadata={"format": "pt"})


def _write_train_state(folder: Path, state: TrainState, *, weights_dtype: str) -> None:
    moments = {name: t.cpu().contiguous() for name, t in state.moments.items()}
    write_tensors(folder / "optimizer.safetensors", moments)
    if weights_dtype != "float32":
        masters = {name: t.cpu().contiguous() for name, t in state.weights.items()}
        write_tensors(folder / "masters.safetensors", masters)
    numbers = {"progress": state.progress.as_plain(), "optimizer_step": state.optimizer_step}
    write_bytes(folder / "state.json", (json.dumps(numbers, indent=2) + "\n").encode())


def _write_manifest(folder: Path, head: dict[str, Any]) -> str:
    """Writes sizes and hashes of the files beside it; returns the manifest's own hash."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    write_json(folder / MANIFEST, head | {"files": files})
    return sha256_of_file(folder / MANIFEST)


def needed_bytes(num_parameters: int, *, weights_dtype: str) -> int:
    """Bytes that must be free for one checkpoint, some to spare among them.

    Args:
        num_parameters: of the model.
        weights_dtype: of the model file.
    """
    planned = checkpoint_bytes(num_parameters, weights_dtype=weights_dtype)
    return planned.weights_bytes + planned.train_state_bytes + SPARE_BYTES


def refuse_if_full(layout: RunLayout, *, state_bytes: int) -> None:
    """Refuses what the disk cannot hold, before time is spent on it.

    Args:
        layout: the run folder.
        state_bytes: of one checkpoint, from `needed_bytes`.

    Raises:
        StorageError: fewer bytes are free; both numbers are said.
    """
    free = free_bytes(layout.root)
    if free < state_bytes:
        raise StorageError(
            f"{layout.root}: a checkpoint needs {state_bytes / 2**20:.0f} MiB, "
            f"{free / 2**20:.0f} MiB are free",
            hint="free some space and run the same command again; nothing saved is lost",
        )


def verify_checkpoint(folder: Path, *, run_id: str | None, step: int | None) -> str:
    """Checks every file of a checkpoint against its manifests; returns the model's hash.

    A train state that is absent is not checked: whether it was dropped, the history says.

    Args:
        folder: the checkpoint.
        run_id: the run it must belong to; None for any.
        step: the step it must be of; None for any.

    Raises:
        LaterVersionError: it is of a schema version that this program cannot read.
        CheckpointError: names the first file that is missing, extra or changed.
        StorageError: a file cannot be read, which says nothing of what it holds.
    """
    _refuse_later_version(folder)
    head = _verify_folder(folder, run_id=run_id, step=step, subfolders={STATE_FOLDER})
    states = folder / STATE_FOLDER
    if states.exists() or states.is_symlink():
        _verify_folder(states, run_id=run_id, step=step, subfolders=set())
        found = _sha256(states / MANIFEST)
        if found != head.get("train_state_manifest_sha256"):
            raise CheckpointError(f"{states} does not belong to {folder / MANIFEST}")
    return _sha256(folder / MANIFEST)


def verify_model_files(folder: Path) -> None:
    """Checks what loading the model needs: the files in the folder's own manifest.

    The train state and files that are not in the manifest are left alone, as a training
    process may be removing its train state at this moment.

    Raises:
        CheckpointError: names the first file that is missing or changed.
        StorageError: a file cannot be read.
    """
    for name, facts in read_checkpoint_manifest(folder, run_id=None, step=None)["files"].items():
        verify_file(folder, name, facts)


def _verify_folder(
    folder: Path, *, run_id: str | None, step: int | None, subfolders: set[str]
) -> dict[str, Any]:
    head = read_checkpoint_manifest(folder, run_id=run_id, step=step)
    files = head["files"]
    with storage_errors(folder, verb="read"):
        present = {entry.name for entry in folder.iterdir()} - {MANIFEST} - subfolders
    for name in sorted(present - set(files)):
        raise CheckpointError(f"{folder / name} is not in the manifest")
    for name, facts in files.items():
        verify_file(folder, name, facts)
    return head


def read_checkpoint_manifest(
    folder: Path, *, run_id: str | None, step: int | None
) -> dict[str, Any]:
    """The manifest of a checkpoint or of its train state, read whole and as it was written.

    Raises:
        CheckpointError: it is missing, damaged, of another run or step, or names files elsewhere.
        StorageError: it cannot be read.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    manifest = plain_file(folder / MANIFEST, error=CheckpointError)
    head = read_json(manifest, error=CheckpointError)
    if not isinstance(head, dict) or not isinstance(head.get("files"), dict):
        raise CheckpointError(f"{folder / MANIFEST} is not a checkpoint manifest")
    if head.get("v") != SCHEMA_VERSION:
        raise CheckpointError(_version_message(folder, head.get("v")), hint=_VERSION_HINT)
    try:
        with storage_errors(manifest, verb="read"):
            is_as_written = manifest.read_bytes() == as_utf8(json_document(head))
    except RecursionError:  # the reader goes deeper than the writer
        is_as_written = False
    if not is_as_written:
        raise CheckpointError(f"{manifest} is not as it was written")
    for name, expected in (("run_id", run_id), ("step", step)):
        if expected is not None and (found := head.get(name)) != expected:
            raise CheckpointError(f"{manifest}: {name} is {found!r}, expected {expected!r}")
    if wrong := [name for name in head["files"] if not _is_plain_name(name)]:
        raise CheckpointError(f"{manifest} names a file outside its folder: {wrong[0]!r}")
    return head


def _is_plain_name(name: str) -> bool:
    """Whether it names a file in one folder, at most NAME_MAX bytes long (linux/limits.h)."""
    is_one_name = name not in ("", ".", "..") and "/" not in name
    return is_one_name and name.isprintable() and len(name.encode()) <= 255


def _refuse_later_version(folder: Path) -> None:
    """Raises where both manifests are of a later version; a flipped bit changes only one."""
    version = _later_version(folder)
    if version is not None and version == _later_version(folder / STATE_FOLDER):
        raise LaterVersionError(_version_message(folder, version), hint=_VERSION_HINT)


def _later_version(folder: Path) -> int | None:
    if folder.is_symlink():
        return None
    try:
        manifest = plain_file(folder / MANIFEST, error=CheckpointError)
        head = read_json(manifest, error=CheckpointError)
    except CheckpointError:
        return None
    version = head.get("v") if isinstance(head, dict) else None
    is_later = type(version) is int and version > SCHEMA_VERSION
    return version if is_later else None


def _version_message(folder: Path, version: Any) -> str:
    return f"{folder / MANIFEST} has schema version {version}, this program reads {SCHEMA_VERSION}"


def verify_file(folder: Path, name: str, facts: Any) -> None:
    """Holds one file of a checkpoint to what `read_checkpoint_manifest` gave for it.

    Raises:
        CheckpointError: it is missing, no plain file or changed.
        StorageError: it cannot be read.
    """
    path = plain_file(folder / name, error=CheckpointError)
    with storage_errors(path, verb="read"):
        num_bytes = path.stat().st_size
    if not isinstance(facts, dict) or num_bytes != facts.get("bytes"):
        raise CheckpointError(f"{path} has {num_bytes} bytes, its manifest says otherwise")
    if _sha256(path) != facts.get("sha256"):
        raise CheckpointError(f"{path} has changed: its SHA-256 is not the manifest's")


def _sha256(path: Path) -> str:
    with storage_errors(path, verb="read"):
        return sha256_of_file(path)


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a verified checkpoint, the float32 masters where it has them, on the CPU.

    Raises:
        CheckpointError: the file is not what it should be.
        StorageError: it cannot be read.
    """
    places = (folder / STATE_FOLDER / "masters.safetensors", folder / ADAPTER_FILE)
    return read_tensors(next((place for place in places if place.exists()), folder / MODEL_FILE))


def load_train_state(folder: Path) -> TrainState:
    """Reads a verified checkpoint with its train state, all tensors on the CPU.

    Raises:
        CheckpointError: a file is not what it should be.
        StorageError: a file cannot be read.
    """
    states = folder / STATE_FOLDER
    place = states / "state.json"
    numbers = read_json(place, error=CheckpointError)
    step = read_json(states / MANIFEST, error=CheckpointError)["step"]
    try:
        progress = progress_from_plain(numbers["progress"], where=str(place))
        if progress.step != step:
            raise CheckpointError(f"{place} is of step {progress.step}, its manifest of {step}")
        return TrainState(
            progress=progress,
            weights=load_weights(folder),
            moments=read_tensors(states / "optimizer.safetensors"),
            optimizer_step=int(numbers["optimizer_step"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{place} is not a train state: {error!r}") from error


def remove_litter(layout: RunLayout) -> None:
    """Deletes what killed saves and deletions left; call only while holding the run's lock."""
    remove_unfinished(layout.manifest)
    if not layout.checkpoints.is_dir():
        return
    for folder in [layout.checkpoints, *layout.checkpoints.glob("step-*")]:
        if folder.is_symlink() or not folder.is_dir():
            continue
        for entry in folder.iterdir():
            if _TEMPORARY.match(entry.name) and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
