"""Rows 1, 2, 3 and 24: killed at any time, inside a save, from one rank to two and back."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.training import Course, children_of, environment, events, kill_group, wait_for_step

EVERY_STEPS = 10
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


def test_a_run_goes_from_one_rank_to_two_and_back_with_a_kill_at_each_change(
    course: Course, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for ranks, until in (("1", 25), ("2", 58)):
        process = course.start(run, "--ranks", ranks)
        wait_for_step(run, until)
        kill_group(process)
    course.finish(run)
    assert [e["ranks"] for e in events(run, "segment_started")] == [1, 2, 1]
    assert len(events(run, "replayed")) == 2


def check_lost_work(run: Path) -> None:
    """Each segment goes on from the newest checkpoint that was recorded, or from a later one: at
    most the interval that was being trained is lost, its last step too, where the next save waits,
    and the one that was being saved.
    """
    saved = step = 0
    for event in events(run, "checkpoint_saved", "step", "segment_started"):
        if event["kind"] == "checkpoint_saved":
            saved = event["step"]
        elif event["kind"] == "step":
            step = event["step"]
        else:
            restored = event["restored_step"] or 0
            assert restored >= saved
            assert step - restored <= 2 * EVERY_STEPS


def kill_at_random(course: Course, run: Path, *, source: random.Random, num_kills: int) -> None:
    """Half of the kills come while it trains or saves, the others wherever it is by then."""
    for number in range(num_kills):
        process = course.start(run, "--ranks", str(source.choice([1, 2])))
        if number % 2 == 0:
            wait_for_step(run, 25 * (number // 2) + source.randint(1, 24))
            time.sleep(source.uniform(0.0, 0.05))
        else:
            time.sleep(source.uniform(0.5, 6.0))
        if process.poll() is None:
            kill_group(process)
        else:
            process.communicate()


def test_kills_at_random_moments_lose_no_bit_as_shipped(shipped: Course, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kill_at_random(shipped, run, source=random.Random(0), num_kills=2)
    shipped.finish(run)
    assert len(events(run, "segment_started")) >= 2, "no kill met the training"
    check_lost_work(run)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "seed"),
    [("plain", seed) for seed in range(1, 13)] + [("shipped", seed) for seed in range(13, 17)],
)
def test_kills_at_random_moments_lose_no_bit(
    kind: str, seed: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    course: Course = request.getfixturevalue(kind)
    run = tmp_path / "run"
    kill_at_random(course, run, source=random.Random(seed), num_kills=4)
    course.finish(run)
    assert len(events(run, "segment_started")) >= 2, "no kill met the training"
    check_lost_work(run)


def strace(
    course: Course, run: Path, *words: str, until: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """A segment on one rank with each system call in the tracer's hand."""
    return subprocess.run(
        ["strace", "-f", "-qq", *words, *course.command(run, "--ranks", "1", *until)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


@needs_strace
@pytest.mark.parametrize(
    ("kind", "call", "name"),
    [("shipped", "fsync", ""), ("plain", "rename", "step-00000010/train_state")],
    ids=["named and not recorded", "recorded and old train state not dropped"],
)
def test_a_kill_inside_a_save_goes_on_from_a_whole_checkpoint(
    kind: str, call: str, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    course: Course = request.getfixturevalue(kind)
    run = tmp_path / "run"
    place = str(run / "checkpoints" / name)
    process = course.start(run, "--ranks", "1")
    wait_for_step(run, 1)
    rank = str(children_of(process.pid)[0])
    kill = ["-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when=1"]
    # Tracing from the start on would make compiling three times as long.
    traced = subprocess.run(
        ["strace", "-f", "-qq", "-o", os.devnull, "-p", rank, "-P", place, *kill],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "not permitted" in traced.stderr:
        pytest.skip("strace may not attach to a process here")
    _, talk = process.communicate(timeout=30)
    assert "rank 0 was ended by SIGKILL" in talk
    assert process.returncode == 1
    course.finish(run)
    check_lost_work(run)


@needs_strace
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("call", "stride"), [("rename", 1), ("fsync", 4), ("write", 40), ("unlink", 1), ("unlinkat", 1)]
)
def test_a_kill_at_any_call_of_the_first_saves_loses_no_bit(
    plain: Course, tmp_path: Path, call: str, stride: int
) -> None:
    """Calls are counted in each thread; the last one is where a run first comes through."""
    num_kills = 0
    until = ("--train.stop_at_step", "30")  # three saves, the last of which drops a train state
    for when in range(1, 40 * stride, stride):
        run = tmp_path / str(when)
        kill = f"inject={call}:signal=SIGKILL:when={when}"
        stop = ("-e", f"trace={call}", "-e", kill)
        traced = strace(plain, run, "-o", "/dev/null", *stop, until=until)
        if traced.returncode == 0:
            break
        num_kills += 1
        plain.finish(run)
        check_lost_work(run)
    assert num_kills > 0


CALL = re.compile(r"(?P<name>fsync|rename|unlink|unlinkat|rmdir)\((?P<arguments>.*)")
PATHS = re.compile(r'<(/[^>]*)>|"([^"]*)"')


def traced_calls(log: Path) -> list[tuple[str, list[str]]]:
    """Name and paths of each call, in the order in which they began."""
    found = []
    for line in log.read_text().splitlines():
        if match := CALL.search(line):
            paths = [a or b for a, b in PATHS.findall(match["arguments"])]
            found.append((match["name"], paths))
    return found


@needs_strace
def test_what_a_save_writes_is_on_the_disk_before_it_is_named_and_before_old_state_goes(
    plain: Course, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "calls"
    calls = "trace=fsync,rename,unlink,unlinkat,rmdir"
    traced = strace(plain, run, "-y", "-o", str(log), "-e", calls)
    assert traced.returncode == 0, traced.stderr
    trace = traced_calls(log)
    for step in (30, 40):
        final = run / "checkpoints" / f"step-{step:08d}"
        named = next(k for k, (n, p) in enumerate(trace) if n == "rename" and p[-1] == str(final))
        temporary = Path(trace[named][1][0])
        before = [Path(p[0]) for n, p in trace[:named] if n == "fsync"]
        synced = [p.relative_to(temporary) for p in before if p.is_relative_to(temporary)]
        check_synced(synced, final=final)
        after = trace[named + 1 :]
        parent = after.index(("fsync", [str(final.parent)]))
        old = final.parent / f"step-{step - 2 * EVERY_STEPS:08d}" / "train_state"
        dropped = next(k for k, (n, p) in enumerate(after) if n == "rename" and p[0] == str(old))
        doomed = after[dropped][1][1]
        recorded = [k for k, (_, p) in enumerate(after) if p == [str(run / "events.jsonl")]]
        assert parent < dropped
        assert any(parent < k < dropped for k in recorded), "the drop is recorded for good first"
        assert [n for n, p in after[:dropped] if p[0].startswith(doomed)] == []


def check_synced(synced: list[Path], *, final: Path) -> None:
    """That each file is forced to the disk, and after it the folder that names it."""
    names = [path.relative_to(final) for path in final.rglob("*") if path.is_file()]
    assert len(names) >= 5
    for name in [*names, Path("train_state/optimizer.safetensors"), Path("train_state")]:
        assert synced.index(name) < len(synced) - 1 - synced[::-1].index(name.parent)
