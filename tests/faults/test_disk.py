"""Rows 11, 12, 13 and 33: disks that are full, read-only or failing, limits that are too low."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from milepost.checkpoint.store import verify_checkpoint
from milepost.core.errors import DataError, StorageError
from milepost.runs.layout import RunLayout, checkpoint_folders
from tests.training import Course, environment, events, logged_steps, wait_for_step

ONE_RANK = ("--ranks", "1")
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


def run_with(
    before: Sequence[str], words: Sequence[str], **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command line behind another program, with these variables in its environment."""
    return subprocess.run(
        [*before, *words],
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=200,
    )


def check_refusal(done: subprocess.CompletedProcess[str], *, code: int, message: str) -> None:
    """One error and one hint, no traceback, the code of the contract."""
    assert done.returncode == code, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], done.stderr
    assert done.stderr.count("\nhint: ") == 1
    assert "Traceback" not in done.stderr


def check_checkpoints(run: Path) -> None:
    """Every checkpoint of the run is whole, and nothing half-written lies beside them."""
    layout = RunLayout(run)
    for step, folder in checkpoint_folders(layout):
        verify_checkpoint(folder, run_id=None, step=step)
    if layout.checkpoints.is_dir():
        assert [p.name for p in layout.checkpoints.iterdir() if p.name.startswith(".")] == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted file system of 12 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all the room."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(b"x" * (1 << 16))
    return filler


def test_a_full_disk_is_refused_at_the_start_and_the_run_goes_on_exactly_once_there_is_room(
    short: Course, small_disk: Path
) -> None:
    run = small_disk / "run"
    short.train_here(run, "--train.stop_at_step", "10")
    filler = fill(small_disk)
    before = (run / "events.jsonl").read_bytes()
    with pytest.raises(StorageError, match=r"a checkpoint needs \d+ MiB, 0 MiB are free"):
        short.train_here(run)
    check_checkpoints(run)
    assert len(events(run, "step")) == before.count(b'"kind":"step"')
    filler.unlink()
    short.finish(run)


def test_a_disk_that_fills_while_training_ends_with_7_and_loses_nothing(
    course: Course, small_disk: Path
) -> None:
    run = small_disk / "run"
    process = course.start(run, *ONE_RANK)
    wait_for_step(run, 12)
    filler = fill(small_disk)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 7, talk
    assert talk.count("\nerror: ") == 1 and "Traceback" not in talk
    assert "free some space and run the same command again" in talk
    check_checkpoints(run)
    assert max(step for step, _ in checkpoint_folders(RunLayout(run))) >= 10
    filler.unlink()
    course.finish(run)


FAILING_CALLS = [("fsync", "ENOSPC"), ("fsync", "EIO"), ("write", "ENOSPC"), ("write", "EIO")]


@needs_strace
@pytest.mark.parametrize(
    ("call", "error", "when"),
    [("fsync", "EIO", 9)]
    + [
        pytest.param(call, error, when, marks=pytest.mark.long)
        for call, error in FAILING_CALLS
        for when in ({"fsync": (1, 4, 8, 13, 17), "write": (1, 3, 5, 6, 8)}[call])
    ]
    + [
        pytest.param(call, "ENOSPC", when, marks=pytest.mark.long)
        for call in ("rename", "mkdir")
        for when in (1, 3)
    ],
)
def test_a_call_of_a_save_that_fails_is_no_silent_success(
    call: str, error: str, when: int, short: Course, tmp_path: Path
) -> None:
    """From the call of that number on every one fails, as on a disk that is full or broken. Of the
    writes, which the threads count each for itself, one: the messages are writes too.
    """
    run = tmp_path / "run"
    inject = f"inject={call}:error={error}:when={when}" + ("" if call == "write" else "+")
    strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", inject]
    words = short.command(run, *ONE_RANK, "--train.stop_at_step", "10")
    done = run_with(strace, words)
    assert done.returncode == 7, done.stderr
    if call != "write":
        assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    check_checkpoints(run)
    short.finish(run)


@needs_strace
@pytest.mark.parametrize("when", [5, *(pytest.param(k, marks=pytest.mark.long) for k in (3, 4, 7))])
def test_a_write_that_falls_short_without_an_error_is_seen(
    when: int, short: Course, tmp_path: Path
) -> None:
    """The system says that one byte was written, and wrote none."""
    run = tmp_path / "run"
    inject = f"inject=write:retval=1:when={when}"
    strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=write", "-e", inject]
    done = run_with(strace, short.command(run, *ONE_RANK, "--train.stop_at_step", "10"))
    assert done.returncode == 7, done.stderr
    check_checkpoints(run)
    short.finish(run)


