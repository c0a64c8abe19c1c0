"""Models in memory, read when they are asked for; only the worker's thread comes here."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch

from milepost.api.catalog import NamedModel
from milepost.api.refusals import SERVER, RefusedError
from milepost.core import console
from milepost.core.errors import MilepostError
from milepost.inference.chat_model import load_chat_model
from milepost.inference.decoder import FastDecoder
from milepost.inference.load import identify
from milepost.text.chat_template import ChatTemplate
from milepost.text.tokenizer import Tokenizer

MODELS_KEPT = 2


@dataclass(frozen=True)
class ServedModel:
    """A model that is ready to answer.

    Attributes:
        name: as it stands in replies.
        fingerprint: from the hash of its checkpoint.
        decoder: on the server's device.
        tokenizer: of the model.
        template: how its chats are written; None where its files hold none.
    """

    name: str
    fingerprint: str
    decoder: FastDecoder
    tokenizer: Tokenizer
    template: ChatTemplate | None

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its completion."""
        return self.decoder.config.max_position_embeddings


class Library:
    """The models that were used last."""

    def __init__(self, *, dtype: str, device: torch.device) -> None:
        """Loads nothing yet.

        Args:
            dtype: of the forward pass; "auto": that of each model's file.
            device: where the models go.
        """
        self._dtype = dtype
        self._device = device
        self._models: OrderedDict[Path, ServedModel] = OrderedDict()

    def get(self, wanted: NamedModel) -> ServedModel:
        """The model, for a client.

        Raises:
            RefusedError: it cannot be read; the terminal says why.
        """
        try:
            return self.open(wanted)
        except MilepostError as error:
            # The message names a folder, which is for the terminal only.
            console.say_error(error)
            raise RefusedError(
                f"the model {wanted.name} cannot be read; the terminal of the server says why",
                status=500,
                kind=SERVER,
                code="model_not_readable",
            ) from error

    def open(self, wanted: NamedModel) -> ServedModel:
        """The model, read and verified if it is not in memory.

        Raises:
            MilepostError: it cannot be read.
        """
        found = self._models.pop(wanted.folder, None)
        if found is None:
            while len(self._models) >= MODELS_KEPT:
                self._models.popitem(last=False)
            found = self._load(wanted)
        self._models[wanted.folder] = found
        return found

    def _load(self, wanted: NamedModel) -> ServedModel:
        found = wanted.find()
        opened = load_chat_model(found, dtype=self._dtype, device=self._device)
        return ServedModel(
            name=wanted.name,
            fingerprint=f"fp_{identify(found)[:16]}",
            decoder=opened.decoder,
            tokenizer=opened.tokenizer,
            template=opened.template,
        )
