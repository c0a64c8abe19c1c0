"""Fine-tuning: a model that is there already, on the answers of conversations.

The loop, its checkpoints and its events are those of pretraining; this is what differs. All
weights are trained, or LoRA's additions alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from milepost.checkpoint.store import ADAPTER_FILE, MODEL_FILE, verify_model_files
from milepost.config.schema import Config
from milepost.core.console import say, warn
from milepost.core.errors import DataError, UsageError
from milepost.core.units import format_count
from milepost.data.batch import Batch
from milepost.data.shards import ShardSet
from milepost.data.sources import HUB_PREFIX
from milepost.evaluation.validation import ValidationSet
from milepost.inference.adapter_files import adapter_documents, is_adapter
from milepost.inference.load import FoundModel, has_manifest, identify, model_folder
from milepost.inference.model_files import read_config, read_weights
from milepost.model.llama import Llama
from milepost.model.lora import add_lora, base_sha256, lora_shape, lora_state
from milepost.planner.cost import count_parameters
from milepost.posttrain.instructions import (
    Conversation,
    find_instructions,
    read_conversations,
    split_held_out,
)
from milepost.posttrain.ledger import Ledger
from milepost.posttrain.sft_rows import SftRows, build_rows, check_rows
from milepost.runs.layout import step_of_folder
from milepost.text.chat_template import ChatTemplate, Message, load_template
from milepost.text.tokenizer import Tokenizer, load_tokenizer
from milepost.train.pretraining import whole_model_files
from milepost.train.subject import Identity

CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""Where transformers looks for a tokenizer's chat template."""


@dataclass(frozen=True)
class Base:
    """The model that is tuned.

    Attributes:
        folder: of its files.
        sha256: see `inference.load.identify`.
    """

    folder: Path
    sha256: str


@dataclass(frozen=True)
class _Asker:
    """A base and how it is spoken to."""

    base: Base
    tokenizer: Tokenizer
    template: ChatTemplate


@dataclass(frozen=True)
class _Material:
    """What rows are made of."""

    asker: _Asker
    to_train: list[Conversation]
    to_score: list[Conversation]
    ledger: Ledger


