"""Rows of a benchmark as they lie in a file: read, with every field checked when it is asked for.

Knows files and types, not what the fields mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from milepost.core.errors import DataError
from milepost.core.files import storage_errors
from milepost.data.sources import FORMS, Forms, SourceFile, find_files, form_of

MAX_FILE_BYTES = 1 << 30
"""So much is read of a file, decompressed; the largest benchmark has 50 MB."""

ROW_FORMS: Forms = {ending: form for ending, form in FORMS.items() if form[0] != "text"} | {
    ".json": ("json_list", None)
}
"""Files that rows are read from, by their endings."""

ROW_ENDINGS = tuple(ending for ending, (kind, _) in FORMS.items() if kind != "text")
"""What names of files of rows end in."""

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
}
"""What a word in a file's name says about its split."""

_FOLDER_HINT = "give the folder of the rows: --data-dir, in a recipe evaluation.data_dir"
_ROW_HINT = "rows have the fields of the benchmark's dataset on the hub: mend this one"
_JSON_HINT = "mend it, or take it out"


@dataclass(frozen=True)
class Row:
    """One row with its place.

    Attributes:
        file: its name in messages.
        number: line of the file or row of the table, from 1.
        fields: as they were read.
    """

    file: str
    number: int
    fields: dict[str, Any]

    @property
    def place(self) -> str:
        """File and number, as messages name it."""
        return f"{self.file}:{self.number}"

    def text(self, name: str) -> str:
        """A field that is text.

        Raises:
            DataError: it is missing, of another type, or has no UTF-8 form; so for the others.
        """
        return self._checked_text(self.value(name), name)

    def texts(self, *names: str) -> tuple[str, ...]:
        """A field that is a list of texts; more names lead into an object."""
        where = ".".join(names)
        value: Any = self.fields
        for depth, name in enumerate(names):
            if not isinstance(value, dict):
                self.refuse(".".join(names[:depth]), f"is {shown(value)}, not an object")
            if value.get(name) is None:
                self.refuse(where, "is missing")
            value = value[name]
        if not isinstance(value, list):
            self.refuse(where, f"is {shown(value)}, not a list of texts")
        return tuple(self._checked_text(text, where) for text in value)

    def choices(self, *names: str) -> tuple[str, ...]:
        """A field that is a list of two or more texts, none of them empty."""
        texts = self.texts(*names)
        if len(texts) < 2:
            self.refuse(".".join(names), f"holds {len(texts)} choices, a question has 2 or more")
        if not all(text.strip() for text in texts):
            self.refuse(".".join(names), "holds an empty choice")
        return texts

    def choice(self, name: str) -> str:
        """A field that is one choice, not an empty one."""
        text = self.text(name)
        if not text.strip():
            self.refuse(name, "is an empty choice")
        return text

    def place_of(self, name: str, *, among: tuple[Any, ...]) -> int:
        """Where the value of a field stands among the values that are allowed."""
        value = self.value(name)
        places = [i for i, one in enumerate(among) if type(one) is type(value) and one == value]
        if not places:
            self.refuse(name, f"is {shown(value)}, not one of {', '.join(map(shown, among))}")
        return places[0]

    def value(self, name: str) -> Any:
        """A field of any type."""
        if self.fields.get(name) is None:
            self.refuse(name, "is missing")
        return self.fields[name]

    def refuse(self, name: str, what: str) -> NoReturn:
        """Raises the `DataError` that says what is wrong with a field."""
        raise DataError(f"{self.place}: field {name!r} {what}", hint=_ROW_HINT)

    def _checked_text(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            self.refuse(name, f"is {shown(value)}, not a text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            self.refuse(
                name, f"holds half a character (a lone surrogate) at character {error.start}"
            )
        return value


def shown(value: Any) -> str:
    """A value as JSON writes it, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def find_row_file(folder: Path, *, benchmark: str, split: str) -> SourceFile:
    """The one file of a folder with a split of a benchmark.

    Files whose names begin with the benchmark's are looked at: `piqa.jsonl`, `piqa_val.parquet`,
    `winogrande_xl_train.jsonl.gz`. A word of the name may say the split; without one it is the
    split that is scored.

    Args:
        folder: holds the rows of any number of benchmarks.
        benchmark: its name.
        split: "train", "validation" or "test".

    Raises:
        DataError: there is none, or more than one.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}", hint=_FOLDER_HINT)
    with storage_errors(folder, verb="read"):
        paths = sorted(folder.iterdir())
    found = {
        path: _split_of(path.name, benchmark) for path in paths if _belongs(path.name, benchmark)
    }
    named = [path for path, word in found.items() if word == split]
    unnamed = [path for path, word in found.items() if word is None and split != "train"]
    fitting = named or unnamed
    if len(fitting) == 1:
        return find_files([fitting[0]])[0]
    if fitting:
        names = ", ".join(path.name for path in fitting)
        raise DataError(
            f"{folder} holds the {split} rows of {benchmark} more than once: {names}",
            hint="keep one of them",
        )
    others = ", ".join(path.name for path in found)
    seen = f", only {others}" if others else ""
    raise DataError(
        f"{folder} holds no {split} rows of {benchmark}{seen}",
        hint=f"put them there as {benchmark}_{split}, ending in one of {', '.join(ROW_ENDINGS)}; "
        "without a folder they come from the hub",
    )


