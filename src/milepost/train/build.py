"""Composition: the parts of a training run, made in one place, and the run around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from milepost.checkpoint.state import Progress
from milepost.checkpoint.store import load_train_state, needed_bytes, refuse_if_full
from milepost.config.recipe import as_plain, config_from_plain
from milepost.config.schema import Config
from milepost.core.console import say
from milepost.core.errors import CheckpointError
from milepost.distributed.reduce import broadcast_json
from milepost.distributed.world import World
from milepost.evaluation.catalog import parse_tasks
from milepost.model.llama import Llama
from milepost.planner.cost import flops_per_token
from milepost.planner.duration import gpu_of_device
from milepost.runs.evaluations import EvaluationStore
from milepost.runs.events import History
from milepost.runs.layout import RunLayout
from milepost.train.evaluating import make_evaluation, open_tasks
from milepost.train.exactness import device_names, judge_exactness, machine_facts
from milepost.train.gradients import LaneGradients
from milepost.train.loop import LoopParts
from milepost.train.objective import build_objective
from milepost.train.opening import OpenedRun
from milepost.train.optimizer import build_optimizer, restore_moments
from milepost.train.periodic import Periodic
from milepost.train.replay import ReplayCheck
from milepost.train.saving import CheckpointWriter, Saver
from milepost.train.schedule import learning_rate
from milepost.train.step import FIRST_LOSS_SCALE, LossScale, Stepper
from milepost.train.subject import Subject
from milepost.train.throughput import Throughput
from milepost.train.watching import make_sampling, make_validation


@dataclass(frozen=True)
class Agreement:
    """What the main rank decided and every rank builds from.

    Attributes:
        config: resolved.
        restore_from: the checkpoint folder, None for a new start.
        is_finished: nothing is left to do.
        missing: what was due at the restored step and was not reached: "validation", "sample",
            names of benchmarks; at the first step of a run all.
    """

    config: Config
    restore_from: Path | None
    is_finished: bool
    missing: frozenset[str]


def agree(opened: OpenedRun | None, *, world: World) -> Agreement:
    """Gives the main rank's decision to every rank; every rank must call."""
    plain: dict[str, Any] = {}
    if opened is not None:
        found = opened.restorable
        missing = _missing_at_start(opened)
        plain = {
            "config": as_plain(opened.config),
            "restore_from": None if found is None else str(found.folder),
            "is_finished": opened.is_finished and not missing,
            "missing": missing,
        }
    plain = broadcast_json(plain, world=world)
    folder = plain["restore_from"]
    return Agreement(
        config=config_from_plain(plain["config"], source="the run's config"),
        restore_from=None if folder is None else Path(folder),
        is_finished=plain["is_finished"],
        missing=frozenset(plain["missing"]),
    )


def _missing_at_start(opened: OpenedRun) -> list[str]:
    step = 0 if opened.restorable is None else opened.restorable.step
    config, history = opened.config, opened.history
    if step > config.last_step:
        return []

    def was_due(every: int | None) -> bool:
        return every is not None and (step % every == 0 or step == config.last_step)

    has_validation = opened.manifest.validation_fingerprint is not None
    intervals = {
        "validation": config.validation.every_steps if has_validation else None,
        "sample": config.samples.every_steps,
    }
    missing = [
        kind
        for kind, every in intervals.items()
        if was_due(every) and step not in history.latest_by_step(kind)
    ]
    if was_due(config.evaluation.every_steps):
        events = history.of_kind("evaluation")
        done = {event.get("benchmark") for event in events if event.get("step") == step}
        missing += [name for name in parse_tasks(config.evaluation.tasks) if name not in done]
    return missing


