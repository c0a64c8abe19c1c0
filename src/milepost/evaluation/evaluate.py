"""Scoring the checkpoints of a run, or one model, on tasks: only what is not recorded yet.

Every rank runs `evaluate`; the main rank finds the checkpoints, verifies them and writes. The
next checkpoint is read from the disk while this one is scored.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost.core.console import ProgressBar, progress
from milepost.core.errors import CheckpointError, DivergedError
from milepost.data.shards import ShardSet
from milepost.distributed.decision import MainRankFailed, decide, main_rank_first
from milepost.distributed.world import World
from milepost.evaluation.catalog import HELDOUT, open_task
from milepost.evaluation.checkpoints import (
    Checkpoint,
    checkpoint_from_plain,
    find_checkpoints,
    load_unverified,
    load_verified,
    open_validation,
    run_of_model,
)
from milepost.evaluation.recording import Scored, conditions_of, score
from milepost.evaluation.tasks import Task, never_stop
from milepost.inference.load import LoadedModel
from milepost.inference.model_files import read_config
from milepost.runs.evaluations import EvaluationStore, evaluation_key
from milepost.text.tokenizer import Tokenizer, load_tokenizer

Line = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What a person asks for.

    Attributes:
        model: a run folder, a checkpoint or any Hugging Face LLaMA folder.
        tasks: names of the catalog.
        steps: which checkpoints of a run, see `parse_steps`; None: the latest.
        data_dir: folder of the benchmarks' rows; None: from the hub.
        prepared: prepared data whose validation documents `heldout` takes; None: the run's.
        limit: the first so many items of each task; None: all.
        num_fewshot: solved items before each question.
        dtype: "auto" or a dtype's name.
        out: folder of the records; None: the model's run; without a run nothing is recorded.
    """

    model: Path
    tasks: tuple[str, ...]
    steps: str | None = None
    data_dir: Path | None = None
    prepared: Path | None = None
    limit: int | None = None
    num_fewshot: int = 0
    dtype: str = "auto"
    out: Path | None = None
    adapter: Path | None = None

    @property
    def named(self) -> Path:
        """What names the model, and has its records where it is a run."""
        return self.model if self.adapter is None else self.adapter


@dataclass(frozen=True)
class Evaluation:
    """What came of a request.

    Attributes:
        lines: of the records, by checkpoint and then by task, in the order asked for.
        tasks: that were asked, by name.
        tokenizer: of the models.
        store: where the records are; None: they were only shown.
        new_items: item lines by the key of their record, of what was scored now.
        was_stopped: a stop was asked for, and what is missing was not scored.
    """

    lines: list[Line]
    tasks: dict[str, Task]
    tokenizer: Tokenizer
    store: EvaluationStore | None
    new_items: dict[str, list[Line]]
    was_stopped: bool

    def items_of(self, line: Line) -> list[Line]:
        """The item lines of one of the records.

        Raises:
            StorageError: the items file cannot be read.
        """
        if line["key"] in self.new_items:
            return self.new_items[line["key"]]
        assert self.store is not None, "what was not scored now is recorded"
        return self.store.items(line)


@dataclass(frozen=True)
class _Job:
    """One checkpoint and the names of the tasks it has no record of."""

    checkpoint: Checkpoint
    missing: tuple[str, ...]


def evaluate(
    request: Request, *, world: World, stop_requested: Callable[[], bool] = never_stop
) -> Evaluation:
    """Scores what is missing and records it; every rank must call.

    Args:
        request: the same on every rank.
        world: of this process.
        stop_requested: whether this process was asked to stop; what is scored stays recorded.

    Raises:
        UsageError: there is no such model, task or checkpoint; or the model is not a LLaMA.
        DataError: rows are missing or damaged.
        CheckpointError: a file is not what its manifest says.
        DivergedError: the logits of a model are not finite; nothing of it is recorded.
        StorageError: a record cannot be written.
    """
    plain = decide(lambda: [c.as_plain() for c in _find(request)], world=world)
    checkpoints = [checkpoint_from_plain(entry) for entry in plain]
    first = checkpoints[0].found.base
    tokenizer = main_rank_first(lambda: load_tokenizer(str(first)), world=world)
    tasks = main_rank_first(lambda: _open_tasks(request, first, tokenizer), world=world)
    store = _store(request)
    known = decide(lambda: _known(checkpoints, tasks, store), world=world)
    missing = [
        tuple(name for name, task in tasks.items() if _key(checkpoint, task) not in known)
        for checkpoint in checkpoints
    ]
    jobs = [_Job(c, names) for c, names in zip(checkpoints, missing, strict=True) if names]
    new: dict[str, Scored] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_said_once(world))
        scorings = _score_all(
            jobs,
            tasks=tasks,
            tokenizer=tokenizer,
            store=store,
            world=world,
            stop_requested=stop_requested,
            stack=stack,
        )
        for found in scorings:
            new[found.line["key"]] = found
    lines = known | {key: found.line for key, found in new.items()}
    keys = [_key(checkpoint, task) for checkpoint in checkpoints for task in tasks.values()]
    return Evaluation(
        lines=[lines[key] for key in keys if key in lines],
        tasks=tasks,
        tokenizer=tokenizer,
        store=store,
        new_items={key: found.items for key, found in new.items()},
        was_stopped=any(key not in lines for key in keys),
    )


