"""Every block of every unit to a piece, over worker processes, going on where a kill left off."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost.core.console import ProgressBar, progress
from milepost.core.environment import num_available_cores
from milepost.core.errors import MilepostError
from milepost.core.files import read_json, write_json
from milepost.core.units import format_bytes
from milepost.data.blocks import BLOCK_BYTES, Block, Unit, read_blocks
from milepost.data.hub import Fetcher
from milepost.data.tokenize import Piece, Settings, read_piece, tokenize_block

BLOCKS_AHEAD = 2
"""Blocks that wait for each worker."""

MAX_WAITING_BYTES = 512 << 20


@dataclass(frozen=True)
class PieceFile:
    """A piece that is done, with its place."""

    folder: Path
    piece: Piece


def make_pieces(
    units: list[Unit],
    *,
    work: Path,
    settings: Settings,
    fetcher: Fetcher,
    names: dict[int, str],
    workers: int | None,
) -> list[PieceFile]:
    """Tokenizes all units; returns their pieces in the order of the sources.

    Raises:
        DataError: the first document that cannot be used, when bad ones are not skipped.
        StorageError: the work folder cannot be written.
        MilepostError: a worker was killed.
    """
    total_bytes = sum(unit.size_bytes for unit in units)
    num_workers = workers or min(num_available_cores(), 1 + total_bytes // BLOCK_BYTES)
    pieces: list[PieceFile] = []
    done_bytes = 0
    with progress("tokenizing", total=total_bytes) as bar, _executor(num_workers) as executor:
        for number, unit in enumerate(units):
            folder = work / "pieces" / f"{number:06d}"
            made = _finished_unit(folder)
            if made is None:
                tokenize = functools.partial(
                    _submit,
                    executor,
                    folder=folder,
                    split=unit.split,
                    settings=settings,
                    names={file: names[file] for file, _ in unit.files},
                )
                blocks = read_blocks(
                    unit, paths={file: fetcher.path(source) for file, source in unit.files}
                )
                room = BLOCKS_AHEAD * num_workers
                made = list(_in_order(blocks, tokenize, room, bar, done_bytes))
                write_json(folder / "unit.json", {"num_pieces": len(made)})
                for _, source in unit.files:
                    fetcher.forget(source)
            pieces += [PieceFile(folder, piece) for piece in made]
            done_bytes += unit.size_bytes
            bar.update(done_bytes, note=format_bytes(done_bytes))
    return pieces


def _finished_unit(folder: Path) -> list[Piece] | None:
    if not (folder / "unit.json").exists():
        return None
    num_pieces = read_json(folder / "unit.json", error=MilepostError)["num_pieces"]
    pieces = [read_piece(folder / f"{number:06d}") for number in range(num_pieces)]
    return [piece for piece in pieces if piece is not None]


def _submit(
    executor: Executor,
    number: int,
    block: Block,
    *,
    folder: Path,
    split: str,
    settings: Settings,
    names: dict[int, str],
) -> Future[Piece]:
    path = folder / f"{number:06d}"
    done = read_piece(path)
    if done is not None:
        future: Future[Piece] = Future()
        future.set_result(done)
        return future
    return executor.submit(
        tokenize_block, block, path=path, split=split, settings=settings, names=names
    )


def _in_order(
    blocks: Iterator[Block],
    tokenize: Callable[[int, Block], Future[Piece]],
    room: int,
    bar: ProgressBar,
    before_bytes: int,
) -> Iterator[Piece]:
    """The piece of each block, in order; at most `room` blocks and so many bytes wait."""
    waiting: deque[tuple[Block, Future[Piece]]] = deque()

    def take() -> Piece:
        block, future = waiting.popleft()
        try:
            piece = future.result()
        except BrokenProcessPool as error:
            raise MilepostError(
                "a worker process was killed",
                hint="often too little memory: run the same command again with fewer --workers",
            ) from error
        done_bytes = before_bytes + block.position_bytes
        bar.update(done_bytes, note=format_bytes(done_bytes))
        return piece

    for number, block in enumerate(blocks):
        waiting.append((block, tokenize(number, block)))
        while len(waiting) > room or sum(len(b.data) for b, _ in waiting) > MAX_WAITING_BYTES:
            yield take()
    while waiting:
        yield take()


def _executor(num_workers: int) -> Executor:
    if num_workers <= 1:
        return _HereExecutor()
    # Not forked: the parent may hold threads of torch, of a progress bar, or of the hub.
    context = multiprocessing.get_context("spawn")
    return _Pool(num_workers, mp_context=context, initializer=_begin_worker)


class _Pool(ProcessPoolExecutor):
    """A pool that drops what has not begun when the work fails."""

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.shutdown(wait=True, cancel_futures=error is not None)


class _HereExecutor(Executor):
    """Works at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except MilepostError as error:
            future.set_exception(error)
        return future


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent.join()
    os._exit(1)
