"""`milepost train`: starts the ranks of a run, or is one of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from milepost.core.errors import MilepostError, StopRequested, UsageError

if TYPE_CHECKING:
    from milepost.config.schema import Config
    from milepost.distributed.place import Place
    from milepost.runs.lineage import ParentRequest

OPTIONS = ("run", "from", "restore", "ranks", "override", "json", "debug")
"""What `train` takes beside overrides, for the hint after a slip of the pen."""


class ChildFailed(MilepostError):
    """The ranks have said what went wrong; only their code is left to pass on."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


def train(
    recipe: str,
    *overrides: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    run: Path,
    from_: Annotated[str | None, Parameter(name="--from")] = None,
    restore: str | None = None,
    ranks: int | None = None,
    override: bool = False,
    json: bool = False,
    words: Annotated[Sequence[str], Parameter(parse=False)],
) -> None:
    """Start a run, or continue it exactly if the folder holds one.

    Any field of the recipe can be set: `--section.key VALUE`. Stop with Ctrl-C: the run is
    saved, and the same command goes on as if nothing had happened.

    With --from a new run begins with a checkpoint of another one, and any setting may be changed
    but the architecture: a decay branch, a rewind, a new schedule.

    Example: `milepost train corpus-30m --run runs/first --data.path data/corpus`

    Parameters
    ----------
    recipe
        A packaged recipe (demo, corpus-30m, lab, llama-124m, dmas-1.7b) or a .toml file.
    run
        The run folder.
    from_
        RUN:STEP, a checkpoint of another run that a new run begins with; without STEP its latest.
    restore
        What --from takes: full (the default), weights, or weights with some of optimizer,
        schedule (the step) and data (the place in their order), with commas between.
    ranks
        Processes: one a GPU, or one a CPU core. Default: as many as the lanes can use.
    override
        Take changes of a run's recipe that alter its numbers, and record them.
    json
        Print one JSON document at the end.
    words
        The command line, for the ranks that this process starts.
    """
    from milepost.distributed.place import read_place

    begin_with = _parent_request(from_, restore)
    place = read_place(os.environ)
    if place is None:

        def load() -> Config:
            from milepost.data.run_data import open_run_data

            config = _load_config(recipe, overrides)
            _refuse_beginning(run, begin_with)  # so that what is wrong is said once
            open_run_data(config)
            return config

        launch_ranks(load, words=words, ranks=ranks)
        return
    config = _load_config(recipe, overrides)
    # Read by cuBLAS when it starts; without it deterministic products are refused.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from milepost.train.rank import train_as_rank

    summary = train_as_rank(
        place,
        config=config,
        recipe=recipe,
        run=run,
        may_override=override,
        begin_with=begin_with,
    )
    end_rank(place, summary, json=json)


def end_rank(place: Place, summary: dict[str, Any] | None, *, json: bool) -> None:
    """Ends the command on one rank of a training.

    Args:
        place: of this process.
        summary: what was reached; the main rank's is shown with `json`.
        json: whether a JSON document is wanted.

    Raises:
        ChildFailed: a stop was asked for, which our launcher is told by the exit code.
    """
    if summary is None:
        return
    if json and place.rank == 0:
        from milepost.core.console import show_json

        show_json(summary)
    if summary["status"] == "stopped" and place.started_by == "milepost":
        raise ChildFailed(StopRequested.exit_code)


def _parent_request(from_: str | None, restore: str | None) -> ParentRequest | None:
    from milepost.runs.lineage import FULL, parse_parent

    if from_ is not None:
        return parse_parent(from_, restore=FULL if restore is None else restore)
    if restore is not None:
        raise UsageError(
            "--restore says what is taken of another run's checkpoint",
            hint="add --from RUN:STEP; a run that is continued is always restored in full",
        )
    return None


def _refuse_beginning(run: Path, begin_with: ParentRequest | None) -> None:
    """Refuses a parent that is not there, and a run that no data was ever named for."""
    from milepost.runs.layout import RunLayout
    from milepost.runs.lineage import refuse_no_run
    from milepost.runs.manifest import read_run_manifest, refuse_without_data
    from milepost.runs.steps import is_run

    if is_run(run):
        refuse_without_data(read_run_manifest(RunLayout(run)), run=run)
    elif begin_with is not None:
        refuse_no_run(begin_with)


def _load_config(recipe: str, overrides: Sequence[str]) -> Config:
    from milepost.config.recipe import load_recipe

    config = load_recipe(recipe, overrides=overrides, options=OPTIONS)
    if config.is_finetuning:
        raise UsageError(
            f"recipe {recipe} tunes a model that is there already",
            hint="milepost finetune MODEL --data FILE --run DIR",
        )
    return config


def launch_ranks(load: Callable[[], Config], *, words: Sequence[str], ranks: int | None) -> None:
    """Starts a run's ranks and waits for them.

    Args:
        load: loads and checks the config, so that what is wrong is said once, not by every rank.
        words: the command line of each rank.
        ranks: how many are asked for; None: as many as the lanes can use.

    Raises:
        MilepostError: `load` refused, or a rank failed and has said why.
    """
    from milepost.distributed.stop_requests import StopRequests

    with StopRequests() as stops:  # first: the other imports and checks take a while
        from milepost.distributed.devices import choose_ranks, count_gpus
        from milepost.distributed.launch import launch
        from milepost.train.installed import check_installed
        from milepost.train.trackers import check_trackers

        config = load()
        if config.evaluation.every_steps is not None:
            from milepost.evaluation.catalog import parse_tasks

            parse_tasks(config.evaluation.tasks)
        check_trackers(config.tracking.tools)
        check_installed(config)
        num_gpus = count_gpus()
        chosen = choose_ranks(requested=ranks, lanes=config.train.lanes, num_gpus=num_gpus)
        code = launch(words, ranks=chosen, on_gpus=num_gpus > 0, stops=stops)
    if code != 0:
        raise ChildFailed(code)
