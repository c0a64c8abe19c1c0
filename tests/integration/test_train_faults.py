"""What training does about damaged files, full disks, foreign folders and changed recipes."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from milepost.core.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    StorageError,
    UsageError,
)
from tests.training import (
    command,
    environment,
    events,
    logged_steps,
    start,
    train,
    train_here,
    wait_for_step,
    weights_sha256,
    write_recipe,
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def finished(recipe: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    summary = train_here(recipe, run, tiny_data)
    assert summary["status"] == "done"
    return run


@pytest.fixture
def half(recipe: Path, tiny_data: Path, tmp_path: Path) -> Path:
    """A run that stopped at step 15 with train states at 10 and 15."""
    run = tmp_path / "half"
    train_here(recipe, run, tiny_data, "--train.stop_at_step", "15")
    return run


def test_stopping_early_does_not_bend_the_schedule(
    recipe: Path, tiny_data: Path, half: Path, finished: Path
) -> None:
    train_here(recipe, half, tiny_data)
    assert logged_steps(half) == logged_steps(finished)
    assert weights_sha256(half, 30) == weights_sha256(finished, 30)


def test_a_segment_records_its_own_training_time(recipe: Path, tiny_data: Path, half: Path) -> None:
    train_here(recipe, half, tiny_data)
    recorded = sum(event["training_seconds"] for event in events(half, "segment_ended"))
    assert recorded == pytest.approx(sum(e["step_seconds"] for e in events(half, "step")))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "truncate", "remove", "extra"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(
    recipe: Path, tiny_data: Path, half: Path, finished: Path, name: str, how: str
) -> None:
    damage(half / "checkpoints" / "step-00000015" / name, how)
    train_here(recipe, half, tiny_data)
    quarantined = events(half, "checkpoint_quarantined")
    assert [event["step"] for event in quarantined] == [15]
    assert (half / "quarantine" / "step-00000015").is_dir()
    assert events(half, "segment_started")[-1]["restored_step"] == 10
    assert logged_steps(half) == logged_steps(finished)
    assert events(half, "replayed")[-1]["equal"] == 5


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_train_state_is_damage(
    recipe: Path, tiny_data: Path, half: Path, name: str
) -> None:
    damage(half / "checkpoints" / "step-00000015" / "train_state" / name, "flip")
    train_here(recipe, half, tiny_data, "--train.stop_at_step", "16")
    assert [event["step"] for event in events(half, "checkpoint_quarantined")] == [15]


def test_a_checkpoint_of_another_run_is_damage(
    recipe: Path, tiny_data: Path, half: Path, finished: Path
) -> None:
    place = half / "checkpoints" / "step-00000015"
    shutil.rmtree(place)
    shutil.copytree(finished / "checkpoints" / "step-00000030", place)
    train_here(recipe, half, tiny_data, "--train.stop_at_step", "16")
    reason = events(half, "checkpoint_quarantined")[0]["reason"]
    assert "run_id is" in reason


def test_with_every_checkpoint_damaged_nothing_starts_over(
    recipe: Path, tiny_data: Path, half: Path
) -> None:
    for folder in (half / "checkpoints").iterdir():
        damage(folder / "model.safetensors", "flip")
    with pytest.raises(CheckpointError, match="none of the 3 recorded checkpoints") as error:
        train_here(recipe, half, tiny_data)
    assert "never starts over" in str(error.value.hint)


def test_stray_files_among_the_checkpoints_do_no_harm(
    recipe: Path, tiny_data: Path, half: Path, finished: Path
) -> None:
    checkpoints = half / "checkpoints"
    (checkpoints / "step-99").mkdir()
    (checkpoints / "notes.txt").write_text("mine")
    (checkpoints / "step-00000099").symlink_to("/etc")
    (checkpoints / ".saving-step-00000020-1").mkdir()
    train_here(recipe, half, tiny_data)
    assert logged_steps(half) == logged_steps(finished)
    assert not (checkpoints / ".saving-step-00000020-1").exists()
    assert (checkpoints / "notes.txt").read_text() == "mine"


def test_a_changed_recipe_is_refused_with_the_list_of_differences(
    recipe: Path, tiny_data: Path, half: Path
) -> None:
    options = ("--optimizer.learning_rate", "1e-4", "--schedule.warmup_steps", "3")
    with pytest.raises(UsageError) as error:
        train_here(recipe, half, tiny_data, *options)
    assert "optimizer.learning_rate: the run has 0.003, asked for 0.0001" in error.value.message
    assert "schedule.warmup_steps: the run has 5, asked for 3" in error.value.message
    assert "--override" in str(error.value.hint)


def test_an_override_is_taken_recorded_and_remembered(
    recipe: Path, tiny_data: Path, half: Path
) -> None:
    option = ("--optimizer.learning_rate", "1e-4")
    stop = ("--train.stop_at_step", "17")
    train_here(recipe, half, tiny_data, *option, *stop, override=True)
    taken = events(half, "override")
    assert [(e["field"], e["old"], e["new"]) for e in taken] == [
        ("optimizer.learning_rate", 0.003, 0.0001)
    ]
    assert logged_steps(half)[16][2] != logged_steps(half)[15][2]
    train_here(recipe, half, tiny_data, *option, "--train.stop_at_step", "18")
    with pytest.raises(UsageError, match=r"the run has 0\.0001, asked for 0\.003"):
        train_here(recipe, half, tiny_data)


def test_an_override_makes_the_segment_approximate_and_compares_nothing(
    recipe: Path, tiny_data: Path, half: Path
) -> None:
    shutil.rmtree(half / "checkpoints" / "step-00000015")  # steps 11 to 15 will be run again
    option = ("--optimizer.learning_rate", "1e-4", "--train.stop_at_step", "17")
    train_here(recipe, half, tiny_data, *option, override=True)
    started = events(half, "segment_started")[-1]
    assert started["exactness"] == "approximate"
    assert started["reason"] == "overridden: optimizer.learning_rate"
    assert events(half, "replayed") == []


def test_an_override_that_fails_to_start_leaves_the_run_as_it_was(
    recipe: Path, tiny_data: Path, half: Path, finished: Path
) -> None:
    with pytest.raises(DataError, match="fewer than the"):
        train_here(recipe, half, tiny_data, "--train.global_batch_tokens", "8388608", override=True)
    assert events(half, "override") == []
    train_here(recipe, half, tiny_data)
    assert logged_steps(half) == logged_steps(finished)


def test_the_report_and_inspect_know_of_an_override(
    recipe: Path, tiny_data: Path, half: Path
) -> None:
    from milepost.cli.data import inspect
    from milepost.trajectory.collect import collect

    options = ("--run.seed", "7", "--train.stop_at_step", "17")
    train_here(recipe, half, tiny_data, *options, override=True)
    assert collect(half).manifest.config.run.seed == 7
    for step in (15, 17):
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            inspect(half, step=step)
        assert "(equal to the logged one)" in shown.getvalue()


def test_another_machine_since_the_checkpoint_makes_the_segment_approximate(
    recipe: Path, tiny_data: Path, half: Path
) -> None:
    log = half / "events.jsonl"
    log.write_text(log.read_text().replace('"torch":"', '"torch":"1.'))
    for stop in ("16", "17"):  # the second comes after a segment on this machine
        train_here(recipe, half, tiny_data, "--train.stop_at_step", stop)
    first, second = events(half, "segment_started")[1:]
    assert first["exactness"] == "approximate"
    assert first["reason"].startswith("torch was 1.")
    assert second["exactness"] == "exact", "its checkpoint was made on this machine"


def test_a_validation_that_was_given_up_is_made_up_for(
    recipe: Path, tiny_data: Path, half: Path, finished: Path
) -> None:
    train_here(recipe, half, tiny_data, "--train.stop_at_step", "20")
    log = half / "events.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if '"kind":"validation"' not in line))
    train_here(recipe, half, tiny_data)
    made_up, last = events(half, "validation")
    expected = {e["step"]: e["loss_nats"] for e in events(finished, "validation")}
    assert (made_up["step"], made_up["loss_nats"]) == (20, expected[20])
    assert (last["step"], last["loss_nats"]) == (30, expected[30])


def test_a_prompt_that_leaves_no_room_is_refused_before_anything_is_trained(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    prompts = '["' + "word " * 100 + '"]'
    options = ("--samples.prompts", prompts, "--samples.every_steps", "10")
    with pytest.raises(UsageError, match=r"tokens, the context .* has 64"):
        train_here(recipe, tmp_path / "run", tiny_data, *options)
    assert events(tmp_path / "run", "step") == []


def test_a_run_that_is_a_file_is_refused(recipe: Path, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UsageError, match="is not a folder"):
        train_here(recipe, tmp_path / "run", tiny_data)


@pytest.mark.parametrize(
    "option", [("--model.rope_theta", "10000.0"), ("--data.document_attention", "true")]
)
def test_architecture_and_data_never_change(
    recipe: Path, tiny_data: Path, half: Path, option: tuple[str, str]
) -> None:
    with pytest.raises(UsageError, match="the recipe differs") as error:
        train_here(recipe, half, tiny_data, *option, override=True)
    assert "never change" in str(error.value.hint)


def test_intervals_and_retention_may_change(
    recipe: Path, tiny_data: Path, half: Path, finished: Path
) -> None:
    options = ("--checkpoint.every_steps", "7", "--checkpoint.keep_train_state", "1")
    train_here(recipe, half, tiny_data, *options, "--validation.every_steps", "3")
    assert logged_steps(half) == logged_steps(finished)
    states = sorted(p.parent.name for p in half.glob("checkpoints/step-*/train_state"))
    assert states == ["step-00000030"]


def test_a_changed_shard_is_refused_by_name(
    recipe: Path, tiny_data: Path, half: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    shard = next(data.glob("train-*.tokens"))
    os.utime(shard, (1, 1))
    train_here(recipe, half, data, "--train.stop_at_step", "16")
    damage(shard, "flip")
    with pytest.raises(DataError, match=shard.name):
        train_here(recipe, half, data)


def test_other_data_is_refused(recipe: Path, tiny_data: Path, half: Path, tmp_path: Path) -> None:
    from milepost.data.prepare import prepare

    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("another text " * 2000)
    prepare([text], out=tmp_path / "other", tokenizer=str(tiny_data / "tokenizer"), workers=1)
    with pytest.raises(DataError, match="training shards are not those of the run"):
        train_here(recipe, half, tmp_path / "other")


def test_a_learning_rate_that_diverges_ends_with_5_and_clean_checkpoints(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    run = tmp_path / "run"
    options = ("--optimizer.learning_rate", "1e30", "--optimizer.clip_grad_norm", "1e6")
    with pytest.raises(DivergedError, match="not finite"):
        train_here(recipe, run, tiny_data, *options, "--checkpoint.every_steps", "1")
    assert events(run, "segment_ended")[-1]["reason"] == "diverged"
    for file in run.glob("checkpoints/*/*.safetensors"):
        assert all(bool(torch.isfinite(t).all()) for t in load_file(file).values())


def test_a_folder_with_something_else_in_it_is_left_alone(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match=r"holds no run \(it has thesis.tex\)"):
        train_here(recipe, tmp_path, tiny_data)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_a_vocabulary_that_does_not_fit_is_said_with_both_sizes(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"vocabulary of 512.* is 600"):
        train_here(recipe, tmp_path / "run", tiny_data, "--model.vocab_size", "600")
    assert not (tmp_path / "run").exists()


def test_a_second_trainer_is_refused_with_the_id_of_the_first(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = start(recipe, run, tiny_data, "--ranks", "1", "--train.total_steps", "100000")
    try:
        wait_for_step(run, 1)
        second = train(recipe, run, tiny_data, "--ranks", "2")
        assert second.returncode == 6, second.stderr
        assert "is in use by process" in second.stderr
        assert "Traceback" not in second.stderr
        holder = int(second.stderr.split("by process ")[1].split()[0])
        os.kill(holder, 0)
    finally:
        first.terminate()
        first.communicate(timeout=30)


def test_a_rank_that_dies_takes_the_others_down_within_seconds(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(recipe, run, tiny_data, "--ranks", "2", "--train.total_steps", "100000")
    wait_for_step(run, 2)
    children = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True
    )
    pids = [int(word) for word in children.stdout.split()]
    os.kill(pids[1], 9)
    died = time.monotonic()
    _, talk = process.communicate(timeout=30)
    assert time.monotonic() - died < 15
    assert process.returncode == 1
    assert "was ended by SIGKILL" in talk
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A mounted file system of 12 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_ends_with_7_and_the_run_goes_on_exactly_once_there_is_room(
    recipe: Path, tiny_data: Path, small_disk: Path, finished: Path
) -> None:
    run = small_disk / "run"
    train_here(recipe, run, tiny_data, "--train.stop_at_step", "10")
    filler = small_disk / "filler"
    with filler.open("wb") as file, pytest.raises(OSError):
        for _ in range(13):
            file.write(b"x" * (1 << 20))
            file.flush()
    with pytest.raises(StorageError) as error:
        train_here(recipe, run, tiny_data)
    assert "cannot write" in error.value.message or "are free" in error.value.message
    filler.unlink()
    train_here(recipe, run, tiny_data)
    assert logged_steps(run) == logged_steps(finished)
    assert weights_sha256(run, 30) == weights_sha256(finished, 30)


def test_torchrun_starts_the_ranks_too(
    recipe: Path, tiny_data: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # Without `--`, torchrun takes --run for a shortened --run-path of its own.
    stop = ("--train.stop_at_step", "6")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*torchrun, "--no-python", "--", *command(recipe, run, tiny_data, *stop)],
        env=environment() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert logged_steps(run) == {s: v for s, v in logged_steps(finished).items() if s <= 6}


def test_transformers_loads_a_checkpoint_folder_as_it_lies(finished: Path, tiny_data: Path) -> None:
    import torch

    transformers = pytest.importorskip("transformers")
    from milepost.inference.load import load_model

    folder = finished / "checkpoints" / "step-00000030"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load_model(finished)
    ids = torch.randint(0, 512, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
        hidden = ours.model(ids)
        torch.testing.assert_close(hidden @ ours.model.head_weight.t(), expected, atol=1e-5, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.config.eos_token_id == tokenizer.eos_token_id == ours.tokenizer.end_of_text_id


def damage(path: Path, how: str) -> None:
    """Changes one file in the named way."""
    content = path.read_bytes()
    if how == "flip":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "truncate":
        path.write_bytes(content[:-1])
    elif how == "remove":
        path.unlink()
    elif how == "extra":
        path.with_name("extra.bin").write_bytes(b"extra")
    else:
        raise ValueError(how)
