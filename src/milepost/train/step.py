"""One update: microbatches forward and backward, lanes summed, judged, clipped and applied."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from milepost.config.schema import Config
from milepost.core.errors import DivergedError
from milepost.data.batch import Batch
from milepost.distributed.reduce import gather_in_rank_order
from milepost.distributed.world import World
from milepost.train.gradients import LaneGradients
from milepost.train.optimizer import set_learning_rate

FIRST_LOSS_SCALE = 65536.0
SMALLEST_LOSS_SCALE = 1.0
STEPS_TO_DOUBLE_SCALE = 2000

DIVERGED_HINT = (
    "lower optimizer.learning_rate, lengthen the warm-up, or look at the data of this step with "
    "milepost data inspect"
)


class Judgement(Protocol):
    """What was decided of an update."""

    @property
    def is_applied(self) -> bool:
        """Whether it may touch the weights."""


Judge = Callable[[float, float], Judgement]
"""Decides of an update before it touches anything, from its mean loss and its norm before
clipping; every rank has the same two and decides the same."""


class Applied:
    """The judgement of what is applied."""

    is_applied = True


def refuse_what_is_not_finite(loss_nats: float, grad_norm: float) -> Applied:
    """The judge of those who train without guards.

    Raises:
        DivergedError: loss or norm is not finite; weights and moments are untouched.
    """
    if math.isfinite(grad_norm) and math.isfinite(loss_nats):
        return Applied()
    raise DivergedError(
        f"loss {loss_nats:g}, gradient norm {grad_norm:g}: not finite; "
        "the update was refused and the weights are as they were",
        hint=DIVERGED_HINT,
    )


class Objective(Protocol):
    """The forward pass of one microbatch and its loss."""

    def __call__(
        self,
        inputs_BT: torch.Tensor,
        targets_BT: torch.Tensor,
        scale: float,
        documents_BT: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale x sum of nats, nats [B, T] float32); see `Batch` for the arguments."""


@dataclass(frozen=True)
class StepResult:
    """What one update gave, or would have.

    Attributes:
        loss_nats: mean over the global batch's target tokens.
        grad_norm: L2, before clipping.
        num_repeats: float16 overflows that made the batch run again.
        is_stop_requested: whether any rank was asked to stop.
        is_applied: whether it touched the weights.
    """

    loss_nats: float
    grad_norm: float
    num_repeats: int
    is_stop_requested: bool
    is_applied: bool


@dataclass
class LossScale:
    """float16's loss scale: halved at an overflow, doubled after a long quiet; 1 elsewhere."""

    value: float = 1.0
    steps_at_scale: int = 0

    def copy(self) -> LossScale:
        """Another one that is equal now."""
        return replace(self)

    def after_update(self, *, precision: str) -> None:
        """Counts one finite update."""
        if precision != "float16":
            return
        self.steps_at_scale += 1
        if self.steps_at_scale >= STEPS_TO_DOUBLE_SCALE:
            self.value, self.steps_at_scale = self.value * 2, 0

    def after_overflow(self) -> None:
        """Halves the scale."""
        self.value, self.steps_at_scale = self.value / 2, 0


