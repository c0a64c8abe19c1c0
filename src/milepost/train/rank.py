"""One rank of a run, from its place among the others to the end of its segment."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from milepost.config.schema import Config
from milepost.core.console import say
from milepost.core.errors import DivergedError, MilepostError, StorageError, UsageError
from milepost.core.files import exclusive_lock, storage_errors
from milepost.distributed.decision import MainRankFailed, on_main_rank
from milepost.distributed.devices import check_ranks
from milepost.distributed.place import Place
from milepost.distributed.reduce import broadcast_json
from milepost.distributed.watchdog import Watchdog
from milepost.distributed.world import World, die_with_parent, join_world
from milepost.runs.events import EventWriter
from milepost.runs.layout import RunLayout
from milepost.runs.lineage import ParentRequest
from milepost.train.agreement import Agreement, agree
from milepost.train.build import build, start_segment
from milepost.train.compiling import CompilingReport
from milepost.train.float8 import check_float8
from milepost.train.forward_timing import has_run_out_of_memory
from milepost.train.guarding import GuardStopped
from milepost.train.installed import check_installed
from milepost.train.loop import LoopParts, run_loop
from milepost.train.opening import OpenedRun, open_run
from milepost.train.periodic import Periodic
from milepost.train.precision import check_compiler, make_deterministic
from milepost.train.pretraining import open_pretraining
from milepost.train.resolving import resolve_config
from milepost.train.stop import StopSignal
from milepost.train.subject import Subject
from milepost.train.trackers import check_trackers
from milepost.train.tracking import Tracking

Summary = dict[str, Any]


def train_as_rank(
    place: Place,
    *,
    config: Config,
    recipe: str,
    run: Path,
    may_override: bool,
    open_subject: Callable[[Config], Subject] = open_pretraining,
    begin_with: ParentRequest | None = None,
) -> Summary | None:
    """Trains as one rank of a run until its last step or a stop.

    Args:
        place: of this process.
        config: from the recipe; "auto" is resolved when the run is made.
        recipe: what the person called it.
        run: the run folder.
        may_override: take changes that alter the numbers.
        open_subject: opens what is trained, on what; called on every rank.
        begin_with: the checkpoint of another run that a new run is made from.

    Returns:
        What was reached, on the main rank; None on the others.

    Raises:
        MilepostError: with the exit code of the contract.
    """
    stop = StopSignal()
    die_with_parent(place)
    _check_means(place, config)
    layout = RunLayout(run)
    with contextlib.ExitStack() as stack:
        subject = open_subject(config)
        if place.rank == 0:
            _take_folder(layout, until=stack)
            subject.verify()
        # Before the world: it ends after it, so that no other rank waits for a tracker.
        tracking = stack.enter_context(Tracking(layout, stop_requested=stop.is_requested))
        world = stack.enter_context(
            join_world(
                place,
                device_type=_device_type(place),
                timeout_seconds=config.guards.collective_timeout_seconds,
            )
        )
        opened = on_main_rank(
            lambda: open_run(
                layout,
                config=config,
                recipe=recipe,
                identity=subject.identity,
                resolve=partial(resolve_config, device=world.device, ranks=world.size),
                may_override=may_override,
                begin_with=begin_with,
            ),
            world=world,
        )
        agreement = agree(opened, world=world)
        if agreement.is_finished:
            return _already_done(opened, layout)
        _prepare_torch(agreement.config, world=world)
        with _memory_errors(agreement.config):
            parts = build(
                agreement,
                layout=layout,
                subject=subject,
                opened=opened,
                world=world,
                stop_requested=stop.is_requested,
                saving_mark=place.saving_mark,
            )
        stack.callback(parts.batches.close)
        _watch_steps(parts, world=world, until=stack)
        on_main_rank(
            lambda: _start(
                parts, opened=opened, subject=subject, world=world, layout=layout, tracking=tracking
            ),
            world=world,
        )
        return _run_segment(parts, layout=layout, agreement=agreement, world=world)


def _check_means(place: Place, config: Config) -> None:
    """Refuses what this many ranks, or what is installed, cannot do."""
    check_ranks(place.size, lanes=config.train.lanes)
    check_trackers(config.tracking.tools)
    check_installed(config)


def _device_type(place: Place) -> str:
    """Where this rank computes; on the CPU our own ranks have one thread each."""
    if torch.cuda.is_available():
        return "cuda"
    if place.started_by == "milepost":
        torch.set_num_threads(1)
    return "cpu"


def _prepare_torch(config: Config, *, world: World) -> None:
    check_compiler(config, device=world.device)
    check_float8(config, device=world.device)
    if config.train.deterministic:
        make_deterministic(device=world.device)


def _watch_steps(parts: LoopParts, *, world: World, until: contextlib.ExitStack) -> None:
    """Has each step watched where a collective that hangs would end the process without a word."""
    if world.device.type == "cuda" and world.size > 1:
        watchdog = Watchdog(world)
        until.callback(watchdog.close)
        parts.watching = watchdog.watching


def _start(
    parts: LoopParts,
    *,
    opened: OpenedRun | None,
    subject: Subject,
    world: World,
    layout: RunLayout,
    tracking: Tracking,
) -> None:
    """What the main rank does when all is built, before the first update."""
    assert opened is not None
    say(subject.introduction(opened.config))
    start_segment(parts, opened=opened, subject=subject, world=world, layout=layout)
    tracking.start(opened.config.tracking, events=opened.events)
    looks = [Periodic(1, tracking.look)]
    if opened.config.train.compile:
        looks.append(Periodic(1, CompilingReport(opened.events).look))
    parts.periodic = [*looks, *parts.periodic]


def _take_folder(layout: RunLayout, *, until: contextlib.ExitStack) -> None:
    """Makes the run folder where there is none, and locks it."""
    run = layout.root
    if run.exists() and not run.is_dir():
        raise UsageError(f"{run} is not a folder", hint="choose another name with --run")
    with storage_errors(run):
        run.mkdir(parents=True, exist_ok=True)
    until.enter_context(exclusive_lock(layout.lock, what=str(run)))


def _already_done(opened: OpenedRun | None, layout: RunLayout) -> Summary | None:
    if opened is None or opened.restorable is None:
        return None
    step, wanted = opened.restorable.step, opened.config.last_step
    if step > wanted:
        say(f"{layout.root}: is at step {step} already, train.stop_at_step is {wanted}")
    else:
        say(f"{layout.root}: done, all {step} steps")
    return {"run": str(layout.root), "status": "done", "step": step}


def _run_segment(
    parts: LoopParts, *, layout: RunLayout, agreement: Agreement, world: World
) -> Summary | None:
    seconds_before = parts.progress.training_seconds
    try:
        # Whatever ends the loop, a save that is under way is finished first.
        with parts.saver or contextlib.nullcontext(), _memory_errors(agreement.config):
            was_stopped = run_loop(parts)
    except MilepostError as error:
        _record_failure(parts, error, seconds_before=seconds_before)
        if isinstance(error, GuardStopped):
            _wait_for_main(world)
            if not world.is_main:
                raise MainRankFailed(error.exit_code) from error
        raise
    if parts.events is None:
        return {"status": "stopped"} if was_stopped else None
    step = parts.progress.step
    config = agreement.config
    reason = "stop requested" if was_stopped else "done"
    if not was_stopped and step < config.train.total_steps:
        reason = "stop_at_step"
    _end_segment(parts, reason, seconds_before=seconds_before)
    if was_stopped:
        where = f"at step {step}, saved" if step else "before the first step"
        say(f"stopped on request {where}; the same command goes on")
    else:
        say(f"{layout.root}: {reason}, {step} of {config.train.total_steps} steps")
    return {
        "run": str(layout.root),
        "status": "stopped" if was_stopped else "done",
        "step": step,
        "tokens_seen": parts.progress.tokens_seen,
        "training_seconds": parts.progress.training_seconds,
    }


@contextlib.contextmanager
def _memory_errors(config: Config) -> Iterator[None]:
    """Says what to do where memory runs out inside the block."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not has_run_out_of_memory(error):
            raise
        raise MilepostError(
            f"out of memory with train.microbatch_rows = {config.train.microbatch_rows}",
            hint='lower train.microbatch_rows, or raise train.recompute to "block"; milepost plan '
            "says what fits",
        ) from error


def _record_failure(parts: LoopParts, error: MilepostError, *, seconds_before: float) -> None:
    """Leaves word of why the segment ended, where the disk still takes it."""
    if isinstance(error, DivergedError):
        reason = "diverged"
    elif isinstance(error, StorageError):
        reason = "storage"
    else:
        reason = "failed"
    with contextlib.suppress(StorageError):
        _end_segment(parts, reason, seconds_before=seconds_before)


def _wait_for_main(world: World) -> None:
    """Keeps the other ranks until the main one has saved; all ranks refuse the same update.

    The launcher gives the rest little time once a rank has left with an error.
    """
    with contextlib.suppress(RuntimeError):
        broadcast_json(None, world=world)


def _end_segment(parts: LoopParts, reason: str, *, seconds_before: float) -> None:
    events: EventWriter | None = parts.events
    if events is not None:
        events.append(
            "segment_ended",
            reason=reason,
            step=parts.progress.step,
            training_seconds=parts.progress.training_seconds - seconds_before,
        )
