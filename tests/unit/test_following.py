"""A history that grows is followed line by line, also from the middle of one."""

from __future__ import annotations

from pathlib import Path

from milepost.runs.events import EventWriter
from milepost.runs.following import NewEvents


def test_a_history_is_followed_line_by_line(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    new = NewEvents(log)
    assert new.read() == []
    EventWriter(log, segment=1).append("step", step=1)
    whole = log.read_bytes()
    with log.open("ab") as file:
        file.write(b'not json\n{"kind":"st')
    assert [(end, e["step"]) for end, e in new.read()] == [(len(whole), 1)]
    with log.open("ab") as file:
        file.write(b'ep","step":2}\n')
    assert [(end, e["step"]) for end, e in new.read()] == [(log.stat().st_size, 2)]
    assert new.read() == []
    assert [e["step"] for _, e in NewEvents(log, start_byte=len(whole)).read()] == [2]


def test_what_was_begun_before_the_follower_came_is_not_an_event(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    log.write_text('{"kind": "step", "step": 1}\n{"kind": "st')
    new = NewEvents(log, start_byte=log.stat().st_size)
    with log.open("a") as file:
        file.write('\n{"kind": "step", "step": 2}\n[1]\nnot json\n{"kind": "step",')
    assert [event["step"] for _, event in new.read()] == [2]
    assert new.read() == []