class Finetuning:
    """The subject of `milepost finetune`; see `train.subject.Subject`.

    Args:
        base: the model that is tuned.
        tokenizer: of the base.
        template: with which conversations are put into text.
        rows: what is trained on.
        held_out: what is scored and never trained on; None where there is none.
        ledger: of the conversations.
        source: where they came from.
        uses_lora: whether only additions are trained.
    """

    def __init__(
        self,
        base: Base,
        *,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        rows: SftRows,
        held_out: SftRows | None,
        ledger: Ledger,
        source: str,
        uses_lora: bool,
    ) -> None:
        self.tokenizer = tokenizer
        self.weights_file = ADAPTER_FILE if uses_lora else MODEL_FILE
        self.benchmark_shards: ShardSet | None = None
        self._base = base
        self._template = template
        self._rows = rows
        self._held_out = held_out
        self._ledger = ledger
        self._source = source
        self._uses_lora = uses_lora

    @property
    def identity(self) -> Identity:
        return Identity(
            place=self._source,
            parts=("conversations", "held-out conversations", "tokenizer"),
            fingerprint=self._rows.fingerprint,
            validation_fingerprint=self._held_out.fingerprint if self._held_out else None,
            tokenizer_sha256=self.tokenizer.sha256,
            hint="give the --data and the chat template that the run was made with",
            lineage=self._lineage(),
        )

    def _lineage(self) -> dict[str, Any]:
        held_out = self._held_out
        return {
            "base": str(self._base.folder),
            "base_sha256": self._base.sha256,
            "base_step": step_of_folder(self._base.folder),
            "conversations": {
                "trained": self._rows.num_conversations,
                "held_out": held_out.num_conversations if held_out else 0,
                **self._ledger.record(),
            },
        }

    def verify(self) -> None:
        if has_manifest(self._base.folder):
            verify_model_files(self._base.folder)
        say(f"{self._source}: {self._ledger.summary()}")
        if self._held_out is None:
            warn("no conversation is held out, so there is no validation loss")

    def introduction(self, config: Config) -> str:
        rows, num_all = self._rows, count_parameters(config.model).total
        trained = f"all {format_count(num_all)} parameters are trained"
        if self._uses_lora:
            trained = (
                f"{format_count(self.num_trained(config))} parameters are trained beside "
                f"{format_count(num_all)} that stay (LoRA, rank {config.lora.rank})"
            )
        epochs = config.last_step * config.rows_per_step / rows.num_rows
        return (
            f"{trained}; {rows.num_conversations:,} conversations in {rows.num_rows:,} rows of "
            f"{config.data.sequence_length}, {rows.filled_fraction:.0%} filled; "
            f"{config.last_step} steps of {config.rows_per_step:,} rows, {epochs:.3g} epochs"
        )

    def num_trained(self, config: Config) -> int:
        if not self._uses_lora:
            return count_parameters(config.model).total
        with torch.device("meta"):
            model = Llama(config.model)
        _add_lora(model, config=config)
        return sum(tensor.numel() for tensor in lora_state(model).values())

    def make_model(self, config: Config) -> Llama:
        if not self._uses_lora:
            return Llama(config.model)
        model = read_weights(self._base.folder, config=config.model)
        _add_lora(model, config=config)
        return model

    def set_first_weights(self, model: Llama, *, config: Config) -> None:
        if not self._uses_lora:  # additions have their first values from `make_model`
            base = read_weights(self._base.folder, config=config.model)
            model.load_state_dict(base.state_dict())

    def trained_weights(self, model: Llama) -> dict[str, Tensor]:
        if self._uses_lora:
            return lora_state(model)
        return {name: tensor.detach() for name, tensor in model.state_dict().items()}

    def model_files(self, model: Llama, *, config: Config) -> dict[str, bytes]:
        files = {CHAT_TEMPLATE_FILE: self._template.source.encode()}
        if not self._uses_lora:
            return files | whole_model_files(config, tokenizer=self.tokenizer)
        documents = adapter_documents(
            lora_shape(model), base=str(self._base.folder), base_sha256=base_sha256(model)
        )
        return files | documents | self.tokenizer.files()

    def batches(self, config: Config) -> SftBatches:
        return SftBatches(self._rows, seed=config.run.seed, rows_per_step=config.rows_per_step)

    def validation_set(self, config: Config) -> ValidationSet | None:
        if self._held_out is None:
            return None
        return _validation_set(
            self._held_out, max_tokens=config.validation.tokens, tokenizer=self.tokenizer
        )


class SftBatches:
    """Batches of rows of conversations, all in memory."""

    def __init__(self, rows: SftRows, *, seed: int, rows_per_step: int) -> None:
        self._rows = rows
        self._seed = seed
        self._rows_per_step = rows_per_step

    def batch(self, data_step: int) -> Batch:
        """The global batch; see `SftRows.batch`."""
        return self._rows.batch(data_step, seed=self._seed, rows_per_step=self._rows_per_step)

    def close(self) -> None:
        """Nothing is open."""


def check_finetuning(config: Config) -> None:
    """Looks at what can be looked at in a moment, so that it is said once, not by every rank.

    Raises:
        MilepostError: as `open_finetuning`.
    """
    if config.finetune.data.startswith(HUB_PREFIX):
        _open_asker(config)
        find_instructions(config.finetune.data)  # the ranks fetch them
    else:
        _read_material(config)


def open_finetuning(config: Config) -> Finetuning:
    """Reads the conversations and looks at the base; the weights are not read yet.

    Raises:
        UsageError: the base is no model that can be tuned, or a question does not fit it.
        CheckpointError: a file of the base is missing or damaged.
        DataError: the conversations cannot be read, or none can be used.
    """
    read = _read_material(config)
    asker = read.asker
    make_rows = partial(
        build_rows,
        template=asker.template,
        tokenizer=asker.tokenizer,
        sequence_length=config.data.sequence_length,
        seed=config.run.seed,
    )
    rows, ledger = make_rows(read.to_train, ledger=read.ledger)
    held_out, ledger = make_rows(read.to_score, ledger=ledger)
    return Finetuning(
        asker.base,
        tokenizer=asker.tokenizer,
        template=asker.template,
        rows=rows,
        held_out=held_out if held_out.num_rows else None,
        ledger=ledger,
        source=config.finetune.data,
        uses_lora=config.lora.rank is not None,
    )


