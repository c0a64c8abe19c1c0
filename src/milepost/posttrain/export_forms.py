"""The forms of an export: a Hugging Face folder, a GGUF file with a Modelfile, an adapter.

Each writes a model, says how it stores each parameter, and reads back what it wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from milepost.checkpoint.store import ADAPTER_FILE
from milepost.config.schema import ModelSection
from milepost.core.errors import CheckpointError, UsageError
from milepost.inference.adapter_files import adapter_documents, load_lora, read_adapter
from milepost.inference.load import FoundModel, LoadedModel
from milepost.inference.model_files import read_config, read_weights
from milepost.model.llama import Llama
from milepost.model.lora import base_sha256, has_lora, lora_shape, lora_state, merge_lora
from milepost.posttrain.folder_files import CONFIG_FILES, chat_template
from milepost.posttrain.gguf_file import (
    read_gguf,
    stored_dtype,
    type_name,
    write_gguf,
)
from milepost.posttrain.gguf_tokenizer import gguf_tokenizer, plain_template
from milepost.posttrain.modelfile import MODELFILE, modelfile
from milepost.posttrain.weight_shards import write_file, write_weights


@dataclass(frozen=True)
class ExportRequest:
    """What is to be written, besides the weights.

    Attributes:
        name: of the export, for people.
        config: the architecture.
        files: the small files of its Hugging Face folder, by name.
        dtype: of the weights in the export.
        max_file_bytes: of one safetensors file's tensors.
    """

    name: str
    config: ModelSection
    files: dict[str, bytes]
    dtype: str
    max_file_bytes: int


class Form(Protocol):
    """What an export is written as."""

    library: str
    """The hub's name of the library that loads it."""

    adapter_in_words: str
    """What becomes of the adapter of a model that has one."""

    def write(
        self,
        folder: Path,
        request: ExportRequest,
        weights: dict[str, Tensor],
        *,
        on_written: Callable[[int], None],
    ) -> None:
        """Writes everything but the card; raises StorageError or UsageError."""

    def weights(self, llama: Llama) -> dict[str, Tensor]:
        """What is to be written, by name; additions are merged in place where they must be."""

    def stored(self, name: str, parameter: Tensor, *, dtype: str) -> torch.dtype:
        """The type that a parameter of the model has in the export."""

    def read(self, folder: Path, *, config: ModelSection) -> Llama:
        """The model as the export holds it, float32; raises CheckpointError."""

    def usage(self, folder: Path, *, name: str) -> str:
        """Markdown that shows how the export is used."""


class HuggingFaceForm:
    """A folder that `AutoModelForCausalLM.from_pretrained` reads."""

    library = "transformers"
    adapter_in_words = "merged into the weights"

    def write(
        self,
        folder: Path,
        request: ExportRequest,
        weights: dict[str, Tensor],
        *,
        on_written: Callable[[int], None],
    ) -> None:
        for name, content in request.files.items():
            (folder / name).write_bytes(content)
        write_weights(
            folder,
            weights,
            dtype=getattr(torch, request.dtype),
            max_bytes=request.max_file_bytes,
            on_written=on_written,
        )

    def weights(self, llama: Llama) -> dict[str, Tensor]:
        return _merged(llama)

    def stored(self, name: str, parameter: Tensor, *, dtype: str) -> torch.dtype:
        return getattr(torch, dtype)

    def read(self, folder: Path, *, config: ModelSection) -> Llama:
        found = read_config(folder)
        # How weights are drawn at the start is not in config.json, and does not matter any more.
        if found != config.model_copy(update={"residual_init": found.residual_init}):
            raise CheckpointError(f"{folder}: config.json describes another architecture")
        return read_weights(folder, config=found)

    def usage(self, folder: Path, *, name: str) -> str:
        return (
            "```python\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
            "```"
        )


