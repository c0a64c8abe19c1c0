"""A Hugging Face LLaMA folder as a run: one checkpoint that training goes on from.

Weights only: the optimizer begins anew, which a train state with moments of zero says exactly.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from milepost.checkpoint.state import Progress, TrainState
from milepost.checkpoint.store import needed_bytes, save_checkpoint
from milepost.config.problems import validate
from milepost.config.recipe import config_from_toml
from milepost.config.schema import Config, ModelSection
from milepost.core.environment import describe_environment
from milepost.core.errors import DataError, UsageError
from milepost.core.files import as_utf8, storage_errors, write_atomically
from milepost.data.run_data import open_run_data
from milepost.data.shards import PreparedData
from milepost.inference.load import LoadedModel, find_model, identify, load_model
from milepost.inference.model_files import ADAPTER_CONFIG_FILE, CONFIG_FILE
from milepost.planner.cost import count_parameters
from milepost.posttrain.finite_weights import refuse_not_finite
from milepost.posttrain.folder_files import folder_files
from milepost.posttrain.new_folder import new_folder, refuse_full_disk, refuse_place
from milepost.runs.events import EventWriter, utc_now
from milepost.runs.layout import RunLayout, step_of_folder
from milepost.runs.manifest import RunManifest, write_run_manifest
from milepost.runs.steps import is_run
from milepost.text.tokenizer import Tokenizer
from milepost.train.resolving import resolve_config
from milepost.trajectory.provenance import recipe_toml

TOKENIZER_FILE = "tokenizer.json"
RECIPE_FILE = "recipe.toml"
"""The run's settings as a recipe, to train it further with."""

MORE_STEPS = 1000
"""Updates that the schedule is made for, if nobody says otherwise."""

_MOST_STEPS = 10**9
_ROWS = 32
_LONGEST_ROW = 2048
_SOURCE = "the settings of the import"


@dataclass(frozen=True)
class ImportedRun:
    """A run that was made from a model.

    Attributes:
        run: its folder.
        source: the model's folder.
        config: of the run.
        step: of its checkpoint.
        num_parameters: of the model.
        has_data: whether it knows the data it can be trained on.
    """

    run: Path
    source: Path
    config: Config
    step: int
    num_parameters: int
    has_data: bool


def import_model(
    source: Path, *, run: Path, data: Path | None, step: int, overrides: Sequence[str]
) -> ImportedRun:
    """Makes a run of a model folder, whole or not at all.

    Args:
        source: a Hugging Face LLaMA folder; its weights are safetensors.
        run: the new run folder.
        data: prepared data to train on, of the model's own tokenizer; None: the run can be used
            and fine-tuned, and not be trained further.
        step: of the run's checkpoint; the order of the data and the schedule go on from it.
        overrides: settings of the run, as of `milepost train`.

    Raises:
        UsageError: there is no such model, it is no plain LLaMA, the run folder holds something,
            or a setting is wrong.
        CheckpointError: the weights are damaged, a pickle, or of another shape.
        DataError: the data is of another tokenizer.
        StorageError: it does not fit on the disk or cannot be written; nothing was left behind.
    """
    run = run.resolve()
    if not 0 <= step <= _MOST_STEPS:
        raise UsageError(f"--step is {step}", hint=f"give 0 to {_MOST_STEPS}")
    refuse_place(run)
    _refuse_filled(run)
    _refuse_other_sources(source)
    loaded = load_model(source)
    refuse_not_finite(loaded.model, folder=source)
    config = _resolved(_config(loaded.model.config, data=data, step=step, overrides=overrides))
    prepared = None if data is None else _open_data(config, loaded=loaded)
    num_parameters = count_parameters(config.model).total
    needed = needed_bytes(num_parameters, weights_dtype=config.checkpoint.weights_dtype)
    refuse_full_disk(run, needed_bytes=needed)
    manifest = _manifest(config, source=source, loaded=loaded, data=prepared)
    with new_folder(run, refuse_filled=lambda: _refuse_filled(run)) as folder:
        _write_run(RunLayout(folder), manifest=manifest, loaded=loaded, step=step)
    return ImportedRun(run, source, config, step, num_parameters, prepared is not None)


def _refuse_filled(run: Path) -> None:
    with storage_errors(run, verb="read"):
        if not run.exists():
            return
        if not run.is_dir() or any(run.iterdir()):
            raise UsageError(f"{run} is not an empty folder", hint="choose a new folder with --run")


def _refuse_other_sources(source: Path) -> None:
    if is_run(source):
        raise UsageError(
            f"{source} is a run already", hint="use it as it is; milepost train continues it"
        )
    if not any((source / name).exists() for name in (CONFIG_FILE, ADAPTER_CONFIG_FILE)):
        what = "has no config.json" if source.is_dir() else "is not a folder"
        raise UsageError(
            f"{source} {what}",
            hint="give a Hugging Face folder on this machine: config.json, tokenizer.json and "
            "model.safetensors",
        )
    if (source / CONFIG_FILE).exists() and not (source / TOKENIZER_FILE).exists():
        raise UsageError(
            f"{source} has no {TOKENIZER_FILE}",
            hint="where there is another form of the tokenizer, load it with transformers' "
            "AutoTokenizer and save it there",
        )


