"""What `verify` finds in a run folder: every kind of damage, and nothing where nothing is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from milepost.checkpoint.audit import Audit, audit, bytes_to_read
from milepost.checkpoint.store import verify_checkpoint
from milepost.core.errors import CheckpointError, UsageError
from milepost.core.files import sha256_of_file
from milepost.runs.events import EventWriter
from milepost.runs.layout import RunLayout
from tests.damage import (
    edit_history,
    edit_manifest,
    flip,
    insert_torn,
    number_of,
    tear,
    truncate,
    without,
)
from tests.training import SHORT, events, train_here, write_recipe

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps in two segments; checkpoints of 3, 6, 9 and 12, the last two with a train state."""
    folder = tmp_path_factory.mktemp("audit")
    recipe = write_recipe(folder)
    train_here(recipe, folder / "run", tiny_data, *SHORT, "--train.stop_at_step", "6")
    train_here(recipe, folder / "run", tiny_data, *SHORT)
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def look(run: Path, *, wait: Callable[[], None] = lambda: None) -> Audit:
    return audit(RunLayout(run), wait=wait)


def found(run: Path) -> list[tuple[str, str]]:
    """Place and words of each finding, places without the folder of the checkpoints."""
    return [(f.place.removeprefix("checkpoints/"), f.what) for f in look(run).findings]


def checkpoint(run: Path, step: int) -> Path:
    return RunLayout(run).checkpoint(step)


def append(run: Path, kind: str, *, segment: int = 2, **fields: Any) -> None:
    EventWriter(run / "events.jsonl", segment).append(kind, **fields)


def swap_in_another(run: Path) -> None:
    shutil.rmtree(checkpoint(run, 12))
    shutil.copytree(checkpoint(run, 9), checkpoint(run, 12))


def swap_train_states(run: Path) -> None:
    shutil.rmtree(checkpoint(run, 12) / "train_state")
    shutil.copytree(checkpoint(run, 9) / "train_state", checkpoint(run, 12) / "train_state")


def make_a_link(run: Path) -> None:
    checkpoint(run, 3).rename(run / "elsewhere")
    checkpoint(run, 3).symlink_to(run / "elsewhere")


def edit_config(run: Path) -> None:
    path = run / "manifest.json"
    path.write_text(path.read_text().replace('"learning_rate": 0.003', '"learning_rate": 0.004'))


def drop_steps(run: Path) -> None:
    edit_history(run, lambda e: None if e["kind"] == "step" and e["step"] in (4, 5, 8) else e)


def forge_sha256(run: Path) -> None:
    def forged(event: dict[str, Any]) -> dict[str, Any]:
        is_it = event["kind"] == "checkpoint_saved" and event["step"] == 6
        return event | {"sha256": "0" * 64} if is_it else event

    edit_history(run, forged)


