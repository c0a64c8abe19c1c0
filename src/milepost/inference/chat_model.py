"""A model to talk with: the fast form of its weights, and how conversations are put."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from milepost.inference.decoder import FastDecoder
from milepost.inference.load import FoundModel, load_found
from milepost.inference.model_files import dtype_of_weights, read_bounded_json
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
    found: FoundModel, *, dtype: str = "auto", device: torch.device | str = "cpu"
) -> ChatModel:
    """Loads a model that was found, verified.

    Args:
        found: see `find_model`.
        dtype: of the forward pass; "auto": that of the weights' file.
        device: where the weights go.

    Raises:
        UsageError: the model, its adapter or its template is of a kind that is not computed.
        CheckpointError: a file is missing or damaged, or the adapter belongs to another base.
    """
    loaded = load_found(found, device=device)
    computed = dtype_of_weights(found.base) if dtype == "auto" else dtype
    decoder = FastDecoder(
        loaded.model,
        compute_dtype=getattr(torch, computed),
        vocab_size=loaded.tokenizer.vocab_size,
    )
    return ChatModel(
        decoder=decoder,
        tokenizer=loaded.tokenizer,
        template=template_of(found),
        folder=found.folder,
        step=found.step,
    )


def template_of(found: FoundModel) -> ChatTemplate | None:
    """How conversations are put to a model; None where its files hold no template."""
    return _template_in(found.folder) or _template_in(found.base)


def _template_in(folder: Path) -> ChatTemplate | None:
    file, settings = folder / TEMPLATE_FILE, folder / "tokenizer_config.json"
    if file.is_file():
        return load_template(str(file))
    # Where transformers kept it before it had a file of its own.
    source = read_bounded_json(settings).get("chat_template") if settings.is_file() else None
    return ChatTemplate(source, name=settings.name) if isinstance(source, str) else None