def build(
    agreement: Agreement,
    *,
    layout: RunLayout,
    subject: Subject,
    opened: OpenedRun | None,
    world: World,
    stop_requested: Callable[[], bool],
    saving_mark: Path | None,
) -> LoopParts:
    """Everything the loop needs on this rank; every rank must call.

    Args:
        agreement: of all ranks.
        layout: the run folder.
        subject: what is trained, on what; verified by the main rank.
        opened: the run, on the main rank only.
        world: of this process.
        stop_requested: whether this process was asked to stop.
        saving_mark: see `Saver`.

    Raises:
        CheckpointError: the train state does not fit the model.
        DataError: too little data.
    """
    config = agreement.config
    model, optimizer, progress = _model_to_train(agreement, subject=subject, world=world)
    weights = subject.trained_weights(model)
    periodic = _watching(
        agreement,
        model=model,
        subject=subject,
        layout=layout,
        opened=opened,
        world=world,
        stop_requested=stop_requested,
        restored_step=progress.step,
    )
    saver = None
    if opened is not None:
        saver = Saver(
            _checkpoint_writer(opened, layout=layout, subject=subject, model=model),
            model=model,
            weights=weights,
            optimizer=optimizer,
            saved_step=progress.step,
            mark=saving_mark,
        )
        periodic.append(Periodic(1, saver.raise_failure))
        periodic.append(Periodic(config.checkpoint.every_steps, saver.save))
    return LoopParts(
        progress=progress,
        last_step=config.last_step,
        batches=subject.batches(config),
        learning_rate=lambda step: learning_rate(step, config=config),
        stepper=Stepper(
            build_objective(model, config=config, end_of_text_id=subject.tokenizer.end_of_text_id),
            optimizer=optimizer,
            gradients=LaneGradients(model),
            config=config,
            world=world,
            loss_scale=LossScale(progress.loss_scale, progress.steps_at_scale),
        ),
        periodic=periodic,
        saver=saver,
        throughput=_throughput(config, world=world),
        replay=_replay_check(opened, restored_step=progress.step),
        events=opened.events if opened is not None else None,
        stop_requested=stop_requested,
    )


def _model_to_train(
    agreement: Agreement, *, subject: Subject, world: World
) -> tuple[Llama, torch.optim.Optimizer, Progress]:
    """The model and its optimizer on their device, new or as a checkpoint left them."""
    config = agreement.config
    model = subject.make_model(config)
    if agreement.restore_from is None:
        subject.set_first_weights(model, config=config)
        model.to(world.device)
        first_scale = FIRST_LOSS_SCALE if config.train.precision == "float16" else 1.0
        optimizer = build_optimizer(model, config=config.optimizer)
        return model, optimizer, Progress(loss_scale=first_scale)
    state = load_train_state(agreement.restore_from)
    _restore_weights(subject.trained_weights(model), saved=state.weights)
    model.to(world.device)
    optimizer = build_optimizer(model, config=config.optimizer)
    restore_moments(
        model, optimizer=optimizer, moments=state.moments, num_updates=state.optimizer_step
    )
    return model, optimizer, _fitting_scale(state.progress, precision=config.train.precision)


def _fitting_scale(progress: Progress, *, precision: str) -> Progress:
    """The saved loss scale, or a fresh one where an override changed the precision."""
    if precision != "float16":
        return replace(progress, loss_scale=1.0, steps_at_scale=0)
    if progress.loss_scale == 1.0 and progress.steps_at_scale == 0:  # not yet float16
        return replace(progress, loss_scale=FIRST_LOSS_SCALE, steps_at_scale=0)
    return progress


def _watching(
    agreement: Agreement,
    *,
    model: Llama,
    subject: Subject,
    layout: RunLayout,
    opened: OpenedRun | None,
    world: World,
    stop_requested: Callable[[], bool],
    restored_step: int,
) -> list[Periodic]:
    """Validation and benchmarks on every rank, then samples on the main rank."""
    config = agreement.config
    periodic: list[Periodic] = []
    action: Callable[[Progress], bool | None]
    if (rows := subject.validation_set(config)) is not None:
        action = make_validation(
            model,
            rows=rows,
            config=config,
            world=world,
            events=opened.events if opened is not None else None,
            stop_requested=stop_requested,
        )
        is_missing = "validation" in agreement.missing
        periodic.append(Periodic(config.validation.every_steps, action, at_start=is_missing))
    if config.evaluation.every_steps is not None:
        tasks = open_tasks(config, subject=subject, world=world)
        names = agreement.missing & {task.benchmark for task in tasks}
        action = make_evaluation(
            model,
            tasks=tasks,
            tokenizer=subject.tokenizer,
            config=config,
            store=EvaluationStore(layout.root),
            opened=opened,
            world=world,
            stop_requested=stop_requested,
            made_up={restored_step: names},
        )
        periodic.append(Periodic(config.evaluation.every_steps, action, at_start=bool(names)))
    if opened is not None and config.samples.every_steps is not None:
        action = make_sampling(
            model, tokenizer=subject.tokenizer, config=config, layout=layout, events=opened.events
        )
        is_missing = "sample" in agreement.missing
        periodic.append(Periodic(config.samples.every_steps, action, at_start=is_missing))
    return periodic


