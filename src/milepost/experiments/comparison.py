"""Compares what was trained twice, bit by bit: logged steps, tensors, numbers of a train state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from milepost.checkpoint.store import MANIFEST, MODEL_FILE, STATE_FOLDER
from milepost.core.errors import CheckpointError
from milepost.core.files import read_json, storage_errors
from milepost.runs.events import Event

TENSOR_FILES = {
    MODEL_FILE: "weight tensors",
    f"{STATE_FOLDER}/optimizer.safetensors": "optimizer tensors",
    f"{STATE_FOLDER}/masters.safetensors": "master tensors",
}
"""Each file and what it counts."""

NUMBERS_FILE = f"{STATE_FOLDER}/state.json"
_TIMES = ("training_seconds",)
"""Numbers of a train state that say how long it took, not what was trained."""


@dataclass(frozen=True)
class Difference:
    """The first place where two things differ.

    Attributes:
        place: "step 17, loss_nats", or a tensor's name.
        what: both values, or how many elements and by how much.
    """

    place: str
    what: str


@dataclass(frozen=True)
class Compared:
    """How far two things are equal.

    Attributes:
        name: "events.jsonl", or a file of the checkpoint.
        unit: what is counted: "steps", "weight tensors", "numbers" and the like.
        first_difference: None where all `count` are equal.
        sha256_then: of the run's file; None for the log.
        sha256_now: of the replay's file; None for the log.
    """

    name: str
    unit: str
    count: int
    equal: int
    first_difference: Difference | None
    sha256_then: str | None = None
    sha256_now: str | None = None

    @property
    def is_equal(self) -> bool:
        """Whether every bit is the same."""
        return self.equal == self.count


def compare_steps(
    then: Mapping[int, Event],
    now: Mapping[int, Event],
    *,
    steps: Sequence[int],
    fields: Sequence[str],
) -> Compared:
    """Logged steps, field by field; a step that was not logged again differs."""
    first: Difference | None = None
    equal = 0
    for step in steps:
        difference = _step_difference(step, then[step], now.get(step), fields=fields)
        equal += difference is None
        first = first or difference
    return Compared("events.jsonl", "steps", len(steps), equal, first)


def _step_difference(
    step: int, then: Event, now: Event | None, *, fields: Sequence[str]
) -> Difference | None:
    if now is None:
        return Difference(f"step {step}", "was not reached")
    for name in fields:
        if exact_text(then.get(name)) != exact_text(now.get(name)):
            was, is_now = exact_text(then.get(name)), exact_text(now.get(name))
            return Difference(f"step {step}, {name}", f"was {was} and is {is_now}")
    return None


def exact_text(value: Any) -> str:
    """A number with every bit of it (floats as hex, then as people read them); else as it is."""
    return f"{value.hex()} ({value!r})" if isinstance(value, float) else str(value)


def compare_checkpoints(then: Path, now: Path) -> Iterator[Compared]:
    """The weights of two checkpoint folders, and their train states where `then` has one.

    Raises:
        CheckpointError: a file is missing or cannot be read.
        StorageError: the disk does not give a file.
    """
    yield compare_tensors(then, now, name=MODEL_FILE)
    if not (then / STATE_FOLDER).is_dir():
        return
    for name in list(TENSOR_FILES)[1:]:
        if (then / name).exists() or (now / name).exists():
            yield compare_tensors(then, now, name=name)
    yield compare_numbers(then, now)


def compare_tensors(then: Path, now: Path, *, name: str) -> Compared:
    """Every tensor of a safetensors file: name, dtype, shape and bits.

    Files whose manifests have one hash are equal, and their tensors are not read.

    Args:
        then: a checkpoint that was verified.
        now: another one.
        name: of the file, in both.

    Raises:
        CheckpointError: a file is missing or cannot be read.
        StorageError: the disk does not give a file.
    """
    paths = then / name, now / name
    hashes = tuple(_sha256_in_manifest(path) for path in paths)
    compare = _tensor_difference if hashes[0] != hashes[1] else _no_difference
    try:
        with storage_errors(paths[0], verb="read"):
            with safe_open(paths[0], framework="pt") as one, safe_open(paths[1], "pt") as other:
                differences = {
                    key: compare(key, one, other) for key in sorted({*one.keys(), *other.keys()})
                }
    except SafetensorError as error:
        raise CheckpointError(f"{paths[0]} or {paths[1]} cannot be read: {error}") from error
    found = [difference for difference in differences.values() if difference is not None]
    first = found[0] if found else None
    count = len(differences)
    return Compared(name, TENSOR_FILES[name], count, count - len(found), first, *hashes)


def _sha256_in_manifest(path: Path) -> str:
    head = read_json(path.with_name(MANIFEST), error=CheckpointError)
    try:
        return str(head["files"][path.name]["sha256"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is missing") from error


def _no_difference(key: str, one: Any, other: Any) -> None:
    """Of a tensor in two files that have the same bytes."""


def _tensor_difference(key: str, one: Any, other: Any) -> Difference | None:
    if key not in one.keys() or key not in other.keys():  # noqa: SIM118
        return Difference(key, f"is only in the {'run' if key in one.keys() else 'replay'}")  # noqa: SIM118
    then, now = one.get_tensor(key), other.get_tensor(key)
    if then.dtype != now.dtype or then.shape != now.shape:
        was, is_now = (f"{t.dtype} {list(t.shape)}".removeprefix("torch.") for t in (then, now))
        return Difference(key, f"was {was} and is {is_now}")
    if torch.equal(_bits(then), _bits(now)):
        return None
    width = then.element_size()
    differs = (_bits(then) != _bits(now)).view(-1, width).any(dim=1)
    largest = float((then.double() - now.double()).abs().max())
    return Difference(
        key, f"{int(differs.sum()):,} of {then.numel():,} elements differ, by {largest:.3g} at most"
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def weights_dtype_of(folder: Path) -> str:
    """The dtype of a checkpoint's model file, as `checkpoint.weights_dtype` calls it.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = folder / MODEL_FILE
    try:
        with safe_open(path, framework="pt") as file:
            first = next(iter(file.keys()))
            return str(file.get_tensor(first).dtype).removeprefix("torch.")
    except (SafetensorError, OSError, StopIteration) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def compare_numbers(then: Path, now: Path) -> Compared:
    """The numbers of two train states, but for the time they took.

    Raises:
        CheckpointError: a file is missing or cannot be read.
    """
    paths = then / NUMBERS_FILE, now / NUMBERS_FILE
    was, is_now = (_flat(read_json(path, error=CheckpointError)) for path in paths)
    names = sorted({*was, *is_now})
    differing = [n for n in names if exact_text(was.get(n)) != exact_text(is_now.get(n))]
    first = None
    if differing:
        name = differing[0]
        values = f"was {exact_text(was.get(name))} and is {exact_text(is_now.get(name))}"
        first = Difference(name, values)
    hashes = [_sha256_in_manifest(path) for path in paths]
    return Compared(
        NUMBERS_FILE, "numbers", len(names), len(names) - len(differing), first, *hashes
    )


def _flat(numbers: Any) -> dict[str, Any]:
    if not isinstance(numbers, dict) or not isinstance(numbers.get("progress"), dict):
        raise CheckpointError(f"{NUMBERS_FILE} is not the numbers of a train state")
    rest = {name: value for name, value in numbers.items() if name != "progress"}
    return {k: v for k, v in {**numbers["progress"], **rest}.items() if k not in _TIMES}
