"""Saving: a checkpoint of the run as it stands, then what retention says."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from milepost.checkpoint.retention import drop_old_train_states
from milepost.checkpoint.state import Progress, TrainState
from milepost.checkpoint.store import save_checkpoint
from milepost.config.schema import CheckpointSection
from milepost.core.console import say
from milepost.core.errors import StorageError
from milepost.core.units import format_bytes
from milepost.model.llama import Llama
from milepost.runs.events import EventWriter
from milepost.runs.layout import RunLayout
from milepost.train.optimizer import moments_by_name


@dataclass
class Saver:
    """Writes checkpoints; only the main rank has one.

    Attributes:
        model_files: the Hugging Face files beside the weights, by name.
        saved_step: the newest step that needs no saving.
    """

    layout: RunLayout
    run_id: str
    config: CheckpointSection
    model: Llama
    optimizer: torch.optim.Optimizer
    model_files: dict[str, bytes]
    events: EventWriter
    saved_step: int

    def save(self, progress: Progress) -> None:
        """Saves, then drops what retention says; a save that fails is tried once more after.

        Raises:
            StorageError: it failed twice; earlier checkpoints are as they were.
        """
        if progress.step == self.saved_step:
            return
        try:
            self._write(progress)
        except StorageError:
            self._drop_old()
            self._write(progress)
        self.saved_step = progress.step
        self._drop_old()

    def _write(self, progress: Progress) -> None:
        moments, num_updates = moments_by_name(self.model, optimizer=self.optimizer)
        state = TrainState(
            progress=progress,
            weights={name: p.detach() for name, p in self.model.state_dict().items()},
            moments=moments,
            optimizer_step=num_updates,
        )
        saved = save_checkpoint(
            self.layout,
            run_id=self.run_id,
            state=state,
            model_files=self.model_files,
            weights_dtype=self.config.weights_dtype,
        )
        self.events.append(
            "checkpoint_saved",
            step=progress.step,
            sha256=saved.sha256,
            bytes=saved.num_bytes,
            seconds=saved.seconds,
        )
        say(f"step {progress.step}  checkpoint saved, {format_bytes(saved.num_bytes)}")

    def _drop_old(self) -> None:
        drop_old_train_states(
            self.layout,
            keep=self.config.keep_train_state,
            every_steps=self.config.keep_train_state_every_steps,
            record=lambda step: self.events.append("train_state_dropped", step=step),
        )