def _belongs(name: str, benchmark: str) -> bool:
    """Whether a file of rows has the benchmark's name, alone or with more words after it."""
    rest = name.lower().removeprefix(benchmark)
    return rest != name.lower() and rest[:1] in ("_", "-", ".") and rest.endswith(ROW_ENDINGS)


def _split_of(name: str, benchmark: str) -> str | None:
    rest = name.lower().removeprefix(benchmark).replace("-", "_").replace(".", "_")
    return next((SPLIT_WORDS[word] for word in rest.split("_") if word in SPLIT_WORDS), None)


def read_rows(name: str, path: Path) -> list[Row]:
    """All rows of a file, in order: JSON lines, blank ones passed over, a JSON list, or a table.

    Args:
        name: what the file is called in messages; its ending says its form.
        path: where it lies.

    Raises:
        DataError: the file is damaged, too large, holds no rows, or a row is no JSON object.
    """
    form = form_of(name, forms=ROW_FORMS)
    assert form is not None, name
    if form[0] == "parquet":
        rows = _table_rows(name, path)
    elif form[0] == "json_list":
        rows = _list_rows(name, _read_all(name, path, compression=None))
    else:
        rows = list(_line_rows(name, _read_all(name, path, compression=form[1])))
    if not rows:
        raise DataError(f"{name} holds no rows", hint="give the whole file")
    return rows


def _read_all(name: str, path: Path, *, compression: str | None) -> bytes:
    import pyarrow

    try:
        with pyarrow.input_stream(str(path), compression=compression) as stream:
            data: bytes = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, EOFError, pyarrow.ArrowException) as error:
        raise DataError(f"{name} cannot be read: {error}", hint="copy it again") from error
    _check_size(name, len(data))
    return data


def _check_size(name: str, num_bytes: int) -> None:
    if num_bytes > MAX_FILE_BYTES:
        raise DataError(
            f"{name} holds more than {MAX_FILE_BYTES >> 20} MiB", hint="split it into several files"
        )


def _line_rows(name: str, data: bytes) -> Iterator[Row]:
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        fields = _strict_json(line, place=f"{name}:{number}")
        if not isinstance(fields, dict):
            raise DataError(f"{name}:{number} is not a JSON object", hint=_JSON_HINT)
        yield Row(name, number, fields)


def _list_rows(name: str, data: bytes) -> list[Row]:
    values = _strict_json(data.removeprefix(b"\xef\xbb\xbf"), place=name)
    if not isinstance(values, list):
        raise DataError(
            f"{name} is not a JSON list of rows",
            hint="where each line is a JSON object of its own, the name ends in .jsonl",
        )
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise DataError(f"{name}:{number} is not a JSON object", hint=_JSON_HINT)
    return [Row(name, number, value) for number, value in enumerate(values, start=1)]


def _strict_json(data: bytes, *, place: str) -> Any:
    """What JSON says that has no NaN and no field twice.

    Raises:
        DataError: it is something else; the message names `place`.
    """
    try:
        return json.loads(data.decode(), parse_constant=_no_constant, object_pairs_hook=_object)
    except RecursionError as error:
        raise DataError(
            f"{place} is nested too deep to be read as JSON", hint=_JSON_HINT
        ) from error
    except ValueError as error:
        raise DataError(f"{place} is not JSON: {error}", hint=_JSON_HINT) from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field stands twice")
    return fields


def _table_rows(name: str, path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            metadata = table.metadata
            groups = range(metadata.num_row_groups)
            _check_size(name, sum(metadata.row_group(g).total_byte_size for g in groups))
            values = table.read().to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{name} cannot be read as Parquet: {error}", hint="copy it again") from (
            error
        )
    return [Row(name, number, fields) for number, fields in enumerate(values, start=1)]