def _find(request: Request) -> list[Checkpoint]:
    return find_checkpoints(
        request.model, steps=request.steps, dtype=request.dtype, adapter=request.adapter
    )


def _store(request: Request) -> EvaluationStore | None:
    folder = request.out if request.out is not None else run_of_model(request.named)
    return None if folder is None else EvaluationStore(folder)


def _open_tasks(request: Request, folder: Path, tokenizer: Tokenizer) -> dict[str, Task]:
    """All checkpoints of a run have one tokenizer and one context: the items are opened once."""
    config = read_config(folder)
    validation: ShardSet | None = None
    if HELDOUT in request.tasks:
        validation = open_validation(request.named, prepared=request.prepared, tokenizer=tokenizer)
    return {
        name: open_task(
            name,
            tokenizer=tokenizer,
            context_length=config.max_position_embeddings,
            data_dir=request.data_dir,
            limit=request.limit,
            num_fewshot=request.num_fewshot,
            validation=validation,
        )
        for name in request.tasks
    }


def _known(
    checkpoints: Sequence[Checkpoint], tasks: dict[str, Task], store: EvaluationStore | None
) -> dict[str, Line]:
    """By key, the records that were asked for and are there with a whole items file."""
    if store is None:
        return {}
    keys = [_key(checkpoint, task) for checkpoint in checkpoints for task in tasks.values()]
    recorded = store.latest()
    return {key: recorded[key] for key in keys if key in recorded and store.is_whole(recorded[key])}


def _key(checkpoint: Checkpoint, task: Task) -> str:
    return evaluation_key(checkpoint.weights, conditions_of(task, dtype=checkpoint.dtype))


def _score_all(
    jobs: Sequence[_Job],
    *,
    tasks: dict[str, Task],
    tokenizer: Tokenizer,
    store: EvaluationStore | None,
    world: World,
    stop_requested: Callable[[], bool],
    stack: contextlib.ExitStack,
) -> Iterator[Scored]:
    """Each score as soon as it is recorded, until all are done or a stop is asked for."""
    meter = _Meter(jobs, tasks=tasks, world=world, stack=stack)
    for job, loaded in _loaded(jobs, tokenizer=tokenizer, world=world, stack=stack):
        for name in job.missing:
            found = score(
                tasks[name],
                loaded.model,
                tokenizer=tokenizer,
                weights=job.checkpoint.weights,
                dtype=job.checkpoint.dtype,
                store=store,
                world=world,
                stop_requested=stop_requested,
                tell=meter.begin(job, task=tasks[name]),
            )
            if found is None:
                return
            meter.finish(tasks[name])
            yield found


@contextlib.contextmanager
def _said_once(world: World) -> Iterator[None]:
    """Logits that are not finite are seen by every rank; the main one says it."""
    try:
        yield
    except DivergedError as error:
        raise error if world.is_main else MainRankFailed(error.exit_code) from error


def _loaded(
    jobs: Sequence[_Job], *, tokenizer: Tokenizer, world: World, stack: contextlib.ExitStack
) -> Iterator[tuple[_Job, LoadedModel]]:
    """Each job with its model on the device; a thread reads the next one meanwhile.

    The main rank verifies; the others use nothing before it has found the files good.
    """
    load = load_verified if world.is_main else load_unverified
    pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-reader")
    stack.callback(pool.shutdown, wait=False, cancel_futures=True)
    readings: list[Future[LoadedModel]] = []
    for number, job in enumerate(jobs):
        if not readings:
            readings.append(pool.submit(load, job.checkpoint))
        reading = readings.pop()
        decide(functools.partial(_refuse_other_tokenizer, reading, tokenizer), world=world)
        loaded = reading.result()
        if number + 1 < len(jobs):
            readings.append(pool.submit(load, jobs[number + 1].checkpoint))
        loaded.model.to(world.device)
        yield job, loaded


def _refuse_other_tokenizer(reading: Future[LoadedModel], tokenizer: Tokenizer) -> None:
    loaded = reading.result()
    if loaded.tokenizer.sha256 != tokenizer.sha256:
        raise CheckpointError(
            f"{loaded.folder} has another tokenizer than the checkpoints before it",
            hint="all checkpoints of a run have one tokenizer; score this folder by itself",
        )


class _Meter:
    """How much is done and how long is left, on the main rank's screen; silent on the others."""

    def __init__(
        self,
        jobs: Sequence[_Job],
        *,
        tasks: dict[str, Task],
        world: World,
        stack: contextlib.ExitStack,
    ) -> None:
        total = sum(tasks[name].num_items for job in jobs for name in job.missing)
        self._num_done = 0
        self._bar: ProgressBar | None = None
        if world.is_main and jobs:
            self._bar = stack.enter_context(progress("evaluating", total=total))

    def begin(self, job: _Job, *, task: Task) -> Callable[[float], None]:
        """What the scoring of one task on one checkpoint calls with the fraction done."""
        step = job.checkpoint.weights.step
        note = task.benchmark if step is None else f"step {step}  {task.benchmark}"

        def tell(done_fraction: float) -> None:
            if self._bar is not None:
                self._bar.update(self._num_done + done_fraction * task.num_items, note=note)

        tell(0.0)
        return tell

    def finish(self, task: Task) -> None:
        """One task is scored on one checkpoint."""
        self._num_done += task.num_items
        if self._bar is not None:
            self._bar.update(self._num_done)
