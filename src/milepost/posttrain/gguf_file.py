"""One model as a GGUF file, written and read back with the `gguf` package (`milepost[export]`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from milepost.config.schema import ModelSection
from milepost.core.errors import CheckpointError, UsageError
from milepost.core.files import storage_errors
from milepost.model.gguf import (
    ARCHITECTURE,
    from_gguf_rows,
    gguf_metadata,
    gguf_name,
    to_gguf_rows,
)
from milepost.model.llama import Llama
from milepost.posttrain.gguf_tokenizer import PRE_TOKENIZER, GgufTokenizer

_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""GGUF's names of the types."""
_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}
"""llama.cpp's numbers for a file that is mostly of a type (gguf.LlamaFileType)."""


def type_name(dtype: str) -> str:
    """GGUF's name of a dtype, as the names of files carry it."""
    return _TYPES[dtype]


def stored_dtype(tensor: Tensor, *, dtype: str) -> torch.dtype:
    """The type of a parameter in a file of `dtype`: the weights of norms stay float32."""
    return torch.float32 if tensor.dim() < 2 else getattr(torch, dtype)


def require_gguf() -> None:
    """Raises a UsageError where the `gguf` package is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "GGUF needs the package gguf, which is not installed",
            hint="pip install 'milepost[export]'",
        ) from error


def write_gguf(
    file: Path,
    weights: dict[str, Tensor],
    *,
    model: ModelSection,
    dtype: str,
    tokenizer: GgufTokenizer,
    name: str,
    template: str | None,
    on_written: Callable[[int], None],
) -> None:
    """Writes a model; one tensor at a time is held in the new type.

    Args:
        file: not there yet.
        weights: by Hugging Face's names.
        model: the architecture.
        dtype: of the matrices.
        tokenizer: of the model.
        name: of the model, for people.
        template: Jinja text of its chat template.
        on_written: called with the bytes written so far.

    Raises:
        StorageError: the file cannot be written.
    """
    import gguf

    writer = gguf.GGUFWriter(file, ARCHITECTURE)
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[dtype])
    for key, value in gguf_metadata(model).items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    _add_tokenizer(writer, tokenizer, template=template)
    for key, tensor in weights.items():
        stored = stored_dtype(tensor, dtype=dtype)
        writer.add_tensor_info(
            gguf_name(key),
            tuple(tensor.shape),
            np.dtype(np.float32),  # of no account beside raw_dtype
            tensor.numel() * stored.itemsize,
            raw_dtype=gguf.GGMLQuantizationType[_TYPES[str(stored).removeprefix("torch.")]],
        )
    num_written = 0
    with storage_errors(file):
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for key, tensor in weights.items():
                turned = to_gguf_rows(key, tensor.detach(), model=model)
                raw = turned.to("cpu", stored_dtype(tensor, dtype=dtype)).contiguous()
                writer.write_tensor_data(raw.view(torch.uint8).numpy().view(_Bytes))
                num_written += raw.nbytes
                on_written(num_written)
        finally:
            writer.close()


class _Bytes(np.ndarray[Any, Any]):
    """Bytes whose failure to be written says why: numpy's own does not tell a full disk."""

    def tofile(self, file: Any, sep: str = "", format: str = "%s") -> None:
        file.write(self.data)


def _add_tokenizer(writer: Any, tokenizer: GgufTokenizer, *, template: str | None) -> None:
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name of byte-level BPE
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    writer.add_token_merges(tokenizer.merges)
    writer.add_bos_token_id(tokenizer.beginning_id)
    writer.add_eos_token_id(tokenizer.end_of_text_id)
    # In pretraining it stands before each document; a chat template puts in what it wants.
    writer.add_add_bos_token(template is None)
    writer.add_add_eos_token(False)
    if template is not None:
        writer.add_chat_template(template)


def read_gguf(file: Path, *, model: ModelSection) -> Llama:
    """The model in a file that `write_gguf` wrote, float32 on the CPU.

    Args:
        file: the GGUF file.
        model: what its metadata must say.

    Raises:
        CheckpointError: it says something else, or a tensor is missing or of another shape.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    for key, value in gguf_metadata(model).items():
        field = reader.get_field(key)
        found = None if field is None else field.contents()
        written = value if isinstance(value, int) else torch.tensor(value).item()
        if found != written:
            raise CheckpointError(f"{file}: {key} is {found!r}, the model has {value!r}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    llama = Llama(model)
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            found = tensors.pop(gguf_name(name), None)
            if found is None or tuple(reversed(found.shape.tolist())) != tuple(parameter.shape):
                raise CheckpointError(f"{file} has no fitting tensor {gguf_name(name)}")
            parameter.copy_(from_gguf_rows(name, _as_tensor(found), model=model))
    if tensors:
        raise CheckpointError(f"{file} has the unknown tensor {min(tensors)}")
    return llama


def _as_tensor(found: Any) -> Tensor:
    dtypes = {gguf_type: getattr(torch, dtype) for dtype, gguf_type in _TYPES.items()}
    raw = torch.from_numpy(found.data.copy()).view(torch.uint8)
    shape = tuple(reversed(found.shape.tolist()))
    return raw.reshape(-1).view(dtypes[found.tensor_type.name]).reshape(shape)
