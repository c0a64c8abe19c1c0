"""Holds a run's checkpoints, manifests and history against each other; reads only.

A training may work in the folder at the same time: what looks wrong is looked at twice.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from milepost.checkpoint.recorded import Recorded, Records, records_of
from milepost.checkpoint.store import MANIFEST, STATE_FOLDER, read_checkpoint_manifest, verify_file
from milepost.core.errors import CheckpointError, MilepostError, StorageError
from milepost.core.files import record_in, sha256_of_file, storage_errors
from milepost.runs.events import History, read_history
from milepost.runs.layout import RunLayout, checkpoint_folders
from milepost.runs.manifest import read_run_manifest

SECONDS_BEFORE_SECOND_LOOK = 1.0

_MODEL_IS_LOST = "the checkpoint cannot be trusted; training sets it aside and takes an older one"
_STATE_IS_LOST = "training cannot go on from this checkpoint; its weights are not concerned"
_HISTORY_IS_TORN = "the history is not whole; what happened there is not known"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        place: the file or folder, from the run folder.
        what: what was seen there.
        meaning: what follows from it.
    """

    place: str
    what: str
    meaning: str


@dataclass(frozen=True)
class Audit:
    """What a look at a whole run found.

    Attributes:
        notes: what is odd and not wrong.
        num_files: files that were read and hashed, of `num_bytes` bytes in all.
        last_step: the last in the history.
    """

    findings: list[Finding]
    notes: list[str]
    num_checkpoints: int
    num_train_states: int
    num_files: int
    num_bytes: int
    num_segments: int
    last_step: int


@dataclass
class _Look:
    """What is gathered while one checkpoint is read.

    Attributes:
        on_read: called with the bytes read so far, `bytes_before` of other checkpoints included.
    """

    on_read: Callable[[int, str], None]
    bytes_before: int
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_files: int = 0
    num_bytes: int = 0

    def count(self, path: Path, *, name: str) -> None:
        """Counts a file that was read."""
        self.num_files += 1
        self.num_bytes += _size(path)
        self.on_read(self.bytes_before + self.num_bytes, name)


def bytes_to_read(layout: RunLayout) -> int:
    """Bytes of everything an audit hashes, for progress; files may come and go meanwhile."""
    folders = [folder for _, folder in checkpoint_folders(layout)]
    return sum(
        _size(Path(place) / name)
        for folder in folders
        for place, _, names in os.walk(folder)
        for name in names
    )


def audit(
    layout: RunLayout,
    *,
    on_read: Callable[[int, str], None] = lambda num_bytes, name: None,
    wait: Callable[[], None] = lambda: time.sleep(SECONDS_BEFORE_SECOND_LOOK),
) -> Audit:
    """Looks at every file of every checkpoint, at the run's manifest and at its history.

    Args:
        layout: the run folder; nothing in it is changed.
        on_read: called with the bytes read so far and the file's name.
        wait: called before the second look at what looked wrong.

    Raises:
        UsageError: the folder holds no run.
    """
    run_id, of_manifest = _check_run_manifest(layout)
    looked = _look_at_all(layout, run_id=run_id, only=None, on_read=on_read)
    if suspects := {step for step, look in looked.items() if look.findings or look.notes}:
        wait()
        again = _look_at_all(layout, run_id=run_id, only=suspects, on_read=lambda *told: None)
        looked = {step: look for step, look in looked.items() if step not in suspects} | again
    history = read_history(layout.events)
    by_kill, elsewhere = _torn_lines(layout.events) if history.num_bad_lines else ([], [])
    last = max([*_steps_of(history), *_that_count(looked, history)], default=0)
    found = [finding for step in sorted(looked) for finding in looked[step].findings]
    folders = [folder for _, folder in checkpoint_folders(layout)]
    return Audit(
        findings=[*of_manifest, *found, *_check_history(history, last_step=last, torn=elsewhere)],
        notes=[note for step in sorted(looked) for note in looked[step].notes]
        + _notes_of_lines(by_kill),
        num_checkpoints=len(folders),
        num_train_states=sum((folder / STATE_FOLDER).is_dir() for folder in folders),
        num_files=sum(look.num_files for look in looked.values()),
        num_bytes=sum(look.num_bytes for look in looked.values()),
        num_segments=history.num_segments,
        last_step=max(_steps_of(history), default=0),
    )


def _check_run_manifest(layout: RunLayout) -> tuple[str | None, list[Finding]]:
    """The run's id, None where its manifest is damaged, and what is wrong with it."""
    try:
        return read_run_manifest(layout).run_id, []
    except (CheckpointError, StorageError) as error:
        meaning = "what the run is made of is not known for certain; restore the file"
        return None, [_finding(error, layout.manifest, layout=layout, meaning=meaning)]


