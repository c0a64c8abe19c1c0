"""`milepost evaluate`: scores checkpoints on benchmarks, as one rank or as the start of several."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from milepost.cli.train import ChildFailed
from milepost.core import console
from milepost.core.errors import StopRequested, UsageError

if TYPE_CHECKING:
    from milepost.distributed.place import Place
    from milepost.distributed.world import World
    from milepost.evaluation.evaluate import Evaluation

WAIT_SECONDS = 3600.0
"""How long a rank waits for another: the main one may fetch rows or read a large checkpoint."""

DTYPES = ("auto", "float32", "bfloat16", "float16")
PROGRAM_BYTES = 1 << 29
"""Of a rank beside its models: the program itself, the items and the scoring's buffers."""


@dataclass(frozen=True)
class Options:
    """What a person asks for, beside the model.

    Parameters
    ----------
    tasks
        Names with commas between: arc_challenge, arc_easy, boolq, hellaswag, openbookqa, piqa,
        winogrande; paper (those seven, the default); heldout (endings of the run's own validation
        documents); boolq_reasoned (BoolQ after a rationale of the model's own).
    adapter
        A fine-tuning run or a folder in PEFT's format, whose adapter is put on the model.
    steps
        Checkpoints of a run, of --adapter where that is one: all, latest (the default), every:N,
        or steps such as 100,200.
    data_dir
        Folder of the benchmarks' rows, such as hellaswag_val.jsonl.gz. Default: from the
        Hugging Face hub, kept for the next time.
    prepared
        Prepared data whose validation documents heldout takes. Default: the run's own.
    limit
        Only the first so many items of each task.
    num_fewshot
        Solved items before each question. Default: 0, with --harness what the task says.
    dtype
        Of the forward pass: auto (that of the model's file), float32, bfloat16 or float16.
    ranks
        Processes that share the work: one a GPU, or one a CPU core. They change no number.
    out
        Folder of the records. Default: the run; other models' scores are only shown.
    output_path
        Also write results_*.json here, as lm-evaluation-harness does.
    log_samples
        With --output-path: also samples_*.jsonl, a line an item.
    harness
        Let lm-evaluation-harness itself ask: any of its tasks, shown and not recorded.
    include_path
        With --harness: a folder with further tasks as its YAML files.
    json
        One JSON document on stdout.
    """

    tasks: Annotated[list[str] | None, Parameter(negative="")] = None
    adapter: Path | None = None
    steps: str | None = None
    data_dir: Path | None = None
    prepared: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    dtype: str = "auto"
    ranks: int | None = None
    out: Path | None = None
    output_path: Path | None = None
    log_samples: Annotated[bool, Parameter(negative="")] = False
    harness: Annotated[bool, Parameter(negative="")] = False
    include_path: Path | None = None
    json: Annotated[bool, Parameter(negative="")] = False


def evaluate(
    model: Path,
    *,
    options: Annotated[Options, Parameter(name="*")] = Options(),
    words: Annotated[Sequence[str], Parameter(parse=False)],
) -> None:
    """Score checkpoints on benchmarks, as lm-evaluation-harness 0.4.13 asks them.

    In float32 the numbers are the harness's. In 16 bits the harness rounds log-probabilities and
    their sums to 16 bits, which makes ties; Milepost does not, so single answers can differ.

    Every score is recorded in the run's evaluations.jsonl, with a file of its items; what is
    recorded is not scored again, so a command that was stopped goes on where it was.

    Example: `milepost evaluate runs/first --tasks hellaswag,boolq --steps all --limit 500`

    Parameters
    ----------
    model
        A run folder, a checkpoint folder, an adapter, or any Hugging Face LLaMA folder.
    words
        The command line, for the ranks that this process starts.
    """
    from milepost.distributed.place import read_place
    from milepost.evaluation.catalog import HELDOUT, PAPER, parse_tasks

    _check(options)
    names = () if options.harness else parse_tasks(options.tasks or [PAPER])
    if options.prepared is not None and not options.harness and HELDOUT not in names:
        raise UsageError(
            "--prepared is for heldout, which is not among the tasks",
            hint="add heldout to --tasks, or leave --prepared out",
        )
    place = read_place(os.environ)
    if place is None:
        _launch(model, ranks=options.ranks, words=words)
        return
    with join_ranks(place) as (world, stop_requested):
        if options.harness:
            was_stopped = _ask_harness(model, options, world=world, stop_requested=stop_requested)
        else:
            was_stopped = _score(
                model, names, options=options, world=world, stop_requested=stop_requested
            )
    if was_stopped:
        if place.rank == 0:
            console.say("stopped on request; the same command goes on")
        if place.started_by == "milepost":
            raise ChildFailed(StopRequested.exit_code)


def _score(
    model: Path,
    names: tuple[str, ...],
    *,
    options: Options,
    world: World,
    stop_requested: Callable[[], bool],
) -> bool:
    """Scores what is missing, shows all; returns whether a stop was asked for."""
    from milepost.evaluation import evaluate as evaluation

    request = evaluation.Request(
        model=model,
        tasks=names,
        steps=options.steps,
        data_dir=options.data_dir,
        prepared=options.prepared,
        limit=options.limit,
        num_fewshot=options.num_fewshot or 0,
        dtype=options.dtype,
        out=options.out,
        adapter=options.adapter,
    )
    found = evaluation.evaluate(request, world=world, stop_requested=stop_requested)
    if world.is_main:
        _write_and_show(found, model, options=options)
    return found.was_stopped