@needs_strace
def test_a_shard_that_cannot_be_read_is_named_and_nothing_else_is_lost(
    short: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shard = next(short.data.glob("train-*.tokens"))
    strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", str(shard)]
    strace += ["-e", "trace=pread64", "-e", "inject=pread64:error=EIO:when=60+"]
    done = run_with(strace, short.command(run, *ONE_RANK))
    check_refusal(done, code=3, message=f"{shard} cannot be read (Input/output error)")
    assert 1 < max(logged_steps(run)) < short.last_step
    check_checkpoints(run)
    short.finish(run)


@pytest.fixture
def frozen(tmp_path: Path, tiny_data: Path) -> Iterator[Path]:
    """A read-only mount with the data in `data` and an unfinished run in `run`."""
    source, place = tmp_path / "source", tmp_path / "frozen"
    shutil.copytree(tiny_data, source / "data")
    (source / "run").mkdir()
    place.mkdir()
    mount = ["mount", "--bind", str(source), str(place)]
    again = ["mount", "-o", "remount,ro,bind", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a read-only mount needs root")
    subprocess.run(again, check=True)
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_read_only_run_folder_is_refused_before_anything_is_trained(
    short: Course, frozen: Path
) -> None:
    for run in (frozen / "run", frozen / "new"):
        with pytest.raises(StorageError, match="read-only file system") as caught:
            short.train_here(run)
        assert caught.value.hint == "choose a folder that can be written"


def test_read_only_data_is_as_good_as_any(short: Course, frozen: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    short.train_here(run, "--data.path", str(frozen / "data"))
    short.check(run)


WITHOUT_POWERS = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"]
"""Root without its powers, whom permissions stop; Python may lie where only root may read."""


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A folder that nobody may write in."""
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o555)
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("permissions stop root only with setpriv")
    yield folder
    folder.chmod(0o755)


def unprivileged() -> list[str]:
    return WITHOUT_POWERS if os.geteuid() == 0 else []


def test_a_home_and_a_temporary_folder_that_cannot_be_written_do_no_harm(
    shipped: Course, closed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = shipped.command(run, *ONE_RANK, "--train.stop_at_step", "2")
    done = run_with(unprivileged(), words, HOME=str(closed), TMPDIR=str(closed))
    assert done.returncode == 0, done.stderr
    expected = logged_steps(shipped.undisturbed)
    assert logged_steps(run) == {step: expected[step] for step in (1, 2)}


def test_a_folder_for_compiled_code_that_cannot_be_written_is_named(
    shipped: Course, closed: Path, tmp_path: Path
) -> None:
    words = shipped.command(tmp_path / "run", *ONE_RANK)
    for place in (closed, closed / "new"):
        done = run_with(unprivileged(), words, TORCHINDUCTOR_CACHE_DIR=str(place))
        check_refusal(done, code=7, message="compiled code cannot be kept")
        assert str(closed) in done.stderr and "TORCHINDUCTOR_CACHE_DIR" in done.stderr


@pytest.mark.parametrize("name", [".", "manifest.json", "tokenizer"])
def test_data_that_this_user_may_not_read_is_said(name: str, short: Course, tmp_path: Path) -> None:
    data = Path(shutil.copytree(short.data, tmp_path / "data"))
    (data / name).chmod(0)
    words = short.command(tmp_path / "run", *ONE_RANK, "--data.path", str(data))
    done = run_with(unprivileged(), words)
    assert done.returncode in (DataError.exit_code, StorageError.exit_code), done.stderr
    check_refusal(done, code=done.returncode, message=str(data))
    assert "permission denied" in done.stderr.lower()


LIMITS = {
    "memory": ("ulimit -v 400000", 1, "out of memory"),
    "files of one block": ("ulimit -f 1", 7, "manifest.json: file too large"),
    "files of 100 blocks": ("ulimit -f 100", 7, "step-00000005: file too large"),
}


@pytest.mark.parametrize(("limit", "code", "message"), LIMITS.values(), ids=LIMITS)
def test_a_limit_that_is_too_low_is_said_in_one_line(
    limit: str, code: int, message: str, short: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shell = ["bash", "-c", f'{limit}; exec "$@"', "bash"]
    done = run_with(shell, short.command(run, *ONE_RANK))
    check_refusal(done, code=code, message=message)
    check_checkpoints(run)


def test_64_open_files_are_enough(short: Course, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shell = ["bash", "-c", 'ulimit -n 64; exec "$@"', "bash"]
    done = run_with(shell, short.command(run, "--ranks", "2"))
    assert done.returncode == 0, done.stderr
    short.check(run)
