"""Adapter folders as a checkpoint of fine-tuning holds them."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from milepost.checkpoint.store import ADAPTER_FILE
from milepost.inference.adapter_files import adapter_documents
from milepost.model.llama import Llama
from milepost.model.lora import lora_shape, lora_state


def save_adapter(folder: Path, model: Llama, *, base: str, base_sha256: str) -> None:
    """Writes the additions of a model; `base` is where PEFT finds what they belong to."""
    folder.mkdir(parents=True)
    documents = adapter_documents(lora_shape(model), base=base, base_sha256=base_sha256)
    for name, content in documents.items():
        (folder / name).write_bytes(content)
    save_file(lora_state(model), folder / ADAPTER_FILE, metadata={"format": "pt"})
