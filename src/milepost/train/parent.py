"""The parent of a run: the checkpoint of another run that it is made from, chosen and verified.

Only the main rank comes here, holding the lock of the new run; the parent is only read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from milepost.checkpoint.retention import Restorable
from milepost.checkpoint.store import STATE_FOLDER, verify_checkpoint
from milepost.config.recipe import differences, is_harmless
from milepost.config.schema import Config
from milepost.core.console import say, warn
from milepost.core.errors import CheckpointError, DataError, StorageError, UsageError
from milepost.runs.events import read_history
from milepost.runs.layout import RunLayout, checkpoint_folders
from milepost.runs.lineage import (
    DATA,
    WEIGHTS,
    Lineage,
    ParentRequest,
    Parts,
    refuse_no_run,
    restore_text,
    restore_words,
)
from milepost.runs.manifest import RunManifest, read_run_manifest
from milepost.runs.overrides import config_with_overrides
from milepost.runs.steps import describe_steps
from milepost.train.subject import Identity

_OF_NO_WEIGHT = ("model.initializer_range", "model.residual_init")
"""What says how first weights are drawn is nothing to weights that are there."""

_OF_THE_ORDER = ("run.seed", "data.sequence_length", "train.global_batch_tokens")
"""What decides which rows a data step has."""


def choose_parent(request: ParentRequest, *, config: Config, identity: Identity) -> Lineage:
    """Chooses the checkpoint that a new run is made from, and verifies it.

    Args:
        request: what was asked for.
        config: of the new run, resolved.
        identity: of the new run's data.

    Raises:
        UsageError: the parent is a fine-tuning, has another architecture, or leaves nothing to do.
        CheckpointError: there is no such checkpoint, it is damaged, or it has no train state.
        DataError: the data is of another tokenizer.
    """
    refuse_no_run(request)
    layout = RunLayout(request.run)
    manifest = read_run_manifest(layout)
    if manifest.config.is_finetuning:
        raise UsageError(
            f"{layout.root} is a fine-tuning, which pretraining cannot go on from",
            hint="export it as a model, and import that as a run: milepost export, milepost import",
        )
    parent_config = config_with_overrides(manifest.config, history=read_history(layout.events))
    _refuse_other_architecture(parent_config, config, where=layout)
    _compare_data(manifest, identity, parts=request.parts)
    step = _choose_step(layout, request)
    sha256 = _verify(layout, run_id=manifest.run_id, step=step, parts=request.parts)
    changed = {
        field: [old, new]
        for field, old, new in differences(parent_config, config)
        if not is_harmless(field)
    }
    _say_rounding(layout.checkpoint(step), parent_config)
    if DATA in request.parts:
        _say_other_order(changed)
    lineage = Lineage(
        run=layout.root,
        run_id=manifest.run_id,
        step=step,
        checkpoint_sha256=sha256,
        parts=request.parts,
        changed=changed,
    )
    if lineage.first_step >= config.last_step:
        raise UsageError(
            f"the run would begin at step {lineage.first_step} and end at step "
            f"{config.last_step}: nothing is left to do",
            hint=f"set --train.total_steps or --train.stop_at_step above {lineage.first_step}",
        )
    return lineage


def open_parent(lineage: Lineage) -> Restorable:
    """The checkpoint that a run begins with, as long as it has none of its own.

    Args:
        lineage: of the run, with the place where the parent lies now.

    Raises:
        CheckpointError: it is gone, or is not what the run was made from.
    """
    folder = lineage.checkpoint
    hint = (
        "the run has no checkpoint of its own yet, so it begins with its parent's once more: put "
        "that back, say with --from where it lies now, or choose another --run"
    )
    if not folder.is_dir():
        raise CheckpointError(f"{folder}, which the run was made from, is gone", hint=hint)
    try:
        sha256 = verify_checkpoint(folder, run_id=None, step=None)
    except (CheckpointError, StorageError) as error:
        raise type(error)(error.message, hint=hint) from error
    if sha256 != lineage.checkpoint_sha256:
        raise CheckpointError(
            f"{folder} is not the checkpoint that the run was made from "
            f"({sha256[:12]} instead of {lineage.checkpoint_sha256[:12]})",
            hint=hint,
        )
    if lineage.parts != (WEIGHTS,) and not (folder / STATE_FOLDER).is_dir():
        raise CheckpointError(f"{folder} has lost its train state", hint=hint)
    return Restorable(lineage.first_step, folder, sha256)


def refuse_other_parent(lineage: Lineage | None, request: ParentRequest, *, run: RunLayout) -> None:
    """Refuses a command line that asks a run for another beginning than it has.

    Raises:
        UsageError: both are said.
    """
    if lineage is None:
        raise UsageError(
            f"{run.root} holds a run already, which does not begin with {request.run}",
            hint="choose a new folder with --run, or leave --from out to continue this one",
        )
    is_same_place = request.run == lineage.run and not request.run.exists()
    if not is_same_place:  # it may have been moved, and is known by its id
        refuse_no_run(request)
        is_same_place = read_run_manifest(RunLayout(request.run)).run_id == lineage.run_id
    is_same_step = request.step in (None, lineage.step)
    if not (is_same_place and is_same_step and request.parts == lineage.parts):
        step = "" if request.step is None else f":{request.step}"
        raise UsageError(
            f"{run.root} begins with {lineage.run}:{lineage.step}, restored: "
            f"{restore_text(lineage.parts)}; asked for {request.run}{step}, "
            f"{restore_text(request.parts)}",
            hint="choose a new folder with --run, or leave --from out to continue this one",
        )


def say_parent(lineage: Lineage) -> None:
    """One line on where a run begins, and one on what differs from its parent."""
    restored = restore_words(restore_text(lineage.parts))
    say(f"from step {lineage.step} of {lineage.run}, restored: {restored}")
    if lineage.changed:
        told = ", ".join(f"{f} {old!r} -> {new!r}" for f, (old, new) in lineage.changed.items())
        say(f"changed against it: {told}")


def _refuse_other_architecture(parent: Config, config: Config, *, where: RunLayout) -> None:
    lines = [
        f"  {field}: the parent has {old!r}, the recipe {new!r}"
        for field, old, new in differences(parent, config)
        if field.startswith("model.") and field not in _OF_NO_WEIGHT
    ]
    if lines:
        raise UsageError(
            f"the model is not that of {where.root}\n" + "\n".join(lines),
            hint="weights fit one architecture only: use the parent's recipe and change the rest",
        )


def _compare_data(manifest: RunManifest, identity: Identity, *, parts: Parts) -> None:
    """The tokenizer must be the parent's; other text is taken, and said."""
    if manifest.tokenizer_sha256 != identity.tokenizer_sha256:
        raise DataError(
            f"{identity.place} was made with another tokenizer than the parent's "
            f"({identity.tokenizer_sha256[:12]} instead of {manifest.tokenizer_sha256[:12]})",
            hint="prepare the data with the parent's own: --tokenizer "
            "RUN/checkpoints/step-*/tokenizer.json",
        )
    if not manifest.data_fingerprint:
        return  # imported without data: there are none to compare with
    if manifest.data_fingerprint != identity.fingerprint:
        where = "goes on at the parent's place in its order" if DATA in parts else "begins anew"
        warn(f"{identity.place} is not the data of the parent; it {where}")
    if manifest.validation_fingerprint != identity.validation_fingerprint:
        warn("the validation set is not the parent's: their losses cannot be compared")


