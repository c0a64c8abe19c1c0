"""Benchmarks that a run is scored on while it trains, by the same scoring as `evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path

from milepost.checkpoint.state import Progress
from milepost.config.schema import Config
from milepost.core.console import say
from milepost.distributed.decision import main_rank_first
from milepost.distributed.world import World
from milepost.evaluation.catalog import open_task, parse_tasks
from milepost.evaluation.recording import score
from milepost.evaluation.tasks import Task
from milepost.model.llama import Llama
from milepost.runs.evaluations import EvaluationStore, Weights
from milepost.text.tokenizer import Tokenizer
from milepost.train.opening import OpenedRun
from milepost.train.subject import Subject


def open_tasks(config: Config, *, subject: Subject, world: World) -> list[Task]:
    """The tasks of the recipe, ready to be scored; every rank must call.

    Raises:
        UsageError: there is no such task, or it does not fit the model's context.
        DataError: rows are missing or damaged.
    """
    section = config.evaluation

    def open_all() -> list[Task]:
        return [
            open_task(
                name,
                tokenizer=subject.tokenizer,
                context_length=config.model.max_position_embeddings,
                data_dir=Path(section.data_dir) if section.data_dir else None,
                limit=section.limit,
                num_fewshot=0,
                validation=subject.benchmark_shards,
            )
            for name in parse_tasks(section.tasks)
        ]

    return main_rank_first(open_all, world=world)


def make_evaluation(
    model: Llama,
    *,
    tasks: Sequence[Task],
    tokenizer: Tokenizer,
    config: Config,
    store: EvaluationStore,
    opened: OpenedRun | None,
    world: World,
    stop_requested: Callable[[], bool],
    made_up: MutableMapping[int, frozenset[str]],
) -> Callable[[Progress], bool]:
    """The periodic evaluation; every rank calls it, the main rank records it.

    Where a stop is asked for it is given up, which it says with True; what was scored before
    stays recorded.

    Args:
        model: that is trained, not compiled.
        tasks: of `open_tasks`.
        tokenizer: of the run.
        config: of the run; its precision is that of the scoring.
        store: of the run.
        opened: the run, on the main rank only.
        world: of this process.
        stop_requested: whether this process was asked to stop.
        made_up: by step, the only tasks that are scored there: an earlier segment did the rest.
            Once: after a rollback the step has other weights.
    """

    def run_evaluation(progress: Progress) -> bool:
        weights = Weights(
            checkpoint_sha256=None,
            run_id=None if opened is None else opened.manifest.run_id,
            step=progress.step,
            tokens_seen=progress.tokens_seen,
        )
        wanted = made_up.pop(progress.step, None)
        for task in tasks:
            if wanted is not None and task.benchmark not in wanted:
                continue
            scored = score(
                task,
                model,
                tokenizer=tokenizer,
                weights=weights,
                dtype=config.train.precision,
                store=store,
                world=world,
                stop_requested=stop_requested,
            )
            if scored is None:
                return True
            if opened is not None:
                names = ("key", "benchmark", "n", "metrics", "seconds")
                fields = {name: scored.line[name] for name in names}
                opened.events.append("evaluation", step=progress.step, **fields)
                say(f"step {progress.step}  {task.benchmark}  {_shown(fields['metrics'])}")
        return False

    return run_evaluation


def _shown(metrics: Mapping[str, Mapping[str, float | None]]) -> str:
    parts = []
    for name, metric in metrics.items():
        error = "" if metric["stderr"] is None else f" ± {metric['stderr']:.4f}"
        parts.append(f"{name} {metric['value']:.4f}{error}")
    return "  ".join(parts)
