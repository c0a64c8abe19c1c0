"""Adapter folders in PEFT's format, there and back. Never a pickle.

    adapter_config.json          PEFT's own fields
    adapter_model.safetensors    A and B of every projection, float32
    adapter_base.json            the hash of the base they were trained on; PEFT ignores the file

An adapter that PEFT made has no adapter_base.json: its base is then not checked, only shapes are.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from milepost.checkpoint.store import ADAPTER_FILE
from milepost.core.errors import CheckpointError, UsageError
from milepost.core.files import json_document, plain_file
from milepost.inference.model_files import (
    ADAPTER_CONFIG_FILE,
    PICKLE_SUFFIXES,
    open_tensors,
    read_bounded_json,
    read_tensor,
)
from milepost.model.llama import Llama
from milepost.model.lora import (
    LORA_TARGETS,
    PEFT_PREFIX,
    LoraShape,
    add_lora,
    base_sha256,
    set_lora_state,
)

ADAPTER_BASE_FILE = "adapter_base.json"

_SCHEMA_VERSION = 1
_MOST_RANK = 1 << 16
_MOST_ALPHA = 1e9
_FLOAT_TYPES = ("F32", "BF16", "F16", "F64")
_HINT = "Milepost reads plain LoRA on the projections of all blocks, one rank for all of them"

# Fields that say nothing of what the adapter computes, or that are read one by one.
_READ_OR_IDLE = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """What an adapter folder holds.

    Attributes:
        shape: of its additions.
        state: A and B, under PEFT's names, on the CPU.
        base: what its base was called; None where it does not say.
        base_sha256: of the base it was trained on, see `model.lora.base_sha256`; None where it
            does not say, as adapters that PEFT made do not.
    """

    shape: LoraShape
    state: dict[str, torch.Tensor]
    base: str | None
    base_sha256: str | None


def is_adapter(folder: Path) -> bool:
    """Whether a folder says that it holds an adapter."""
    return (folder / ADAPTER_CONFIG_FILE).exists()


def adapter_documents(shape: LoraShape, *, base: str, base_sha256: str) -> dict[str, bytes]:
    """The JSON files of an adapter folder, by name.

    Args:
        shape: of the additions.
        base: the path or hub name of the base, for PEFT to find it.
        base_sha256: of the base as it was before any training of the adapter.
    """
    documents = {
        ADAPTER_CONFIG_FILE: _peft_config(shape, base=base),
        ADAPTER_BASE_FILE: {"v": _SCHEMA_VERSION, "base": base, "base_sha256": base_sha256},
    }
    return {name: json_document(values).encode() for name, values in documents.items()}


def _peft_config(shape: LoraShape, *, base: str) -> dict[str, Any]:
    """adapter_config.json with the fields that PEFT has had from the start."""
    alpha = int(shape.alpha) if float(shape.alpha).is_integer() else shape.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": shape.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": list(shape.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def load_lora(model: Llama, folder: Path) -> Adapter:
    """Puts the adapter of a folder on its base, in place.

    Args:
        model: the base, without additions, on any device.
        folder: in PEFT's format, written by Milepost or by PEFT.

    Raises:
        UsageError: there is no adapter, or it is of a kind that Milepost does not compute.
        CheckpointError: it is damaged, a pickle, or was trained on another base; the model is as
            it was.
    """
    adapter = read_adapter(folder)
    _check_base(model, adapter, folder=folder)
    _check_shapes(model, adapter, folder=folder)
    shape = adapter.shape
    add_lora(model, rank=shape.rank, alpha=shape.alpha, dropout=0.0, targets=shape.targets, seed=0)
    set_lora_state(model, adapter.state)
    return adapter


def _check_base(model: Llama, adapter: Adapter, *, folder: Path) -> None:
    if adapter.base_sha256 is None:
        return
    found = base_sha256(model)
    if found != adapter.base_sha256:
        raise CheckpointError(
            f"{folder} was trained on another base: its weights have the hash "
            f"{adapter.base_sha256[:12]}, this model's {found[:12]}",
            hint=f"give the model it was trained on, which was called {adapter.base}",
        )


def _check_shapes(model: Llama, adapter: Adapter, *, folder: Path) -> None:
    """Holds the tensors to the model's projections, so that nothing is half done."""
    wanted = _wanted_shapes(model, adapter.shape)
    for names, what in (
        (set(wanted) - set(adapter.state), "lacks"),
        (set(adapter.state) - set(wanted), "has the unknown tensor"),
    ):
        if names:
            raise CheckpointError(f"{folder / ADAPTER_FILE} {what} {min(names)}", hint=_HINT)
    for name, shape in wanted.items():
        found = list(adapter.state[name].shape)
        if found != shape:
            raise CheckpointError(
                f"{folder / ADAPTER_FILE}: {name} has shape {found}, "
                f"rank {adapter.shape.rank} on this model needs {shape}",
                hint="give the model that the adapter was trained on",
            )


