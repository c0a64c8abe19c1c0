"""A model to talk with: weights, an adapter where there is one, and how conversations are put."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from milepost.checkpoint.store import verify_model_files
from milepost.core.errors import UsageError
from milepost.inference.adapter_files import is_adapter, load_lora, read_adapter
from milepost.inference.decoder import FastDecoder
from milepost.inference.load import dtype_of_weights, load_model, model_folder
from milepost.model.lora import merge_lora
from milepost.runs.layout import step_of_folder
from milepost.runs.steps import is_run
from milepost.text.chat_template import ChatTemplate, load_template
from milepost.text.tokenizer import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True)
class ChatModel:
    """A model that is ready to answer.

    Attributes:
        decoder: an adapter is merged into its weights.
        tokenizer: of the model.
        template: how conversations are put; None where the model's files hold none, as a base
            model's do not.
        folder: where the model, or its adapter, was read.
        step: updates it had seen; None where the folder's name does not say.
    """

    decoder: FastDecoder
    tokenizer: Tokenizer
    template: ChatTemplate | None
    folder: Path
    step: int | None


def load_chat_model(
    path: Path,
    *,
    adapter: Path | None = None,
    step: int | None = None,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
) -> ChatModel:
    """Loads a model, or an adapter with the base it names.

    Args:
        path: a run, a checkpoint, a Hugging Face LLaMA folder, or an adapter.
        adapter: a run or a folder whose adapter is put on the model of `path`.
        step: of a run, which checkpoint; None: the latest. Of `path` where that is a run, else of
            the adapter.
        dtype: of the forward pass; "auto": that of the weights' file.
        device: where the weights go.

    Raises:
        UsageError: there is no model or adapter.
        CheckpointError: a file is missing or damaged, or the adapter belongs to another base.
    """
    own_step = step if adapter is None or is_run(path) else None
    folder = path if is_adapter(path) else model_folder(path, step=own_step)
    if adapter is not None:
        on_top = _adapter_folder(adapter, step=None if is_run(path) else step)
    elif is_adapter(folder):
        on_top, folder = folder, _base_of(folder)
    else:
        on_top = None
    loaded = load_model(folder, device=device)
    if on_top is not None:
        if step_of_folder(on_top) is not None:
            verify_model_files(on_top)
        load_lora(loaded.model, on_top)
        merge_lora(loaded.model)
    shown = on_top or folder
    computed = dtype_of_weights(folder) if dtype == "auto" else dtype
    decoder = FastDecoder(
        loaded.model,
        compute_dtype=getattr(torch, computed),
        vocab_size=loaded.tokenizer.vocab_size,
    )
    return ChatModel(
        decoder=decoder,
        tokenizer=loaded.tokenizer,
        template=_template(shown) or _template(folder),
        folder=shown,
        step=step_of_folder(shown),
    )


def _adapter_folder(path: Path, *, step: int | None) -> Path:
    folder = model_folder(path, step=step) if is_run(path) else path
    if not is_adapter(folder):
        raise UsageError(
            f"there is no adapter in {folder}: it has no adapter_config.json",
            hint="give a run of `milepost finetune`, one of its checkpoints, or PEFT's folder",
        )
    return folder


def _base_of(adapter: Path) -> Path:
    base = read_adapter(adapter).base
    if base is None or not Path(base).is_dir():
        raise UsageError(
            f"{adapter} is an adapter, and its base {base or 'has no name'} is not here",
            hint=f"give the base as the model, and --adapter {adapter}",
        )
    return model_folder(Path(base))


def _template(folder: Path) -> ChatTemplate | None:
    file = folder / TEMPLATE_FILE
    return load_template(str(file)) if file.is_file() else None
