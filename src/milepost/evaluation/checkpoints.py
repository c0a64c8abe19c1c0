"""Which checkpoints an evaluation means, and what must be known of each before it is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from milepost.checkpoint.store import MANIFEST
from milepost.core.errors import CheckpointError, DataError
from milepost.core.files import read_json
from milepost.data.shards import ShardSet, open_prepared
from milepost.inference.load import (
    FoundModel,
    LoadedModel,
    find_models,
    has_manifest,
    identify,
    load_found,
    read_found,
)
from milepost.inference.model_files import dtype_of_weights
from milepost.runs.evaluations import Weights
from milepost.runs.events import read_history
from milepost.runs.layout import RunLayout, step_of_folder
from milepost.runs.manifest import read_run_manifest
from milepost.runs.steps import is_run
from milepost.text.tokenizer import Tokenizer

AUTO = "auto"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Checkpoint:
    """A model that is to be scored.

    Attributes:
        found: where it lies.
        weights: what identifies it.
        dtype: of the forward pass.
    """

    found: FoundModel
    weights: Weights
    dtype: str

    @property
    def folder(self) -> Path:
        """The folder that names it."""
        return self.found.folder

    def as_plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        adapter = self.found.adapter
        return {
            "base": str(self.found.base),
            "adapter": None if adapter is None else str(adapter),
            "weights": asdict(self.weights),
            "dtype": self.dtype,
        }


def checkpoint_from_plain(plain: dict[str, Any]) -> Checkpoint:
    """Reads back what `Checkpoint.as_plain` gave."""
    adapter = None if plain["adapter"] is None else Path(plain["adapter"])
    found = FoundModel(Path(plain["base"]), adapter)
    return Checkpoint(found, Weights(**plain["weights"]), plain["dtype"])


def run_of_model(path: Path) -> Path | None:
    """The run folder that `path` is or that the checkpoint `path` lies in; None for a stranger."""
    if is_run(path):
        return path
    parent = path.resolve().parent
    if step_of_folder(path) is not None and parent.name == "checkpoints" and is_run(parent.parent):
        return parent.parent
    return None


def find_checkpoints(
    path: Path, *, steps: str | None, dtype: str, adapter: Path | None = None
) -> list[Checkpoint]:
    """The checkpoints that a person means, ascending by step, identified and not yet verified.

    Args:
        path: a model, see `find_model`.
        steps: see `parse_steps`; None: the latest.
        dtype: one of `DTYPES`, or "auto": that of each model's file.
        adapter: put on the model, see `find_model`.

    Raises:
        UsageError: there is no model, or steps are asked of what is no run.
        CheckpointError: the run has no such checkpoint, or a file is missing.
    """
    found = find_models(path, steps=steps, adapter=adapter)
    tokens_by_step = _tokens_by_step(run_of_model(adapter or path))
    return [_checkpoint(model, dtype=dtype, tokens_by_step=tokens_by_step) for model in found]


def _checkpoint(found: FoundModel, *, dtype: str, tokens_by_step: dict[int, int]) -> Checkpoint:
    run_id = None
    if has_manifest(found.folder):
        head = read_json(found.folder / MANIFEST, error=CheckpointError)
        run_id = head.get("run_id") if isinstance(head, dict) else None
    weights = Weights(
        checkpoint_sha256=identify(found),
        run_id=run_id,
        step=found.step,
        tokens_seen=None if found.step is None else tokens_by_step.get(found.step),
    )
    return Checkpoint(found, weights, dtype_of_weights(found.base) if dtype == AUTO else dtype)


def _tokens_by_step(run: Path | None) -> dict[int, int]:
    if run is None:
        return {}
    found = read_history(RunLayout(run).events).latest_by_step("step")
    return {step: e["tokens_seen"] for step, e in found.items() if "tokens_seen" in e}


def load_verified(checkpoint: Checkpoint) -> LoadedModel:
    """The model on the CPU, its files held against the manifest where there is one.

    Raises:
        CheckpointError: a file is missing or is not what the manifest says.
    """
    return load_found(checkpoint.found)


def load_unverified(checkpoint: Checkpoint) -> LoadedModel:
    """As `load_verified`, where another rank looks at the hashes."""
    return read_found(checkpoint.found)


def open_validation(path: Path, *, prepared: Path | None, tokenizer: Tokenizer) -> ShardSet | None:
    """The validation shards of a model's run, or of the prepared data that a person names.

    Args:
        path: as for `find_checkpoints`.
        prepared: a folder of prepared data; None: where the run's config says.
        tokenizer: of the model.

    Returns:
        The shards; None where the model is not of a run, or the data has no validation split.

    Raises:
        DataError: the data is missing, or of another tokenizer or run.
    """
    fingerprint = None
    if prepared is None:
        run = run_of_model(path)
        if run is None:
            return None
        manifest = read_run_manifest(RunLayout(run))
        prepared, fingerprint = Path(manifest.config.data.path), manifest.validation_fingerprint
    data = open_prepared(prepared)
    if data.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"{prepared} was prepared with another tokenizer than the model's",
            hint="give data that was prepared with the model's own tokenizer",
        )
    found = data.validation
    if fingerprint is not None and (found is None or found.fingerprint != fingerprint):
        raise DataError(
            f"{prepared} no longer holds the validation documents of the run",
            hint="give the folder that the run was made with: --prepared DIR",
        )
    return found