class GgufForm:
    """A GGUF file for llama.cpp and what is built on it, with a Modelfile for Ollama.

    Args:
        loaded: the model; its tokenizer must have a form in GGUF.
    """

    library = "gguf"
    adapter_in_words = "merged into the weights"

    def __init__(self, loaded: LoadedModel) -> None:
        self._tokenizer = gguf_tokenizer(
            loaded.tokenizer, vocab_size=loaded.model.config.vocab_size
        )

    def write(
        self,
        folder: Path,
        request: ExportRequest,
        weights: dict[str, Tensor],
        *,
        on_written: Callable[[int], None],
    ) -> None:
        template = chat_template(request.files)
        file = folder / f"{request.name}-{type_name(request.dtype)}.gguf"
        text = modelfile(
            file.name,
            template=template,
            end_of_text=self._tokenizer.tokens[self._tokenizer.end_of_text_id],
            context_tokens=request.config.max_position_embeddings,
        )
        (folder / MODELFILE).write_text(text, encoding="utf-8")
        write_gguf(
            file,
            weights,
            model=request.config,
            dtype=request.dtype,
            tokenizer=self._tokenizer,
            name=request.name,
            template=None if template is None else plain_template(template),
            on_written=on_written,
        )

    def weights(self, llama: Llama) -> dict[str, Tensor]:
        return _merged(llama)

    def stored(self, name: str, parameter: Tensor, *, dtype: str) -> torch.dtype:
        return stored_dtype(parameter, dtype=dtype)

    def read(self, folder: Path, *, config: ModelSection) -> Llama:
        return read_gguf(_gguf_of(folder), model=config)

    def usage(self, folder: Path, *, name: str) -> str:
        file = _gguf_of(folder).name
        return (
            "```bash\n"
            f'llama-cli -m {file} -p "Once upon a time"\n'
            "ollama create my-model -f Modelfile && ollama run my-model\n"
            "```"
        )


def _gguf_of(folder: Path) -> Path:
    return next(folder.glob("*.gguf"))


class AdapterForm:
    """A folder that `PeftModel.from_pretrained` reads: the additions alone.

    Args:
        found: where base and adapter lie.
        llama: the model with its additions.

    Raises:
        UsageError: there is no adapter.
    """

    library = "peft"
    adapter_in_words = "all that is here; the base has to be there too"

    def __init__(self, found: FoundModel, llama: Llama) -> None:
        if found.adapter is None:
            raise UsageError(
                f"{found.folder} has no adapter", hint="give one with --adapter, or --format hf"
            )
        self._base = found.base
        self._base_name = read_adapter(found.adapter).base or str(found.base)
        self._documents = adapter_documents(
            lora_shape(llama), base=self._base_name, base_sha256=base_sha256(llama)
        )

    def write(
        self,
        folder: Path,
        request: ExportRequest,
        weights: dict[str, Tensor],
        *,
        on_written: Callable[[int], None],
    ) -> None:
        files = {name: request.files[name] for name in request.files if name not in CONFIG_FILES}
        for name, content in (files | self._documents).items():
            (folder / name).write_bytes(content)
        dtype = getattr(torch, request.dtype)
        write_file(folder / ADAPTER_FILE, weights, dtype=dtype)
        on_written(sum(tensor.numel() for tensor in weights.values()) * dtype.itemsize)

    def weights(self, llama: Llama) -> dict[str, Tensor]:
        return lora_state(llama)

    def stored(self, name: str, parameter: Tensor, *, dtype: str) -> torch.dtype:
        return getattr(torch, dtype) if ".lora_" in name else parameter.dtype

    def read(self, folder: Path, *, config: ModelSection) -> Llama:
        llama = read_weights(self._base, config=config)
        load_lora(llama, folder)
        return llama

    def usage(self, folder: Path, *, name: str) -> str:
        return (
            "```python\n"
            "from peft import PeftModel\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{self._base_name}")\n'
            f'model = PeftModel.from_pretrained(base, "{name}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
            "```"
        )


def _merged(llama: Llama) -> dict[str, Tensor]:
    if has_lora(llama):
        merge_lora(llama)
    return dict(llama.state_dict())


def make_form(name: str, *, found: FoundModel, loaded: LoadedModel) -> Form:
    """The form of a name on the command line.

    Raises:
        UsageError: the model has no adapter and the form is one, or its tokenizer has no form in
            GGUF.
    """
    if name == "adapter":
        return AdapterForm(found, loaded.model)
    return GgufForm(loaded) if name == "gguf" else HuggingFaceForm()
