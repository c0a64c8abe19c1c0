"""A run's manifest: what it is made of, written once when the run is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from milepost.config.recipe import as_plain, config_from_plain, config_sha256
from milepost.config.schema import Config
from milepost.core.errors import CheckpointError, UsageError
from milepost.core.files import read_json, sha256_of_json, write_json
from milepost.runs.layout import RunLayout

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class RunManifest:
    """What identifies a run.

    Attributes:
        run_id: random hex; every checkpoint of the run carries it.
        created: UTC, ISO 8601.
        config: the resolved config.
        recipe: what the person called the recipe.
        data_fingerprint: of the training shards.
        validation_fingerprint: of the validation shards, None where there are none.
        tokenizer_sha256: of the tokenizer.
        environment: machine and versions the run was made on.
        lineage: the run and step this one starts from; empty for a run from scratch.
    """

    run_id: str
    created: str
    config: Config
    recipe: str
    data_fingerprint: str
    validation_fingerprint: str | None
    tokenizer_sha256: str
    environment: dict[str, Any]
    lineage: dict[str, Any] = field(default_factory=dict)


def refuse_without_data(manifest: RunManifest, *, run: Path) -> None:
    """Refuses to train a run that was imported without data.

    Raises:
        UsageError: it was; the hint says how the model is trained all the same.
    """
    if not manifest.data_fingerprint:
        raise UsageError(
            f"{run} was imported without data, so it cannot be trained further",
            hint=f"begin a new run with its weights: --run NEW --from {run} --restore weights "
            "--data.path DIR; or import the model once more with --data",
        )


def write_run_manifest(layout: RunLayout, manifest: RunManifest) -> None:
    """Writes the manifest atomically.

    Raises:
        StorageError: the folder cannot be written.
    """
    values = {key: value for key, value in asdict(manifest).items() if key != "config"}
    plain = as_plain(manifest.config)
    write_json(
        layout.manifest,
        {"v": SCHEMA_VERSION}
        | values
        | {"config": plain, "config_sha256": config_sha256(manifest.config)},
    )


def read_run_manifest(layout: RunLayout) -> RunManifest:
    """Reads and checks the manifest.

    Raises:
        UsageError: the folder holds no run.
        CheckpointError: the manifest is damaged, or of a later version than this program.
    """
    if not layout.manifest.is_file():
        raise UsageError(
            f"{layout.root} is not a run folder: it has no manifest.json",
            hint="give the folder that was named with --run",
        )
    values = read_json(layout.manifest, error=CheckpointError)
    version = values.get("v") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{layout.manifest} has schema version {version}, this program reads {SCHEMA_VERSION}",
            hint="use the version of Milepost that made the run, or a later one",
        )
    try:
        # Over the config as it was written: fields that came later have defaults, no hash.
        if sha256_of_json(values["config"]) != values["config_sha256"]:
            raise CheckpointError(
                f"{layout.manifest}: the config does not match its hash",
                hint="the file was edited; restore it, a run's config never changes",
            )
        config = config_from_plain(values["config"], source=str(layout.manifest))
        return RunManifest(
            config=config, **{k: values[k] for k in RunManifest.__annotations__ if k != "config"}
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{layout.manifest} lacks {error}") from error
