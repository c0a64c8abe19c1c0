"""`milepost finetune`: instruction tuning of a model, on the loop of `milepost train`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from milepost.cli.train import end_rank, launch_ranks
from milepost.core.errors import UsageError

if TYPE_CHECKING:
    from milepost.config.schema import Config

DEFAULT_RECIPE = "sft-alpaca"

OPTIONS = ("data", "run", "full", "ranks", "override", "json", "debug")
"""What `finetune` takes beside overrides, for the hint after a slip of the pen."""


def finetune(
    model: Path,
    recipe: Annotated[str, Parameter(allow_leading_hyphen=True)] = DEFAULT_RECIPE,
    *overrides: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    data: str,
    run: Path,
    full: Annotated[bool, Parameter(negative="")] = False,
    ranks: int | None = None,
    override: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
    words: Annotated[Sequence[str], Parameter(parse=False)],
) -> None:
    """Tune a model on conversations, or continue such a run exactly.

    Only answers are trained, and the end-of-text token behind each. At the end both models
    answer the recipe's questions. Stop with Ctrl-C: the same command goes on.

    Any field of the recipe can be set, anywhere in the line: `--section.key VALUE`, such as
    `--data.sequence_length 512`. `milepost plan sft-alpaca` says what the recipe costs.

    Example: `milepost finetune runs/first --data alpaca.jsonl --run runs/tuned`

    Parameters
    ----------
    model
        A run folder (its latest checkpoint), a checkpoint, or any Hugging Face LLaMA folder.
    recipe
        A packaged recipe, or a .toml file with a [finetune] section.
    data
        Conversations: .json, .jsonl(.gz, .zst) or .parquet with Alpaca, messages or ShareGPT rows,
        or hf://datasets/owner/name.
    run
        The run folder.
    full
        Train all weights, in place of LoRA's additions.
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

    if recipe.startswith("--"):  # it was left out, and this is the first of the overrides
        recipe, overrides = DEFAULT_RECIPE, (recipe, *overrides)

    def load() -> Config:
        return load_config(model, recipe, overrides, data=data, full=full)

    place = read_place(os.environ)
    if place is None:
        launch_ranks(lambda: _checked(load()), words=words, ranks=ranks)
        return
    config = load()
    # Read by cuBLAS when it starts; without it deterministic products are refused.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from milepost.posttrain.compare import compare_answers, show_answers
    from milepost.posttrain.finetuning import open_finetuning
    from milepost.train.rank import train_as_rank

    summary = train_as_rank(
        place,
        config=config,
        recipe=recipe,
        run=run,
        may_override=override,
        open_subject=open_finetuning,
    )
    if summary is not None and place.rank == 0 and summary["status"] != "stopped":
        answers = compare_answers(run, config=config) if config.finetune.questions else []
        summary["answers"] = [asdict(answer) for answer in answers]
        if answers and not json:
            show_answers(answers)
    end_rank(place, summary, json=json)


def _checked(config: Config) -> Config:
    from milepost.posttrain.finetuning import check_finetuning

    check_finetuning(config)
    return config


def load_config(
    model: Path, recipe: str, overrides: Sequence[str], *, data: str, full: bool
) -> Config:
    """The recipe with the architecture of the model, and where model and data lie.

    Raises:
        UsageError: the model cannot be tuned, or the recipe is no recipe for it.
    """
    from milepost.config.recipe import as_overrides, load_recipe
    from milepost.inference.model_files import read_config
    from milepost.posttrain.finetuning import open_base

    _refuse_contradictions(overrides, full=full)
    folder = open_base(model).folder
    made = {"base": str(folder), "data": data if "://" in data else str(Path(data).resolve())}
    words = [*as_overrides("model", read_config(folder)), *as_overrides("finetune", made)]
    if full:
        words += ["--lora.rank", "none"]
    config = load_recipe(recipe, overrides=[*overrides, *words], options=OPTIONS)
    if not config.is_finetuning:
        raise UsageError(
            f"recipe {recipe} has no finetune.template, it is for milepost train",
            hint="use sft-alpaca, or add --finetune.template vicuna-1.1",
        )
    if config.samples.every_steps is not None:
        raise UsageError(
            "samples.every_steps is set, which only milepost train does",
            hint="finetune.questions are answered at the end; milepost sample asks any checkpoint",
        )
    return config


def _refuse_contradictions(overrides: Sequence[str], *, full: bool) -> None:
    sections = [word.removeprefix("--").partition(".")[0] for word in overrides]
    if "model" in sections:
        raise UsageError(
            "the architecture is that of the model that is tuned", hint="leave --model. out"
        )
    if full and "lora" in sections:
        raise UsageError("--full trains without LoRA", hint="leave out --full, or --lora.")
    for name in ("base", "data"):
        if any(word.partition("=")[0] == f"--finetune.{name}" for word in overrides):
            raise UsageError(
                f"finetune.{name} is named by the command itself",
                hint="milepost finetune MODEL --data FILE --run DIR",
            )
