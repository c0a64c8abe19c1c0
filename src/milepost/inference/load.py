"""Finds and loads what a person means by MODEL and --adapter. Never a pickle.

MODEL is a run, a checkpoint, any Hugging Face LLaMA folder, or an adapter, whose base is then
looked for where the adapter says. This is the one place that knows; all verbs come here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from milepost.checkpoint.store import ADAPTER_FILE, MANIFEST, verify_model_files
from milepost.core.errors import CheckpointError, UsageError
from milepost.core.files import plain_file, sha256_of_file, sha256_of_json, storage_errors
from milepost.inference.adapter_files import is_adapter, load_lora
from milepost.inference.model_files import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    read_bounded_json,
    read_config,
    read_weights,
    weight_files,
)
from milepost.model.llama import Llama
from milepost.model.lora import merge_lora
from milepost.runs.layout import RunLayout, step_of_folder
from milepost.runs.steps import available_steps, describe_steps, is_run, parse_steps
from milepost.text.tokenizer import Tokenizer, load_tokenizer

_FILES_THAT_COUNT = (
    CONFIG_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


@dataclass(frozen=True)
class FoundModel:
    """Where a model lies; nothing of it is read yet.

    Attributes:
        base: folder of its config, tokenizer and weights.
        adapter: folder of the adapter that goes on them; None: there is none.
    """

    base: Path
    adapter: Path | None = None

    @property
    def folder(self) -> Path:
        """The folder that names the model: of what was trained last."""
        return self.base if self.adapter is None else self.adapter

    @property
    def step(self) -> int | None:
        """Updates of the last training; None where the folder's name does not say."""
        return step_of_folder(self.folder)


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to use.

    Attributes:
        model: float32 weights on the device asked for.
        tokenizer: of the weights' folder.
        step: as `FoundModel.step`.
        folder: as `FoundModel.folder`.
    """

    model: Llama
    tokenizer: Tokenizer
    step: int | None
    folder: Path


def find_model(path: Path, *, step: int | None = None, adapter: Path | None = None) -> FoundModel:
    """The model that a person means.

    Args:
        path: a run, a checkpoint, a folder with a LLaMA's config.json, tokenizer.json and
            model.safetensors (or its shards with their index); or an adapter, or a run of them.
        step: which checkpoint of a run: of `adapter` where that is one, else of `path`; None:
            the latest.
        adapter: a run of fine-tuning, one of its checkpoints or PEFT's folder, put on the model of
            `path`; None: what `path` itself holds.

    Raises:
        UsageError: there is no model or no adapter, or there are two adapters.
        CheckpointError: no checkpoint of that step, or an adapter's base is not where it says.
    """
    if adapter is None:
        folder = model_folder(path, step=step)
        return FoundModel(_base_of(folder), folder) if is_adapter(folder) else FoundModel(folder)
    of_adapter = is_run(adapter)
    base = model_folder(path, step=None if of_adapter else step)
    if is_adapter(base):
        raise UsageError(
            f"{base} is an adapter itself", hint="give its base as the model, or no --adapter"
        )
    folder = model_folder(adapter, step=step) if of_adapter else adapter
    if not is_adapter(folder):
        what = f"has no {ADAPTER_CONFIG_FILE}" if folder.is_dir() else "is not a folder"
        raise UsageError(
            f"there is no adapter in {folder}: it {what}",
            hint="give a run of `milepost finetune`, one of its checkpoints, or PEFT's folder",
        )
    return FoundModel(base, folder)


def find_models(path: Path, *, steps: str | None, adapter: Path | None = None) -> list[FoundModel]:
    """As `find_model`, of several checkpoints, ascending by step.

    Args:
        path: as `find_model` takes it.
        steps: see `parse_steps`; None: the latest.
        adapter: as `find_model` takes it.

    Raises:
        UsageError: as `find_model`, or steps are asked of what is no run.
        CheckpointError: as `find_model`.
    """
    if steps is None:
        return [find_model(path, adapter=adapter)]
    run = stepped(path, adapter=adapter)
    if not is_run(run):
        raise UsageError(f"--steps needs a run, {run} is not one", hint="leave --steps out")
    wanted = parse_steps(steps, layout=RunLayout(run))
    return [find_model(path, step=step, adapter=adapter) for step in wanted]


def stepped(path: Path, *, adapter: Path | None) -> Path:
    """Which of a model and its adapter a step selects a checkpoint of."""
    return path if adapter is None or not is_run(adapter) else adapter


def model_folder(path: Path, *, step: int | None = None) -> Path:
    """The folder that `path` and `step` mean, of a model or of an adapter; see `find_model`."""
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


def _base_of(adapter: Path) -> Path:
    """The folder of the model that an adapter was trained on.

    Raises:
        CheckpointError: it is not where the adapter says, or is no model.
    """
    name = read_bounded_json(adapter / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
    base = Path(name) if isinstance(name, str) else None
    if base is not None and base.is_dir() and is_run(base):
        base = model_folder(base)
    if base is None or not (base / CONFIG_FILE).exists():
        where = "does not name its base" if base is None else f"its base is not at {base}"
        raise CheckpointError(
            f"{adapter} is an adapter, and {where}",
            hint=f"give the folder of its base as the model, with --adapter {adapter}, or name it "
            f"in {ADAPTER_CONFIG_FILE} (base_model_name_or_path)",
        )
    return base


def load_model(
    path: Path,
    *,
    step: int | None = None,
    adapter: Path | None = None,
    device: torch.device | str = "cpu",
) -> LoadedModel:
    """Finds, verifies and reads a model with its tokenizer; an adapter is added to the weights.

    Args:
        path: as `find_model` takes it, like `step` and `adapter`.
        step: which checkpoint.
        adapter: put on the model.
        device: where the weights go.

    Raises:
        UsageError: as `find_model`, or the model or its adapter is of a kind that is not computed.
        CheckpointError: as `find_model`, or a file is missing, or has changed since the checkpoint
            was saved; a tensor is missing or has another shape than config.json says; the adapter
            belongs to another base.
    """
    return load_found(find_model(path, step=step, adapter=adapter), device=device)


def load_found(found: FoundModel, *, device: torch.device | str = "cpu") -> LoadedModel:
    """As `load_model`, of a model that was found."""
    verify_found(found)
    return read_found(found, device=device)


def verify_found(found: FoundModel) -> None:
    """Holds the files of a model to their manifests, where there are any.

    Raises:
        CheckpointError: a file is missing or is not what the manifest says.
    """
    for folder in (found.base, found.adapter):
        if folder is not None and has_manifest(folder):
            verify_model_files(folder)  # a flipped bit would load silently


def read_found(found: FoundModel, *, device: torch.device | str = "cpu") -> LoadedModel:
    """As `load_found`, where the files were verified before."""
    loaded = read_separate(found)
    if found.adapter is not None:
        merge_lora(loaded.model)
    loaded.model.to(device)
    return loaded


def read_separate(found: FoundModel) -> LoadedModel:
    """As `read_found` on the CPU, with the adapter as additions beside the weights."""
    config = read_config(found.base)
    for file in found.base.glob("*.json"):
        plain_file(file, error=CheckpointError)
    tokenizer = load_tokenizer(str(found.base))
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{found.base}: the tokenizer has {tokenizer.vocab_size} tokens, "
            f"the model's vocabulary {config.vocab_size}",
            hint="the tokenizer's files belong to another model",
        )
    model = read_weights(found.base, config=config)
    if found.adapter is not None:
        load_lora(model, found.adapter)
    return LoadedModel(model, tokenizer, found.step, found.folder)


def identify(found: FoundModel) -> str:
    """The hash that names a model: of its checkpoint's manifest, or else of its files.

    The manifest of a checkpoint holds the hashes of its files; whether they are still true,
    `verify_found` says.

    Raises:
        CheckpointError: a file is missing or not a plain file.
        StorageError: a file cannot be read.
    """
    folder = found.folder
    if has_manifest(folder):
        return _sha256(folder / MANIFEST)
    if found.adapter is not None:
        own = {file.name: _sha256(file) for file in sorted(folder.glob("adapter_*"))}
        return sha256_of_json(own | {"base": identify(FoundModel(found.base))})
    present = [folder / name for name in _FILES_THAT_COUNT if (folder / name).exists()]
    return sha256_of_json({file.name: _sha256(file) for file in [*present, *weight_files(folder)]})


def adapter_sha256(found: FoundModel) -> str | None:
    """The hash of the additions alone, as records of what a model wrote have it; None: no adapter.

    Raises:
        CheckpointError: the file is missing or not a plain file.
    """
    return None if found.adapter is None else _sha256(found.adapter / ADAPTER_FILE)


def has_manifest(folder: Path) -> bool:
    """Whether a model folder says itself what its files must be, as a checkpoint does."""
    return (folder / MANIFEST).exists() or step_of_folder(folder) is not None


def _sha256(file: Path) -> str:
    plain_file(file, error=CheckpointError)
    with storage_errors(file, verb="read"):
        return sha256_of_file(file)
