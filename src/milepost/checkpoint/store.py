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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from milepost.checkpoint.state import TrainState, progress_from_plain
from milepost.core.errors import CheckpointError, StorageError
from milepost.core.files import (
    delete_folder,
    folder_bytes,
    free_bytes,
    is_disk_failure,
    json_document,
    publish_folder,
    read_json,
    sha256_of_file,
    storage_errors,
    write_json,
)
from milepost.runs.layout import RunLayout

SCHEMA_VERSION = 1
MODEL_FILE = "model.safetensors"
STATE_FOLDER = "train_state"
MANIFEST = "manifest.json"
SPARE_BYTES = 8 << 20
"""Room left for the event log when a save is judged to fit."""

_TEMPORARY = re.compile(r"^\.(saving|deleted)-")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
) -> SavedCheckpoint:
    """Writes one checkpoint; call on one rank only.

    Args:
        layout: the run folder.
        run_id: of the run's manifest; a checkpoint of another run is refused later.
        state: weights, moments and numbers.
        model_files: config, tokenizer and the like, by file name.
        weights_dtype: of the model file; with "bfloat16" the train state holds the masters.

    Raises:
        StorageError: it does not fit or cannot be written; nothing of it is left.
    """
    started = time.monotonic()
    step = state.progress.step
    final = layout.checkpoint(step)
    temporary = layout.checkpoints / f".saving-{final.name}-{os.getpid()}"
    _refuse_if_full(layout, state, weights_dtype=weights_dtype)
    try:
        with storage_errors(final):
            (temporary / STATE_FOLDER).mkdir(parents=True)
            _write_model(temporary, state, model_files=model_files, weights_dtype=weights_dtype)
            _write_train_state(temporary / STATE_FOLDER, state, weights_dtype=weights_dtype)
            identity = {"v": SCHEMA_VERSION, "run_id": run_id, "step": step}
            state_sha256 = _write_manifest(temporary / STATE_FOLDER, identity)
            sha256 = _write_manifest(
                temporary, identity | {"train_state_manifest_sha256": state_sha256}
            )
            if final.exists():
                # A save of the same step that was not recorded; this one replaces it.
                delete_folder(final, doomed=final.with_name(f".deleted-{final.name}"))
            publish_folder(temporary, final=final)
    except SafetensorError as error:
        if is_disk_failure(error):
            raise StorageError(
                f"cannot write {final}: no space left on device",
                hint="free some space and run the same command again; nothing saved is lost",
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return SavedCheckpoint(step, sha256, folder_bytes(final), time.monotonic() - started)


def _write_model(
    folder: Path, state: TrainState, *, model_files: dict[str, bytes], weights_dtype: str
) -> None:
    for name, content in model_files.items():
        (folder / name).write_bytes(content)
    dtype = _DTYPES[weights_dtype]
    weights = {name: t.to("cpu", dtype).contiguous() for name, t in state.weights.items()}
    save_file(weights, folder / MODEL_FILE, metadata={"format": "pt"})


def _write_train_state(folder: Path, state: TrainState, *, weights_dtype: str) -> None:
    moments = {name: t.cpu().contiguous() for name, t in state.moments.items()}
    save_file(moments, folder / "optimizer.safetensors")
    if weights_dtype != "float32":
        masters = {name: t.cpu().contiguous() for name, t in state.weights.items()}
        save_file(masters, folder / "masters.safetensors")
    numbers = {"progress": state.progress.as_plain(), "optimizer_step": state.optimizer_step}
    (folder / "state.json").write_text(json.dumps(numbers, indent=2) + "\n")


def _write_manifest(folder: Path, head: dict[str, Any]) -> str:
    """Writes sizes and hashes of the files beside it; returns the manifest's own hash."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    write_json(folder / MANIFEST, head | {"files": files})
    return sha256_of_file(folder / MANIFEST)


def checkpoint_bytes(state: TrainState, *, weights_dtype: str) -> int:
    """Bytes that saving this state takes, but for small files."""
    weights = sum(t.numel() for t in state.weights.values())
    moments = sum(t.numel() * t.element_size() for t in state.moments.values())
    return weights * (4 if weights_dtype == "float32" else 2 + 4) + moments


def _refuse_if_full(layout: RunLayout, state: TrainState, *, weights_dtype: str) -> None:
    needed = checkpoint_bytes(state, weights_dtype=weights_dtype) + SPARE_BYTES
    free = free_bytes(layout.root)
    if free < needed:
        raise StorageError(
            f"{layout.root}: a checkpoint needs {needed / 2**20:.0f} MiB, "
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
        CheckpointError: names the first file that is missing, extra or changed.
    """
    head = _verify_folder(folder, run_id=run_id, step=step, subfolders={STATE_FOLDER})
    states = folder / STATE_FOLDER
    if states.exists() or states.is_symlink():
        _verify_folder(states, run_id=run_id, step=step, subfolders=set())
        found = sha256_of_file(states / MANIFEST)
        if found != head.get("train_state_manifest_sha256"):
            raise CheckpointError(f"{states} does not belong to {folder / MANIFEST}")
    return sha256_of_file(folder / MANIFEST)


def verify_model_files(folder: Path) -> None:
    """Checks what loading the model needs: the files in the folder's own manifest.

    The train state and files that are not in the manifest are left alone, as a training
    process may be removing its train state at this moment.

    Raises:
        CheckpointError: names the first file that is missing or changed.
    """
    for name, facts in _read_manifest(folder, run_id=None, step=None)["files"].items():
        _verify_file(folder, name, facts)


def _verify_folder(
    folder: Path, *, run_id: str | None, step: int | None, subfolders: set[str]
) -> dict[str, Any]:
    head = _read_manifest(folder, run_id=run_id, step=step)
    files = head["files"]
    present = {entry.name for entry in folder.iterdir()} - {MANIFEST} - subfolders
    for name in sorted(present - set(files)):
        raise CheckpointError(f"{folder / name} is not in the manifest")
    for name, facts in files.items():
        _verify_file(folder, name, facts)
    return head


def _read_manifest(folder: Path, *, run_id: str | None, step: int | None) -> dict[str, Any]:
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    head = read_json(folder / MANIFEST, error=CheckpointError)
    if not isinstance(head, dict) or not isinstance(head.get("files"), dict):
        raise CheckpointError(f"{folder / MANIFEST} is not a checkpoint manifest")
    if (folder / MANIFEST).read_bytes() != json_document(head).encode():
        raise CheckpointError(f"{folder / MANIFEST} is not as it was written")
    if head.get("v") != SCHEMA_VERSION:
        raise CheckpointError(
            f"{folder / MANIFEST} has schema version {head.get('v')}, "
            f"this program reads {SCHEMA_VERSION}"
        )
    for name, expected in (("run_id", run_id), ("step", step)):
        if expected is not None and head.get(name) != expected:
            raise CheckpointError(
                f"{folder / MANIFEST}: {name} is {head.get(name)!r}, expected {expected!r}"
            )
    return head


def _verify_file(folder: Path, name: str, facts: Any) -> None:
    path = folder / name
    if Path(name).name != name or name in (".", ".."):
        raise CheckpointError(f"{folder / MANIFEST} names a file outside its folder: {name!r}")
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if not isinstance(facts, dict) or path.stat().st_size != facts.get("bytes"):
        raise CheckpointError(
            f"{path} has {path.stat().st_size} bytes, its manifest says otherwise"
        )
    if sha256_of_file(path) != facts.get("sha256"):
        raise CheckpointError(f"{path} has changed: its SHA-256 is not the manifest's")


def load_train_state(folder: Path) -> TrainState:
    """Reads a verified checkpoint with its train state, all tensors on the CPU.

    Raises:
        CheckpointError: a file is not what it should be.
    """
    states = folder / STATE_FOLDER
    numbers = read_json(states / "state.json", error=CheckpointError)
    masters = states / "masters.safetensors"
    try:
        return TrainState(
            progress=progress_from_plain(numbers["progress"], where=str(states / "state.json")),
            weights=_read_tensors(masters if masters.exists() else folder / MODEL_FILE),
            moments=_read_tensors(states / "optimizer.safetensors"),
            optimizer_step=int(numbers["optimizer_step"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{states / 'state.json'} lacks {error}") from error


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def remove_litter(layout: RunLayout) -> None:
    """Deletes what killed saves and deletions left; call only while holding the run's lock."""
    if not layout.checkpoints.is_dir():
        return
    for folder in [layout.checkpoints, *layout.checkpoints.glob("step-*")]:
        if folder.is_symlink() or not folder.is_dir():
            continue
        for entry in folder.iterdir():
            if _TEMPORARY.match(entry.name) and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
