"""The models that a server offers, by name: the checkpoints of a run, or one model folder.

`RUN` is the latest checkpoint, whichever that is when a request comes; `RUN:STEP` is one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from milepost.api.refusals import RefusedError, shown
from milepost.evaluation.checkpoints import run_of_model
from milepost.inference.load import FoundModel, find_model
from milepost.runs.layout import RunLayout, checkpoint_folders
from milepost.runs.steps import describe_steps, is_run


@dataclass(frozen=True)
class NamedModel:
    """A model folder and what a client calls it.

    Attributes:
        name: as it stands in a reply: it always names the step where there is one.
        folder: of the model, or of its adapter.
        base: what the adapter is put on; None: the model is in `folder`, or the adapter says
            where its base is.
    """

    name: str
    folder: Path
    base: Path | None = None

    @property
    def created(self) -> int:
        """When the folder was written, in seconds since 1970."""
        return int(self.folder.stat().st_mtime)

    def find(self) -> FoundModel:
        """Where weights and adapter lie; raises as `find_model`."""
        if self.base is None:
            return find_model(self.folder)
        return find_model(self.base, adapter=self.folder)


class Catalog:
    """What is offered; the folders are looked at anew each time, since a run may go on."""

    def __init__(self, path: Path, *, adapter: Path | None = None) -> None:
        """Looks whether there is a model.

        Args:
            path: a model, see `find_model`.
            adapter: put on the model, see `find_model`; it names what is offered.

        Raises:
            UsageError: there is no model.
            CheckpointError: the run has no checkpoint yet, or an adapter's base is not where it
                says.
        """
        found = find_model(path, adapter=adapter)
        named = path if adapter is None else adapter
        run = run_of_model(named)
        self._base = None if adapter is None else found.base
        self._run = RunLayout(named) if is_run(named) else None
        name = named.resolve().name if run is None else RunLayout(run).name
        self._alone = NamedModel(
            name if run is None else f"{name}:{found.step}", found.folder, self._base
        )
        self.name = name if self._run else self._alone.name

    @property
    def latest(self) -> NamedModel:
        """The model of the plain name, as it is now."""
        return self.find(self.name)

    def models(self) -> list[NamedModel]:
        """Every name: of a run first the latest, then all by step."""
        if self._run is None:
            return [self._alone]
        of_steps = [
            NamedModel(f"{self.name}:{step}", folder, self._base)
            for step, folder in checkpoint_folders(self._run)
        ]
        return [replace(model, name=self.name) for model in of_steps[-1:]] + of_steps

    def find(self, name: str) -> NamedModel:
        """The model of a name.

        Raises:
            RefusedError: there is none.
        """
        models = self.models()
        by_name = {model.name: model for model in models}
        if self._run is not None and name == self.name and models:
            return models[-1]
        if name not in by_name:
            raise RefusedError(
                f"the model {shown(name)} does not exist: {self._offer()}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return by_name[name]

    def _offer(self) -> str:
        if self._run is None:
            return f"this server has {shown(self._alone.name)}"
        steps = [step for step, _ in checkpoint_folders(self._run)]
        if not steps:
            return f"the run {shown(self.name)} has no checkpoint now"
        return f"give {shown(self.name)} or {shown(self.name + ':STEP')}, {describe_steps(steps)}"
