"""Which steps of a run are trained again, from which checkpoint, with which config and data."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from milepost.checkpoint.recorded import records_of
from milepost.checkpoint.store import STATE_FOLDER
from milepost.config.recipe import differences
from milepost.config.schema import Config
from milepost.core.errors import CheckpointError, DataError, MilepostError, UsageError
from milepost.data.run_data import open_run_data
from milepost.data.shards import PreparedData
from milepost.runs.events import Event, History, present_events, read_history
from milepost.runs.layout import RunLayout
from milepost.runs.manifest import RunManifest, read_run_manifest
from milepost.runs.overrides import config_with_overrides


@dataclass(frozen=True)
class ReplayPlan:
    """What a replay will do.

    Attributes:
        config: with which the range was trained.
        from_step: of the checkpoint to start from; 0 for the first step.
        to_step: of the next saved checkpoint.
        logged: the range's `step` events by step.
        segments: the `segment_started` events of those that trained the range.
        refused: the events of batches that were skipped, and of rollbacks, in the range.
    """

    layout: RunLayout
    manifest: RunManifest
    config: Config
    data: PreparedData
    from_step: int
    to_step: int
    logged: dict[int, Event]
    segments: list[Event]
    refused: list[Event]

    @property
    def steps(self) -> list[int]:
        """The steps that are trained again."""
        return list(range(self.from_step + 1, self.to_step + 1))


def plan_replay(layout: RunLayout, *, from_step: int | None, data: Path | None) -> ReplayPlan:
    """Chooses the steps and checks that what a replay needs is there; no hash is read yet.

    Args:
        layout: the run folder.
        from_step: of the checkpoint to start from, 0 for the first step; None: the latest
            checkpoint that has a train state and a later checkpoint.
        data: prepared data; None: where the run says.

    Raises:
        UsageError: the folder holds no run, or the range's recipe changes in its middle.
        CheckpointError: there is no such pair of checkpoints, or the history has no measure
            for the range.
        DataError: the data is not there, or not that of the run.
    """
    manifest = read_run_manifest(layout)
    if manifest.config.is_finetuning:
        raise UsageError(
            f"{layout.root} is a fine-tuning, which is not trained again for a proof",
            hint="without --replay its checkpoints are held against their manifests",
        )
    history = read_history(layout.events)
    first, last = _choose_pair(layout, manifest=manifest, history=history, from_step=from_step)
    logged = _logged_steps(history, layout=layout, first=first + 1, last=last)
    config = _config_of_range(manifest.config, history=history, logged=logged)
    numbers = {event["segment"] for event in logged.values()}
    segments = [e for e in history.of_kind("segment_started") if e.get("segment") in numbers]
    if not segments:
        raise CheckpointError(f"{layout.events} does not say on what steps {first + 1} on ran")
    return ReplayPlan(
        layout=layout,
        manifest=manifest,
        config=config,
        data=_open_data(config, manifest=manifest, history=history, folder=data),
        from_step=first,
        to_step=last,
        logged=logged,
        segments=segments,
        refused=_refused(history, first=first, last=last),
    )


def _refused(history: History, *, first: int, last: int) -> list[Event]:
    """What led from one batch to the next but one: skips and rollbacks that still hold."""
    return [
        event
        for event in present_events(history.events)
        if (event.get("kind") == "batch_skipped" and first < event.get("step", 0) <= last)
        or (event.get("kind") == "rolled_back" and first <= event.get("to_step", -1) < last)
    ]


def _choose_pair(
    layout: RunLayout, *, manifest: RunManifest, history: History, from_step: int | None
) -> tuple[int, int]:
    """(step to start from, step of the next checkpoint)."""
    saved = [s for s in records_of(history).saved_steps if layout.checkpoint(s).is_dir()]
    with_state = [s for s in saved if (layout.checkpoint(s) / STATE_FOLDER).is_dir()]
    following = dict(itertools.pairwise(saved))
    if not saved:
        raise CheckpointError(
            f"{layout.root} has no checkpoint yet, so nothing can be trained again and compared",
            hint="let it train up to its first checkpoint",
        )
    if from_step == 0:
        _refuse_unknown_start(layout, manifest=manifest, history=history)
        return 0, saved[0]
    if from_step is None:
        pairs = [(step, following[step]) for step in with_state if step in following]
        if pairs:
            return pairs[-1]
        raise CheckpointError(
            f"{layout.root} has no checkpoint with a train state that another one follows",
            hint=f"{_with_state_in_words(with_state)}; --from-step 0 starts from the first step",
        )
    if from_step not in saved:
        problem = f"has no checkpoint of step {from_step}"
    elif from_step not in with_state:
        problem = f"has no train state in its checkpoint of step {from_step}"
    elif from_step not in following:
        problem = f"has no checkpoint after step {from_step}, so there is nothing to compare with"
    else:
        return from_step, following[from_step]
    raise CheckpointError(f"{layout.root} {problem}", hint=_with_state_in_words(with_state))


def _with_state_in_words(steps: list[int]) -> str:
    if not steps:
        return "no checkpoint has a train state"
    return f"checkpoints with a train state: {', '.join(map(str, steps))}"


def _refuse_unknown_start(layout: RunLayout, *, manifest: RunManifest, history: History) -> None:
    started = next(history.of_kind("segment_started"), {})
    if manifest.lineage or started.get("restored_step"):
        raise CheckpointError(
            f"{layout.root} begins with the weights of another run, not with a first step",
            hint="give the step of one of its own checkpoints with --from-step",
        )


def _logged_steps(
    history: History, *, layout: RunLayout, first: int, last: int
) -> dict[int, Event]:
    latest = history.latest_by_step("step")
    missing = [step for step in range(first, last + 1) if step not in latest]
    if missing:
        raise CheckpointError(
            f"{layout.events} lacks step {missing[0]}, so steps {first} to {last} cannot be "
            "compared",
            hint="choose other steps with --from-step",
        )
    return {step: latest[step] for step in range(first, last + 1)}


def _config_of_range(config: Config, *, history: History, logged: dict[int, Event]) -> Config:
    """The config that every step of the range was trained with."""
    configs = {
        event["segment"]: config_with_overrides(
            config, history=history, until_segment=event["segment"]
        )
        for event in logged.values()
    }
    numbers = sorted(configs)
    for number in numbers[1:]:
        changed = differences(configs[numbers[0]], configs[number])
        if changed:
            field, old, new = changed[0]
            step = min(s for s, e in logged.items() if e["segment"] == number)
            raise UsageError(
                f"{field} was changed from {old!r} to {new!r} at step {step}, inside steps "
                f"{min(logged)} to {max(logged)}",
                hint="one replay has one recipe: choose other steps with --from-step",
            )
    return configs[numbers[0]]


def _open_data(
    config: Config, *, manifest: RunManifest, history: History, folder: Path | None
) -> PreparedData:
    path = str(folder) if folder is not None else _last_data_path(config, history)
    section = config.data.model_copy(update={"path": path})
    try:
        data = open_run_data(config.model_copy(update={"data": section}))
    except (DataError, UsageError) as error:
        if folder is not None:
            raise
        raise _elsewhere(error.message) from error
    if data.train.fingerprint != manifest.data_fingerprint:
        raise _elsewhere(f"{path}: the training shards are not those of the run")
    return data


def _elsewhere(message: str) -> MilepostError:
    return DataError(message, hint="say with --data DIR where the data of the run lies now")


def _last_data_path(config: Config, history: History) -> str:
    """Where the data was last: a move of it is a harmless change that a segment may take."""
    changed = [
        change
        for event in history.of_kind("segment_started")
        for change in event.get("changed") or ()
        if change.get("field") == "data.path"
    ]
    return str(changed[-1]["new"]) if changed else config.data.path
