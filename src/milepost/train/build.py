"""Composition: the parts of a training run, made in one place, and the run around them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from milepost.checkpoint.state import Progress
from milepost.checkpoint.store import needed_bytes, refuse_if_full
from milepost.config.schema import Config
from milepost.core.console import say, warn
from milepost.core.units import format_duration
from milepost.data.read_ahead import ReadAhead
from milepost.distributed.decision import on_main_rank
from milepost.distributed.world import World
from milepost.model.llama import Llama
from milepost.planner.cost import flops_per_token
from milepost.planner.duration import gpu_of_device
from milepost.runs.evaluations import EvaluationStore
from milepost.runs.events import EventWriter, History
from milepost.runs.layout import RunLayout
from milepost.runs.lineage import FULL, PARTS, Lineage, restore_text
from milepost.train.agreement import Agreement
from milepost.train.disk_watch import DiskWatch
from milepost.train.evaluating import make_evaluation, open_tasks
from milepost.train.exactness import device_names, judge_exactness, machine_facts
from milepost.train.float8 import float8_words
from milepost.train.gradients import LaneGradients
from milepost.train.guarding import Guarding
from milepost.train.guards import ResumeDrift
from milepost.train.loop import LoopParts
from milepost.train.objective import build_objective
from milepost.train.opening import OpenedRun
from milepost.train.parent import say_parent
from milepost.train.periodic import Periodic
from milepost.train.replay import ReplayCheck
from milepost.train.restoring import model_to_train
from milepost.train.rewinding import Rewinder
from milepost.train.saving import CheckpointWriter, Saver
from milepost.train.schedule import learning_rate
from milepost.train.step import LossScale, Stepper
from milepost.train.subject import Subject
from milepost.train.throughput import Throughput
from milepost.train.watching import make_sampling, make_validation


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
    model, optimizer, progress = model_to_train(
        agreement.restore_from, parts=agreement.parts, config=config, subject=subject, world=world
    )
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
    saver = on_main_rank(
        lambda: Saver(
            _checkpoint_writer(opened, layout=layout, subject=subject, model=model),
            model=model,
            weights=subject.trained_weights(model),
            optimizer=optimizer,
            saved_step=progress.step,
            mark=saving_mark,
        ),
        world=world,
    )
    if opened is not None and saver is not None:
        periodic += _saving(saver, opened=opened, layout=layout, subject=subject)
    events = opened.events if opened is not None else None
    stepper = _stepper(
        model, optimizer=optimizer, subject=subject, config=config, world=world, progress=progress
    )
    rewinder = Rewinder(
        model,
        optimizer=optimizer,
        subject=subject,
        agreement=agreement,
        layout=layout,
        world=world,
        opened=opened,
        saver=saver,
    )
    return LoopParts(
        progress=progress,
        last_step=config.last_step,
        batches=_read_ahead(subject, config=config, world=world, events=events),
        learning_rate=lambda step: learning_rate(step, config=config),
        stepper=stepper,
        periodic=periodic,
        saver=saver,
        throughput=_throughput(config, world=world),
        replay=_replay_check(opened, restored_step=progress.step),
        events=events,
        stop_requested=stop_requested,
        guarding=_guarding(agreement, progress, stepper=stepper, rewinder=rewinder, events=events),
    )


def _saving(
    saver: Saver, *, opened: OpenedRun, layout: RunLayout, subject: Subject
) -> list[Periodic]:
    """What the main rank does about checkpoints, after all that shows in them."""
    disk_watch = _disk_watch(opened, layout=layout, subject=subject, saver=saver)
    return [
        Periodic(1, saver.raise_failure),
        Periodic(1, disk_watch.look),
        Periodic(opened.config.checkpoint.every_steps, saver.save),
    ]


def _guarding(
    agreement: Agreement,
    progress: Progress,
    *,
    stepper: Stepper,
    rewinder: Rewinder,
    events: EventWriter | None,
) -> Guarding:
    limit = agreement.config.guards.resume_drift_z
    return Guarding(
        agreement.config,
        refusals=agreement.refusals,
        drift=ResumeDrift(progress.guards.losses, limit=limit),
        rewinder=rewinder,
        stepper=stepper,
        events=events,
    )


def _stepper(
    model: Llama,
    *,
    optimizer: torch.optim.Optimizer,
    subject: Subject,
    config: Config,
    world: World,
    progress: Progress,
) -> Stepper:
    return Stepper(
        build_objective(model, config=config, end_of_text_id=subject.tokenizer.end_of_text_id),
        optimizer=optimizer,
        gradients=LaneGradients(model),
        config=config,
        world=world,
        loss_scale=LossScale(progress.loss_scale, progress.steps_at_scale),
    )


def _read_ahead(
    subject: Subject, *, config: Config, world: World, events: EventWriter | None
) -> ReadAhead:
    """The batches, read by a thread that is given up where it hangs."""

    def slow(data_step: int, seconds: float) -> None:
        warn(
            f"rank {world.rank} has waited {format_duration(seconds)} for the batch of data step "
            f"{data_step}; it gives up after guards.loader_timeout_seconds = "
            f"{config.guards.loader_timeout_seconds:g}"
        )
        if events is not None:
            events.append("guard_warned", guard="loader", data_step=data_step, seconds=seconds)

    return ReadAhead(
        subject.batches(config),
        timeout_seconds=config.guards.loader_timeout_seconds,
        slow=slow,
        stalled=world.mark_stalled,
    )


def _disk_watch(
    opened: OpenedRun, *, layout: RunLayout, subject: Subject, saver: Saver
) -> DiskWatch:
    config = opened.config
    dtype = config.checkpoint.weights_dtype
    needed = needed_bytes(subject.num_trained(config), weights_dtype=dtype)
    return DiskWatch(layout, needed_bytes=needed, is_saving=saver.is_saving, events=opened.events)


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
    sampling = on_main_rank(
        lambda: _sampling(agreement, model=model, subject=subject, layout=layout, opened=opened),
        world=world,
    )
    return [*periodic, *(sampling or [])]


def _sampling(
    agreement: Agreement,
    *,
    model: Llama,
    subject: Subject,
    layout: RunLayout,
    opened: OpenedRun | None,
) -> list[Periodic]:
    """What the main rank does about samples, where the recipe has some."""
    config = agreement.config
    if config.samples.every_steps is None:
        return []
    assert opened is not None
    action = make_sampling(
        model, tokenizer=subject.tokenizer, config=config, layout=layout, events=opened.events
    )
    is_missing = "sample" in agreement.missing
    return [Periodic(config.samples.every_steps, action, at_start=is_missing)]


def _checkpoint_writer(
    opened: OpenedRun | None, *, layout: RunLayout, subject: Subject, model: Llama
) -> CheckpointWriter:
    """The main rank's writer, with the retention of the segment before carried out."""
    assert opened is not None
    config = opened.config
    writer = CheckpointWriter(
        layout=layout,
        run_id=opened.manifest.run_id,
        config=config.checkpoint,
        model_files=subject.model_files(model, config=config),
        weights_file=subject.weights_file,
        events=opened.events,
        good_step=0 if opened.restorable is None else opened.restorable.step,
        keeps_for_rollback=config.guards.spike == "rollback",
        first_step=opened.first_step,
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
        restored=_restored_words(opened),
        parent=None if opened.parent is None else f"{opened.parent.run}:{opened.parent.step}",
        exactness=exactness,
        reason=reason,
        compile=config.train.compile,
        precision=config.train.precision,
        float8=config.train.float8,
        changed=[{"field": f, "old": o, "new": n} for f, o, n in opened.changed],
    )
    for field, old, new in opened.overrides:
        parts.events.append("override", field=field, old=old, new=new)
    if opened.parent is not None:
        _record_parent(opened.parent, events=parts.events)
    where = "from the first step" if not restored else f"goes on from step {restored}"
    ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
    compiled = "compiled" if config.train.compile else "not compiled"
    say(f"{layout.root}: {where}; {ranks}, {config.train.precision}, {compiled}")
    if config.train.float8 != "none":
        say(float8_words(config, device=world.device))
    say(f"{exactness}: {reason}")
    if parts.replay.num_expected:
        say(f"{parts.replay.num_expected} logged steps will be run again and compared")


def _restored_words(opened: OpenedRun) -> str:
    if opened.restorable is None:
        return "nothing"
    return FULL if opened.parent is None else restore_text(opened.parent.parts)


def _record_parent(parent: Lineage, *, events: EventWriter) -> None:
    """Says what a run begins with, and records it where that is not all of a train state."""
    say_parent(parent)
    if parent.parts != PARTS:
        events.append(
            "partial_restore",
            restored=list(parent.parts),
            parent=f"{parent.run}:{parent.step}",
            checkpoint_sha256=parent.checkpoint_sha256,
        )
