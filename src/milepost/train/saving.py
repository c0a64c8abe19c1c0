"""Saving: a checkpoint of the run as it stands, then what retention says."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from milepost.checkpoint.retention import drop_old_train_states
from milepost.checkpoint.state import Progress, TrainState
from milepost.checkpoint.store import SavedCheckpoint, save_checkpoint
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
    _unrecorded: SavedCheckpoint | None = field(default=None, init=False)

    def save(self, progress: Progress) -> None:
        """Saves, then drops what retention says.

        A save that fails is tried once more if retention could free something.

        Raises:
            StorageError: it failed; earlier checkpoints are as they were.
        """
        if progress.step == self.saved_step:
            return
        try:
            self._write(progress)
        except StorageError:
            if not self._drop_old():
                raise
            self._write(progress)
        self.saved_step = progress.step
        self._drop_old()

    def _write(self, progress: Progress) -> None:
        saved = self._unrecorded
        if saved is None or saved.step != progress.step:
            saved = self._save_checkpoint(progress)
        # Where only its event fails, the checkpoint is there and is not written once more.
        self._unrecorded = saved
        self.events.append(
            "checkpoint_saved",
            step=saved.step,
            sha256=saved.sha256,
            bytes=saved.num_bytes,
            seconds=saved.seconds,
        )
        self._unrecorded = None
        say(f"step {saved.step}  checkpoint saved, {format_bytes(saved.num_bytes)}")

    def _save_checkpoint(self, progress: Progress) -> SavedCheckpoint:
        moments, num_updates = moments_by_name(self.model, optimizer=self.optimizer)
        state = TrainState(
            progress=progress,
            weights={name: p.detach() for name, p in self.model.state_dict().items()},
            moments=moments,
            optimizer_step=num_updates,
        )
        return save_checkpoint(
            self.layout,
            run_id=self.run_id,
            state=state,
            model_files=self.model_files,
            weights_dtype=self.config.weights_dtype,
        )

    def _drop_old(self) -> list[int]:
        return drop_old_train_states(
            self.layout,
            keep=self.config.keep_train_state,
            every_steps=self.config.keep_train_state_every_steps,
            record=lambda step: self.events.append_durably("train_state_dropped", step=step),
        )
