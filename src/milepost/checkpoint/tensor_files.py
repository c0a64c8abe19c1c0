"""Files of a checkpoint: written so that a write which fell short is seen, and read back."""

from __future__ import annotations

import stat
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from milepost.core.errors import CheckpointError, StorageError
from milepost.core.files import storage_errors


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], *, metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file with the permissions of any new file; on its own it is 0600."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            is_same = set(file.keys()) == set(tensors) and all(
                torch.equal(_bits(file.get_tensor(name)), _bits(tensor))
                for name, tensor in tensors.items()
            )
    except SafetensorError:
        is_same = False
    _refuse_unless(is_same, path)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a small file and reads it back.

    Raises:
        StorageError: it does not hold what was written.
    """
    path.write_bytes(content)
    _refuse_unless(path.read_bytes() == content, path)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _refuse_unless(is_same: bool, path: Path) -> None:
    """A write that fell short without an error must not get a hash that vouches for it."""
    if not is_same:
        raise StorageError(
            f"cannot write {path}: reading it back gives something else",
            hint="check the disk, then run the same command again; nothing saved is lost",
        )


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: it is missing or damaged.
        StorageError: it cannot be read.
    """
    try:
        with (
            storage_errors(path, verb="read"),
            safe_open(path, framework="pt", device="cpu") as file,
        ):
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
