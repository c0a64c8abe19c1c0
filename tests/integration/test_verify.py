"""`milepost verify`: what a person sees, and replays that hold a run to its bits."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from milepost.cli.main import run as milepost
from tests.training import environment, events, start, train_here, wait_for_step

SHORT = ("--train.total_steps", "12", "--checkpoint.every_steps", "3")
SAMPLED = ("--samples.every_steps", "2", "--samples.prompts", '["the"]')


@pytest.fixture(scope="module")
def trained(recipe: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps on one rank; checkpoints of 3, 6, 9 and 12, the last two with a train state."""
    run = tmp_path_factory.mktemp("verify") / "run"
    train_here(recipe, run, tiny_data, *SHORT)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def edit_history(run: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = run / "events.jsonl"
    changed = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(event) + "\n" for event in changed))


def certificate_of(run: Path, *, steps: str, ranks: int) -> dict[str, Any]:
    path = run / "certificates" / f"replay-{steps}-ranks{ranks}.json"
    assert path.with_suffix(".txt").is_file()
    return json.loads(path.read_text())


def counts(certificate: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {part["name"]: (part["equal"], part["count"]) for part in certificate["compared"]}


def left_beside(run: Path) -> list[str]:
    return [path.name for path in run.parent.iterdir() if "replay" in path.name]


def test_a_whole_run_is_said_to_be_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert milepost(["verify", str(run)]) == 0
    out, err = capsys.readouterr()
    assert f"{run}: 4 checkpoints, 2 with a train state" in out
    assert "12 steps in 1 segment\n" in out
    assert out.endswith("every file is as its manifest says, and the history agrees\n")
    assert err == ""


def test_damage_is_listed_a_line_each_and_ends_with_4(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "checkpoints" / "step-00000003" / "config.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000012" / "train_state")
    assert milepost(["verify", str(run)]) == 4
    out, err = capsys.readouterr()
    first, second, *_ = out.splitlines()
    assert first.startswith("checkpoints/step-00000003/config.json: is missing; ")
    assert second.startswith("checkpoints/step-00000012/train_state: is missing, and the history ")
    assert "all is well" not in out
    assert f"error: {run}: 2 findings, nothing was changed" in err


def test_json_is_one_document_for_whole_and_damaged_runs(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert milepost(["verify", str(run), "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert (whole["is_whole"], whole["findings"], whole["last_step"]) == (True, [], 12)
    (run / "checkpoints" / "step-00000003" / "config.json").unlink()
    assert milepost(["verify", str(run), "--json"]) == 4
    damaged = json.loads(capsys.readouterr().out)
    assert damaged["is_whole"] is False
    assert damaged["findings"][0]["place"] == "checkpoints/step-00000003/config.json"


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_replay_gives_the_same_bits_on_any_number_of_ranks(
    run: Path, ranks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert milepost(["verify", str(run), "--replay", "--ranks", str(ranks)]) == 0
    out = capsys.readouterr().out
    assert out.index("replay of steps 10 to 12") < out.index(f"run           {run}\n")
    assert "EQUAL: 3 of 3 steps, 21 of 21 weight tensors, 42 of 42 optimizer tensors" in out
    certificate = certificate_of(run, steps="9-12", ranks=ranks)
    assert certificate["verdict"] == "equal"
    assert all(equal == count > 0 for equal, count in counts(certificate).values())
    assert (certificate["then"][0]["ranks"], certificate["now"]["ranks"]) == (1, ranks)
    assert certificate["run_id"] == json.loads((run / "manifest.json").read_text())["run_id"]
    for part in certificate["compared"][1:3]:
        assert part["sha256_then"] == part["sha256_now"]
    assert certificate["command"] == f"milepost verify {run} --replay --ranks {ranks}"
    assert left_beside(run) == []
    assert milepost(["verify", str(run)]) == 0, "the run is as it was"


def test_a_log_that_differs_by_one_bit_is_named_and_ends_with_4(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_ulp_more(event: dict[str, Any]) -> dict[str, Any]:
        if event["kind"] == "step" and event["step"] == 11:
            event["loss_nats"] = math.nextafter(event["loss_nats"], math.inf)
        return event

    edit_history(run, one_ulp_more)
    assert milepost(["verify", str(run), "--replay", "--ranks", "1"]) == 4
    out, err = capsys.readouterr()
    certificate = certificate_of(run, steps="9-12", ranks=1)
    assert certificate["verdict"] == "different"
    assert counts(certificate)["events.jsonl"] == (2, 3)
    assert counts(certificate)["model.safetensors"] == (21, 21)
    assert certificate["compared"][0]["first_difference"]["place"] == "step 11, loss_nats"
    assert "DIFFERENT: first at step 11, loss_nats: was 0x1." in out
    assert "error" in err
    assert left_beside(run) == []


def start_replay(run: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "milepost.cli.main", "verify", str(run), "--replay"]
    process = subprocess.Popen(
        [*words, "--ranks", "1"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not left_beside(run):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 75, marks=pytest.mark.long)],
)
def test_a_stop_ends_the_training_and_leaves_nothing(
    run: Path, signum: signal.Signals, code: int
) -> None:
    process = start_replay(run)
    scratch = run.parent / left_beside(run)[0]
    time.sleep(0.5)  # somewhere in the training's start
    os.killpg(process.pid, signum)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, (out, err)
    assert "Traceback" not in err
    assert left_beside(run) == []
    assert not (run / "certificates").exists() or not any((run / "certificates").iterdir())
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(scratch) not in listed, "the training has ended too"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--replay", "--from-step", "6"], 4, "no train state in its checkpoint of step 6"),
        (["--replay", "--from-step", "7"], 4, "has no checkpoint of step 7"),
        (["--replay", "--from-step", "12"], 4, "has no checkpoint after step 12"),
        (["--replay", "--ranks", "3"], 2, "2 lanes cannot be dealt to 3 ranks"),
        (["--replay", "--data", "nowhere"], 3, "nowhere holds no prepared data"),
        (["--ranks", "2"], 2, "--ranks says how to replay"),
    ],
)
def test_what_cannot_be_replayed_is_refused_with_a_reason(
    run: Path, words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert milepost(["verify", str(run), *words]) == code
    err = capsys.readouterr().err
    assert message in err
    assert "hint: " in err
    assert left_beside(run) == []


def test_a_checkpoint_is_no_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints" / "step-00000012"
    assert milepost(["verify", str(folder)]) == 2
    assert f"{folder} is a model folder, not a run" in capsys.readouterr().err


def test_a_run_with_one_train_state_says_from_where_it_can_be_replayed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "checkpoints" / "step-00000009" / "train_state")
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({"v": 1, "kind": "train_state_dropped", "step": 9}) + "\n")
    assert milepost(["verify", str(run), "--replay"]) == 4
    err = capsys.readouterr().err
    assert "no checkpoint with a train state that another one follows" in err
    assert "checkpoints with a train state: 12; --from-step 0 starts from the first step" in err


def test_data_that_was_moved_is_asked_for(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from milepost.runs.layout import RunLayout
    from milepost.runs.manifest import read_run_manifest, write_run_manifest

    layout = RunLayout(run)
    manifest = read_run_manifest(layout)
    gone = manifest.config.data.model_copy(update={"path": "/gone"})
    config = manifest.config.model_copy(update={"data": gone})
    write_run_manifest(layout, type(manifest)(**{**vars(manifest), "config": config}))
    assert milepost(["verify", str(run), "--replay"]) == 3
    err = capsys.readouterr().err
    assert "/gone holds no prepared data" in err
    assert "hint: say with --data DIR" in err


def test_a_full_disk_is_refused_with_numbers_before_anything_is_trained(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from milepost.experiments import scratch_copy

    monkeypatch.setattr(scratch_copy, "free_bytes", lambda path: 1 << 20)
    assert milepost(["verify", str(run), "--replay"]) == 7
    err = capsys.readouterr().err
    assert "no room for the replay's copy" in err
    assert "has 1.0 MiB free, " in err


def test_a_train_state_that_goes_while_it_is_copied_is_told(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from milepost.experiments import scratch_copy

    really = scratch_copy._link

    def training_drops_it(source: Path, target: Path) -> None:
        if source.name == "optimizer.safetensors":
            shutil.rmtree(source.parent)
        really(source, target)

    monkeypatch.setattr(scratch_copy, "_link", training_drops_it)
    assert milepost(["verify", str(run), "--replay"]) == 4
    err = capsys.readouterr().err
    assert "step-00000009/train_state/optimizer.safetensors went away while it was read" in err
    assert "hint: if a training is at work in this folder" in err
    assert left_beside(run) == []


def test_what_a_killed_replay_left_goes_with_the_next_and_a_living_one_stays(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from milepost.core.files import exclusive_lock
    from milepost.experiments import scratch_copy

    dead, living = (run.parent / f".run-replay-{name}" for name in ("dead", "living"))
    for folder in (dead, living):
        folder.mkdir()
        (folder / scratch_copy.SCRATCH_LOCK).touch()
    monkeypatch.setattr(scratch_copy, "free_bytes", lambda path: 0)  # it ends soon after
    with exclusive_lock(living / scratch_copy.SCRATCH_LOCK, what="a replay"):
        assert milepost(["verify", str(run), "--replay"]) == 7
    assert left_beside(run) == [living.name]


def note_deletions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are deleted from now on."""
    names: list[str] = []
    really = os.unlink

    def note(path: str | Path, *, dir_fd: int | None = None) -> None:
        names.append(Path(path).name)
        really(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", note)
    return names


def test_the_lock_of_a_scratch_copy_is_the_last_of_it_that_goes(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from milepost.experiments.replay_plan import plan_replay
    from milepost.experiments.scratch_copy import SCRATCH_LOCK, scratch_copy
    from milepost.runs.layout import RunLayout

    plan = plan_replay(RunLayout(run), from_step=None, data=None)
    for name in "abcd":  # killed replays; the order in a folder is chance
        dead = run.parent / f".run-replay-{name}"
        for file in (dead / "run" / "weights", dead / "recipe.toml", dead / SCRATCH_LOCK):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    names = note_deletions(monkeypatch)
    with scratch_copy(plan):
        assert names == ["weights", "recipe.toml", SCRATCH_LOCK] * 4
        names.clear()
    assert names.index(SCRATCH_LOCK) == len(names) - 1 > 10
    assert left_beside(run) == []


def test_what_a_certificate_says_of_the_run_is_read_before_the_training(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from milepost.experiments import replay

    def train_and_lose(words: list[str], *, run: Path, **options: Any) -> bool:
        shutil.copytree(original / "checkpoints" / last, run / "checkpoints" / last)
        shutil.copyfile(original / "events.jsonl", run / "events.jsonl")
        (original / "manifest.json").unlink()
        (original / "checkpoints" / "step-00000009" / "manifest.json").unlink()
        return True

    original, last = run, "step-00000012"
    hashes = {step: _sha256(run / "checkpoints" / f"step-{step:08d}") for step in (9, 12)}
    monkeypatch.setattr(replay, "run_segment", train_and_lose)
    assert milepost(["verify", str(run), "--replay", "--ranks", "1"]) == 0
    certificate = certificate_of(run, steps="9-12", ranks=1)
    assert {f"manifest of step {n}": h for n, h in hashes.items()}.items() <= certificate[
        "hashes"
    ].items()


def _sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()


def test_a_checkpoint_without_weights_is_refused_before_the_training(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run / "checkpoints" / "step-00000012"
    (folder / "model.safetensors").unlink()
    head = json.loads((folder / "manifest.json").read_text())
    del head["files"]["model.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(head, indent=2) + "\n")
    assert milepost(["verify", str(run), "--replay"]) == 4
    assert f"{folder / 'model.safetensors'} is missing" in capsys.readouterr().err
    assert left_beside(run) == []


@pytest.mark.long
def test_a_train_state_that_is_dropped_while_it_is_trained_again_is_left_out(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from milepost.experiments import replay

    really = replay.run_segment

    def training_drops_it(*arguments: Any, **options: Any) -> bool:
        shutil.rmtree(run / "checkpoints" / "step-00000012" / "train_state")
        return really(*arguments, **options)

    monkeypatch.setattr(replay, "run_segment", training_drops_it)
    assert milepost(["verify", str(run), "--replay", "--ranks", "1"]) == 0
    certificate = certificate_of(run, steps="9-12", ranks=1)
    assert list(counts(certificate)) == ["events.jsonl", "model.safetensors"]
    assert "has no train state any more" in certificate["notes"][0]


def test_a_training_that_fails_says_nothing_of_the_bits(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from milepost.experiments import replay
    from milepost.experiments.segment_process import SegmentFailed

    def fail(*arguments: Any, **options: Any) -> bool:
        raise SegmentFailed(3, last_words=["error: shard 0 is damaged"])

    monkeypatch.setattr(replay, "run_segment", fail)
    assert milepost(["verify", str(run), "--replay"]) == 3
    err = capsys.readouterr().err
    assert "the replay's training ended with exit code 3:\n  error: shard 0 is damaged" in err
    assert "hint: this says nothing of the run's bits" in err
    assert left_beside(run) == []


def test_a_recipe_that_changes_inside_the_range_is_refused(
    recipe: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    keep = ("--checkpoint.keep_train_state", "9")
    train_here(recipe, run, tiny_data, *SHORT, *keep, "--train.stop_at_step", "7")
    changed = ("--optimizer.learning_rate", "1e-3")
    train_here(recipe, run, tiny_data, *SHORT, *keep, *changed, override=True)
    shutil.move(run / "checkpoints" / "step-00000007", tmp_path / "aside")
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({"v": 1, "kind": "checkpoint_quarantined", "step": 7}) + "\n")
    assert milepost(["verify", str(run), "--replay", "--from-step", "6"]) == 2
    err = capsys.readouterr().err
    assert "optimizer.learning_rate was changed from 0.003 to 0.001 at step 8" in err
    assert "inside steps 7 to 9" in err


@pytest.mark.long
def test_an_override_before_the_range_is_applied_and_said(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train_here(recipe, run, tiny_data, *SHORT, "--train.stop_at_step", "9")
    changed = ("--optimizer.clip_grad_norm", "none")
    train_here(recipe, run, tiny_data, *SHORT, *changed, override=True)
    assert milepost(["verify", str(run), "--replay", "--ranks", "1"]) == 0
    notes = " ".join(certificate_of(run, steps="9-12", ranks=1)["notes"])
    assert "optimizer.clip_grad_norm = None" in notes
    assert "labelled approximate: overridden: optimizer.clip_grad_norm" in notes


@pytest.mark.long
def test_a_replay_from_the_first_step_compares_what_is_left(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert milepost(["verify", str(run), "--replay", "--from-step", "0", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    certificate = certificate_of(run, steps="0-3", ranks=told["replay"]["now"]["ranks"])
    assert told["replay"] == certificate
    assert [Path(name).suffix for name in told["certificate_files"]] == [".json", ".txt"]
    assert list(counts(certificate)) == ["events.jsonl", "model.safetensors"]
    assert "has no train state any more" in certificate["notes"][0]
    assert "Trained again from the first step" in certificate["claim"]


@pytest.mark.long
@pytest.mark.parametrize(
    "setting",
    [
        ("--train.precision", "bfloat16", "--train.compile", "true"),
        ("--train.precision", "float16"),
        ("--checkpoint.weights_dtype", "bfloat16", *SAMPLED),
    ],
    ids=["bfloat16 and compiled", "float16", "weights in bfloat16, with samples"],
)
def test_a_replay_is_exact_under_other_settings(
    recipe: Path, tiny_data: Path, tmp_path: Path, setting: tuple[str, ...]
) -> None:
    if "--train.compile" in setting and shutil.which("g++") is None:
        pytest.skip("no C++ compiler is installed")
    run = tmp_path / "run"
    train_here(recipe, run, tiny_data, *SHORT, *setting)
    assert milepost(["verify", str(run), "--replay", "--ranks", "2"]) == 0
    certificate = certificate_of(run, steps="9-12", ranks=2)
    assert certificate["verdict"] == "equal"
    has_masters = "train_state/masters.safetensors" in counts(certificate)
    assert has_masters == ("--checkpoint.weights_dtype" in setting)


@pytest.mark.long
def test_a_run_may_train_while_it_is_verified(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    endless = ("--train.total_steps", "100000", "--checkpoint.every_steps", "20", "--ranks", "1")
    process = start(recipe, run, tiny_data, *endless)
    wait_for_step(run, 120)
    for _ in range(5):
        assert milepost(["verify", str(run)]) == 0
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert milepost(["verify", str(run), "--replay"]) == 0
    assert events(run, "replayed") == []