LATE, OLD = "step-00000012", "step-00000003"
DAMAGE: dict[str, tuple[Damage, list[tuple[str, str]]]] = {
    "a bit flipped in the weights": (
        lambda run: flip(checkpoint(run, 12) / "model.safetensors"),
        [(f"{LATE}/model.safetensors", "has changed: its SHA-256 is not the manifest's")],
    ),
    "a bit flipped in the optimizer": (
        lambda run: flip(checkpoint(run, 12) / "train_state" / "optimizer.safetensors"),
        [(f"{LATE}/train_state/optimizer.safetensors", "has changed: its SHA-256 is not")],
    ),
    "weights without their last byte": (
        lambda run: truncate(checkpoint(run, 3) / "model.safetensors"),
        [(f"{OLD}/model.safetensors", "bytes, its manifest says otherwise")],
    ),
    "a missing file": (
        lambda run: (checkpoint(run, 3) / "config.json").unlink(),
        [(f"{OLD}/config.json", "is missing")],
    ),
    "a missing manifest": (
        lambda run: (checkpoint(run, 12) / "manifest.json").unlink(),
        [(f"{LATE}/manifest.json", "is missing")],
    ),
    "an extra file": (
        lambda run: (checkpoint(run, 3) / "notes.txt").write_text("mine"),
        [(f"{OLD}/notes.txt", "is not in the manifest")],
    ),
    "an extra file in the train state": (
        lambda run: (checkpoint(run, 12) / "train_state" / "old.bin").write_text("mine"),
        [(f"{LATE}/train_state/old.bin", "is not in the manifest")],
    ),
    "two files at once": (
        lambda run: [flip(checkpoint(run, 3) / n) for n in ("config.json", "model.safetensors")],
        [(f"{OLD}/config.json", "has changed"), (f"{OLD}/model.safetensors", "has changed")],
    ),
    "a checkpoint swapped for another": (
        swap_in_another,
        [
            (f"{LATE}/manifest.json", "step is 9, expected 12"),
            (f"{LATE}/train_state/manifest.json", "step is 9, expected 12"),
        ],
    ),
    "a train state swapped for another": (
        swap_train_states,
        [(f"{LATE}/train_state/manifest.json", "step is 9, expected 12")],
    ),
    "a missing checkpoint": (
        lambda run: shutil.rmtree(checkpoint(run, 6)),
        [("step-00000006", "is missing")],
    ),
    "a link in place of a checkpoint": (make_a_link, [(OLD, "is a link, not a folder")]),
    "a missing train state": (
        lambda run: shutil.rmtree(checkpoint(run, 12) / "train_state"),
        [(f"{LATE}/train_state", "is missing, and the history does not say that it was dropped")],
    ),
    "a dropped train state that is there": (
        lambda run: append(run, "train_state_dropped", step=12),
        [(f"{LATE}/train_state", "is there, and the history says that it was dropped")],
    ),
    "no record of a save": (
        lambda run: without(run, "checkpoint_saved", step=6),
        [("step-00000006", "is not in the history")],
    ),
    "a record of another save": (
        forge_sha256,
        [("step-00000006/manifest.json", "its SHA-256 is not the one that the history has")],
    ),
    "steps that are not logged": (
        drop_steps,
        [("events.jsonl", "steps 4 to 5 are missing"), ("events.jsonl", "step 8 is missing")],
    ),
    "a log without its end": (
        lambda run: edit_history(run, lambda e: None if e.get("step", 0) > 10 else e),
        [("events.jsonl", "steps 11 to 12 are missing")],
    ),
    "no start of a segment": (
        lambda run: without(run, "segment_started", segment=2),
        [("events.jsonl", "segment 2 is started 0 times")],
    ),
    "two starts of a segment": (
        lambda run: append(run, "segment_started", restored_step=12),
        [("events.jsonl", "segment 2 is started 2 times")],
    ),
    "a manifest that names a file elsewhere": (
        lambda run: edit_manifest(checkpoint(run, 12), files={"/etc/passwd": {}}),
        [(f"{LATE}/manifest.json", "names a file outside its folder: '/etc/passwd'")],
    ),
    "a lone surrogate in the manifest of a train state": (
        lambda run: edit_manifest(checkpoint(run, 12) / "train_state", run_id="\ud800"),
        [(f"{LATE}/train_state/manifest.json", "run_id is '\\ud800', expected")],
    ),
    "half a line in the middle of the history": (
        lambda run: insert_torn(run, before=number_of(run, "step", step=4)),
        [("events.jsonl", "1 line cannot be read, the first is line ")],
    ),
    "half a line in place of the end of a segment and one before": (
        lambda run: [tear(run, number_of(run, "validation", step=6)), tear(run, 2)],
        [("events.jsonl", "2 lines cannot be read, the first is line 2")],
    ),
    "an edited config": (
        edit_config,
        [("manifest.json", "the config does not match its hash")],
    ),
}


def test_a_run_that_nothing_happened_to_is_whole(run: Path) -> None:
    result = look(run)
    assert (result.findings, result.notes) == ([], [])
    assert (result.num_checkpoints, result.num_train_states) == (4, 2)
    assert (result.last_step, result.num_segments) == (12, 2)
    assert result.num_bytes == bytes_to_read(RunLayout(run))


@pytest.mark.parametrize("name", DAMAGE)
def test_every_damage_is_found_and_nothing_else(run: Path, name: str) -> None:
    damage, expected = DAMAGE[name]
    damage(run)
    seen = found(run)
    assert [place for place, _ in seen] == [place for place, _ in expected], seen
    for (_, what), (_, words) in zip(seen, expected, strict=True):
        assert words in what


@pytest.mark.parametrize("name", [n for n, (_, e) in DAMAGE.items() if "/" in e[0][0]])
def test_what_is_found_in_a_folder_is_what_training_would_set_aside(run: Path, name: str) -> None:
    damage, expected = DAMAGE[name]
    damage(run)
    folder = run / "checkpoints" / expected[0][0].split("/")[0]
    step = int(folder.name[5:])
    run_id = json.loads((run / "manifest.json").read_text())["run_id"]
    if "history" in expected[0][1]:  # the folder is whole, only the history says otherwise
        verify_checkpoint(folder, run_id=run_id, step=step)
        return
    with pytest.raises(CheckpointError):
        verify_checkpoint(folder, run_id=run_id, step=step)


def test_a_rollback_in_the_middle_of_which_a_kill_came_is_told_and_is_no_fault(run: Path) -> None:
    fields = {"to_step": 6, "from_step": 12, "skipped": 9, "rollbacks": 1}
    append(run, "segment_started", segment=3)
    append(run, "rolled_back", segment=3, **fields)
    looked = look(run)
    assert looked.findings == []
    assert looked.last_step == 6
    assert [note for note in looked.notes if "undone by a rollback" in note]
    for step in (9, 12):
        shutil.rmtree(checkpoint(run, step))
    assert look(run).findings == [], "what is set aside is not missing"


