"""Saving: a copy of the run as it stands, which a thread writes while training goes on.

The `Saver` is the training thread's and never touches the disk; the `CheckpointWriter` is the
writing thread's and never touches what is trained on.
"""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from milepost.checkpoint.finite import refuse_what_is_not_finite
from milepost.checkpoint.host_copy import HostCopy
from milepost.checkpoint.retention import drop_old_train_states
from milepost.checkpoint.state import Progress, TrainState
from milepost.checkpoint.store import MODEL_FILE, SavedCheckpoint, save_checkpoint
from milepost.config.schema import CheckpointSection
from milepost.core.console import say, warn
from milepost.core.errors import MilepostError, StorageError
from milepost.core.units import format_bytes
from milepost.model.llama import Llama
from milepost.runs.events import EventWriter
from milepost.runs.layout import RunLayout
from milepost.train.optimizer import moments_by_name, moments_bytes


@dataclass
class CheckpointWriter:
    """Writes checkpoints and keeps to the retention; one call at a time.

    Attributes:
        model_files: the Hugging Face files beside the weights, by name.
        weights_file: the name of the weights' own.
        good_step: the newest step whose train state is known to be whole, as it was verified at
            the start or written by this process; 0 where there is none. Retention keeps it.
        keeps_for_rollback: whether retention keeps what a rollback may need, beside the rest.
        first_step: that the run began at.
    """

    layout: RunLayout
    run_id: str
    config: CheckpointSection
    model_files: dict[str, bytes]
    events: EventWriter
    good_step: int
    weights_file: str = MODEL_FILE
    keeps_for_rollback: bool = False
    first_step: int = 0

    def write(self, state: TrainState, *, waited_seconds: float) -> None:
        """Writes a checkpoint, records it, then drops what retention says.

        What fails is tried once more if retention could free something.

        Args:
            state: on the CPU; nothing else may change it meanwhile.
            waited_seconds: how long training stood still for it.

        Raises:
            StorageError: it failed; earlier checkpoints are as they were.
        """
        assert state.progress.step > self.good_step, "steps only grow"
        saved = None
        try:
            saved = self._save(state)
            self._record(saved, waited_seconds=waited_seconds)
        except StorageError:
            if not self.drop_old():
                raise
            # Where only its event failed, the checkpoint is there and is not written once more.
            saved = saved or self._save(state)
            self._record(saved, waited_seconds=waited_seconds)
        self.drop_old()

    def drop_old(self) -> list[int]:
        """Drops train states that are older than retention keeps; returns their steps."""
        return drop_old_train_states(
            self.layout,
            good_step=self.good_step,
            keep=self.config.keep_train_state,
            every_steps=self.config.keep_train_state_every_steps,
            scheduled=self.config.every_steps if self.keeps_for_rollback else None,
            first_step=self.first_step,
            record=lambda step: self.events.append_durably("train_state_dropped", step=step),
        )

    def _save(self, state: TrainState) -> SavedCheckpoint:
        # No loss of power may leave a checkpoint without the history that led to it.
        self.events.force()
        saved = save_checkpoint(
            self.layout,
            run_id=self.run_id,
            state=state,
            model_files=self.model_files,
            weights_file=self.weights_file,
            weights_dtype=self.config.weights_dtype,
        )
        self.good_step = saved.step
        return saved

    def _record(self, saved: SavedCheckpoint, *, waited_seconds: float) -> None:
        self.events.append(
            "checkpoint_saved",
            step=saved.step,
            sha256=saved.sha256,
            bytes=saved.num_bytes,
            seconds=saved.seconds,
            waited_seconds=waited_seconds,
        )
        say(f"step {saved.step}  checkpoint saved, {format_bytes(saved.num_bytes)}")


class Saver:
    """Copies the train state and has it written; only the main rank has one.

    One save is under way at a time. The `with` block of a saver ends when all of them are done.

    Args:
        writer: used by this saver's thread alone.
        model: whose weights are trained.
        weights: what is trained, float32, by the names a checkpoint has for it; None: all of
            the model, by parameter name.
        optimizer: of the model.
        saved_step: the newest step that needs no saving.
        mark: a file that is there while a save is under way; None: nobody looks for it.
    """

    def __init__(
        self,
        writer: CheckpointWriter,
        *,
        model: Llama,
        weights: dict[str, torch.Tensor] | None = None,
        optimizer: torch.optim.Optimizer,
        saved_step: int,
        mark: Path | None = None,
    ) -> None:
        self._writer = writer
        self._mark = mark
        self._model = model
        self._optimizer = optimizer
        self._saved_step = saved_step
        if weights is None:
            weights = {name: p.detach() for name, p in model.state_dict().items()}
        self._weights = weights
        num_bytes = sum(w.nbytes for w in weights.values())
        num_bytes += moments_bytes(model, optimizer=optimizer)
        device = next(model.parameters()).device
        # Taken before training: where there is no room for it, no time is lost.
        self._copy = HostCopy(num_bytes, device=device)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer")
        self._writing: Future[None] | None = None

    def save(self, progress: Progress) -> None:
        """Copies the state and begins to write it; first waits for the save before.

        Raises:
            StorageError: the save before failed.
            DivergedError: its weights or moments were not finite.
        """
        if progress.step == self._saved_step:
            return
        started = time.monotonic()
        self.finish()
        moments, num_updates = moments_by_name(self._model, optimizer=self._optimizer)
        state = TrainState(
            progress=progress, weights=self._weights, moments=moments, optimizer_step=num_updates
        )
        copied = self._copy.fill(state)
        waited_seconds = time.monotonic() - started
        if self._mark is not None:
            with contextlib.suppress(OSError):
                self._mark.touch()
        self._writing = self._thread.submit(self._write, copied, waited_seconds=waited_seconds)
        self._saved_step = progress.step

    def rewind(self, step: int) -> None:
        """Takes note of a rollback to a step that is saved, or to 0; no save is under way."""
        assert self._writing is None
        self._saved_step = self._writer.good_step = step

    def _write(self, state: TrainState, *, waited_seconds: float) -> None:
        """What the writing thread does."""
        try:
            refuse_what_is_not_finite(state)
            self._writer.write(state, waited_seconds=waited_seconds)
        finally:
            if self._mark is not None:
                with contextlib.suppress(OSError):
                    self._mark.unlink()

    def is_saving(self) -> bool:
        """Whether a save is under way."""
        return self._writing is not None and not self._writing.done()

    def raise_failure(self, progress: Progress) -> None:
        """Raises what went wrong with a save that has ended by now; does not wait."""
        if self._writing is not None and self._writing.done():
            self.finish()

    def finish(self) -> None:
        """Waits for the save under way.

        Raises:
            StorageError: it failed; earlier checkpoints are as they were.
            DivergedError: weights or moments were not finite; nothing was written.
            MilepostError: there was no memory for it.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
                raise
            raise MilepostError(
                "out of memory while a checkpoint was written; the newest is one from before",
                hint="milepost plan says what a save takes beside the training",
            ) from error

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.finish()
        except MilepostError as failure:
            if error is None:
                raise
            warn(f"{failure.message}; the newest checkpoint is one from before")
        finally:
            self._thread.shutdown()
            self._copy.unlock()
