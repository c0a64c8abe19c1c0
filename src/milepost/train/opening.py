"""Opening a run folder for training: made new, or continued with what may change.

Only the main rank comes here, holding the run's lock.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from milepost.checkpoint.recorded import records_of
from milepost.checkpoint.retention import Restorable, newest_restorable, set_aside_after
from milepost.checkpoint.store import remove_litter
from milepost.config.recipe import differences, is_fixed, is_harmless
from milepost.config.schema import Config
from milepost.core.console import warn
from milepost.core.environment import describe_environment
from milepost.core.errors import CheckpointError, DataError, UsageError
from milepost.core.files import storage_errors
from milepost.runs.events import EventWriter, History, read_history, utc_now
from milepost.runs.layout import RunLayout
from milepost.runs.lineage import Lineage, ParentRequest, lineage_of
from milepost.runs.manifest import (
    RunManifest,
    read_run_manifest,
    refuse_without_data,
    write_run_manifest,
)
from milepost.runs.overrides import Change, apply_changes, config_with_overrides
from milepost.runs.refusals import refusals_of
from milepost.train.parent import choose_parent, open_parent, refuse_other_parent
from milepost.train.subject import Identity


@dataclass(frozen=True)
class OpenedRun:
    """A run that is ready to be trained.

    Attributes:
        manifest: as it was written when the run was made.
        config: the manifest's, with the changes that this segment takes.
        history: everything logged so far.
        events: the writer of this segment.
        restorable: the checkpoint to go on from; None for a run from its first step.
        changed: what this segment takes, harmless changes too.
        origin: the checkpoint of another run that this one was made from, with the place where
            it lies now; None where there is none.
        parent: the same, where `restorable` is it; None where that is the run's own.
    """

    manifest: RunManifest
    config: Config
    history: History
    events: EventWriter
    restorable: Restorable | None
    changed: list[Change]
    origin: Lineage | None = None
    parent: Lineage | None = None

    @property
    def first_step(self) -> int:
        """The step that the run began at: its parent's, an import's, or 0."""
        if self.origin is not None:
            return self.origin.first_step
        saved = self.history.of_kind("checkpoint_saved")
        imported = (e.get("step") for e in saved if not e.get("segment"))
        return next((step for step in imported if isinstance(step, int)), 0)

    @property
    def overrides(self) -> list[Change]:
        """The changes that alter the run's numbers; they are recorded when the segment starts."""
        return _altering(self.changed, config=self.config)

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.restorable is not None and self.restorable.step >= self.config.last_step


def open_run(
    layout: RunLayout,
    *,
    config: Config,
    recipe: str,
    identity: Identity,
    resolve: Callable[[Config], Config],
    may_override: bool,
    begin_with: ParentRequest | None = None,
) -> OpenedRun:
    """Makes the run or opens it to be continued.

    Args:
        layout: the run folder, locked by this process.
        config: from the recipe and the command line, "auto" not yet resolved.
        recipe: what the person called the recipe.
        identity: of what is trained and of the data, verified.
        resolve: turns every "auto" into what this machine takes.
        may_override: whether changes that alter the numbers are taken.
        begin_with: the checkpoint of another run that a new run begins with; None: with random
            weights, or as the run that is continued did.

    Raises:
        UsageError: the folder holds something else, or the recipe differs; all differences said.
        CheckpointError: there were checkpoints and none can be used.
        DataError: the data, or the model that is tuned, is not that of the run.
        StorageError: the folder cannot be written.
    """
    changed: list[Change] = []
    if layout.manifest.exists():
        manifest = read_run_manifest(layout)
        lineage = lineage_of(manifest.lineage)
        if begin_with is not None:
            refuse_other_parent(lineage, begin_with, run=layout)
        refuse_without_data(manifest, run=layout.root)
        history = read_history(layout.events)
        base = config_with_overrides(manifest.config, history=history)
        changed = differences(base, config)
        altering = _altering(changed, config=config)
        _refuse_changes(altering, may_override=may_override)
        config = apply_changes(base, changed)
        _refuse_other_origin(manifest, identity)
    else:
        _refuse_foreign_folder(layout)
        config = resolve(config)
        lineage = None
        if begin_with is not None:
            lineage = choose_parent(begin_with, config=config, identity=identity)
        manifest = _new_manifest(config, recipe=recipe, identity=identity, parent=lineage)
        write_run_manifest(layout, manifest)
        history = History(events=[], num_bad_lines=0)
    if history.num_bad_lines:
        warn(f"{layout.events}: {history.num_bad_lines} lines cannot be read and are skipped")
    events = EventWriter(layout.events, segment=history.num_segments + 1)
    restorable = _find_checkpoint(layout, manifest=manifest, history=history, events=events)
    origin = lineage
    if lineage is not None and begin_with is not None:
        origin = replace(lineage, run=begin_with.run)
    parent = origin if restorable is None else None
    if parent is not None:
        restorable = open_parent(parent)
    return OpenedRun(manifest, config, history, events, restorable, changed, origin, parent)


