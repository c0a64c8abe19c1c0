"""Carries out what the guards decide, on every rank alike; the main rank says and records it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from milepost.checkpoint.state import Progress
from milepost.config.schema import Config
from milepost.core.console import say, warn
from milepost.core.errors import DivergedError
from milepost.data.batch import Batch
from milepost.runs.events import EventWriter
from milepost.runs.refusals import Refusals, Rollback
from milepost.train.guards import (
    DRIFT_STEPS,
    ResumeDrift,
    Verdict,
    judge,
    recalled,
    rollback_step,
)
from milepost.train.rewinding import Rewinder
from milepost.train.step import DIVERGED_HINT, Stepper, StepResult

_SPIKE_HINT = (
    "look at the data of this step with milepost data inspect, lower optimizer.learning_rate, or "
    "raise guards.spike_z"
)


class GuardStopped(DivergedError):
    """A guard has given up, on all ranks at once."""


class Guarding:
    """The guards of a run at work on one rank.

    Args:
        config: of the run.
        refusals: what the history says; every rank has the same.
        drift: of this segment.
        rewinder: of this rank.
        stepper: whose loss scale a rollback sets back.
        events: None on every rank but the main one.
    """

    def __init__(
        self,
        config: Config,
        *,
        refusals: Refusals,
        drift: ResumeDrift,
        rewinder: Rewinder,
        stepper: Stepper,
        events: EventWriter | None,
    ) -> None:
        self._config = config
        self._refusals = refusals
        self._drift = drift
        self._rewinder = rewinder
        self._stepper = stepper
        self._events = events
        self._verdict = Verdict("apply", "", None, Progress().guards)

    @property
    def verdict(self) -> Verdict:
        """Of the update that was judged last."""
        return self._verdict

    def recall(self, progress: Progress) -> Progress:
        """Where the run stands after what was decided about its next update before."""
        found = recalled(progress, refusals=self._refusals)
        num_skips = found.guards.skips_in_a_row - progress.guards.skips_in_a_row
        if self._events is not None and num_skips > 0:
            batches = "1 batch is" if num_skips == 1 else f"{num_skips} batches are"
            say(f"step {found.step + 1}: {batches} skipped as logged before")
        return found

    def judge_at(self, progress: Progress) -> Callable[[float, float], Verdict]:
        """The judge of the update that comes next."""

        def judge_next(loss_nats: float, grad_norm: float) -> Verdict:
            self._verdict = judge(
                loss_nats, grad_norm, numbers=progress.guards, config=self._config.guards
            )
            return self._verdict

        return judge_next

    def note_applied(self, result: StepResult, batch: Batch, *, progress: Progress) -> None:
        """Warns of an applied update that stands out, and of a drift after a resume.

        Args:
            result: of the update.
            batch: it was made with.
            progress: before it.
        """
        z = self._drift.add(result.loss_nats)
        if self._events is None:
            return
        step = progress.step + 1
        if self._verdict.begins_spike:
            warn(f"step {step}: {self._trouble(result)}")
            self._events.append(
                "guard_warned", guard="spike", **self._facts(result, batch, progress=progress)
            )
        if z is not None:
            warn(
                f"the first {DRIFT_STEPS} losses after the resume lie {z:.1f} robust deviations "
                "above those before it: something was not restored, or has changed"
            )
            self._events.append("guard_warned", guard="resume_drift", step=step, z=z)

    def refuse(self, result: StepResult, batch: Batch, *, progress: Progress) -> Progress:
        """What takes the place of an update that was not applied; every rank must call.

        Returns:
            Where the run stands then.

        Raises:
            GuardStopped: no try is left, or the checkpoint for a rollback is gone.
            MilepostError: see `Rewinder.rewind`.
        """
        if self._verdict.action == "stop":
            raise self._stop(result, batch, progress=progress)
        if self._verdict.action == "roll_back":
            return self._roll_back(result, batch, progress=progress)
        if self._events is not None:
            facts = self._facts(result, batch, progress=progress)
            self._events.append_durably("batch_skipped", why=self._verdict.why, **facts)
            say(
                f"step {progress.step + 1}: {self._trouble(result)}; the batch of data step "
                f"{progress.data_step} is skipped"
            )
        return replace(progress, skipped=progress.skipped + 1, guards=self._verdict.numbers)

    def _roll_back(self, result: StepResult, batch: Batch, *, progress: Progress) -> Progress:
        to_step = rollback_step(
            progress,
            why=self._verdict.why,
            every_steps=self._config.checkpoint.every_steps,
            first_step=self._rewinder.first_step,
        )
        rollback = Rollback(
            to_step=to_step,
            skipped=progress.data_step + 1 - to_step - progress.data_shift,
            rollbacks=progress.guards.rollbacks + 1,
        )
        if self._events is not None:
            trouble = self._trouble(result)
            say(f"step {progress.step + 1}: {trouble}; rolling back to step {to_step}")

        def record(restored: Progress) -> None:
            assert self._events is not None
            # An earlier rollback to this step, or a skip there, has left out data already.
            first_data_step = recalled(restored, refusals=self._refusals).data_step
            self._events.append_durably(
                "rolled_back",
                from_step=progress.step,
                to_step=to_step,
                skipped=rollback.skipped,
                rollbacks=rollback.rollbacks,
                first_data_step=first_data_step,
                last_data_step=progress.data_step,
                batch_sha256=batch.sha256,
                why=self._verdict.why,
                loss_nats=result.loss_nats,
                grad_norm=result.grad_norm,
                z=self._verdict.z,
            )
            count = progress.data_step + 1 - first_data_step
            say(
                f"rolled back to step {to_step}; the data of {count} steps is left out "
                f"(rollback {rollback.rollbacks} of {self._config.guards.max_rollbacks})"
            )

        restored = self._rewinder.rewind(
            to_step=to_step,
            record=record,
            gone=lambda why: self._stop(result, batch, progress=progress, because=why),
        )
        self._refusals = self._refusals.with_rollback(rollback)
        self._drift.end()
        self._stepper.set_loss_scale(restored.loss_scale, restored.steps_at_scale)
        return replace(restored, training_seconds=progress.training_seconds)

    def _stop(
        self, result: StepResult, batch: Batch, *, progress: Progress, because: str = ""
    ) -> GuardStopped:
        """The error that ends the run, recorded."""
        message = f"step {progress.step + 1}: {self._trouble(result)}"
        message += because or self._tries_in_words(progress)
        message += "; the update was refused and the weights are as they were"
        if self._events is not None:
            self._events.append(
                "guard_stopped",
                guard="spike" if self._verdict.why == "spike" else "nonfinite",
                why=message,
                **self._facts(result, batch, progress=progress),
            )
        hint = _SPIKE_HINT if self._verdict.why == "spike" else DIVERGED_HINT
        return GuardStopped(message, hint=hint)

    def _tries_in_words(self, progress: Progress) -> str:
        """', after 3 batches skipped in a row and 2 rollbacks', or ''."""
        guards = progress.guards
        tries = []
        if guards.skips_in_a_row:
            count = guards.skips_in_a_row
            tries.append(f"{count} batch{'es' if count > 1 else ''} skipped in a row")
        if guards.rollbacks and self._config.guards.spike == "rollback":
            tries.append(f"{guards.rollbacks} rollback{'s' if guards.rollbacks > 1 else ''}")
        return f", after {' and '.join(tries)}" if tries else ""

    def _trouble(self, result: StepResult) -> str:
        if self._verdict.why == "spike":
            return (
                f"loss {result.loss_nats:.4f} lies {self._verdict.z:.1f} robust deviations above "
                "those before it"
            )
        return f"loss {result.loss_nats:g}, gradient norm {result.grad_norm:g}: not finite"

    def _facts(self, result: StepResult, batch: Batch, *, progress: Progress) -> dict[str, Any]:
        """Which update it was: fields of an event."""
        return {
            "step": progress.step + 1,
            "data_step": progress.data_step,
            "batch_sha256": batch.sha256,
            "loss_nats": result.loss_nats,
            "grad_norm": result.grad_norm,
            "z": self._verdict.z,
        }
