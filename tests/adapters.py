"""Models with additions, and adapter folders as a checkpoint of fine-tuning holds them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from milepost.checkpoint.store import ADAPTER_FILE
from milepost.inference.adapter_files import adapter_documents
from milepost.model.llama import Llama
from milepost.model.lora import LORA_TARGETS, add_lora, lora_shape, lora_state
from tests.tiny_models import tiny_model


def save_adapter(folder: Path, model: Llama, *, base: str, base_sha256: str) -> None:
    """Writes the additions of a model; `base` is where PEFT finds what they belong to."""
    folder.mkdir(parents=True)
    documents = adapter_documents(lora_shape(model), base=base, base_sha256=base_sha256)
    for name, content in documents.items():
        (folder / name).write_bytes(content)
    save_file(lora_state(model), folder / ADAPTER_FILE, metadata={"format": "pt"})


def adapted(
    *, seed: int = 1, targets: tuple[str, ...] = LORA_TARGETS, filled: bool = True
) -> Llama:
    """The tiny model with additions of rank 4; filled ones change what it computes."""
    model = tiny_model(seed=seed)
    add_lora(model, rank=4, alpha=8, dropout=0.0, targets=targets, seed=3)
    if filled:
        generator = torch.Generator().manual_seed(4)
        for name, tensor in lora_state(model).items():
            if ".lora_B." in name:
                tensor.normal_(0, 0.1, generator=generator)
    return model