def _ask_harness(
    model: Path, options: Options, *, world: World, stop_requested: Callable[[], bool]
) -> bool:
    """Lets the harness ask; returns whether a stop was asked for."""
    from milepost.cli.evaluate_harness import evaluate_with_harness

    return evaluate_with_harness(
        model,
        adapter=options.adapter,
        tasks=[name.strip() for text in options.tasks or () for name in text.split(",")],
        steps=options.steps,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        dtype=options.dtype,
        include_path=options.include_path,
        output_path=options.output_path,
        log_samples=options.log_samples,
        as_json=options.json,
        world=world,
        stop_requested=stop_requested,
    )


def _check(options: Options) -> None:
    """Refuses numbers out of range and what would not be honored."""
    limit, num_fewshot, dtype = options.limit, options.num_fewshot, options.dtype
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} leaves no item", hint="give 1 or more")
    if num_fewshot is not None and num_fewshot < 0:
        raise UsageError(f"--num-fewshot {num_fewshot} cannot be", hint="give 0 or more")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r} cannot be", hint=f"give {', '.join(DTYPES)}")
    if options.log_samples and options.output_path is None:
        raise UsageError("--log-samples needs a place", hint="add --output-path DIR")
    if not options.harness:
        if options.include_path is not None:
            raise UsageError("--include-path is for --harness", hint="add --harness, or leave it")
        return
    if not options.tasks:
        raise UsageError("--harness needs tasks", hint="name them: --tasks lambada_openai,sciq")
    own = {"--data-dir": options.data_dir, "--prepared": options.prepared, "--out": options.out}
    for name, value in own.items():
        if value is not None:
            raise UsageError(
                f"{name} cannot be with --harness",
                hint="the harness finds its own rows, and its scores are shown only; "
                "--output-path DIR writes its files",
            )


def _launch(model: Path, *, ranks: int | None, words: Sequence[str]) -> None:
    from milepost.distributed.stop_requests import StopRequests

    if not model.is_dir():  # before the seconds that starting the ranks takes
        raise UsageError(
            f"{model} is not a folder", hint="give a run, a checkpoint or a Hugging Face folder"
        )
    with StopRequests() as stops:
        from milepost.distributed.devices import choose_scoring_ranks, count_gpus
        from milepost.distributed.launch import Phrases, launch

        num_gpus = count_gpus()
        chosen = choose_scoring_ranks(
            requested=ranks, num_gpus=num_gpus, rank_bytes=PROGRAM_BYTES + _model_bytes(model)
        )
        phrases = Phrases(
            finishing="what is scored is recorded",
            kept="what was scored is recorded",
            goes_on="what is recorded is not scored again",
        )
        code = launch(words, ranks=chosen, on_gpus=num_gpus > 0, stops=stops, phrases=phrases)
    if code != 0:
        raise ChildFailed(code)


def _model_bytes(model: Path) -> int:
    """Memory of one rank's models: scored, packed for the CPU's products, and read meanwhile.

    From the sizes of the files, as float32 if they hold two bytes a weight.
    """
    from milepost.runs.layout import RunLayout, checkpoint_folders
    from milepost.runs.steps import is_run

    folders = checkpoint_folders(RunLayout(model)) if is_run(model) else [(0, model)]
    files = [file for _, folder in folders[-1:] for file in folder.glob("*.safetensors")]
    return 3 * 2 * sum(file.stat().st_size for file in files)


@contextlib.contextmanager
def join_ranks(place: Place) -> Iterator[tuple[World, Callable[[], bool]]]:
    """This rank's world for the block, and whether a stop was asked of it."""
    import torch

    from milepost.distributed.world import die_with_parent, join_world
    from milepost.train.precision import make_deterministic
    from milepost.train.stop import StopSignal

    # Read by cuBLAS when it starts; without it deterministic products are refused.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    stop = StopSignal()
    die_with_parent(place)
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if device_type == "cpu" and place.started_by == "milepost":
        torch.set_num_threads(1)
    with join_world(place, device_type=device_type, timeout_seconds=WAIT_SECONDS) as world:
        make_deterministic(device=world.device)
        yield world, stop.is_requested


def _write_and_show(found: Evaluation, model: Path, *, options: Options) -> None:
    from milepost.cli.evaluation_tables import tables
    from milepost.evaluation.harness_files import write_harness_files

    if options.output_path is not None and not found.was_stopped:
        write_harness_files(
            found,
            folder=options.output_path,
            model=model,
            now=datetime.datetime.now(),
            log_samples=options.log_samples,
        )
    if options.json:
        recorded_in = None if found.store is None else found.store.log
        console.show_json({"evaluations": found.lines, "recorded_in": recorded_in})
    else:
        for line in tables(found.lines):
            console.show(line)
    num_new = len(found.new_items)
    if found.store is None:
        console.say("not recorded: the model is not of a run; --out DIR keeps the scores")
    else:
        known = len(found.lines) - num_new
        console.say(f"recorded in {found.store.log}: {num_new} scored now, {known} were there")