def _find_checkpoint(
    layout: RunLayout, *, manifest: RunManifest, history: History, events: EventWriter
) -> Restorable | None:
    remove_litter(layout)
    _finish_rollback(layout, history=history, events=events)
    records = records_of(history)
    set_aside = [step for step, r in records.by_step.items() if r.is_set_aside and not r.is_undone]

    def quarantined(step: int, place: Path, reason: str) -> None:
        set_aside.append(step)
        warn(f"checkpoint {step} is damaged and was set aside in {place}: {reason}")
        events.append("checkpoint_quarantined", step=step, path=str(place), reason=reason)

    found = newest_restorable(
        layout,
        run_id=manifest.run_id,
        dropped={step for step, recorded in records.by_step.items() if recorded.is_dropped},
        quarantined=quarantined,
    )
    known = {*records.saved_steps, *set_aside}
    if found is None and known:
        raise CheckpointError(
            f"{layout.checkpoints}: none of the {len(known)} known checkpoints can be used",
            hint=f"look at {layout.quarantine}; a run never starts over in its own folder, "
            "so choose another --run for a new start",
        )
    if found is not None and found.step not in records.saved_steps:
        # Killed between the checkpoint's rename and its event.
        events.append("checkpoint_saved", step=found.step, sha256=found.sha256, recovered=True)
    return found


def _finish_rollback(layout: RunLayout, *, history: History, events: EventWriter) -> None:
    """Sets aside what a rollback undid, where a kill came before that was done."""
    refusals = refusals_of(history)
    if not refusals.is_rollback_open:
        return

    def moved(step: int, place: Path, reason: str) -> None:
        events.append("checkpoint_quarantined", step=step, path=str(place), reason=reason)

    set_aside_after(layout, step=refusals.rollbacks[-1].to_step, record=moved)


def _altering(changed: list[Change], *, config: Config) -> list[Change]:
    """Those that alter the run's numbers."""
    return [change for change in changed if not is_harmless(change[0], config=config)]


def _refuse_changes(refused: list[Change], *, may_override: bool) -> None:
    fixed = [c for c in refused if is_fixed(c[0])]
    if not refused or (may_override and not fixed):
        return
    lines = [f"  {field}: the run has {old!r}, asked for {new!r}" for field, old, new in refused]
    if fixed:
        hint = "architecture and data of a run never change; choose another --run"
    else:
        hint = "use the run's own recipe, or add --override to change it on purpose (recorded)"
    raise UsageError("the recipe differs from the run's\n" + "\n".join(lines), hint=hint)


def _refuse_other_origin(manifest: RunManifest, identity: Identity) -> None:
    ours, theirs = (d.get("base_sha256") for d in (manifest.lineage, identity.lineage))
    if ours != theirs:
        raise DataError(
            f"the model that is tuned is not that of the run ({_short(theirs)} instead of "
            f"{_short(ours)})",
            hint=f"give the model that the run was made from: {manifest.lineage.get('base')}",
        )
    known = (manifest.data_fingerprint, manifest.validation_fingerprint, manifest.tokenizer_sha256)
    found = (identity.fingerprint, identity.validation_fingerprint, identity.tokenizer_sha256)
    for what, ours, theirs in zip(identity.parts, known, found, strict=True):
        if ours != theirs:
            raise DataError(
                f"{identity.place}: the {what} are not those of the run "
                f"({_short(theirs)} instead of {_short(ours)})",
                hint=identity.hint,
            )


def _short(sha256: str | None) -> str:
    return str(sha256)[:12]


def _refuse_foreign_folder(layout: RunLayout) -> None:
    with storage_errors(layout.root):
        strangers = [e.name for e in layout.root.iterdir() if e.name != layout.lock.name]
    leftovers = [name for name in strangers if not name.startswith(f".{layout.manifest.name}.")]
    if leftovers:
        raise UsageError(
            f"{layout.root} is not empty and holds no run (it has {sorted(leftovers)[0]})",
            hint="choose a new folder with --run",
        )


def _new_manifest(
    config: Config, *, recipe: str, identity: Identity, parent: Lineage | None
) -> RunManifest:
    return RunManifest(
        run_id=uuid.uuid4().hex,
        created=utc_now(),
        config=config,
        recipe=recipe,
        data_fingerprint=identity.fingerprint,
        validation_fingerprint=identity.validation_fingerprint,
        tokenizer_sha256=identity.tokenizer_sha256,
        environment=describe_environment(),
        lineage=identity.lineage if parent is None else parent.as_plain(),
    )
