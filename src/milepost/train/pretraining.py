"""Pretraining: a model from random weights, on every token of prepared shards."""

from __future__ import annotations

import json

from torch import Tensor

from milepost.checkpoint.store import MODEL_FILE
from milepost.config.schema import Config
from milepost.core.console import progress
from milepost.core.units import format_count
from milepost.data.batch import Batch
from milepost.data.loader import Loader
from milepost.data.run_data import open_run_data
from milepost.data.shards import PreparedData, ShardSet
from milepost.evaluation.validation import ValidationSet
from milepost.model.huggingface import hf_config, hf_generation_config
from milepost.model.init import initialize
from milepost.model.llama import Llama
from milepost.planner.cost import count_parameters
from milepost.text.tokenizer import Tokenizer
from milepost.train.subject import Identity
from milepost.train.watching import open_validation_set


class Pretraining:
    """The subject of `milepost train`; see `Subject`."""

    weights_file = MODEL_FILE

    def __init__(self, data: PreparedData) -> None:
        self._data = data
        self.tokenizer: Tokenizer = data.tokenizer()

    @property
    def identity(self) -> Identity:
        data = self._data
        return Identity(
            place=str(data.folder),
            parts=("training shards", "validation shards", "tokenizer"),
            fingerprint=data.train.fingerprint,
            validation_fingerprint=data.validation.fingerprint if data.validation else None,
            tokenizer_sha256=data.tokenizer_sha256,
            hint="point --data.path to the folder that the run was made with",
            lineage={},
        )

    @property
    def benchmark_shards(self) -> ShardSet | None:
        return self._data.validation

    def verify(self) -> None:
        data = self._data
        splits = [data.train] if data.validation is None else [data.train, data.validation]
        total = sum(split.num_files for split in splits)
        num_checked = 0
        with progress(f"checking {data.folder}", total=total) as bar:
            for split in splits:
                for name in split.verify():
                    num_checked += 1
                    bar.update(num_checked, note=name)

    def introduction(self, config: Config) -> str:
        return (
            f"{format_count(self.num_trained(config))} parameters; "
            f"{format_count(self._data.train.num_tokens)} tokens in {self._data.folder}; "
            f"{config.last_step} steps of {config.train.global_batch_tokens:,} tokens"
        )

    def num_trained(self, config: Config) -> int:
        return count_parameters(config.model).total

    def make_model(self, config: Config) -> Llama:
        return Llama(config.model)

    def set_first_weights(self, model: Llama, *, config: Config) -> None:
        initialize(model, config=config.model, seed=config.run.seed)

    def trained_weights(self, model: Llama) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in model.state_dict().items()}

    def model_files(self, model: Llama, *, config: Config) -> dict[str, bytes]:
        return whole_model_files(config, tokenizer=self.tokenizer)

    def batches(self, config: Config) -> RunningText:
        return RunningText(
            Loader(
                self._data.train,
                seed=config.run.seed,
                sequence_length=config.data.sequence_length,
                rows_per_step=config.rows_per_step,
            )
        )

    def validation_set(self, config: Config) -> ValidationSet | None:
        if self._data.validation is None:
            return None
        return open_validation_set(
            self._data.validation, config=config, data=self._data, tokenizer=self.tokenizer
        )


class RunningText:
    """Batches in which every token is a target."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def batch(self, data_step: int) -> Batch:
        """The rows of a step; see `Loader.batch`."""
        return Batch.of_tokens(self._loader.batch(data_step))

    def close(self) -> None:
        """Closes the loader."""
        self._loader.close()


def open_pretraining(config: Config) -> Pretraining:
    """Opens the data of a run; hashes are not read yet.

    Raises:
        UsageError: data.path is not set.
        DataError: it holds no prepared data, or token ids the model does not have.
    """
    return Pretraining(open_run_data(config))


def whole_model_files(config: Config, *, tokenizer: Tokenizer) -> dict[str, bytes]:
    """The Hugging Face files beside the weights of a whole model."""
    end = tokenizer.end_of_text_id
    dtype = config.checkpoint.weights_dtype
    documents = {
        "config.json": hf_config(config.model, end_of_text_id=end, dtype=dtype),
        "generation_config.json": hf_generation_config(end_of_text_id=end),
    }
    texts = {name: (json.dumps(v, indent=2) + "\n").encode() for name, v in documents.items()}
    return texts | tokenizer.files()
