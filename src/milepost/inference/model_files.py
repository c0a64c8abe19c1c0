"""The files of a model folder: what they say, the weights in them. Never a pickle.

Which folder a person means, and what adapter goes on it, `load` knows.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from milepost.config.schema import ModelSection
from milepost.core.errors import CheckpointError, UsageError
from milepost.core.files import plain_file, read_json
from milepost.model.huggingface import model_section_from_hf
from milepost.model.llama import Llama

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"

MOST_JSON_BYTES = 64 << 20
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FLOAT_DTYPES = ("F32", "BF16", "F16", "F64")
_DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def read_weights(folder: Path, *, config: ModelSection) -> Llama:
    """A model with the weights of a folder, as float32 on the CPU.

    Names and shapes are checked before anything is allocated.

    Raises:
        CheckpointError: a file is missing, damaged or not a plain file; a tensor is missing,
            unknown, or has another shape or type than it should.
    """
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Llama(config).named_parameters()}
    with ExitStack() as stack:
        places: dict[str, tuple[Path, Any]] = {}
        for file in weight_files(folder):
            reader = open_tensors(file, stack)
            places |= dict.fromkeys(reader.keys(), (file, reader))
        _check_names(set(places), set(shapes), config=config, folder=folder)
        for name, shape in shapes.items():
            _check_tensor(name, shape, *places[name])
        model = Llama(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(read_tensor(name, *places[name]))
    return model


def read_config(folder: Path) -> ModelSection:
    """The architecture of a model folder.

    Raises:
        UsageError: it is not a LLaMA that can be read.
        CheckpointError: config.json is missing or damaged.
    """
    values = read_bounded_json(folder / CONFIG_FILE)
    try:
        return model_section_from_hf(values)
    except UsageError as error:
        raise UsageError(f"{folder}: {error.message}", hint=error.hint) from error


def dtype_of_weights(folder: Path) -> str:
    """ "float32", "bfloat16" or "float16": what config.json says, or else the first tensor's type.

    That is what transformers takes for "auto". Types that cannot be computed with are float32.
    """
    values = read_bounded_json(folder / CONFIG_FILE)
    named = values.get("dtype") or values.get("torch_dtype")
    if not isinstance(named, str):
        named = _DTYPE_NAMES.get(_first_type(folder), "")
    return named if named in _DTYPE_NAMES.values() else "float32"


def _first_type(folder: Path) -> str:
    with ExitStack() as stack:
        for file in weight_files(folder):
            reader = open_tensors(file, stack)
            for name in sorted(reader.keys()):
                return str(reader.get_slice(name).get_dtype())
    return ""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises:
        CheckpointError: there are none, or one is not a plain file in the folder.
    """
    if (folder / WEIGHTS_FILE).exists() or (folder / WEIGHTS_FILE).is_symlink():
        return [plain_file(folder / WEIGHTS_FILE, error=CheckpointError)]
    if (folder / INDEX_FILE).exists():
        index = read_bounded_json(folder / INDEX_FILE)
        names = index.get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map of file names")
        return [_shard(folder, name) for name in sorted(set(names.values()))]
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{folder} holds its weights as {pickles[0]}, a pickle, which can run code when read",
            hint="convert it to model.safetensors with the program that made it",
        )
    raise CheckpointError(f"{folder / WEIGHTS_FILE} is missing")


def _shard(folder: Path, name: str) -> Path:
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise CheckpointError(
            f"{folder / INDEX_FILE} names {name!r}, only .safetensors files beside it are read"
        )
    return plain_file(folder / name, error=CheckpointError)


def read_bounded_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that a stranger may have written.

    Raises:
        CheckpointError: it is missing, too large, not a plain file or not a JSON object.
    """
    size = plain_file(path, error=CheckpointError).stat().st_size
    if size > MOST_JSON_BYTES:
        raise CheckpointError(f"{path} has {size} bytes, at most {MOST_JSON_BYTES} are read")
    values = read_json(path, error=CheckpointError)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return values


def open_tensors(file: Path, stack: ExitStack) -> Any:
    """A reader of a safetensors file, closed with the stack.

    Raises:
        CheckpointError: it is damaged or something else.
    """
    try:
        return stack.enter_context(safe_open(str(file), framework="pt", device="cpu"))
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error


def _check_names(found: set[str], wanted: set[str], *, config: ModelSection, folder: Path) -> None:
    # A tied model may come with a copy of its head; old files hold the rotary frequencies.
    harmless = {"lm_head.weight"} if config.tie_word_embeddings else set()
    unknown = {n for n in found - wanted - harmless if not n.endswith("rotary_emb.inv_freq")}
    for names, what in ((wanted - found, "lacks"), (unknown, "has the unknown tensor")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"{folder} {what} {min(names)}{more}",
                hint="config.json and the weights belong to different models",
            )


def _check_tensor(name: str, shape: tuple[int, ...], file: Path, reader: Any) -> None:
    part = reader.get_slice(name)
    found = tuple(part.get_shape())
    if found != shape:
        raise CheckpointError(
            f"{file}: {name} has shape {list(found)}, config.json says {list(shape)}",
            hint="config.json and the weights belong to different models",
        )
    if part.get_dtype() not in _FLOAT_DTYPES:
        raise CheckpointError(
            f"{file}: {name} has type {part.get_dtype()}",
            hint=f"types that can be read: {', '.join(_FLOAT_DTYPES)}",
        )


def read_tensor(name: str, file: Path, reader: Any) -> Any:
    """One tensor of a file from `open_tensors`.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return reader.get_tensor(name)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{file}: {name} cannot be read: {error}") from error
