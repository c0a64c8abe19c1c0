"""Damage to files, manifests and histories, for tests of what finds it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from milepost.core.files import sha256_of_file, write_json


def flip(path: Path) -> None:
    """Changes one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    """Leaves all but the last byte."""
    os.truncate(path, path.stat().st_size - 1)


def cut(path: Path) -> None:
    """Leaves the first half."""
    os.truncate(path, path.stat().st_size // 2)


def replace_by_pipe(path: Path) -> None:
    """Whoever opens it for reading waits for ever."""
    path.unlink()
    os.mkfifo(path)


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._marker,)


def edit_manifest(folder: Path, **changes: Any) -> None:
    """Gives fields of a folder's manifest other values."""
    path = folder / "manifest.json"
    write_json(path, json.loads(path.read_bytes()) | changes)


def approve(folder: Path, **changes: Any) -> None:
    """Makes a manifest vouch for what lies beside it now, as one who wants to harm would."""
    files = {}
    for name in json.loads((folder / "manifest.json").read_bytes())["files"]:
        file = folder / name
        files[name] = {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)}
    edit_manifest(folder, files=files, **changes)


def edit_history(run: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Each event as `change` gives it back; None takes it out."""
    path = run / "events.jsonl"
    changed = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(event) + "\n" for event in changed if event is not None))


def without(run: Path, kind: str, **fields: Any) -> None:
    """Takes every such event out of the history."""
    wanted = {"kind": kind, **fields}
    edit_history(run, lambda e: None if all(e.get(k) == v for k, v in wanted.items()) else e)


def tear(run: Path, number: int) -> None:
    """Leaves half of one line of the history, counted from 1."""
    path = run / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[number - 1] = lines[number - 1][:20] + "\n"
    path.write_text("".join(lines))


def insert_torn(run: Path, *, before: int) -> None:
    """Half a line in front of another, counted from 1, as the next writer ends it."""
    path = run / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines.insert(before - 1, '{"v": 1, "kind": "st\n')
    path.write_text("".join(lines))


def number_of(run: Path, kind: str, **fields: Any) -> int:
    """The line of the first such event, counted from 1."""
    wanted = {"kind": kind, **fields}
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return next(n for n, e in enumerate(events, 1) if wanted.items() <= e.items())
