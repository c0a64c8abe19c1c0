"""`milepost import`: a model of another program as a run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from milepost.core import console
from milepost.core.units import format_count

if TYPE_CHECKING:
    from milepost.posttrain.imported_run import ImportedRun


def import_(
    folder: Path,
    *overrides: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    run: Path,
    data: Path | None = None,
    step: int = 0,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Make a run of a Hugging Face LLaMA folder, to train it further or to fine-tune it.

    The weights are taken, as safetensors; a pickle is never read. The optimizer begins anew. The
    settings of further training are set here, `--section.key VALUE`, and stand in the run's
    recipe.toml.

    Example: `milepost import models/small-llama --run runs/small --data data/corpus`

    Parameters
    ----------
    folder
        A folder with config.json, tokenizer.json and model.safetensors (or its shards).
    run
        The new run folder. It appears whole or not at all.
    data
        What to train it further on: a folder of `milepost data prepare`, made with the model's
        own tokenizer. Without it the run can be used and fine-tuned.
    step
        The step that its checkpoint gets; the order of the data and the schedule go on from it.
    json
        One JSON document on stdout.
    """
    from milepost.posttrain.imported_run import import_model

    imported = import_model(folder, run=run, data=data, step=step, overrides=overrides)
    if json:
        console.show_json(_plain(imported))
    else:
        _show(imported, run=run)


def _plain(imported: ImportedRun) -> dict[str, object]:
    return {
        "run": str(imported.run),
        "source": str(imported.source),
        "step": imported.step,
        "parameters": imported.num_parameters,
        "can_be_trained": imported.has_data,
    }


def _show(imported: ImportedRun, *, run: Path) -> None:
    place, model = shlex.quote(str(run)), imported.config.model
    console.show(
        f"{imported.source}: {format_count(imported.num_parameters)} parameters, "
        f"{model.num_hidden_layers} layers of {model.hidden_size}, "
        f"context {model.max_position_embeddings:,}"
    )
    console.show(f"{run}: a run with a checkpoint of step {imported.step}")
    console.show("")
    if imported.has_data:
        recipe = shlex.quote(str(run / "recipe.toml"))
        console.show(f"  train it further   milepost train {recipe} --run {place}")
    else:
        console.show(
            "  train it further   import it with --data, which fixes what it is trained on"
        )
    console.show(f"  fine-tune it       milepost finetune {place} --data FILE --run DIR")
    console.show(f'  try it             milepost sample {place} --prompt "Once upon a time"')
