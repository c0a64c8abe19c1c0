"""Loads a model from a run, a checkpoint or any Hugging Face LLaMA folder. Never a pickle."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from milepost.checkpoint.store import MANIFEST, verify_model_files
from milepost.config.schema import ModelSection
from milepost.core.errors import CheckpointError, UsageError
from milepost.core.files import (
    plain_file,
    read_json,
    sha256_of_file,
    sha256_of_json,
    storage_errors,
)
from milepost.model.huggingface import model_section_from_hf
from milepost.model.llama import Llama
from milepost.model.lora import merge_lora
from milepost.runs.layout import RunLayout, step_of_folder
from milepost.runs.steps import available_steps, describe_steps, is_run
from milepost.text.tokenizer import Tokenizer, load_tokenizer

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"

MOST_JSON_BYTES = 64 << 20
_FLOAT_DTYPES = ("F32", "BF16", "F16", "F64")
_DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_FILES_THAT_COUNT = (
    CONFIG_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to use.

    Attributes:
        model: float32 weights on the device asked for.
        tokenizer: from the same folder.
        step: updates the model had seen; None where the folder's name does not say.
        folder: where it was read.
    """

    model: Llama
    tokenizer: Tokenizer
    step: int | None
    folder: Path


def load_model(
    path: Path, *, step: int | None = None, device: torch.device | str = "cpu"
) -> LoadedModel:
    """Loads a model with its tokenizer.

    Args:
        path: a run folder, a checkpoint folder, or a folder with a LLaMA's config.json,
            tokenizer.json and model.safetensors (or its shards with their index).
        step: of a run, which checkpoint; None: the latest.
        device: where the weights go.

    Raises:
        UsageError: there is no model at `path`, or one of another architecture.
        CheckpointError: no checkpoint of that step; a file is missing, or has changed since the
            checkpoint was saved; a tensor is missing or has another shape than config.json says.
    """
    folder = model_folder(path, step=step)
    if step_of_folder(folder) is not None:
        verify_model_files(folder)  # a flipped bit would load silently
    return read_model(folder, device=device)


def read_model(folder: Path, *, device: torch.device | str = "cpu") -> LoadedModel:
    """As `load_model`, from a folder whose files were verified or have no manifest.

    An adapter is added into the weights of its base, which is looked for where the adapter says.
    """
    config = read_config(folder)
    for file in folder.glob("*.json"):
        plain_file(file, error=CheckpointError)
    tokenizer = load_tokenizer(str(folder))
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, "
            f"the model's vocabulary {config.vocab_size}",
            hint="the tokenizer's files belong to another model",
        )
    base = base_of_adapter(folder)
    if base is None:
        model = read_weights(folder, config=config)
    else:
        # That module is built on this one.
        from milepost.inference.adapter_files import load_lora

        if has_manifest(base):
            verify_model_files(base)
        model = read_weights(base, config=config)
        load_lora(model, folder)
        merge_lora(model)
    model = model.to(device)
    return LoadedModel(model, tokenizer, step_of_folder(folder), folder)


def model_folder(path: Path, *, step: int | None = None) -> Path:
    """The Hugging Face folder that `path` and `step` mean; see `load_model`."""
    if not path.is_dir():
        raise UsageError(
            f"{path} is not a folder", hint="give a run, a checkpoint or a Hugging Face folder"
        )
    if is_run(path):
        return _checkpoint_of_run(RunLayout(path), step)
    if not any((path / name).exists() for name in (CONFIG_FILE, ADAPTER_CONFIG_FILE)):
        raise UsageError(
            f"{path} is neither a run nor a model: it has no manifest.json and no config.json",
            hint="give a run, a checkpoint or a Hugging Face folder",
        )
    if step is not None and step != step_of_folder(path):
        raise UsageError(
            f"{path} is one model, it has no step {step}", hint="give the run folder with a step"
        )
    return path


def base_of_adapter(folder: Path) -> Path | None:
    """The folder of the model that an adapter was trained on; None where `folder` is a model.

    Raises:
        CheckpointError: there is no such folder any more, or the adapter does not name one.
    """
    if not (folder / ADAPTER_CONFIG_FILE).exists():
        return None
    name = read_bounded_json(folder / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
    base = Path(name) if isinstance(name, str) else None
    if base is None or not (base / CONFIG_FILE).exists():
        raise CheckpointError(
            f"{folder} is an adapter, and its base is not where it says: {name!r}",
            hint=f"put the base back, or name where it lies in {ADAPTER_CONFIG_FILE}; "
            "its hash is looked at",
        )
    return base


def _checkpoint_of_run(layout: RunLayout, step: int | None) -> Path:
    available = available_steps(layout)
    if not available:
        raise CheckpointError(
            f"{layout.root} has no checkpoint yet", hint="let it train up to its first checkpoint"
        )
    if step is None:
        return layout.checkpoint(available[-1])
    if step not in available:
        raise CheckpointError(
            f"{layout.root} has no checkpoint of step {step}", hint=describe_steps(available)
        )
    return layout.checkpoint(step)


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
    folder = base_of_adapter(folder) or folder
    values = read_bounded_json(folder / CONFIG_FILE)
    try:
        return model_section_from_hf(values)
    except UsageError as error:
        raise UsageError(f"{folder}: {error.message}", hint=error.hint) from error


def identify(folder: Path) -> str:
    """The hash that names a model: of its checkpoint's manifest, or else of its files.

    The manifest of a checkpoint holds the hashes of its files; whether they are still true,
    `verify_model_files` says.

    Raises:
        CheckpointError: a file is missing or not a plain file.
        StorageError: a file cannot be read.
    """
    if has_manifest(folder):
        return _sha256(plain_file(folder / MANIFEST, error=CheckpointError))
    base = base_of_adapter(folder)
    if base is not None:
        own = sorted(folder.glob("adapter_*"))
        hashes = {f.name: _sha256(plain_file(f, error=CheckpointError)) for f in own}
        return sha256_of_json(hashes | {"base": identify(base)})
    present = [folder / name for name in _FILES_THAT_COUNT if (folder / name).exists()]
    files = [*present, *weight_files(folder)]
    return sha256_of_json(
        {file.name: _sha256(plain_file(file, error=CheckpointError)) for file in files}
    )


def has_manifest(folder: Path) -> bool:
    """Whether a model folder says itself what its files must be, as a checkpoint does."""
    return (folder / MANIFEST).exists() or step_of_folder(folder) is not None


def _sha256(file: Path) -> str:
    with storage_errors(file, verb="read"):
        return sha256_of_file(file)


def dtype_of_weights(folder: Path) -> str:
    """ "float32", "bfloat16" or "float16": what config.json says, or else the first tensor's type.

    That is what transformers takes for "auto". Types that cannot be computed with are float32.
    """
    folder = base_of_adapter(folder) or folder
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