def _open_asker(config: Config) -> _Asker:
    assert config.finetune.template is not None, "the verb looks at it"
    base = open_base(Path(config.finetune.base))
    asker = _Asker(base, load_tokenizer(str(base.folder)), load_template(config.finetune.template))
    _check_questions(config, template=asker.template, tokenizer=asker.tokenizer)
    return asker


def _read_material(config: Config) -> _Material:
    """All that rows are made of, looked at until it is sure that there will be some."""
    asker = _open_asker(config)
    conversations, ledger = read_conversations(config.finetune.data)
    fraction = config.finetune.held_out_fraction
    to_train, to_score = split_held_out(conversations, fraction=fraction)
    if not to_train:
        raise DataError(
            f"all {len(conversations)} conversations of {config.finetune.data} are held out",
            hint="lower finetune.held_out_fraction, or give more conversations",
        )
    check_rows(
        to_train,
        template=asker.template,
        tokenizer=asker.tokenizer,
        sequence_length=config.data.sequence_length,
    )
    return _Material(asker, to_train, to_score, ledger)


def open_base(path: Path) -> Base:
    """The model that a person means: a run (its latest checkpoint) or any model folder.

    Raises:
        UsageError: it is no model, or an adapter.
        CheckpointError: a file is missing.
    """
    if is_adapter(path):
        raise _no_base(path)
    folder = model_folder(path).resolve()
    if is_adapter(folder):
        raise _no_base(folder)
    read_config(folder)
    return Base(folder, identify(FoundModel(folder)))


def _no_base(folder: Path) -> UsageError:
    return UsageError(
        f"{folder} is an adapter, which cannot be tuned once more",
        hint=f"milepost export {folder} --to DIR writes base and adapter as one model",
    )


def _add_lora(model: Llama, *, config: Config) -> None:
    lora = config.lora
    assert lora.rank is not None
    add_lora(
        model,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=lora.targets,
        seed=config.run.seed,
    )


def _check_questions(config: Config, *, template: ChatTemplate, tokenizer: Tokenizer) -> None:
    """Refuses before the training what would fail behind it."""
    context = config.model.max_position_embeddings
    for question in config.finetune.questions:
        if not question.strip():
            raise UsageError(
                "finetune.questions holds one without a word",
                hint="take it out, or ask something",
            )
        num_tokens = len(question_ids(question, template=template, tokenizer=tokenizer))
        if num_tokens >= context:
            raise UsageError(
                f"finetune.questions: {question[:40]!r} takes {num_tokens} tokens with the "
                f"template, the context (model.max_position_embeddings) has {context}",
                hint="shorten it, or give others with --finetune.questions '[\"...\"]'",
            )


def question_ids(question: str, *, template: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    """The tokens after which a model answers a question, as training has seen them."""
    messages = [Message("user", question)]
    chat = template.encode(messages, tokenizer=tokenizer, add_generation_prompt=True)
    return [int(token_id) for token_id in chat.ids]


def _validation_set(rows: SftRows, *, max_tokens: int, tokenizer: Tokenizer) -> ValidationSet:
    """The first rows that have no more than so many targets, one at least."""
    num_until = np.cumsum((rows.target_ids >= 0).sum(axis=1))
    num_rows = max(1, int((num_until <= max_tokens).sum()))
    targets = rows.target_ids[:num_rows]
    return ValidationSet(
        inputs=rows.input_ids[:num_rows],
        targets=targets,
        num_bytes=tokenizer.count_bytes(targets[targets >= 0]),
        documents=rows.segment_ids[:num_rows],
    )