def test_a_torn_line_is_told_and_is_no_fault(run: Path) -> None:
    with (run / "events.jsonl").open("a") as file:
        file.write('{"v": 1, "kind": "st')
    result = look(run)
    assert result.findings == []
    assert "1 line of events.jsonl is torn" in result.notes[0]


def test_torn_lines_before_the_first_of_a_new_segment_are_told_and_are_no_fault(run: Path) -> None:
    without(run, "segment_ended", segment=1)
    first = number_of(run, "segment_started", segment=2)
    for _ in range(2):  # the second segment was killed at once, and begun again
        insert_torn(run, before=first)
    shutil.rmtree(checkpoint(run, 12))
    append(run, "checkpoint_quarantined", segment=3, step=12)
    last = len((run / "events.jsonl").read_text().splitlines())
    insert_torn(run, before=last)
    result = look(run)
    assert result.findings == []
    assert "3 lines are torn" in result.notes[0]


def test_a_full_disk_between_a_save_and_its_record_is_told_and_is_no_fault(run: Path) -> None:
    without(run, "segment_ended", segment=2)
    without(run, "checkpoint_saved", step=12)
    append(run, "segment_ended", reason="storage", step=12)
    result = look(run)
    assert result.findings == []
    assert "checkpoints/step-00000012 is not in the history yet" in result.notes[0]


@pytest.mark.parametrize("reason", ["done", "diverged", "failed"])
def test_a_save_without_a_record_is_a_fault_after_any_other_end(run: Path, reason: str) -> None:
    without(run, "segment_ended", segment=2)
    without(run, "checkpoint_saved", step=12)
    append(run, "segment_ended", reason=reason, step=12)
    assert found(run) == [("step-00000012", "is not in the history")]


def test_a_kill_between_a_save_and_its_record_after_a_quarantine_is_no_fault(run: Path) -> None:
    without(run, "segment_ended", segment=2)
    (run / "quarantine").mkdir()
    checkpoint(run, 12).rename(run / "quarantine" / "step-00000012")
    append(run, "checkpoint_quarantined", step=12, path="quarantine", reason="damaged")
    without(run, "checkpoint_saved", step=9)
    result = look(run)
    assert result.findings == []
    assert "checkpoints/step-00000009 is not in the history yet" in result.notes[0]


def test_a_save_under_way_is_no_fault(run: Path) -> None:
    (run / "checkpoints" / ".saving-step-00000015-123").mkdir()
    assert look(run).findings == []


def test_a_checkpoint_that_was_set_aside_is_not_missed(run: Path) -> None:
    (run / "quarantine").mkdir()
    checkpoint(run, 12).rename(run / "quarantine" / "step-00000012")
    append(run, "checkpoint_quarantined", step=12, path="quarantine", reason="damaged")
    assert look(run).findings == []


def test_a_kill_between_a_save_and_its_record_is_told_and_is_no_fault(run: Path) -> None:
    without(run, "segment_ended")
    without(run, "checkpoint_saved", step=12)
    result = look(run)
    assert result.findings == []
    assert "checkpoints/step-00000012 is not in the history yet" in result.notes[0]


def test_a_kill_between_the_record_of_a_drop_and_the_drop_is_told_and_is_no_fault(
    run: Path,
) -> None:
    without(run, "segment_ended")
    append(run, "train_state_dropped", step=9)
    result = look(run)
    assert result.findings == []
    assert "step-00000009/train_state is about to be dropped" in result.notes[0]


def test_a_training_that_drops_a_train_state_meanwhile_is_no_fault(run: Path) -> None:
    states = checkpoint(run, 9) / "train_state"
    (states / "optimizer.safetensors").unlink()  # as a reader meets it in the middle of the drop

    def training_goes_on() -> None:
        shutil.rmtree(states)
        append(run, "train_state_dropped", step=9)

    result = look(run, wait=training_goes_on)
    assert (result.findings, result.notes) == ([], [])
    assert result.num_train_states == 1


def test_the_history_is_read_again_after_the_checkpoints(run: Path) -> None:
    without(run, "checkpoint_saved", step=12)
    sha256 = sha256_of_file(checkpoint(run, 12) / "manifest.json")
    result = look(run, wait=lambda: append(run, "checkpoint_saved", step=12, sha256=sha256))
    assert result.findings == []


def test_looking_changes_nothing(run: Path) -> None:
    DAMAGE["two files at once"][0](run)

    def state() -> dict[str, tuple[int, bytes]]:
        files = [path for path in run.rglob("*") if path.is_file()]
        return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}

    before = state()
    assert look(run).findings
    assert state() == before


def test_a_run_without_a_step_yet_is_whole(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "events.jsonl").unlink()
    result = look(run)
    assert (result.findings, result.num_checkpoints, result.last_step) == ([], 0, 0)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a run folder"):
        look(tmp_path)


def test_the_second_segment_of_the_trained_run_went_on(trained: Path) -> None:
    assert [e["restored_step"] for e in events(trained, "segment_started")] == [None, 6]