def _look_at_all(
    layout: RunLayout,
    *,
    run_id: str | None,
    only: set[int] | None,
    on_read: Callable[[int, str], None],
) -> dict[int, _Look]:
    """By step, what is seen of every checkpoint that is there or recorded."""
    records = records_of(read_history(layout.events))
    folders = dict(checkpoint_folders(layout))
    looked = {}
    num_bytes_before = 0
    for step in sorted(folders.keys() | records.by_step.keys()):
        if only is not None and step not in only:
            continue
        look = _Look(on_read, num_bytes_before)
        if step in folders:
            is_read = _check_folder(folders[step], step=step, layout=layout, run_id=run_id, to=look)
            if is_read:
                _check_record(folders[step], step=step, layout=layout, records=records, to=look)
            _check_train_state(folders[step], step=step, layout=layout, records=records, to=look)
        else:
            _check_absence(step, layout=layout, records=records, to=look)
        looked[step] = look
        num_bytes_before += look.num_bytes
    return looked


def _check_folder(
    folder: Path, *, step: int, layout: RunLayout, run_id: str | None, to: _Look
) -> bool:
    """Every file of a checkpoint against its manifests; whether the model's could be read."""
    head = _check_files(
        folder,
        step=step,
        layout=layout,
        run_id=run_id,
        subfolders={STATE_FOLDER},
        meaning=_MODEL_IS_LOST,
        to=to,
    )
    states = folder / STATE_FOLDER
    if not (states.exists() or states.is_symlink()):
        return head is not None
    inner = _check_files(
        states,
        step=step,
        layout=layout,
        run_id=run_id,
        subfolders=set(),
        meaning=_STATE_IS_LOST,
        to=to,
    )
    if head is not None and inner is not None:
        found = _sha256(states / MANIFEST)
        if found is not None and found != head.get("train_state_manifest_sha256"):
            what = f"does not belong to {MANIFEST} of its checkpoint"
            place = _relative(states / MANIFEST, layout)
            to.findings.append(Finding(place, what, _STATE_IS_LOST))
    return head is not None


def _check_files(
    folder: Path,
    *,
    step: int,
    layout: RunLayout,
    run_id: str | None,
    subfolders: set[str],
    meaning: str,
    to: _Look,
) -> dict[str, Any] | None:
    """The files of one folder; its manifest's content, None where that cannot be trusted."""
    try:
        head = read_checkpoint_manifest(folder, run_id=run_id, step=step)
        with storage_errors(folder, verb="read"):
            present = {entry.name for entry in folder.iterdir()} - {MANIFEST} - subfolders
    except (CheckpointError, StorageError) as error:
        to.findings.append(_finding(error, folder / MANIFEST, layout=layout, meaning=meaning))
        return None
    to.count(folder / MANIFEST, name=_relative(folder / MANIFEST, layout))
    for name in sorted(present - set(head["files"])):
        place = _relative(folder / name, layout)
        to.findings.append(Finding(place, "is not in the manifest", meaning))
    for name, facts in head["files"].items():
        try:
            verify_file(folder, name, facts)
        except (CheckpointError, StorageError) as error:
            to.findings.append(_finding(error, folder / name, layout=layout, meaning=meaning))
        to.count(folder / name, name=_relative(folder / name, layout))
    return head


def _check_record(
    folder: Path, *, step: int, layout: RunLayout, records: Records, to: _Look
) -> None:
    """A checkpoint against the event of its save."""
    recorded = records.by_step.get(step, Recorded())
    place = _relative(folder, layout)
    if recorded.is_undone and records.is_open:
        to.notes.append(
            f"{place} was undone by a rollback and is about to be set aside; the next start makes "
            "up for it"
        )
        return
    if recorded.sha256 is None or recorded.is_set_aside:
        if records.is_open and step >= records.newest_step:
            to.notes.append(
                f"{place} is not in the history yet: the training is at work, or was ended "
                "between the save and its record; the next start makes up for it"
            )
            return
        meaning = "nobody knows who put it there, or a line of the history is lost"
        to.findings.append(Finding(place, "is not in the history", meaning))
    elif recorded.sha256 != _sha256(folder / MANIFEST):
        what = "its SHA-256 is not the one that the history has"
        meaning = "the checkpoint is whole, but it is not the one that this run saved"
        to.findings.append(Finding(f"{place}/{MANIFEST}", what, meaning))