def _say_other_order(changed: dict[str, list[Any]]) -> None:
    """The place in the data is a number of batches: of other batches, or of another order, it is
    not the place where the parent was."""
    if fields := [field for field in _OF_THE_ORDER if field in changed]:
        warn(
            f"{' and '.join(fields)} differ{'s' if len(fields) == 1 else ''} from the parent's: "
            "the number of batches goes on, but they are others, so that some text may be seen "
            "twice and some not"
        )


def _say_rounding(checkpoint: Path, parent: Config) -> None:
    """Weights whose float32 masters went with their train state are what is left of them."""
    if parent.checkpoint.weights_dtype != "float32" and not (checkpoint / STATE_FOLDER).is_dir():
        warn(f"{checkpoint} has its weights in {parent.checkpoint.weights_dtype} only")


def _verify(layout: RunLayout, *, run_id: str, step: int, parts: Parts) -> str:
    """The hash of a checkpoint whose bytes are as they were saved.

    Raises:
        CheckpointError, StorageError: they are not; the hint says which others there are.
    """
    try:
        return verify_checkpoint(layout.checkpoint(step), run_id=run_id, step=step)
    except (CheckpointError, StorageError) as error:
        others = [other for other in _usable_steps(layout, parts) if other != step]
        what = "checkpoints" if parts == (WEIGHTS,) else "train states"
        hint = describe_steps(others, what=what) if others else "the parent has no other like it"
        raise type(error)(error.message, hint=f"{hint}; milepost verify checks them") from error


def _usable_steps(layout: RunLayout, parts: Parts) -> list[int]:
    """Steps of the parent whose checkpoint has what is to be restored."""
    saved = [step for step, _ in checkpoint_folders(layout)]
    if parts == (WEIGHTS,):
        return saved
    return [step for step in saved if (layout.checkpoint(step) / STATE_FOLDER).is_dir()]


def _choose_step(layout: RunLayout, request: ParentRequest) -> int:
    saved = [step for step, _ in checkpoint_folders(layout)]
    usable = _usable_steps(layout, request.parts)
    if request.step is None and usable:
        return usable[-1]
    if request.step in usable:
        assert request.step is not None
        return request.step
    if request.step not in (None, *saved) or not saved:
        what = "checkpoint" if request.step is None else f"checkpoint of step {request.step}"
        raise CheckpointError(
            f"{layout.root} has no {what}",
            hint=describe_steps(saved) if saved else "let it train up to its first checkpoint",
        )
    told = describe_steps(usable, what="train states") if usable else "no step has one"
    where = "any checkpoint" if request.step is None else f"its checkpoint of step {request.step}"
    raise CheckpointError(
        f"{layout.root} has no train state in {where}, only weights",
        hint=f"{told}; --restore weights needs none",
    )