def _wanted_shapes(model: Llama, shape: LoraShape) -> dict[str, list[int]]:
    wanted = {}
    for name, parameter in model.named_parameters():
        path = name.removesuffix(".weight")
        if path.rpartition(".")[2] in shape.targets:
            out_features, in_features = parameter.shape
            wanted[f"{PEFT_PREFIX}{path}.lora_A.weight"] = [shape.rank, in_features]
            wanted[f"{PEFT_PREFIX}{path}.lora_B.weight"] = [out_features, shape.rank]
    return wanted


def read_adapter(folder: Path) -> Adapter:
    """Reads an adapter folder, without a model to put it on.

    Raises:
        UsageError: there is no adapter, or it is of a kind that Milepost does not compute.
        CheckpointError: it is damaged or a pickle.
    """
    if not is_adapter(folder):
        raise UsageError(
            f"{folder} is not an adapter: it has no {ADAPTER_CONFIG_FILE}",
            hint="give the folder that milepost finetune or PEFT wrote",
        )
    config = read_bounded_json(folder / ADAPTER_CONFIG_FILE)
    rank, alpha = _rank_and_alpha(config, folder=folder)
    state = _read_state(folder)
    base = config.get("base_model_name_or_path")
    return Adapter(
        shape=LoraShape(rank, alpha, _targets_of(state, folder=folder)),
        state=state,
        base=base if isinstance(base, str) else None,
        base_sha256=_recorded_base(folder),
    )


def _rank_and_alpha(config: dict[str, Any], *, folder: Path) -> tuple[int, float]:
    """Rank and alpha of plain LoRA; whatever would compute something else is refused."""
    place = folder / ADAPTER_CONFIG_FILE

    def refuse(name: str) -> UsageError:
        return UsageError(f"{place}: {name} is {config.get(name)!r}", hint=_HINT)

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type")
    if config.get("bias", "none") != "none":
        raise refuse("bias")
    if config.get("init_lora_weights") not in _PLAIN_INITS:  # others change the base's weights
        raise refuse("init_lora_weights")
    for name in ("rank_pattern", "alpha_pattern", *sorted(set(config) - _READ_OR_IDLE)):
        if config.get(name):
            raise refuse(name)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank is True or not 1 <= rank <= _MOST_RANK:
        raise refuse("r")
    if not isinstance(alpha, int | float) or alpha is True or not 0 < alpha <= _MOST_ALPHA:
        raise refuse("lora_alpha")
    # Kalajdzievski 2023 scales by alpha / sqrt(rank).
    return rank, alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _read_state(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / ADAPTER_FILE
    if not file.exists() and not file.is_symlink():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise CheckpointError(
                f"{folder} holds its weights as {pickles[0]}, a pickle, which can run code "
                "when read",
                hint="save it once more with PEFT, which writes safetensors by default",
            )
    with ExitStack() as stack:
        reader = open_tensors(plain_file(file, error=CheckpointError), stack)
        for name in reader.keys():  # noqa: SIM118
            if (kind := reader.get_slice(name).get_dtype()) not in _FLOAT_TYPES:
                raise CheckpointError(f"{file}: {name} has type {kind}")
        return {name: read_tensor(name, file, reader) for name in reader.keys()}  # noqa: SIM118


def _targets_of(state: dict[str, torch.Tensor], *, folder: Path) -> tuple[str, ...]:
    """The projections that tensors belong to: the names in the file count, not the config's."""
    named = {name.split(".")[-3] for name in state if name.count(".") >= 3}
    targets = tuple(target for target in LORA_TARGETS if target in named)
    if not targets:
        raise CheckpointError(
            f"{folder / ADAPTER_FILE} has no LoRA tensors of a projection", hint=_HINT
        )
    return targets


def _recorded_base(folder: Path) -> str | None:
    file = folder / ADAPTER_BASE_FILE
    if not file.exists() and not file.is_symlink():
        return None
    recorded = read_bounded_json(file)
    found = recorded.get("base_sha256")
    if recorded.get("v") != _SCHEMA_VERSION or not isinstance(found, str):
        raise CheckpointError(
            f"{file} does not say which base the adapter belongs to",
            hint="put the file back from a copy; without it the base could not be checked",
        )
    return found
