"""From sources to a folder of shards, in parallel, the same bytes every time, restartable.

OUT/.partial holds what is done while the work goes on: the tokenizer, one piece a block, one
record a finished unit and shard. The manifest is written last; a folder without one is not
whole. A kill loses at most the blocks in work.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost.core.console import say
from milepost.core.environment import code_version
from milepost.core.errors import DataError, UsageError
from milepost.core.files import (
    delete_folder,
    exclusive_lock,
    read_json,
    storage_errors,
    write_json,
)
from milepost.data.assemble import delete_shards
from milepost.data.preparation import TRAIN_PREFIX, WORK_FOLDER, Preparation, vocab_size_of
from milepost.data.shards import MANIFEST, SCHEMA_VERSION
from milepost.data.sources import SourceFile, find_files, place_of
from milepost.text.tokenizer import load_tokenizer

_DOOMED_FOLDER = ".deleted"


@dataclass(frozen=True)
class PrepareSummary:
    """What `prepare` made.

    Attributes:
        out: the folder.
        train, validation: counts and fingerprint of each split; None where there is none.
        dropped: documents dropped, by reason.
        seconds: how long it took.
        was_done: the folder held all this before.
        was_continued: a part was done by an earlier call.
    """

    out: Path
    train: dict[str, Any]
    validation: dict[str, Any] | None
    dropped: dict[str, int]
    seconds: float
    was_done: bool
    was_continued: bool


def prepare(
    sources: Sequence[str | Path],
    *,
    out: Path,
    tokenizer: str,
    text_field: str = "text",
    val_fraction: float | None = None,
    val_sources: Sequence[str | Path] = (),
    skip_bad: bool = False,
    workers: int | None = None,
) -> PrepareSummary:
    """Prepares training data.

    Args:
        sources: files, folders or hf:// paths of training text.
        out: the folder to make; one that was left half done by the same call is finished.
        tokenizer: "gpt2", a path, or "train:VOCAB_SIZE".
        text_field: key or column of the text.
        val_fraction: hold out this share of the documents, chosen by the hash of their text.
        val_sources: or hold out these files, folders or hf:// paths, also where they lie in
            one of the sources.
        skip_bad: drop documents that cannot be used, with a reason, instead of refusing.
        workers: processes; None: one a core, fewer for small sources.

    Raises:
        UsageError: options that do not go together, or `out` holds something else.
        DataError: a source is missing, empty or holds what is not a document.
        RunInUseError: another process prepares into `out`.
        StorageError: the disk is full or read-only; `out` is not whole.
    """
    started = time.monotonic()
    _check_options(val_fraction, val_sources, workers)
    train_files, val_files = _held_out(find_files(sources), find_files(val_sources))
    files = train_files + val_files
    wanted = _wanted(
        files,
        num_train=len(train_files),
        tokenizer=tokenizer,
        text_field=text_field,
        val_fraction=val_fraction,
        skip_bad=skip_bad,
    )
    _check_out(out)
    with exclusive_lock(out / ".lock", what=str(out)):
        manifest = _finished(out, wanted, files)
        was_done = manifest is not None
        was_continued = False
        if manifest is None:
            was_continued = _begin_or_go_on(out, wanted, files)
            job = Preparation(out=out, files=files, num_train=len(train_files), wanted=wanted)
            manifest = job.run(workers=workers)
        _delete_work(out)
        return _summary(
            out,
            manifest,
            seconds=time.monotonic() - started,
            was_done=was_done,
            was_continued=was_continued,
        )


def _check_options(
    val_fraction: float | None, val_sources: Sequence[str | Path], workers: int | None
) -> None:
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise UsageError(
            f"a validation fraction of {val_fraction} is out of range",
            hint="a number between 0 and 1, such as 0.001",
        )
    if val_fraction is not None and val_sources:
        raise UsageError(
            "both --val and --val-fraction are given",
            hint="name the validation sources, or let a fraction be chosen; not both",
        )
    if workers is not None and not 1 <= workers <= 1024:
        raise UsageError(f"{workers} workers are out of range", hint="1 to 1024")


def _held_out(
    files: list[SourceFile], val_files: list[SourceFile]
) -> tuple[list[SourceFile], list[SourceFile]]:
    """Training and validation files: what is in both is held out."""
    held_out = {place_of(file) for file in val_files}
    train_files = [file for file in files if place_of(file) not in held_out]
    if not train_files:
        raise DataError(
            "every source is held out for validation", hint="name training text besides"
        )
    return train_files, val_files


def _check_out(out: Path) -> None:
    ours = {WORK_FOLDER, _DOOMED_FOLDER, ".lock", MANIFEST}
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is not a folder", hint="choose a new folder with --out")
    names = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    if names and not names & ours:
        raise UsageError(
            f"{out} holds other files, and no prepared data",
            hint="choose a new or empty folder with --out",
        )


def _wanted(
    files: list[SourceFile],
    *,
    num_train: int,
    tokenizer: str,
    text_field: str,
    val_fraction: float | None,
    skip_bad: bool,
) -> dict[str, Any]:
    """Everything that decides the result, as plain values that stand in the manifest."""
    if tokenizer.startswith(TRAIN_PREFIX):
        vocab_size_of(tokenizer)
        identity = tokenizer
    else:
        identity = load_tokenizer(tokenizer).sha256
    return {
        "tokenizer": tokenizer,
        "tokenizer_identity": identity,
        "text_field": text_field,
        "val_fraction": val_fraction,
        "skip_bad": skip_bad,
        "sources": [
            {
                "name": file.name,
                "size_bytes": file.size_bytes,
                "use": "training" if number < num_train else "validation",
            }
            for number, file in enumerate(files)
        ],
    }


def _finished(out: Path, wanted: dict[str, Any], files: list[SourceFile]) -> dict[str, Any] | None:
    """The manifest of a folder that is done, None of one that is not.

    Raises:
        UsageError: it was made from something else.
    """
    if not (out / MANIFEST).exists():
        return None
    manifest = read_json(out / MANIFEST, error=DataError)
    settings = manifest.get("settings") if isinstance(manifest, dict) else None
    sources = manifest.get("sources") if isinstance(manifest, dict) else None
    made_from = (settings or {}) | {"sources": sources}
    differing = sorted(
        key
        for key, value in wanted.items()
        # A tokenizer is what it does; the path that led to it may be another one.
        if key != "tokenizer" and made_from.get(key) != value
    )
    if differing:
        raise UsageError(
            f"{out} holds data prepared otherwise (differs in: {', '.join(differing)})",
            hint="choose another folder with --out, or delete this one first",
        )
    finished_ns = (out / MANIFEST).stat().st_mtime_ns
    for file in files:
        if file.modified_ns > finished_ns:
            raise UsageError(
                f"{file.name} was changed after {out} was prepared from it",
                hint="choose another folder with --out, or delete this one first",
            )
    return manifest


def _begin_or_go_on(out: Path, wanted: dict[str, Any], files: list[SourceFile]) -> bool:
    """Takes up what an earlier call of the same settings left (True), or begins anew."""
    job = out / WORK_FOLDER / "job.json"
    key = wanted | {
        "v": SCHEMA_VERSION,
        "code": code_version(),
        "modified_ns": [file.modified_ns for file in files],
    }
    if job.exists() and read_json(job, error=DataError) == key:
        say(f"going on with what {job.parent} holds")
        return True
    if job.exists():
        say("the sources or settings changed since the last attempt: beginning anew")
    _delete_work(out)
    delete_shards(out)
    write_json(job, key)
    return False


def _delete_work(out: Path) -> None:
    """Deletes the work folder, and what a kill left of an earlier deletion."""
    with storage_errors(out):
        if (out / _DOOMED_FOLDER).exists():
            shutil.rmtree(out / _DOOMED_FOLDER)
    if (out / WORK_FOLDER).exists():
        delete_folder(out / WORK_FOLDER, doomed=out / _DOOMED_FOLDER)


def _summary(
    out: Path,
    manifest: dict[str, Any],
    *,
    seconds: float,
    was_done: bool,
    was_continued: bool,
) -> PrepareSummary:
    splits = {
        name: split and {key: value for key, value in split.items() if key != "shards"}
        for name, split in manifest["splits"].items()
    }
    return PrepareSummary(
        out=out,
        train=splits["train"],
        validation=splits["validation"],
        dropped=manifest["dropped"],
        seconds=seconds,
        was_done=was_done,
        was_continued=was_continued,
    )
