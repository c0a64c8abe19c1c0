"""A model with the adapter that goes with it, whichever of the two a person names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from milepost.checkpoint.store import ADAPTER_FILE, verify_model_files
from milepost.core.errors import CheckpointError, UsageError
from milepost.core.files import plain_file, sha256_of_file, storage_errors
from milepost.inference.adapter_files import load_lora
from milepost.inference.load import (
    LoadedModel,
    base_of_adapter,
    has_manifest,
    identify,
    load_model,
    model_folder,
)
from milepost.runs.layout import step_of_folder
from milepost.runs.steps import is_run


@dataclass(frozen=True)
class TunedModel:
    """A model that is ready to use, its additions on it.

    Attributes:
        loaded: the model; `folder` and `step` are those of the base.
        adapter: the folder of its adapter; None: it has none.
        base_name: what the adapter calls its base, for PEFT to find it.
    """

    loaded: LoadedModel
    adapter: Path | None
    base_name: str

    @property
    def folder(self) -> Path:
        """The folder whose records tell of the model: the adapter's where there is one."""
        return self.loaded.folder if self.adapter is None else self.adapter

    @property
    def step(self) -> int | None:
        """Updates of the last training; None where the folder's name does not say."""
        return step_of_folder(self.folder)

    def identify(self) -> str:
        """The hash that names what was trained last."""
        if self.adapter is None or has_manifest(self.adapter):
            return identify(self.folder)
        file = plain_file(self.adapter / ADAPTER_FILE, error=CheckpointError)
        with storage_errors(file, verb="read"):
            return sha256_of_file(file)


def load_tuned(path: Path, *, step: int | None, adapter: Path | None) -> TunedModel:
    """Loads a model with its adapter.

    Args:
        path: a run, a checkpoint, a Hugging Face LLaMA folder; or a run or folder of an adapter,
            whose base is where the adapter says.
        step: of a run, which checkpoint; None: the latest.
        adapter: put on the model; None: what `path` itself holds.

    Raises:
        UsageError: there is no model or no adapter, or there are two adapters.
        CheckpointError: a file is damaged, the adapter is of another base, or its base is not
            where it says.
    """
    folder = model_folder(path, step=step)
    base = base_of_adapter(folder)
    if base is None:
        loaded = load_model(path, step=step)
        return TunedModel(loaded, None, "") if adapter is None else _put_on(loaded, adapter)
    if adapter is not None:
        raise UsageError(
            f"{folder} is an adapter itself", hint="give its base as the model, or no --adapter"
        )
    return _put_on(load_model(base), folder)


def _put_on(loaded: LoadedModel, adapter: Path) -> TunedModel:
    if is_run(adapter):
        adapter = model_folder(adapter)
    if has_manifest(adapter):
        verify_model_files(adapter)
    found = load_lora(loaded.model, adapter)
    return TunedModel(loaded, adapter, found.base or str(loaded.folder))
