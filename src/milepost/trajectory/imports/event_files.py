"""Scalars of TensorBoard event files, through TensorBoard's own reader.

The event files of one folder are one trajectory, as TensorBoard has it; they are read in order of
their names, which begin with the time they were begun, so that a resumed run's later values count.
"""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from milepost.core.errors import UsageError
from milepost.core.files import storage_errors
from milepost.trajectory.course import Course
from milepost.trajectory.imports.points import Points
from milepost.trajectory.imports.sniff import files_in, limit_size, refuse
from milepost.trajectory.sections.wording import plural

EXPECTED = "event files of TensorBoard (events.out.tfevents.*), or the one folder they lie in"

MAX_TRAJECTORIES_TOLD = 4

MAX_BYTES = 256 << 20
"""The reader works out checksums in Python, at some 5 MB a second."""

CHECKSUM_BYTES = 4
_LENGTH = struct.Struct("<Q")
"""A record: its length, a checksum of that, its bytes, a checksum of those."""


def read(path: Path, *, name: str | None, tokens_per_step: int | None) -> Course:
    """See `formats.import_course`."""
    folders = defaultdict(list)
    for file in files_in(path):
        if ".tfevents." in file.name:
            folders[file.parent].append(file)
    if not folders:
        raise refuse(path, expected=EXPECTED)
    by_folder = {folder: _read_files(files) for folder, files in folders.items()}
    with_scalars = {folder: found for folder, found in by_folder.items() if found[0]}
    if not with_scalars:
        raise UsageError(
            f"{path} has {plural(sum(map(len, folders.values())), 'event file')} without a scalar",
            hint=f"expected {EXPECTED}, with scalars",
        )
    if len(with_scalars) > 1:
        raise _several(path, list(with_scalars))
    folder, (points, num_torn) = next(iter(with_scalars.items()))
    files = folders[folder]
    verb = "is" if num_torn == 1 else "are"
    torn = f"{plural(num_torn, 'event file')} {verb} torn or damaged, and read up to there."
    return points.course(
        name or folder.resolve().name,
        source=f"{plural(len(files), 'TensorBoard event file')} in {folder.resolve().name}",
        notes=[torn] if num_torn else [],
        tokens_per_step=tokens_per_step,
    )


def _read_files(files: Sequence[Path]) -> tuple[Points, int]:
    """The scalars of one folder's files, and how many of the files could not be read to the end."""
    limit_size(files, max_bytes=MAX_BYTES, what="a folder of event files")
    points, plugins, num_torn = Points(), dict[str, str](), 0
    for file in files:
        num_events = 0
        for event in _events(file):
            num_events += 1
            step = max(0, event.step)
            for value in event.summary.value:
                # Only a tag's first value in a run says which plugin it is for.
                plugin = plugins.setdefault(value.tag, value.metadata.plugin_data.plugin_name)
                if value.HasField("simple_value"):
                    points.add(value.tag, step=step, value=value.simple_value)
                elif plugin == "scalars" and value.HasField("tensor"):
                    points.add(value.tag, step=step, value=_number(value.tensor))
        num_torn += num_events != _num_records(file)
    return points, num_torn


def _events(file: Path) -> Iterator[Any]:
    try:
        # Without the compatibility layers of its subclass, which take most of the time.
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    except ImportError as missing:
        raise UsageError(
            "reading TensorBoard files needs the package tensorboard",
            hint="pip install 'milepost[trackers]'",
        ) from missing
    with storage_errors(file, verb="read"):
        yield from LegacyEventFileLoader(str(file)).Load()


def _number(tensor: Any) -> float:
    from tensorboard.util.tensor_util import make_ndarray

    values = make_ndarray(tensor)
    is_one_number = values.size == 1 and values.dtype.kind in "fiu"
    return float(values.reshape(-1)[0]) if is_one_number else math.nan


def _num_records(file: Path) -> int | None:
    """Records that the file's own lengths tell of; None where the last is not whole.

    The reader stops at a record that is torn or damaged and does not say so.
    """
    num_records, place = 0, 0
    with storage_errors(file, verb="read"), file.open("rb") as content:
        size = file.stat().st_size
        while place < size:
            content.seek(place)
            head = content.read(_LENGTH.size)
            if len(head) < _LENGTH.size:
                return None
            place += _LENGTH.size + _LENGTH.unpack(head)[0] + 2 * CHECKSUM_BYTES
            num_records += 1
    return num_records if place == size else None


def _several(path: Path, folders: list[Path]) -> UsageError:
    shown = ", ".join(str(folder) for folder in folders[:MAX_TRAJECTORIES_TOLD])
    more = len(folders) - MAX_TRAJECTORIES_TOLD
    return UsageError(
        f"{path} holds {len(folders):,} trajectories: {shown}"
        + (f" and {more:,} more" if more > 0 else ""),
        hint="an import is one trajectory: give one of these folders",
    )