def _check_train_state(
    folder: Path, *, step: int, layout: RunLayout, records: Records, to: _Look
) -> None:
    """Whether the train state is there or gone as the history says."""
    states = folder / STATE_FOLDER
    place = _relative(states, layout)
    is_dropped = records.by_step.get(step, Recorded()).is_dropped
    if not states.is_dir() and not is_dropped:
        what = "is missing, and the history does not say that it was dropped"
        to.findings.append(Finding(place, what, _STATE_IS_LOST))
    elif states.is_dir() and is_dropped:
        if records.is_open:
            to.notes.append(f"{place} is about to be dropped: the history says so already")
            return
        what = "is there, and the history says that it was dropped"
        meaning = "it takes up room, or it was put back by hand"
        to.findings.append(Finding(place, what, meaning))


def _check_absence(step: int, *, layout: RunLayout, records: Records, to: _Look) -> None:
    recorded = records.by_step[step]
    if recorded.sha256 is None or recorded.is_set_aside or recorded.is_undone:
        return
    path = layout.checkpoint(step)
    what = "is a link, not a folder" if path.is_symlink() else "is missing"
    meaning = "it was saved and never set aside; its weights are lost to the run"
    to.findings.append(Finding(_relative(path, layout), what, meaning))


def _that_count(looked: dict[int, _Look], history: History) -> list[int]:
    """Steps of checkpoints, without those that a rollback undid."""
    records = records_of(history).by_step
    return [step for step in looked if not records.get(step, Recorded()).is_undone]


def _steps_of(history: History) -> set[int]:
    return set(history.latest_by_step("step"))


def _check_history(history: History, *, last_step: int, torn: list[int]) -> Iterator[Finding]:
    """Lines `torn` where no kill tears one; gaps in the steps and the numbers of the segments."""
    place = "events.jsonl"
    if torn:
        lines = "1 line" if len(torn) == 1 else f"{len(torn)} lines"
        what = f"{lines} cannot be read, the first is line {torn[0]}: no kill tears a line there"
        yield Finding(place, what, _HISTORY_IS_TORN)
    starts = [event.get("segment") for event in history.of_kind("segment_started")]
    at_work = [event.get("segment", 0) for event in history.of_kind("step")]
    for number in range(1, max([history.num_segments, *at_work]) + 1):
        if (count := starts.count(number)) != 1:
            what = f"segment {number} is started {count} times"
            yield Finding(place, what, _HISTORY_IS_TORN)
    started = next(history.of_kind("segment_started"), {})
    # A run may start from another's step, or from an import, which is no segment.
    imported = [e.get("step") for e in history.of_kind("checkpoint_saved") if not e.get("segment")]
    first_step = (started.get("restored_step") or next(iter(imported), None) or 0) + 1
    for first, last in _gaps(_steps_of(history), first=first_step, last=last_step):
        steps = f"step {first} is" if first == last else f"steps {first} to {last} are"
        yield Finding(place, f"{steps} missing", _HISTORY_IS_TORN)


def _gaps(steps: set[int], *, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Ranges (first, last) of the steps that are not there."""
    start = None
    for step in range(first, last + 2):
        is_missing = step <= last and step not in steps
        if is_missing and start is None:
            start = step
        elif not is_missing and start is not None:
            yield start, step - 1
            start = None


def _torn_lines(path: Path) -> tuple[list[int], list[int]]:
    """Numbers, from 1, of the lines that cannot be read: a kill leaves the first, no others.

    A kill tears the last line; whatever comes after that is of a segment not yet begun.
    """
    by_kill: list[int] = []
    elsewhere: list[int] = []
    torn: list[int] = []
    num_started = 0
    with storage_errors(path, verb="read"):
        lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        event = record_in(line)
        if event is None:
            torn.append(number)
            continue
        segment = event.get("segment", 0)
        is_new = isinstance(segment, int) and segment > num_started
        (by_kill if is_new else elsewhere).extend(torn)
        torn = []
        if is_new and event.get("kind") == "segment_started":
            num_started = segment
    return by_kill + torn, elsewhere


def _notes_of_lines(torn: list[int]) -> list[str]:
    """Of lines that cannot be read where a kill leaves them."""
    if not torn:
        return []
    lines = "1 line of events.jsonl is" if len(torn) == 1 else f"{len(torn)} lines are"
    return [f"{lines} torn, as a kill or a loss of power leaves it; readers skip it"]


def _finding(error: MilepostError, path: Path, *, layout: RunLayout, meaning: str) -> Finding:
    """What an error says of `path`, without the path where it stands first."""
    what = error.message.removeprefix(str(path)).lstrip(": ")
    return Finding(_relative(path, layout), what.replace(f"{layout.root}{os.sep}", ""), meaning)


def _relative(path: Path, layout: RunLayout) -> str:
    return str(path.relative_to(layout.root))


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _sha256(path: Path) -> str | None:
    try:
        return sha256_of_file(path)
    except OSError:
        return None
