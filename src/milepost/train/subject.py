"""What differs between one kind of training and another; the loop and all around it is one.

Pretraining is `train/pretraining.py`; fine-tuning stands above this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from milepost.config.schema import Config
from milepost.data.batch import Batches
from milepost.data.shards import ShardSet
from milepost.evaluation.validation import ValidationSet
from milepost.model.llama import Llama
from milepost.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Identity:
    """What a run is made from, held against its manifest whenever it is continued.

    Attributes:
        place: of the data, for messages.
        parts: what each hash is of, for messages: training, validation, tokenizer.
        fingerprint: of what is trained on.
        validation_fingerprint: of what is scored and never trained on; None where there is none.
        tokenizer_sha256: of the tokenizer.
        hint: what to do where one of them differs.
        lineage: where the first weights come from, with their hash as `base_sha256`; empty for
            a run from scratch.
    """

    place: str
    parts: tuple[str, str, str]
    fingerprint: str
    validation_fingerprint: str | None
    tokenizer_sha256: str
    hint: str
    lineage: dict[str, Any]


class Subject(Protocol):
    """What a run trains, on what, and what its checkpoints hold. Every rank opens its own."""

    @property
    def identity(self) -> Identity:
        """What the run is made from."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the data and the model."""

    @property
    def benchmark_shards(self) -> ShardSet | None:
        """Validation text for the benchmarks that ask for it."""

    @property
    def weights_file(self) -> str:
        """The file of a checkpoint that holds what is trained."""

    def verify(self) -> None:
        """Reads everything and holds it against its hashes; the main rank's work.

        Raises:
            DataError: a file is missing or has changed.
        """

    def introduction(self, config: Config) -> str:
        """One line that says what is trained, and on how much."""

    def num_trained(self, config: Config) -> int:
        """Parameters that are trained."""

    def make_model(self, config: Config) -> Llama:
        """The model on the CPU in float32, what is trained not yet set."""

    def set_first_weights(self, model: Llama, *, config: Config) -> None:
        """Gives what is trained its first values, in place."""

    def trained_weights(self, model: Llama) -> dict[str, Tensor]:
        """What is trained, by the names a checkpoint has for it; nothing is copied."""

    def model_files(self, model: Llama, *, config: Config) -> dict[str, bytes]:
        """The files of a checkpoint beside the weights, by name."""

    def batches(self, config: Config) -> Batches:
        """The global batches.

        Raises:
            DataError: too little data for one.
        """

    def validation_set(self, config: Config) -> ValidationSet | None:
        """The fixed rows that are scored; None where there are none."""
