"""A table as people read it: every cell is text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: its heading.
        is_number: whether its cells are set flush right.
    """

    name: str
    is_number: bool = False


@dataclass(frozen=True)
class TextTable:
    """Rows of text under headings; the first cell of a row is its heading.

    Attributes:
        caption: what the table holds, in one phrase.
        columns: one a cell.
        rows: cells; what stands after a newline in a cell is set small below it.
        is_plain: whether it stays a table on a phone, which scrolls it sideways where it has to;
            one with much text becomes a card a row there.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    is_plain: bool = False


def numbers(*names: str) -> tuple[Column, ...]:
    """Columns of numbers."""
    return tuple(Column(name, is_number=True) for name in names)
