"""The launcher and what stands around it: stops, exit codes, devices, words, versions."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import milepost
from milepost.cli.main import run
from milepost.core.environment import code_version
from milepost.core.errors import MilepostError, StorageError, UsageError
from milepost.distributed import launch as launch_module
from milepost.distributed.devices import count_gpus
from milepost.distributed.launch import (
    KEEP_FREED_MEMORY,
    Phrases,
    _exit_code,
    _shared_environment,
    _wait_for_all,
    launch,
)
from milepost.distributed.meeting_place import PREFIX, meeting_place
from milepost.distributed.place import Place
from milepost.distributed.stop_requests import STOP_SIGNALS, StopRequests, held_back_stops
from milepost.experiments.segment_process import SegmentFailed, run_segment


@pytest.mark.parametrize(
    ("codes", "expected", "said"),
    [
        ({0: 0, 1: 0}, 0, ""),
        ({1: 75, 0: 75}, 75, ""),
        ({1: 1, 0: -9}, 1, "rank 0 was ended by SIGKILL"),
        ({0: 1, 1: -11}, 1, "rank 1 was ended by SIGSEGV"),
        ({0: 1, 1: -40}, 1, "rank 1 was ended by signal 40"),
        ({1: 1, 0: 3}, 3, ""),
        ({1: 75, 0: 7}, 7, ""),  # the main rank could not save what the other believes saved
        ({1: 75, 0: -9}, 1, "rank 0 was ended by SIGKILL"),
        ({1: 75, 0: 1}, 1, ""),
        ({0: 75, 1: 1}, 75, ""),
    ],
)
def test_the_exit_code_is_that_of_the_rank_that_knows_why(
    codes: dict[int, int], expected: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _exit_code(codes) == expected
    talk = capsys.readouterr().err
    assert said in talk if said else talk == ""


@pytest.mark.parametrize(("is_saving", "code"), [(True, 0), (False, 1)])
def test_a_save_of_the_main_rank_is_waited_for_when_another_rank_has_failed(
    is_saving: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_module, "GRACE_AFTER_REASON_SECONDS", 0.2)
    mark = tmp_path / "saving"
    words = f"import pathlib, time; time.sleep(1.5); pathlib.Path({str(mark)!r}).unlink()"
    words = words if is_saving else "import time; time.sleep(60)"
    main = subprocess.Popen([sys.executable, "-c", words])
    other = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    if is_saving:
        mark.touch()
    with StopRequests() as stops:
        codes = _wait_for_all([main, other], stops=stops, phrases=Phrases(), marks=tmp_path)
    assert codes == {1: 3, 0: code}


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_a_stop_before_there_are_ranks_ends_with_75_and_starts_none(
    signum: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch_module.subprocess, "Popen", None)
    before = {s: signal.getsignal(s) for s in STOP_SIGNALS}
    with StopRequests() as stops:
        os.kill(os.getpid(), signum)
        assert launch(["doctor"], ranks=2, on_gpus=False, stops=stops) == 75
    assert {s: signal.getsignal(s) for s in STOP_SIGNALS} == before
    assert "stopped on request" in capsys.readouterr().err


def test_a_second_ctrl_c_before_there_are_ranks_leaves_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequests():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_nohup_is_respected() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests() as stops:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stops.is_requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


RANK = """
import signal, subprocess, sys
sys.stdin.read()
from milepost.train.stop import StopSignal
stop = StopSignal()
signal.raise_signal(signal.SIGINT)
started = subprocess.run(["grep", "SigBlk", "/proc/self/status"], capture_output=True)
print(stop.is_requested(), int(started.stdout.split()[1], 16))
"""
HELD_BACK = sum(1 << (signum - 1) for signum in STOP_SIGNALS)


@pytest.mark.parametrize(
    ("sent", "is_requested"),
    [
        ([], False),
        ([signal.SIGINT] * 2, False),
        ([signal.SIGTERM], True),
        ([signal.SIGHUP], True),
        ([signal.SIGUSR1] * 2, True),
    ],
)
def test_a_rank_loses_no_stop_and_what_it_starts_survives_one(
    sent: list[int], is_requested: bool
) -> None:
    with held_back_stops():
        rank = subprocess.Popen(
            [sys.executable, "-c", RANK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    for signum in sent:
        rank.send_signal(signum)
    answer, _ = rank.communicate("", timeout=30)
    assert answer.split() == [str(is_requested), str(HELD_BACK)]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOP_SIGNALS)


def test_a_rank_of_a_launcher_that_ignores_hangups_ignores_them_too() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with held_back_stops():
            rank = subprocess.Popen(
                [sys.executable, "-c", RANK],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        rank.send_signal(signal.SIGHUP)
        answer, _ = rank.communicate("", timeout=30)
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert answer.split()[0] == "False"


def test_a_process_of_its_own_answers_ctrl_c_itself() -> None:
    alone = subprocess.run(
        [sys.executable, "-c", RANK], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert alone.stdout.split() == ["True", "0"]


def test_folders_of_dead_launchers_go_and_those_of_living_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead, foreign = tmp_path / f"{PREFIX}dead", tmp_path / "milepost-notes"
    for folder in (dead, foreign):
        folder.mkdir()
        (folder / "rendezvous").touch()
    with meeting_place() as living:
        assert sorted(tmp_path.iterdir()) == sorted([living, foreign])
        with meeting_place() as other:
            assert sorted(tmp_path.iterdir()) == sorted([living, other, foreign])
    assert list(tmp_path.iterdir()) == [foreign]


def test_no_room_for_temporary_files_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    with pytest.raises(StorageError, match=f"cannot write {tmp_path}/gone"), meeting_place():
        pass


@pytest.mark.parametrize(
    ("message", "is_loss"),
    [
        ("[pair.cc:547] Connection closed by peer [127.0.0.1]:2301", True),
        ("Read error [127.0.0.1]:2301: Connection reset by peer", True),
        ("gloo: tensors must have the same dtype", False),
        ("NCCL error: unhandled cuda error, out of memory", False),
        ("ProcessGroupGloo: invalid tensor size at index 0", False),
    ],
)
def test_only_a_closed_connection_is_the_loss_of_a_peer(message: str, is_loss: bool) -> None:
    from milepost.distributed.world import _is_loss_of_a_peer

    assert _is_loss_of_a_peer(RuntimeError(message)) is is_loss


def test_gpus_that_torch_cannot_use_are_no_reason_to_train_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="cannot use the 2 GPUs") as error:
        count_gpus()
    assert "driver" in str(error.value.hint)
    from milepost.distributed.world import join_world

    place = Place(rank=0, size=1, local_rank=0, started_by="torchrun")
    with pytest.raises(UsageError, match="cannot use"):
        with join_world(place, device_type="cpu", timeout_seconds=600):
            pass


def test_more_processes_than_gpus_are_refused_with_both_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from milepost.distributed.world import join_world

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    place = Place(rank=3, size=4, local_rank=3, started_by="torchrun")
    with pytest.raises(UsageError, match="rank 3 needs GPU 3, this machine has 2"):
        with join_world(place, device_type="cuda", timeout_seconds=600):
            pass


@pytest.mark.parametrize(
    ("device_type", "error", "is_ended"),
    [
        ("cuda", None, True),
        ("cuda", StorageError("full"), False),  # the others wait for this one, not for its end
        ("cuda", RuntimeError("Connection closed by peer"), False),
        ("cpu", StorageError("full"), True),  # so that the others notice at once
    ],
)
def test_a_rank_on_a_gpu_that_fails_waits_for_no_other_when_it_leaves(
    device_type: str, error: Exception | None, is_ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from milepost.distributed import world

    ended: list[bool] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(world, "count_gpus", lambda: 0)
    monkeypatch.setattr(world, "_meet", lambda place: None)
    monkeypatch.setattr(world.dist, "init_process_group", lambda *words, **more: None)
    monkeypatch.setattr(world.dist, "new_group", lambda *words, **more: None)
    monkeypatch.setattr(world.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(world.dist, "destroy_process_group", lambda: ended.append(True))
    place = Place(rank=1, size=2, local_rank=1, started_by="milepost")
    with contextlib.suppress(MilepostError):
        with world.join_world(place, device_type=device_type, timeout_seconds=600):
            if error is not None:
                raise error
    assert bool(ended) is is_ended


def test_the_ranks_get_the_words_that_run_was_given(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[str]] = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(launch_module, "launch", lambda words, **_: given.append(list(words)) or 75)
    words = ["train", "demo", "--debug", "--run", str(tmp_path)]
    words += ["--data.path", str(tiny_data), "--model.vocab_size", "512"]
    assert run(words) == 75
    assert given == [words]


@pytest.mark.parametrize(
    ("slip", "hint"),
    [
        ("--rnaks", "did you mean --ranks?"),
        ("--overide", "did you mean --override?"),
        ("--lane", "did you mean --train.lanes?"),
        ("--every", "overrides look like --section.key VALUE"),
    ],
)
def test_a_slip_of_the_pen_in_an_option_brings_the_nearest(
    slip: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", "demo", "--run", "nowhere", slip, "2"]) == 2
    talk = capsys.readouterr().err
    assert f"unexpected argument '{slip}'" in talk
    assert f"hint: {hint}" in talk


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


@pytest.mark.parametrize("place", ["src/milepost", ".venv/lib/site-packages/milepost"])
def test_a_commit_is_named_only_of_milepost_s_own_checkout(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / place / "__init__.py"
    code.parent.mkdir(parents=True)
    code.write_text("")
    (tmp_path / "pyproject.toml").write_text("")
    git(tmp_path, "init")
    git(tmp_path, "add", "-f", ".")
    git(tmp_path, "commit", "-m", "all")
    monkeypatch.setattr(milepost, "__file__", str(code))
    clean = code_version()
    code.write_text("changed")
    if place == "src/milepost":
        assert clean.startswith(f"{milepost.__version__}+")
        assert code_version() == f"{clean}-dirty"
    else:
        assert clean == code_version() == milepost.__version__


def test_a_failed_segment_carries_the_trainings_exit_code(tmp_path: Path) -> None:
    words = ["train", "no-such-recipe", "--run", str(tmp_path)]
    with pytest.raises(SegmentFailed, match="there is no recipe") as error:
        run_segment(words, run=tmp_path, on_step=lambda event: None, kill_when=lambda event: False)
    assert error.value.exit_code == 2


def test_a_segment_gets_the_environment_it_is_given(tmp_path: Path) -> None:
    words = ["train", "demo", "--run", str(tmp_path)]
    with pytest.raises(SegmentFailed, match="must be numbers"):
        run_segment(
            words,
            run=tmp_path,
            on_step=lambda event: None,
            kill_when=lambda event: False,
            environment={"RANK": "first", "WORLD_SIZE": "1"},
        )


def test_ranks_on_a_cpu_keep_freed_memory_unless_a_person_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    of_ranks = _shared_environment(tmp_path, pipe=3, on_gpus=False)
    assert of_ranks["GLIBC_TUNABLES"] == KEEP_FREED_MEMORY
    assert of_ranks["OMP_NUM_THREADS"] == "1"
    assert "GLIBC_TUNABLES" not in _shared_environment(tmp_path, pipe=3, on_gpus=True)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    own = _shared_environment(tmp_path, pipe=3, on_gpus=False)
    assert own["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=2"
