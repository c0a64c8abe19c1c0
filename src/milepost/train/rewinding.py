"""A rollback carried out: weights, moments and numbers put back, in place, on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from milepost.checkpoint.retention import set_aside_after
from milepost.checkpoint.state import Progress, TrainState
from milepost.checkpoint.store import STATE_FOLDER, verify_checkpoint
from milepost.core.errors import CheckpointError, DivergedError, MilepostError
from milepost.distributed.decision import decide, on_main_rank
from milepost.distributed.world import World
from milepost.model.llama import Llama
from milepost.runs.layout import RunLayout
from milepost.runs.lineage import PARTS
from milepost.train.agreement import Agreement
from milepost.train.opening import OpenedRun
from milepost.train.optimizer import restore_moments
from milepost.train.parent import open_parent
from milepost.train.restoring import fitting_scale, read_state, restore_weights
from milepost.train.saving import Saver
from milepost.train.subject import Subject


class Rewinder:
    """Puts a run back to an earlier step; every rank has one.

    Args:
        model: that is trained.
        optimizer: of the model.
        subject: what is trained.
        agreement: of all ranks.
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
        agreement: Agreement,
        layout: RunLayout,
        world: World,
        opened: OpenedRun | None,
        saver: Saver | None,
    ) -> None:
        self.first_step = agreement.first_step
        self._model = model
        self._optimizer = optimizer
        self._subject = subject
        self._config = agreement.config
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
            to_step: of a checkpoint, or the run's first, which may be of another run's checkpoint
                or have none.
            record: writes the event, durably, given where the run stood then; called on the main
                rank.
            gone: makes the error of a checkpoint that cannot be used, from words that follow
                what was wrong; called on every rank.

        Returns:
            Where the run stood then.

        Raises:
            MilepostError: what `gone` made.
            StorageError: the save under way failed, or the event cannot be written.
        """
        source = decide(lambda: self._source(to_step), world=self._world)
        if "gone" in source:
            raise gone(source["gone"])
        if source["folder"] is None:
            state = self._first_state()
        else:
            state = read_state(Path(source["folder"]), parts=tuple(source["parts"]))

        def undo() -> None:
            assert self._opened is not None and self._saver is not None
            record(state.progress)
            set_aside_after(self._layout, step=to_step, record=self._record_moved)
            self._saver.rewind(to_step)

        on_main_rank(undo, world=self._world)
        self._restore(state)
        return fitting_scale(state.progress, precision=self._config.train.precision)

    def _source(self, to_step: int) -> dict[str, Any]:
        """What is read again, verified: {"folder", "parts"}, a folder of None for the first
        weights, or {"gone"} in words; the main rank's work.
        """
        assert self._opened is not None and self._saver is not None
        with contextlib.suppress(DivergedError):  # of a step that is undone now
            self._saver.finish()
        own, origin = self._layout.checkpoint(to_step), self._opened.origin
        try:
            if to_step == self.first_step and origin is not None:
                return {"folder": str(open_parent(origin).folder), "parts": origin.parts}
            if to_step == 0 and "imported_from" not in self._opened.manifest.lineage:
                return {"folder": None, "parts": PARTS}
            if not (own / STATE_FOLDER).is_dir():
                return {"gone": f", and step {to_step} has no train state to roll back to"}
            verify_checkpoint(own, run_id=self._opened.manifest.run_id, step=to_step)
        except CheckpointError as error:
            return {"gone": f", and what to roll back to cannot be used: {error.message}"}
        return {"folder": str(own), "parts": PARTS}

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