class Stepper:
    """Runs updates of one model on one rank.

    Args:
        objective: the forward pass and its loss, for one microbatch.
        optimizer: of the model's parameters.
        gradients: the model's lane buffers.
        config: of the run.
        world: of this process.
        loss_scale: restored with the run.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        optimizer: torch.optim.Optimizer,
        gradients: LaneGradients,
        config: Config,
        world: World,
        loss_scale: LossScale,
    ) -> None:
        self._objective = objective
        self._optimizer = optimizer
        self._gradients = gradients
        self._config = config
        self._world = world
        self.loss_scale = loss_scale

    def set_loss_scale(self, value: float, steps_at_scale: int) -> None:
        """Sets the scale back to that of a train state."""
        self.loss_scale = LossScale(value, steps_at_scale)

    def run_step(
        self,
        batch: Batch,
        *,
        learning_rate: float,
        stop_requested: Callable[[], bool],
        judge: Judge = refuse_what_is_not_finite,
    ) -> StepResult:
        """One update with one global batch; every rank must call.

        What is refused leaves weights, moments and loss scale as they were.

        Args:
            batch: the whole global batch, on every rank.
            learning_rate: of this update.
            stop_requested: asked once, after the backward passes.
            judge: asked before anything is changed; it may raise.
        """
        before = self.loss_scale.copy()
        num_repeats = 0
        while True:
            loss_nats, is_stopping = self._accumulate(batch, stop_requested)
            flat = self._gradients.sum_all(world=self._world)
            if self.loss_scale.value != 1.0:
                flat.div_(self.loss_scale.value)
            grad_norm = float(torch.linalg.vector_norm(flat))
            if not self._has_overflowed(loss_nats, grad_norm):
                break
            self.loss_scale.after_overflow()
            num_repeats += 1
        after, self.loss_scale = self.loss_scale, before
        is_applied = judge(loss_nats, grad_norm).is_applied
        if is_applied:
            self.loss_scale = after
            self._update(flat, grad_norm, learning_rate)
        return StepResult(loss_nats, grad_norm, num_repeats, is_stopping, is_applied)

    def _has_overflowed(self, loss_nats: float, grad_norm: float) -> bool:
        """Whether a lower loss scale may help: float16's gradients alone are not finite."""
        is_scaled = self._config.train.precision == "float16"
        is_scaled &= self.loss_scale.value > SMALLEST_LOSS_SCALE
        return is_scaled and math.isfinite(loss_nats) and not math.isfinite(grad_norm)

    def _accumulate(self, batch: Batch, stop_requested: Callable[[], bool]) -> tuple[float, bool]:
        """Forward and backward over this rank's lanes; mean loss and whether to stop, agreed."""
        world, train = self._world, self._config.train
        num_rows, num_targets = batch.num_rows, batch.num_targets
        rows_per_lane = num_rows // train.lanes
        first_row = world.rank * (num_rows // world.size)
        microbatch_rows = train.rows_of_forward
        row_nats: list[torch.Tensor] = []
        for lane in range(train.lanes // world.size):
            self._gradients.begin_lane()
            lane_start = first_row + lane * rows_per_lane
            for start in range(lane_start, lane_start + rows_per_lane, microbatch_rows):
                rows = slice(start, start + microbatch_rows)
                inputs, targets = self._to_device(batch.inputs, batch.targets, rows=rows)
                documents = None
                if batch.documents is not None:
                    (documents,) = self._to_device(batch.documents, rows=rows)
                scale = self.loss_scale.value / num_targets
                loss, nats = self._objective(inputs, targets, scale, documents)
                loss.backward()
                row_nats.append(nats.double().sum(dim=1))
            self._gradients.end_lane()
        flag = torch.tensor([float(stop_requested())], dtype=torch.float64, device=world.device)
        gathered = gather_in_rank_order(torch.cat([*row_nats, flag]), world=world).cpu()
        total_nats = sum(gathered[:, :-1].flatten().tolist())
        return total_nats / num_targets, bool(gathered[:, -1].any())

    def _to_device(self, *arrays: np.ndarray, rows: slice) -> list[torch.Tensor]:
        tensors = [torch.from_numpy(array[rows].astype(np.int64)) for array in arrays]
        if self._world.device.type != "cuda":
            return tensors
        return [t.pin_memory().to(self._world.device, non_blocking=True) for t in tensors]

    def _update(self, flat: torch.Tensor, grad_norm: float, learning_rate: float) -> None:
        limit = self._config.optimizer.clip_grad_norm
        if limit is not None and grad_norm > limit:
            flat.mul_(limit / grad_norm)
        set_learning_rate(self._optimizer, learning_rate)
        self._optimizer.step()
        self.loss_scale.after_update(precision=self._config.train.precision)
