"""What is trained, made new or as a checkpoint left it, of this run or of its parent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from milepost.checkpoint.state import Progress, TrainState
from milepost.checkpoint.store import load_train_state, load_weights
from milepost.config.schema import Config
from milepost.core.errors import CheckpointError
from milepost.distributed.world import World
from milepost.model.llama import Llama
from milepost.runs.lineage import DATA, OPTIMIZER, PARTS, SCHEDULE, WEIGHTS, Parts
from milepost.train.optimizer import build_optimizer, restore_moments
from milepost.train.step import FIRST_LOSS_SCALE
from milepost.train.subject import Subject


def model_to_train(
    folder: Path | None, *, parts: Parts, config: Config, subject: Subject, world: World
) -> tuple[Llama, torch.optim.Optimizer, Progress]:
    """The model and its optimizer on their device, and where the run stands.

    Args:
        folder: the checkpoint; None for a new start.
        parts: what of it is restored; all for a checkpoint of the run itself.
        config: resolved.
        subject: what is trained.
        world: of this process.

    Raises:
        CheckpointError: the train state does not fit the model.
    """
    model = subject.make_model(config)
    state = None if folder is None else read_state(folder, parts=parts)
    if state is None:
        subject.set_first_weights(model, config=config)
    else:
        restore_weights(subject.trained_weights(model), saved=state.weights)
    model.to(world.device)
    optimizer = build_optimizer(model, config=config.optimizer)
    if state is None:
        return model, optimizer, fitting_scale(Progress(), precision=config.train.precision)
    if OPTIMIZER in parts:
        restore_moments(
            model, optimizer=optimizer, moments=state.moments, num_updates=state.optimizer_step
        )
    return model, optimizer, fitting_scale(state.progress, precision=config.train.precision)


def read_state(folder: Path, *, parts: Parts) -> TrainState:
    """What a run takes of a checkpoint; the rest is as before the first update.

    Weights only need no train state.

    Raises:
        CheckpointError: it cannot be read.
    """
    if parts == (WEIGHTS,):
        return TrainState(Progress(), load_weights(folder), {}, optimizer_step=0)
    state = load_train_state(folder)
    progress = restored_progress(state.progress, parts=parts)
    if OPTIMIZER not in parts:
        return TrainState(progress, state.weights, {}, optimizer_step=0)
    return replace(state, progress=progress)


def restored_progress(saved: Progress, *, parts: Parts) -> Progress:
    """Where a run stands that restores some parts of a train state.

    The schedule is a function of the step and the data of the data step, so that the one can go
    on while the other begins anew.
    """
    if parts == PARTS:
        return saved
    kept = Progress()
    if SCHEDULE in parts:
        kept = replace(
            kept,
            step=saved.step,
            tokens_seen=saved.tokens_seen,
            training_seconds=saved.training_seconds,
        )
    if OPTIMIZER in parts:
        kept = replace(kept, loss_scale=saved.loss_scale, steps_at_scale=saved.steps_at_scale)
    data_step = saved.data_step if DATA in parts else 0
    return replace(kept, data_shift=data_step - kept.step)


def fitting_scale(progress: Progress, *, precision: str) -> Progress:
    """The saved loss scale, or a fresh one where the run has none of this precision yet."""
    if precision != "float16":
        return replace(progress, loss_scale=1.0, steps_at_scale=0)
    if progress.loss_scale == 1.0 and progress.steps_at_scale == 0:  # not yet float16
        return replace(progress, loss_scale=FIRST_LOSS_SCALE, steps_at_scale=0)
    return progress


@torch.no_grad()
def restore_weights(own: dict[str, torch.Tensor], *, saved: dict[str, torch.Tensor]) -> None:
    """Copies saved tensors over the model's own."""
    for name, tensor in own.items():
        if name not in saved or saved[name].shape != tensor.shape:
            raise CheckpointError(f"the checkpoint has no fitting tensor {name}")
    if left := sorted(set(saved) - set(own)):
        raise CheckpointError(f"the checkpoint has an unknown tensor {left[0]}")
    for name, tensor in own.items():
        tensor.copy_(saved[name])