def _checkpoint_writer(
    opened: OpenedRun, *, layout: RunLayout, subject: Subject, model: Llama
) -> CheckpointWriter:
    """The main rank's writer, with the retention of the segment before carried out."""
    config = opened.config
    writer = CheckpointWriter(
        layout=layout,
        run_id=opened.manifest.run_id,
        config=config.checkpoint,
        model_files=subject.model_files(model, config=config),
        weights_file=subject.weights_file,
        events=opened.events,
        good_step=0 if opened.restorable is None else opened.restorable.step,
    )
    # What a kill between a save and its retention left would come on top of the next save.
    writer.drop_old()
    return writer


def _replay_check(opened: OpenedRun | None, *, restored_step: int) -> ReplayCheck:
    """What was logged before a change of the recipe is no measure for the steps after it."""
    if opened is None or opened.overrides:
        return ReplayCheck(None, restored_step=restored_step)
    events = opened.history.events
    changes = [place for place, event in enumerate(events) if event.get("kind") == "override"]
    since = events[changes[-1] + 1 :] if changes else events
    return ReplayCheck(History(since, num_bad_lines=0), restored_step=restored_step)


@torch.no_grad()
def _restore_weights(own: dict[str, torch.Tensor], *, saved: dict[str, torch.Tensor]) -> None:
    """Copies saved tensors over the model's own."""
    for name, tensor in own.items():
        if name not in saved or saved[name].shape != tensor.shape:
            raise CheckpointError(f"the checkpoint has no fitting tensor {name}")
    if left := sorted(set(saved) - set(own)):
        raise CheckpointError(f"the checkpoint has an unknown tensor {left[0]}")
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def _throughput(config: Config, *, world: World) -> Throughput:
    peak_flops = None
    if world.device.type == "cuda":
        gpu = gpu_of_device(torch.cuda.get_device_name(world.device))
        peak_flops = None if gpu is None else gpu.bf16_flops * world.size
    return Throughput(
        tokens_per_step=config.train.global_batch_tokens,
        flops_per_token=flops_per_token(
            config.model, sequence_length=config.data.sequence_length, lora=config.lora
        ),
        peak_flops=peak_flops,
    )


def start_segment(
    parts: LoopParts, *, opened: OpenedRun, subject: Subject, world: World, layout: RunLayout
) -> None:
    """Records and says what this segment is; main rank only.

    Raises:
        StorageError: the disk cannot hold one checkpoint; nothing was trained.
    """
    assert parts.events is not None
    config = opened.config
    needed = needed_bytes(
        subject.num_trained(config), weights_dtype=config.checkpoint.weights_dtype
    )
    refuse_if_full(layout, state_bytes=needed)
    restored = None if opened.restorable is None else opened.restorable.step
    exactness, reason = judge_exactness(
        config=config,
        world=world,
        history=opened.history,
        restored_step=restored,
        overrides=opened.overrides,
    )
    facts = machine_facts(device=world.device)
    parts.events.append(
        "segment_started",
        ranks=world.size,
        threads=torch.get_num_threads(),
        device=facts["device"],
        devices=device_names(world=world),
        versions=facts,
        restored_step=restored,
        restored="nothing" if restored is None else "full",
        exactness=exactness,
        reason=reason,
        compile=config.train.compile,
        precision=config.train.precision,
        changed=[{"field": f, "old": o, "new": n} for f, o, n in opened.changed],
    )
    for field, old, new in opened.overrides:
        parts.events.append("override", field=field, old=old, new=new)
    where = "from the first step" if restored is None else f"goes on from step {restored}"
    ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
    compiled = "compiled" if config.train.compile else "not compiled"
    say(f"{layout.root}: {where}; {ranks}, {config.train.precision}, {compiled}")
    say(f"{exactness}: {reason}")
    if parts.replay.num_expected:
        say(f"{parts.replay.num_expected} logged steps will be run again and compared")
