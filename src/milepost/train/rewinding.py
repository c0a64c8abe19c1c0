"""A rollback carried out: weights, moments and numbers put back, in place, on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch

from milepost.checkpoint.retention import set_aside_after
from milepost.checkpoint.state import Progress, TrainState
from milepost.checkpoint.store import STATE_FOLDER, load_train_state, verify_checkpoint
from milepost.config.schema import Config
from milepost.core.errors import CheckpointError, DivergedError, MilepostError
from milepost.distributed.decision import decide
from milepost.distributed.world import World
from milepost.model.llama import Llama
from milepost.runs.layout import RunLayout
from milepost.train.opening import OpenedRun
from milepost.train.optimizer import restore_moments
from milepost.train.restoring import fitting_scale, restore_weights
from milepost.train.saving import Saver
from milepost.train.subject import Subject


class Rewinder:
    """Puts a run back to an earlier step; every rank has one.

    Args:
        model: that is trained.
        optimizer: of the model.
        subject: what is trained.
        config: of the run.
        layout: the run folder.
        world: of this process.
        opened: the run, on the main rank only.
        saver: of the run, on the main rank only.
    """

    def __init__(
        self,
        model: Llama,
        *,
        optimizer: torch.optim.Optimizer,
        subject: Subject,
        config: Config,
        layout: RunLayout,
        world: World,
        opened: OpenedRun | None,
        saver: Saver | None,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._subject = subject
        self._config = config
        self._layout = layout
        self._world = world
        self._opened = opened
        self._saver = saver

    def rewind(
        self,
        *,
        to_step: int,
        record: Callable[[Progress], None],
        gone: Callable[[str], MilepostError],
    ) -> Progress:
        """Restores a step; every rank must call.

        A kill at any moment leaves either the run as it was, or the recorded rollback, which the
        next start finishes.

        Args:
            to_step: 0 for the first weights, else of a checkpoint.
            record: writes the event, durably, given where the run stood then; called on the main
                rank.
            gone: makes the error of a checkpoint that cannot be used, from words that follow
                what was wrong; called on the main rank.

        Returns:
            Where the run stood then.

        Raises:
            MilepostError: what `gone` made.
            StorageError: the save under way failed, or the event cannot be written.
        """
        folder = self._layout.checkpoint(to_step) if to_step else None
        decide(lambda: self._check(folder, to_step=to_step, gone=gone), world=self._world)
        state = self._first_state() if folder is None else load_train_state(folder)
        if self._opened is not None and self._saver is not None:
            record(state.progress)
            set_aside_after(self._layout, step=to_step, record=self._record_moved)
            self._saver.rewind(to_step)
        self._restore(state)
        return fitting_scale(state.progress, precision=self._config.train.precision)

    def _check(
        self, folder: Path | None, *, to_step: int, gone: Callable[[str], MilepostError]
    ) -> None:
        """What the main rank sees to before anything is changed."""
        assert self._opened is not None and self._saver is not None
        with contextlib.suppress(DivergedError):  # of a step that is undone now
            self._saver.finish()
        begins_elsewhere = _begins_elsewhere(self._opened)
        if folder is None and begins_elsewhere:
            raise gone(", and the run began with weights that are not its own first ones")
        if folder is None:
            return
        if not (folder / STATE_FOLDER).is_dir():
            raise gone(f", and step {to_step} has no train state to roll back to")
        try:
            verify_checkpoint(folder, run_id=self._opened.manifest.run_id, step=to_step)
        except CheckpointError as error:
            raise gone(
                f", and the checkpoint to roll back to is damaged: {error.message}"
            ) from error

    def _first_state(self) -> TrainState:
        """The state before the first update, made anew."""
        model = self._subject.make_model(self._config)
        self._subject.set_first_weights(model, config=self._config)
        return TrainState(Progress(), self._subject.trained_weights(model), {}, optimizer_step=0)

    def _restore(self, state: TrainState) -> None:
        restore_weights(self._subject.trained_weights(self._model), saved=state.weights)
        self._optimizer.state.clear()
        if state.moments:
            restore_moments(
                self._model,
                optimizer=self._optimizer,
                moments=state.moments,
                num_updates=state.optimizer_step,
            )

    def _record_moved(self, step: int, place: Path, reason: str) -> None:
        assert self._opened is not None
        self._opened.events.append(
            "checkpoint_quarantined", step=step, path=str(place), reason=reason
        )


def _begins_elsewhere(opened: OpenedRun) -> bool:
    """Whether the run's step 0 is not what a subject makes: an import, or another run's."""
    is_import = any(not e.get("segment") for e in opened.history.of_kind("checkpoint_saved"))
    return is_import or "from" in opened.manifest.lineage
