"""What a run's own records say of one of its checkpoints, for whoever gets the model alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost.core.errors import UsageError
from milepost.evaluation.checkpoints import run_of_model
from milepost.runs.evaluations import EvaluationStore
from milepost.runs.events import read_history
from milepost.runs.layout import RunLayout, step_of_folder
from milepost.runs.manifest import RunManifest, read_run_manifest


@dataclass(frozen=True)
class RunFacts:
    """The records of a run about one step.

    Attributes:
        name: of the run.
        manifest: of the run.
        step: of the checkpoint.
        is_trained: whether the run has trained up to there, which a run does not that begins at
            this step, from another model or from random weights.
        tokens_seen: target tokens trained on up to there; None where no record says.
        validation: its event; None where there is none.
        scores: evaluation records of the step, in file order.
        devices: what trained it, each once.
    """

    name: str
    manifest: RunManifest
    step: int
    is_trained: bool
    tokens_seen: int | None
    validation: dict[str, Any] | None
    scores: list[dict[str, Any]]
    devices: list[str]


def read_run_facts(folder: Path) -> RunFacts | None:
    """The records about a checkpoint; None for a model folder that lies in no run.

    Raises:
        CheckpointError: the run's manifest is damaged.
        StorageError: a record cannot be read.
    """
    run, step = run_of_model(folder), step_of_folder(folder)
    if run is None or step is None:
        return None
    layout = RunLayout(run)
    try:
        manifest = read_run_manifest(layout)
    except UsageError:  # checkpoints that somebody put in a folder of this form
        return None
    history = read_history(layout.events)
    steps = history.latest_by_step("step")
    scores = EvaluationStore(run).latest().values()
    return RunFacts(
        name=manifest.config.run.name or layout.name,
        manifest=manifest,
        step=step,
        is_trained=any(trained <= step for trained in steps),
        tokens_seen=steps.get(step, {}).get("tokens_seen"),
        validation=history.latest_by_step("validation").get(step),
        scores=[line for line in scores if line.get("step") == step],
        devices=list(
            dict.fromkeys(
                f"{event.get('ranks')} x {event.get('device')}"
                for event in history.of_kind("segment_started")
            )
        ),
    )
