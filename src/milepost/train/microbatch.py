"""`train.microbatch_rows = "auto"`: the fewest rows that are as fast as any, measured.

What was measured is remembered in a small file for each device and kind of run. Nothing here
draws from a generator of the run or touches its numbers, but for the rows it chooses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from milepost.config.recipe import as_plain
from milepost.config.schema import Config
from milepost.core.console import say, warn
from milepost.core.errors import DataError, MilepostError, StorageError
from milepost.core.files import read_json, sha256_of_json, write_json
from milepost.core.units import format_duration
from milepost.train.exactness import machine_facts
from milepost.train.forward_timing import ForwardTiming, has_run_out_of_memory

PROBE_VERSION = 1
"""Raised where what is measured, or what it is measured for, becomes another; older files then
no longer count."""

PROBE_SECONDS = {"cpu": 20.0, "cuda": 60.0}
MAX_COMPILED = 4
"""Candidates that are tried where each is compiled: the largest."""

ROUNDS = 3
AS_FAST = 1.02
"""Seconds a row that count as equal to the least; fewer rows take less memory."""

PassSeconds = Callable[[int], float]
"""Seconds of one forward and backward pass of so many rows; may run out of memory."""

SecondsLeft = Callable[[], float]
"""Of the time for the whole measurement; below 0 when it is over."""


def choose_rows(
    config: Config, *, candidates: Sequence[int], device: torch.device, ranks: int, folder: Path
) -> int:
    """The rows of a forward pass for a run that is made now.

    Args:
        config: resolved but for `train.microbatch_rows`.
        candidates: ascending, those that fit the memory as planned.
        device: of the run.
        ranks: processes that share the lanes.
        folder: of what is remembered; made where it is not there.

    Raises:
        MilepostError: not even the smallest candidate fits the memory.
    """
    if len(candidates) == 1:
        say(f"microbatch: {rows_in_words(candidates[0])}, the only choice")
        return candidates[0]
    key = _key(config, candidates=candidates, device=device, ranks=ranks)
    file = folder / f"{sha256_of_json(key)[:24]}.json"
    remembered = recall(file, key=key, candidates=candidates)
    if remembered is not None:
        say(f"microbatch: {rows_in_words(remembered)}, as remembered in {file}")
        return remembered
    started = time.perf_counter()
    ends = started + PROBE_SECONDS[device.type]
    with ForwardTiming(config, device=device, ranks=ranks) as timing:
        row_seconds = measure(
            candidates,
            num_tried=len(candidates) if device.type == "cpu" else MAX_COMPILED,
            pass_seconds=timing.pass_seconds,
            seconds_left=lambda: ends - time.perf_counter(),
        )
    rows = fewest_as_fast(row_seconds)
    seconds = format_duration(time.perf_counter() - started)
    is_kept = remember(file, key=key, rows=rows, row_seconds=row_seconds)
    kept = f", remembered in {file}" if is_kept else ""
    say(f"microbatch: {_in_words(rows, row_seconds)}; probed in {seconds}{kept}")
    return rows


def measure(
    candidates: Sequence[int],
    *,
    num_tried: int,
    pass_seconds: PassSeconds,
    seconds_left: SecondsLeft,
) -> dict[int, float]:
    """Seconds a row of some candidates, medians of interleaved rounds; one candidate at least.

    The largest ones are tried, upwards, as long as memory and time last; where memory does not
    suffice for any of these, the largest of the smaller ones that it suffices for.

    Args:
        candidates: ascending, each twice the one before.
        num_tried: how many of them.
        pass_seconds: of a forward and backward pass; it may take less, or more, to find out.
        seconds_left: of the time there is.

    Raises:
        MilepostError: memory does not suffice for any.
    """
    tried = candidates[-num_tried:]
    seconds = _warm_up(tried, pass_seconds=pass_seconds, seconds_left=seconds_left)
    for _ in range(ROUNDS - 1 if len(seconds) > 1 else 0):
        before = seconds_left()
        for rows in list(seconds):
            try:
                seconds[rows].append(pass_seconds(rows))
            except (RuntimeError, MemoryError) as error:  # others have taken it meanwhile
                _raise_others(error)
                seconds = {fewer: times for fewer, times in seconds.items() if fewer < rows}
                break
        left = seconds_left()
        if left < before - left:  # the next round would take as long
            break
    if not seconds:
        smaller = candidates[: -len(tried)]
        return _largest_that_fits(smaller, pass_seconds=pass_seconds)
    return {rows: _median(times) / rows for rows, times in seconds.items()}


def _warm_up(
    candidates: Sequence[int], *, pass_seconds: PassSeconds, seconds_left: SecondsLeft
) -> dict[int, list[float]]:
    """The second pass of each candidate that there is memory and time for; the first compiles."""
    seconds: dict[int, list[float]] = {}
    needed = of_round = 0.0
    for rows in candidates:
        if seconds and seconds_left() < needed:
            break
        begin = seconds_left()
        try:
            pass_seconds(rows)
            middle = seconds_left()
            seconds[rows] = [pass_seconds(rows)]
        except (RuntimeError, MemoryError) as error:
            _raise_others(error)
            break
        first, second = begin - middle, middle - seconds_left()
        of_round += second
        # Twice the rows take twice the time, but as long to compile; and one round after that.
        needed = first + 4 * second + of_round
    return seconds


def _largest_that_fits(candidates: Sequence[int], *, pass_seconds: PassSeconds) -> dict[int, float]:
    for rows in reversed(candidates):
        try:
            return {rows: pass_seconds(rows) / rows}
        except (RuntimeError, MemoryError) as error:
            _raise_others(error)
    raise _nothing_fits()


def _nothing_fits() -> MilepostError:
    return MilepostError(
        "out of memory with the smallest microbatch",
        hint='raise train.recompute to "block"; milepost plan says what fits',
    )


def _raise_others(error: Exception) -> None:
    """Raises what is no lack of memory."""
    if not has_run_out_of_memory(error):
        raise error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _median(values: Sequence[float]) -> float:
    """The lower one of an even number: what disturbs a measurement makes it longer."""
    return sorted(values)[(len(values) - 1) // 2]


def fewest_as_fast(row_seconds: Mapping[int, float]) -> int:
    """The fewest rows within 2 % of the fastest."""
    limit = AS_FAST * min(row_seconds.values())
    return min(rows for rows, seconds in row_seconds.items() if seconds <= limit)


def rows_in_words(rows: int) -> str:
    """Such as "1 row"."""
    return "1 row" if rows == 1 else f"{rows} rows"


def _in_words(rows: int, row_seconds: Mapping[int, float]) -> str:
    others = [other for other in row_seconds if other != rows]
    if not others:
        return rows_in_words(rows)
    # The next lower one shows what was gained, else the next higher one.
    lower = [other for other in others if other < rows]
    other = max(lower) if lower else min(others)
    ratio = row_seconds[other] / row_seconds[rows]
    return f"{rows_in_words(rows)}, {ratio:.2f}x the speed of {other}"


def recall(file: Path, *, key: Mapping[str, Any], candidates: Sequence[int]) -> int | None:
    """The rows that were measured for this key; None where there is nothing that can be used."""
    if not file.exists():
        return None
    try:
        found = read_json(file, error=DataError)
    except MilepostError as error:
        warn(f"{error}; the microbatch is measured again")
        return None
    rows = found.get("microbatch_rows") if isinstance(found, dict) else None
    is_whole = rows in candidates and found.get("key") == key
    if not is_whole:
        warn(f"{file} is damaged; the microbatch is measured again")
    return rows if is_whole else None


def remember(
    file: Path, *, key: Mapping[str, Any], rows: int, row_seconds: Mapping[int, float]
) -> bool:
    """Writes what was measured, atomically; whether the disk took it."""
    found = {"key": key, "microbatch_rows": rows, "row_seconds": dict(row_seconds)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, found)
    except (OSError, StorageError) as error:
        warn(f"the measured microbatch is not remembered: {error}")
        return False
    return True


def _key(
    config: Config, *, candidates: Sequence[int], device: torch.device, ranks: int
) -> dict[str, Any]:
    """What the choice depends on."""
    facts, plain = machine_facts(device=device), as_plain(config)
    of_others = ("global_batch_tokens", "microbatch_rows", "total_steps", "stop_at_step", "lanes")
    return {
        "version": PROBE_VERSION,
        **{name: facts[name] for name in ("device", "torch", "cuda")},
        "threads": torch.get_num_threads(),
        "ranks": ranks,
        "lanes_per_rank": config.train.lanes // ranks,
        "candidates": list(candidates),
        "sequence_length": config.data.sequence_length,
        "document_attention": config.data.document_attention or config.is_finetuning,
        "optimizer": config.optimizer.name,
        "model": plain["model"],
        "lora": plain["lora"],
        "train": {name: v for name, v in plain["train"].items() if name not in of_others},
    }