def _config(
    model: ModelSection, *, data: Path | None, step: int, overrides: Sequence[str]
) -> Config:
    """The run's config: the model's architecture, settings to train it further with."""
    length = min(model.max_position_embeddings, _LONGEST_ROW)
    # Continued training warms up and decays anew (Ibrahim et al. 2024), at a lower rate.
    sections: dict[str, dict[str, Any]] = {
        "data": {"path": "" if data is None else str(data), "sequence_length": length},
        "model": model.model_dump(),
        "train": {
            "global_batch_tokens": _ROWS * length,
            "microbatch_rows": 2,
            "total_steps": step + MORE_STEPS,
        },
        "optimizer": {"learning_rate": 1e-4},
        "schedule": {"warmup_steps": 50, "min_learning_rate": 1e-5},
    }
    usual = validate(sections, source=_SOURCE)
    config = config_from_toml(recipe_toml(usual), overrides=overrides, source=_SOURCE)
    _refuse_settings(config, usual=usual)
    if config.train.total_steps <= step:
        raise UsageError(
            f"train.total_steps is {config.train.total_steps}, the import begins at step {step}",
            hint=f"set --train.total_steps above {step}",
        )
    return config


def _refuse_settings(config: Config, *, usual: Config) -> None:
    """Refuses settings that an imported run could not honor.

    Args:
        config: as a person set it.
        usual: as it is where nobody sets anything.

    Raises:
        UsageError: names the first.
    """
    model = config.model.model_copy(update={"residual_init": usual.model.residual_init})
    if model != usual.model:
        raise UsageError(
            "the architecture is that of the model folder and cannot be set",
            hint="leave --model.* out",
        )
    if config.data.path != usual.data.path:
        raise UsageError(
            "the data of an imported run is checked against the model, so --data names it",
            hint=f"give --data {config.data.path} in place of --data.path",
        )
    if (config.lora, config.finetune) != (usual.lora, usual.finetune):
        raise UsageError(
            "[lora] and [finetune] are settings of milepost finetune",
            hint="import the model without them, then run milepost finetune on the run",
        )
    if config.optimizer.name != usual.optimizer.name:
        raise UsageError(
            f"an imported run begins with the moments of {usual.optimizer.name}, "
            f"optimizer.name is {config.optimizer.name}",
            hint="leave --optimizer.name out",
        )


def _resolved(config: Config) -> Config:
    """Every "auto" as this machine takes it, as a new run stores it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # With how many ranks it will go on is not known; one needs the most memory.
    return resolve_config(config, device=device, ranks=1)


def _open_data(config: Config, *, loaded: LoadedModel) -> PreparedData:
    """The data, which must be of the model's own tokenizer."""
    tokenizer = loaded.tokenizer
    if tokenizer.vocab_size != config.model.vocab_size:
        raise UsageError(
            f"{loaded.folder} has {config.model.vocab_size} rows for {tokenizer.vocab_size} "
            "tokens; a model with rows that no token has cannot be trained further",
            hint="import it without --data, to use it or to fine-tune it",
        )
    data = open_run_data(config)
    if data.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"{data.folder} was made with another tokenizer than the model's "
            f"({data.tokenizer_sha256[:12]} instead of {tokenizer.sha256[:12]})",
            hint="prepare the data with the model's own: milepost data prepare SOURCE "
            f"--tokenizer {loaded.folder}/tokenizer.json --out DIR",
        )
    return data


def _manifest(
    config: Config, *, source: Path, loaded: LoadedModel, data: PreparedData | None
) -> RunManifest:
    validation = None if data is None else data.validation
    return RunManifest(
        run_id=uuid.uuid4().hex,
        created=utc_now(),
        config=config,
        recipe=RECIPE_FILE,
        data_fingerprint="" if data is None else data.train.fingerprint,
        validation_fingerprint=None if validation is None else validation.fingerprint,
        tokenizer_sha256=loaded.tokenizer.sha256,
        environment=describe_environment(),
        lineage={
            "imported_from": str(source.resolve()),
            "imported_sha256": identify(find_model(source)),
            "imported_step": step_of_folder(loaded.folder),
        },
    )


def _write_run(layout: RunLayout, *, manifest: RunManifest, loaded: LoadedModel, step: int) -> None:
    config = manifest.config
    write_run_manifest(layout, manifest)
    write_atomically(layout.root / RECIPE_FILE, as_utf8(recipe_toml(config)))
    saved = save_checkpoint(
        layout,
        run_id=manifest.run_id,
        state=_first_state(loaded, step=step),
        model_files=_model_files(loaded, config=config),
        weights_dtype=config.checkpoint.weights_dtype,
    )
    EventWriter(layout.events, segment=0).append_durably(
        "checkpoint_saved",
        step=step,
        sha256=saved.sha256,
        bytes=saved.num_bytes,
        seconds=saved.seconds,
    )


def _first_state(loaded: LoadedModel, *, step: int) -> TrainState:
    """The weights with an optimizer that has seen nothing."""
    weights = {name: p.detach() for name, p in loaded.model.named_parameters()}
    return TrainState(
        progress=Progress(step=step),
        weights=weights,
        moments={
            f"{moment}.{name}": torch.zeros_like(tensor)
            for moment in ("exp_avg", "exp_avg_sq")
            for name, tensor in weights.items()
        },
        optimizer_step=0,
    )


def _model_files(loaded: LoadedModel, *, config: Config) -> dict[str, bytes]:
    tokenizer: Tokenizer = loaded.tokenizer
    return folder_files(
        loaded.folder,
        model=config.model,
        tokenizer=tokenizer,
        dtype=config.checkpoint.weights_dtype,
    )
