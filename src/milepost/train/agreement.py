"""What the main rank decided about a segment, given to every rank before anything is built."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from milepost.config.recipe import as_plain, config_from_plain
from milepost.config.schema import Config
from milepost.distributed.reduce import broadcast_json
from milepost.distributed.world import World
from milepost.evaluation.catalog import parse_tasks
from milepost.runs.events import present_events
from milepost.runs.lineage import PARTS, Parts
from milepost.runs.refusals import Refusals, refusals_from_plain, refusals_of
from milepost.train.opening import OpenedRun


@dataclass(frozen=True)
class Agreement:
    """What the main rank decided and every rank builds from.

    Attributes:
        config: resolved.
        restore_from: the checkpoint folder, None for a new start.
        parts: what of it is restored; all, but for a checkpoint of a parent.
        is_finished: nothing is left to do.
        refusals: what was skipped and rolled back before, and holds.
        first_step: that the run began at.
        missing: what was due at the restored step and was not reached: "validation", "sample",
            names of benchmarks; at the first step of a run all.
    """

    config: Config
    restore_from: Path | None
    parts: Parts
    is_finished: bool
    refusals: Refusals
    first_step: int
    missing: frozenset[str]


def agree(opened: OpenedRun | None, *, world: World) -> Agreement:
    """Gives the main rank's decision to every rank; every rank must call."""
    plain: dict[str, Any] = {}
    if opened is not None:
        found = opened.restorable
        missing = _missing_at_start(opened)
        plain = {
            "config": as_plain(opened.config),
            "restore_from": None if found is None else str(found.folder),
            "parts": PARTS if opened.parent is None else opened.parent.parts,
            "is_finished": opened.is_finished and not missing,
            "refusals": _refusals(opened).as_plain(),
            "first_step": opened.first_step,
            "missing": missing,
        }
    plain = broadcast_json(plain, world=world)
    folder = plain["restore_from"]
    return Agreement(
        config=config_from_plain(plain["config"], source="the run's config"),
        restore_from=None if folder is None else Path(folder),
        parts=tuple(plain["parts"]),
        is_finished=plain["is_finished"],
        refusals=refusals_from_plain(plain["refusals"]),
        first_step=plain["first_step"],
        missing=frozenset(plain["missing"]),
    )


def _refusals(opened: OpenedRun) -> Refusals:
    """What holds in this segment; with other settings a skipped batch is tried again."""
    refusals = refusals_of(opened.history)
    return replace(refusals, skips=frozenset()) if opened.overrides else refusals


def _missing_at_start(opened: OpenedRun) -> list[str]:
    step = 0 if opened.restorable is None else opened.restorable.step
    config, history = opened.config, opened.history
    if step > config.last_step:
        return []

    def was_due(every: int | None) -> bool:
        return every is not None and (step % every == 0 or step == config.last_step)

    has_validation = opened.manifest.validation_fingerprint is not None
    intervals = {
        "validation": config.validation.every_steps if has_validation else None,
        "sample": config.samples.every_steps,
    }
    missing = [
        kind
        for kind, every in intervals.items()
        if was_due(every) and step not in history.latest_by_step(kind)
    ]
    if was_due(config.evaluation.every_steps):
        events = present_events(history.events)
        of_step = [e for e in events if e.get("kind") == "evaluation" and e.get("step") == step]
        done = {event.get("benchmark") for event in of_step}
        missing += [name for name in parse_tasks(config.evaluation.tasks) if name not in done]
    return missing
