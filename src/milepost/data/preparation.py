"""The work of `prepare`: tokenizer, pieces, shards, manifest, each kept once it is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from milepost.core.console import say
from milepost.core.environment import code_version
from milepost.core.errors import DataError, UsageError
from milepost.core.files import sha256_of_json, storage_errors, write_atomically, write_json
from milepost.data.assemble import Assembled, assemble
from milepost.data.blocks import Unit, make_units, read_blocks
from milepost.data.document import RawDocument
from milepost.data.hub import Fetcher
from milepost.data.pieces import make_pieces
from milepost.data.shards import (
    FORMAT,
    MANIFEST,
    SCHEMA_VERSION,
    TOKENIZER_FOLDER,
    ShardRecord,
    fingerprint_of,
)
from milepost.data.sources import SourceFile
from milepost.data.tokenize import Settings, fast_encoder, split_of, usable_documents
from milepost.text.fast_encoder import NoFastEncoderError
from milepost.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

WORK_FOLDER = ".partial"
DROPPED = "dropped.jsonl"
TRAIN_PREFIX = "train:"
TRAIN_TEXT_BYTES = 128 << 20
"""A tokenizer is trained on so much of the training text, from its beginning."""

FAST_FROM_BYTES = 16 << 20
"""Smaller sources are done before the fast encoder would be open."""


@dataclass(frozen=True)
class Preparation:
    """One preparation in work.

    Attributes:
        out: the folder that is made.
        files: of all sources, those of the validation set last.
        num_train: how many of them are not.
        wanted: everything that decides the result, as it stands in the manifest.
    """

    out: Path
    files: list[SourceFile]
    num_train: int
    wanted: dict[str, Any]

    @property
    def _work(self) -> Path:
        return self.out / WORK_FOLDER

    def run(self, *, workers: int | None) -> dict[str, Any]:
        """Does all that is not done yet and writes the manifest; returns it.

        Raises:
            DataError, StorageError, MilepostError: as `prepare`.
        """
        units = self._units()
        with Fetcher(self._work / "hub", files=self.files) as fetcher:
            tokenizer = self._tokenizer(units, fetcher)
            settings = self._with_encoder(self._settings(tokenizer))
            pieces = make_pieces(
                units,
                work=self._work,
                settings=settings,
                fetcher=fetcher,
                names={number: file.name for number, file in enumerate(self.files)},
                workers=workers,
            )
        assembled = assemble(
            pieces,
            out=self.out,
            work=self._work,
            dtype=settings.dtype,
            sources=self.wanted["sources"],
        )
        self._check(assembled)
        for name, content in tokenizer.files().items():
            write_atomically(self.out / TOKENIZER_FOLDER / name, content)
        manifest = self._manifest(tokenizer, settings, assembled)
        write_json(self.out / MANIFEST, manifest | {"sha256": sha256_of_json(manifest)})
        return manifest

    def _units(self) -> list[Unit]:
        numbered = list(enumerate(self.files))
        split = "train" if self.wanted["val_fraction"] is None else "by_fraction"
        return make_units(numbered[: self.num_train], split=split) + make_units(
            numbered[self.num_train :], split="validation"
        )

    def _settings(self, tokenizer: Tokenizer) -> Settings:
        return Settings(
            tokenizer=str(self._work / TOKENIZER_FOLDER),
            tokenizer_sha256=tokenizer.sha256,
            dtype="uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
            text_field=self.wanted["text_field"],
            val_fraction=self.wanted["val_fraction"] or 0.0,
            skip_bad=self.wanted["skip_bad"],
        )

    def _with_encoder(self, settings: Settings) -> Settings:
        """Settings that take the fast encoder, where it is worth opening and there is one."""
        if sum(file.size_bytes for file in self.files) < FAST_FROM_BYTES:
            return settings
        try:
            encoder = fast_encoder(settings.tokenizer, settings.tokenizer_sha256)
        except NoFastEncoderError as problem:
            hint = f"; {problem.hint}" if problem.hint else ""
            say(f"encoding at the slower rate: {problem.message}{hint}")
            return settings
        say(f"encoding with {encoder.name}")
        return dataclasses.replace(settings, is_fast=True)

    def _tokenizer(self, units: list[Unit], fetcher: Fetcher) -> Tokenizer:
        """The tokenizer, from the copy in the work folder once there is one."""
        folder = self._work / TOKENIZER_FOLDER
        spec = self.wanted["tokenizer"]
        if not (folder / "tokenizer.json").exists():
            if spec.startswith(TRAIN_PREFIX):
                size = vocab_size_of(spec)
                say(f"training a tokenizer of {size} tokens")
                texts = self._training_texts(units, fetcher)
                content = train_tokenizer(texts, vocab_size=size)
                write_atomically(folder / "tokenizer.json", content)
            else:
                files = load_tokenizer(spec).files()
                for name in sorted(files, reverse=True):  # tokenizer.json last
                    write_atomically(folder / name, files[name])
        return load_tokenizer(str(folder))

    def _training_texts(self, units: list[Unit], fetcher: Fetcher) -> Iterator[str]:
        num_bytes = 0
        for unit in units:
            if unit.split == "validation":
                continue
            for document in self._documents(unit, fetcher):
                if split_of(document.text, self.wanted["val_fraction"] or 0.0) == "train":
                    yield document.text
                    num_bytes += len(document.text.encode())
                if num_bytes >= TRAIN_TEXT_BYTES:
                    return

    def _documents(self, unit: Unit, fetcher: Fetcher) -> Iterator[RawDocument]:
        paths = {number: fetcher.path(file) for number, file in unit.files}
        for block in read_blocks(unit, paths=paths):
            documents = usable_documents(
                block,
                text_field=self.wanted["text_field"],
                skip_bad=self.wanted["skip_bad"],
                names={number: file.name for number, file in unit.files},
                problems=[],
            )
            yield from (document for _, document in documents)

    def _check(self, assembled: Assembled) -> None:
        if not assembled.splits["train"]:
            raise DataError(
                "the sources hold no training document",
                hint="give more text"
                + (", or a smaller --val-fraction" if self.wanted["val_fraction"] else ""),
            )
        wants_validation = self.wanted["val_fraction"] or self.num_train < len(self.files)
        if wants_validation and not assembled.splits["validation"]:
            raise DataError(
                "no document fell into the validation set",
                hint="raise --val-fraction, or name the validation text with --val",
            )

    def _manifest(
        self, tokenizer: Tokenizer, settings: Settings, assembled: Assembled
    ) -> dict[str, Any]:
        with storage_errors(self.out):
            (self.out / DROPPED).unlink(missing_ok=True)
        if assembled.drops:
            write_atomically(self.out / DROPPED, assembled.dropped_lines())
        made = {key: value for key, value in self.wanted.items() if key != "sources"}
        return {
            "v": SCHEMA_VERSION,
            "format": FORMAT,
            "milepost": code_version(),
            "dtype": settings.dtype,
            "tokenizer": {
                "name": self.wanted["tokenizer"],
                "sha256": tokenizer.sha256,
                "vocab_size": tokenizer.vocab_size,
                "end_of_text_id": tokenizer.end_of_text_id,
            },
            "settings": made,
            "splits": {
                name: _split_values(shards, settings.dtype, tokenizer.sha256)
                for name, shards in assembled.splits.items()
            },
            "dropped": assembled.drop_counts,
            "sources": self.wanted["sources"],
        }


def _split_values(
    shards: list[ShardRecord], dtype: str, tokenizer_sha256: str
) -> dict[str, Any] | None:
    if not shards:
        return None
    return {
        "fingerprint": fingerprint_of(shards, dtype=dtype, tokenizer_sha256=tokenizer_sha256),
        "num_tokens": sum(shard.num_tokens for shard in shards),
        "num_documents": sum(shard.num_documents for shard in shards),
        "num_bytes": sum(shard.num_bytes for shard in shards),
        "shards": [asdict(shard) for shard in shards],
    }


def vocab_size_of(spec: str) -> int:
    """The vocabulary size that `train:VOCAB_SIZE` asks for.

    Raises:
        UsageError: it is not a number.
    """
    size = spec.removeprefix(TRAIN_PREFIX)
    if not (size.isascii() and size.isdecimal()):
        raise UsageError(
            f"{spec!r} does not say how large a vocabulary to train",
            hint="write train:VOCAB_SIZE, such as train:4096",
        )
    return int(size)
