"""A model's weights as safetensors: one file, or several of a bounded size with their index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from milepost.checkpoint.tensor_files import write_tensors
from milepost.core.files import as_storage_error, storage_errors, system_error, write_json
from milepost.inference.model_files import INDEX_FILE, WEIGHTS_FILE


def write_weights(
    folder: Path,
    weights: dict[str, Tensor],
    *,
    dtype: torch.dtype,
    max_bytes: int,
    on_written: Callable[[int], None],
) -> None:
    """Writes the weights in the order given; only one file's are held in the new dtype at once.

    Args:
        folder: there already.
        weights: by parameter name.
        dtype: in the files.
        max_bytes: of one file's tensors. A tensor that is larger has a file of its own.
        on_written: called with the bytes written so far.

    Raises:
        StorageError: a file cannot be written.
    """
    sizes = {name: tensor.numel() * dtype.itemsize for name, tensor in weights.items()}
    shards = plan_shards(sizes, max_bytes=max_bytes)
    num_written = 0
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = folder / (several if len(shards) > 1 else WEIGHTS_FILE)
        write_file(file, {name: weights[name] for name in names}, dtype=dtype)
        weight_map |= dict.fromkeys(names, file.name)
        num_written += sum(sizes[name] for name in names)
        on_written(num_written)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / INDEX_FILE, index)


def plan_shards(sizes: dict[str, int], *, max_bytes: int) -> list[list[str]]:
    """Names in order, cut so that the sizes of a part add up to at most `max_bytes`.

    A name whose size is above it makes a part alone.
    """
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards


def write_file(path: Path, weights: dict[str, Tensor], *, dtype: torch.dtype) -> None:
    """Writes one safetensors file.

    Raises:
        StorageError: it cannot be written.
    """
    tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in weights.items()}
    try:
        with storage_errors(path):
            write_tensors(path, tensors, metadata={"format": "pt"})
    except SafetensorError as error:
        if failure := system_error(error):
            raise as_storage_error(failure, what=str(path)) from error
        raise
