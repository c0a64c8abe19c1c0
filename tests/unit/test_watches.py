"""What watches a run from its side: free space, and a step that takes too long."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from milepost.checkpoint.state import Progress
from milepost.core.errors import StorageError
from milepost.distributed import watchdog
from milepost.distributed.watchdog import Watchdog
from milepost.distributed.world import World
from milepost.runs.events import EventWriter, read_history
from milepost.runs.layout import RunLayout
from milepost.train import disk_watch
from milepost.train.disk_watch import LOOK_SECONDS, DiskWatch

NEEDED = 1000


class Disk:
    """Free bytes and a clock, both turned by hand."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free: int | None = 10 * NEEDED
        self.now = 0.0
        self.num_looks = 0
        self.is_saving = False
        layout = RunLayout(root)
        self.events = layout.events
        self.watch = DiskWatch(
            layout,
            needed_bytes=NEEDED,
            is_saving=lambda: self.is_saving,
            events=EventWriter(layout.events, segment=1),
            clock=lambda: self.now,
        )
        monkeypatch.setattr(disk_watch, "free_bytes", self.read)

    def read(self, path: Path) -> int:
        self.num_looks += 1
        if self.free is None:
            raise StorageError("cannot read")
        return self.free

    def after(self, seconds: float, *, free: int | None) -> None:
        self.now += seconds
        self.free = free
        self.watch.look(Progress(step=7))

    def warned(self) -> list[int]:
        return [event["free_bytes"] for event in read_history(self.events).of_kind("guard_warned")]


@pytest.mark.parametrize(("free", "is_low"), [(NEEDED - 1, True), (NEEDED, False)])
def test_too_little_space_for_the_next_checkpoint_is_told(
    free: int, is_low: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path, monkeypatch)
    disk.after(0, free=free)
    assert disk.warned() == ([free] if is_low else [])
    for event in read_history(disk.events).of_kind("guard_warned"):
        assert (event["guard"], event["step"], event["needed_bytes"]) == ("disk", 7, NEEDED)


def test_it_looks_once_a_minute_and_warns_once_until_there_was_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path, monkeypatch)
    for free in (1, 2, 5000, 3):
        disk.after(LOOK_SECONDS, free=free)
        disk.after(1, free=free)
    assert disk.num_looks == 4
    assert disk.warned() == [1, 3]


def test_what_a_save_under_way_takes_is_no_reason_to_warn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path, monkeypatch)
    disk.is_saving = True
    disk.after(LOOK_SECONDS, free=NEEDED // 2)
    assert disk.warned() == [], "retention has not freed what it may"
    disk.is_saving = False
    disk.after(1, free=NEEDED - 1)
    assert disk.warned() == [NEEDED - 1], "looked at as soon as the save is over"


def test_a_disk_that_cannot_be_asked_does_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path, monkeypatch)
    disk.after(0, free=None)
    assert disk.warned() == []


def test_a_step_that_takes_too_long_is_shown_once_and_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    marked = threading.Event()
    monkeypatch.setattr(watchdog, "say", lines.append)
    monkeypatch.setattr(World, "mark_stalled", lambda self: marked.set())
    world = World(rank=1, size=2, device=torch.device("cpu"), timeout_seconds=0.2)
    dog = Watchdog(world)
    with dog.watching():
        assert marked.wait(30)
    dog.close()
    assert lines[0].startswith("rank 1 has been in one step for 0.")
    assert "where it waits for another rank, torch ends it after 0.2 s" in lines[0]


def test_steps_in_time_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(watchdog, "say", lines.append)
    dog = Watchdog(World(rank=0, size=2, device=torch.device("cpu"), timeout_seconds=30))
    for _ in range(100):
        with dog.watching():
            pass
    dog.close()
    assert lines == []
