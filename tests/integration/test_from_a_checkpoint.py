"""A new run that begins with a checkpoint of another: what it restores, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from milepost.cli.main import run as main
from milepost.core.errors import CheckpointError, DataError, UsageError
from milepost.runs.layout import RunLayout
from milepost.runs.lineage import lineage_of, parse_parent
from milepost.runs.manifest import read_run_manifest, write_run_manifest
from milepost.trajectory.collect import collect
from milepost.trajectory.provenance import commands
from tests.conftest import made_up_text
from tests.training import events, logged_steps, train, train_here, validations, weights_sha256

SHORT = ("--train.total_steps", "12", "--checkpoint.every_steps", "3")
AT = 9


def branch(
    recipe: Path, run: Path, data: Path, parent: str, *words: str, restore: str = "full"
) -> Any:
    """A segment of a run that begins with a checkpoint of another, in this process."""
    return train_here(
        recipe, run, data, *SHORT, *words, begin_with=parse_parent(parent, restore=restore)
    )


def test_a_full_restore_has_the_bits_of_the_parent(
    recipe: Path, tiny_data: Path, trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "branch"
    summary = branch(recipe, run, tiny_data, f"{trained}:{AT}")
    assert summary["step"] == 12
    steps, expected = logged_steps(run), logged_steps(trained)
    assert steps == {step: expected[step] for step in (10, 11, 12)}
    assert weights_sha256(run, 12) == weights_sha256(trained, 12)
    lineage = lineage_of(read_run_manifest(RunLayout(run)).lineage)
    assert lineage is not None
    parent = read_run_manifest(RunLayout(trained))
    assert (lineage.run, lineage.run_id, lineage.step) == (trained, parent.run_id, AT)
    saved = {e["step"]: e["sha256"] for e in events(trained, "checkpoint_saved")}
    assert lineage.checkpoint_sha256 == saved[AT]
    assert lineage.changed == {}
    started = events(run, "segment_started")[0]
    assert (started["restored_step"], started["restored"]) == (AT, "full")
    assert events(run, "partial_restore") == []


@pytest.mark.long
def test_one_and_two_ranks_begin_alike(
    recipe: Path, tiny_data: Path, trained: Path, tmp_path: Path
) -> None:
    words = (*SHORT, "--from", f"{trained}:{AT}")
    for ranks in ("1", "2"):
        done = train(recipe, tmp_path / ranks, tiny_data, *words, "--ranks", ranks)
        assert done.returncode == 0, done.stderr
        assert weights_sha256(tmp_path / ranks, 12) == weights_sha256(trained, 12)


def test_a_decay_branch_changes_the_schedule_from_there_on(
    recipe: Path, tiny_data: Path, trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "branch"
    branch(recipe, run, tiny_data, f"{trained}:{AT}", "--schedule.name", "linear")
    first, expected = events(run, "step")[0], events(trained, "step")[AT]
    assert first["loss_nats"] == expected["loss_nats"], "the same weights and batch"
    assert first["learning_rate"] != expected["learning_rate"]
    lineage = lineage_of(read_run_manifest(RunLayout(run)).lineage)
    assert lineage is not None and lineage.changed == {"schedule.name": ["cosine", "linear"]}


@pytest.mark.parametrize(
    ("restore", "first_step", "data_step", "same_batch_as"),
    [
        ("weights", 1, 0, 1),
        ("weights,schedule", AT + 1, 0, 1),
        ("weights,data", 1, AT, AT + 1),
        ("weights,schedule,data", AT + 1, AT, AT + 1),
        ("weights,optimizer,schedule", AT + 1, 0, 1),
    ],
)
def test_parts_of_a_train_state_are_restored_one_by_one(
    recipe: Path,
    tiny_data: Path,
    trained: Path,
    tmp_path: Path,
    restore: str,
    first_step: int,
    data_step: int,
    same_batch_as: int,
) -> None:
    run = tmp_path / "branch"
    stop = ("--train.stop_at_step", str(first_step + 1))
    branch(recipe, run, tiny_data, f"{trained}:{AT}", *stop, restore=restore)
    first = events(run, "step")[0]
    assert (first["step"], first["data_step"]) == (first_step, data_step)
    parent = {event["step"]: event for event in events(trained, "step")}
    assert first["batch_sha256"] == parent[same_batch_as]["batch_sha256"]
    assert first["learning_rate"] == parent[first_step]["learning_rate"]
    state = run / "checkpoints" / f"step-{first_step + 1:08d}" / "train_state"
    updates = json.loads((state / "state.json").read_text())["optimizer_step"]
    assert updates == (AT + 2 if "optimizer" in restore else 2)
    told = events(run, "partial_restore")
    assert [event["restored"] for event in told] == [restore.split(",")]
    # It is the place in the data that goes on, whatever the numbers of the steps.
    branch(recipe, run, tiny_data, str(trained), restore=restore)
    steps = events(run, "step")
    assert [e["data_step"] - e["step"] for e in steps] == [data_step - first_step] * len(steps)


def test_weights_need_no_train_state_and_everything_else_does(
    recipe: Path, tiny_data: Path, trained: Path, tmp_path: Path
) -> None:
    stop = ("--train.stop_at_step", "1")
    branch(recipe, tmp_path / "a", tiny_data, f"{trained}:3", *stop, restore="weights")
    with pytest.raises(CheckpointError, match="no train state in its checkpoint of step 3") as no:
        branch(recipe, tmp_path / "b", tiny_data, f"{trained}:3")
    assert "there are train states of steps 9, 12" in str(no.value.hint)
    assert not (tmp_path / "b" / "manifest.json").exists()


def test_without_a_step_the_latest_is_taken_and_a_checkpoint_folder_says_its_own(
    trained: Path,
) -> None:
    assert parse_parent(str(trained), restore="full").step is None
    folder = trained / "checkpoints" / "step-00000009"
    request = parse_parent(str(folder), restore="weights")
    assert (request.run, request.step, request.parts) == (trained, 9, ("weights",))


def test_killed_before_its_first_checkpoint_it_begins_with_the_same_parent(
    recipe: Path, tiny_data: Path, run: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    branch(recipe, whole, tiny_data, f"{run}:{AT}", restore="weights,schedule,data")
    branch(recipe, killed, tiny_data, f"{run}:{AT}", restore="weights,schedule,data")
    shutil.rmtree(killed / "checkpoints")  # as a kill before the first save leaves it
    kept = [
        line
        for line in (killed / "events.jsonl").read_text().splitlines()
        if json.loads(line)["kind"] in ("segment_started", "step", "partial_restore")
    ]
    (killed / "events.jsonl").write_text("\n".join(kept) + "\n")
    train_here(recipe, killed, tiny_data, *SHORT)  # its manifest says where it begins
    assert (
        events(killed, "replayed")[-1]["equal"] == events(killed, "replayed")[-1]["compared"] == 3
    )
    assert weights_sha256(killed, 12) == weights_sha256(whole, 12)


def test_a_parent_that_is_gone_or_another_is_refused_until_it_is_said_where_it_lies(
    recipe: Path, tiny_data: Path, run: Path, tmp_path: Path
) -> None:
    child, moved = tmp_path / "child", tmp_path / "moved"
    branch(recipe, child, tiny_data, f"{run}:{AT}", "--train.stop_at_step", "10")
    shutil.rmtree(child / "checkpoints")
    (child / "events.jsonl").unlink()
    run.rename(moved)
    with pytest.raises(CheckpointError, match="is gone") as gone:
        train_here(recipe, child, tiny_data, *SHORT)
    assert "say with --from where it lies now" in str(gone.value.hint)
    branch(recipe, child, tiny_data, f"{moved}:{AT}", "--train.stop_at_step", "10")
    shutil.rmtree(child / "checkpoints")
    (child / "events.jsonl").unlink()
    shutil.rmtree(moved / "checkpoints" / "step-00000009")
    shutil.copytree(moved / "checkpoints/step-00000012", moved / "checkpoints/step-00000009")
    with pytest.raises(CheckpointError, match="is not the checkpoint that the run was made from"):
        branch(recipe, child, tiny_data, f"{moved}:{AT}")


def test_another_beginning_than_the_run_has_is_refused(
    recipe: Path, tiny_data: Path, trained: Path, run: Path, tmp_path: Path
) -> None:
    child = tmp_path / "child"
    branch(recipe, child, tiny_data, f"{trained}:{AT}")
    with pytest.raises(UsageError, match=r"asked for .*:12, full"):
        branch(recipe, child, tiny_data, f"{trained}:12")
    with pytest.raises(UsageError, match=r"restored: full; asked for .*, weights$"):
        branch(recipe, child, tiny_data, str(trained), restore="weights")
    with pytest.raises(UsageError, match="does not begin with"):
        branch(recipe, run, tiny_data, str(trained))


def test_another_architecture_is_refused_field_by_field(
    recipe: Path, tiny_data: Path, trained: Path, tmp_path: Path
) -> None:
    words = ("--model.intermediate_size", "96", "--model.rope_theta", "10000.0")
    with pytest.raises(UsageError) as refused:
        branch(recipe, tmp_path / "child", tiny_data, str(trained), *words, restore="weights")
    told = refused.value.message
    assert "model.intermediate_size: the parent has 64, the recipe 96" in told
    assert "model.rope_theta: the parent has 500000.0, the recipe 10000.0" in told


def test_other_data_is_taken_and_said_another_tokenizer_is_refused(
    recipe: Path,
    tiny_data: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from milepost.data.prepare import prepare

    backwards = made_up_text(seed=5, num_words=20_000)[::-1]
    (tmp_path / "text.txt").write_text(backwards)
    tokenizer = trained / "checkpoints" / "step-00000012" / "tokenizer.json"
    for out, chosen in (("same", str(tokenizer)), ("other", "train:512")):
        prepare([tmp_path / "text.txt"], out=tmp_path / out, tokenizer=chosen, workers=1)
    child = tmp_path / "child"
    branch(recipe, child, tmp_path / "same", f"{trained}:{AT}", "--train.stop_at_step", "10")
    told = capsys.readouterr().err
    assert "is not the data of the parent; it goes on at the parent's place" in told
    assert "the validation set is not the parent's" in told
    assert events(child, "step")[0]["data_step"] == AT
    with pytest.raises(DataError, match="was made with another tokenizer than the parent's"):
        branch(recipe, tmp_path / "b", tmp_path / "other", f"{trained}:{AT}")


def test_weights_without_their_masters_are_said_to_be_rounded(
    recipe: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = tmp_path / "parent"
    train_here(recipe, parent, tiny_data, *SHORT, "--checkpoint.weights_dtype", "bfloat16")
    stop = ("--train.stop_at_step", "1")
    for step, is_rounded in ((3, True), (12, False)):
        capsys.readouterr()
        request = f"{parent}:{step}"
        branch(recipe, tmp_path / f"{step}", tiny_data, request, *stop, restore="weights")
        assert ("has its weights in bfloat16 only" in capsys.readouterr().err) == is_rounded


def test_a_fine_tuning_is_refused_as_a_parent(
    recipe: Path, tiny_data: Path, run: Path, tmp_path: Path
) -> None:
    manifest = read_run_manifest(RunLayout(run))
    section = manifest.config.finetune.model_copy(update={"template": "vicuna-1.1"})
    tuned = manifest.config.model_copy(update={"finetune": section})
    write_run_manifest(RunLayout(run), replace(manifest, config=tuned))
    with pytest.raises(UsageError, match="is a fine-tuning, which pretraining cannot go on from"):
        branch(recipe, tmp_path / "child", tiny_data, f"{run}:{AT}")


def test_nothing_left_to_do_is_said(
    recipe: Path, tiny_data: Path, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="begin at step 12 and end at step 12: nothing is left"):
        branch(recipe, tmp_path / "child", tiny_data, str(trained))


@pytest.mark.parametrize("restore", ["everything", "optimizer,data", "full,data"])
def test_what_cannot_be_restored_is_refused(trained: Path, restore: str) -> None:
    with pytest.raises(UsageError, match=f"--restore '{restore}' cannot be read"):
        parse_parent(str(trained), restore=restore)


def test_a_parent_that_is_not_there_or_no_run_is_refused_before_a_rank_is_started(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(recipe), "--run", str(tmp_path / "child"), "--from"]
    assert main([*words, f"{tmp_path}/nowhere:3"]) == 2
    assert f"there is no folder {tmp_path}/nowhere" in capsys.readouterr().err
    assert main([*words, str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert not (tmp_path / "child").exists()


def test_the_same_command_goes_on_when_the_parent_is_gone_and_no_longer_needed(
    recipe: Path, tiny_data: Path, run: Path, tmp_path: Path
) -> None:
    child = tmp_path / "child"
    branch(recipe, child, tiny_data, f"{run}:{AT}", "--train.stop_at_step", "11")
    shutil.rmtree(run)
    assert branch(recipe, child, tiny_data, f"{run}:{AT}")["step"] == 12
    with pytest.raises(UsageError, match=r"restored: full; asked for .*, weights$"):
        branch(recipe, child, tiny_data, f"{run}:{AT}", restore="weights")
    with pytest.raises(UsageError, match="there is no folder"):
        branch(recipe, child, tiny_data, f"{tmp_path}/elsewhere:{AT}")


def test_a_damaged_parent_is_refused_with_the_steps_that_may_be_taken(
    recipe: Path, tiny_data: Path, run: Path, tmp_path: Path
) -> None:
    weights = run / "checkpoints" / "step-00000009" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="its SHA-256 is not the manifest's") as refused:
        branch(recipe, tmp_path / "child", tiny_data, f"{run}:{AT}")
    assert "there are train states of steps 12; milepost verify" in str(refused.value.hint)
    assert weights.exists(), "a parent is only read"


def test_a_parent_without_any_train_state_is_said_where_no_step_was_named(
    recipe: Path, tiny_data: Path, run: Path, tmp_path: Path
) -> None:
    for state in run.glob("checkpoints/*/train_state"):
        shutil.rmtree(state)
    with pytest.raises(CheckpointError, match="no train state in any checkpoint, only weights"):
        branch(recipe, tmp_path / "child", tiny_data, str(run))


def test_another_batch_at_the_parents_place_in_the_data_is_said(
    recipe: Path,
    tiny_data: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--train.global_batch_tokens", "512", "--train.stop_at_step", "10")
    for restore, is_said in (("full", True), ("weights,schedule", False)):
        capsys.readouterr()
        child = tmp_path / restore
        branch(recipe, child, tiny_data, f"{trained}:{AT}", *words, restore=restore)
        told = "train.global_batch_tokens differs from the parent's: the number of batches goes on"
        assert (told in capsys.readouterr().err) == is_said


def test_the_report_says_how_the_branch_is_made_again(
    recipe: Path, tiny_data: Path, trained: Path, tmp_path: Path
) -> None:
    child = tmp_path / "child"
    branch(recipe, child, tiny_data, f"{trained}:{AT}", restore="weights,schedule")
    told = commands(collect(child), recipe="recipe.toml")[-1]
    assert told == (
        f"milepost train recipe.toml --run child-again --from {trained}:{AT} "
        "--restore weights,schedule"
    )


def test_moments_are_coded_where_a_branch_takes_the_optimizer_of_8_bits(
    recipe: Path, tiny_data: Path, trained: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torchao", reason="the 8-bit optimizer is not installed (extra lowbit)")
    run = tmp_path / "branch"
    branch(recipe, run, tiny_data, f"{trained}:{AT}", "--optimizer.name", "adamw8bit")
    first, expected = events(run, "step")[0], events(trained, "step")[AT]
    assert first["loss_nats"] == expected["loss_nats"]
    own = load_file(run / "checkpoints/step-00000012/train_state/optimizer.safetensors")
    assert any("codes" in name for name in own)
    losses = [logged_steps(r)[12] for r in (run, trained)]
    assert losses[0] != losses[1]
    one, other = (float.fromhex(loss[0]) for loss in losses)
    assert abs(one - other) < 0.05  # rounding, no lost moments


def test_the_validation_of_the_first_weights_is_made(
    recipe: Path, tiny_data: Path, trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "branch"
    branch(recipe, run, tiny_data, f"{trained}:{AT}", "--validation.every_steps", "3")
    assert sorted(validations(run)) == [9, 12]
    assert validations(run)[12] == validations(trained)[12]
