"""Probes as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

from rich.cells import cell_len

from milepost.cli.evaluation_tables import aligned
from milepost.posttrain.visible_tokens import LINE_BREAK, SPACE, on_one_line
from milepost.runs.probes import LikelyToken, ProbeRecord

FORWARD, REVERSE, ASIDE = "KL(base‖it)", "KL(it‖base)", "blanks aside"

_SHOWN_AROUND = 2
"""Tokens shown before and after those that differ from the base's."""

_COLUMNS_AT_ONCE = 8
_LONGEST_NAME = 24
_NO_BREAK = "\u00a0"
"""A space that no line is broken at; of a token it would be escaped."""
_NARROWEST_TEXT = 24
"""Columns below which a text stands under its name, not beside it."""


def shown_model(records: Sequence[ProbeRecord], *, title: str, width: int | None) -> list[str]:
    """The lines about one model: numbers, then tokens, then completions.

    Args:
        records: one a variant, the base first.
        title: what the model is called.
        width: columns that a line may take; None: any number.
    """
    lines = [
        *_wrapped(f"{title}, the next token after each prompt (nats)", width),
        *_numbers(records, width=width),
        "",
        *_wrapped(
            f"the prompts as tokens: {SPACE} is a space, {LINE_BREAK} a line break, … as the base",
            width,
        ),
        *_texts([(_name(r), difference(records[0], r)) for r in records], width=width),
    ]
    if any(record.decoding["max_new_tokens"] for record in records):
        most = records[0].decoding["max_new_tokens"]
        head = f"what the model writes, the likeliest token each time, at most {most}"
        lines += ["", *_wrapped(head, width)]
        lines += _texts([(_name(r), _written(r)) for r in records], width=width)
    return lines


def course(by_model: Sequence[Sequence[ProbeRecord]], *, width: int | None) -> list[str]:
    """The lines about several checkpoints: a row a step, a column a variant.

    Args:
        by_model: of each checkpoint its records, the base first.
        width: as for `shown_model`.
    """
    head = _wrapped("KL(base‖variant) of the next token, nats, by step", width)
    for count in range(_COLUMNS_AT_ONCE, 1, -1):
        table = _course_table(by_model, columns_at_once=count)
        if _fits(table, width):
            return [*head, *table]
    return [*head, *_course_table(by_model, columns_at_once=1)]


def _course_table(by_model: Sequence[Sequence[ProbeRecord]], *, columns_at_once: int) -> list[str]:
    """One table, or several below each other of which the last has the likeliest tokens."""
    rows = [("step", *(_name(record) for record in by_model[0][1:]))]
    rows += [(_step(rs[0]), *(_nats(record.kl_nats) for record in rs[1:])) for rs in by_model]
    likeliest = ["likeliest after the base", *(_token(rs[0].likeliest[0]) for rs in by_model)]
    if len(rows[0]) <= columns_at_once + 1:
        return aligned([(*row, token) for row, token in zip(rows, likeliest, strict=True)])
    lines: list[str] = []
    for start in range(1, len(rows[0]), columns_at_once):
        part = slice(start, start + columns_at_once)
        lines += [*aligned([(row[0], *row[part], "") for row in rows]), ""]
    return lines + aligned([(row[0], token) for row, token in zip(rows, likeliest, strict=True)])


def difference(base: ProbeRecord, record: ProbeRecord) -> str:
    """The tokens of a prompt; of another than the base only those around what differs."""
    if record is base:
        return " ".join(record.tokens)
    mine, others = record.token_ids, base.token_ids
    if mine == others:
        return "the same tokens"
    shorter = min(len(mine), len(others))
    before = next((n for n in range(shorter) if mine[n] != others[n]), shorter)
    most_after = shorter - before
    after = next((n for n in range(most_after) if mine[-1 - n] != others[-1 - n]), most_after)
    first = max(0, before - _SHOWN_AROUND)
    last = min(len(mine), len(mine) - after + _SHOWN_AROUND)
    dots_before, dots_after = ["…"] if first else [], ["…"] if last < len(mine) else []
    return " ".join([*dots_before, *record.tokens[first:last], *dots_after])


def _numbers(records: Sequence[ProbeRecord], *, width: int | None) -> list[str]:
    """The numbers of each variant: a table, or where it is too wide what fits."""
    head = ("", "tokens", FORWARD, REVERSE, ASIDE, "entropy", "likeliest")
    rows: list[tuple[str, ...]] = [head]
    for record in records:
        is_base = record is records[0]
        divergences = (record.kl_nats, record.reverse_kl_nats, record.kl_nats_aside_from_blanks)
        rows.append(
            (
                _name(record),
                str(len(record.token_ids)),
                *("-" if is_base else _nats(value) for value in divergences),
                _nats(record.entropy_nats),
                "  ".join(_token(likely) for likely in record.likeliest),
            )
        )
    whole = aligned(rows)
    if _fits(whole, width):
        return whole
    # A probability stays beside its token.
    tied = [
        (_name(r), "  ".join(_token(t).replace(" ", _NO_BREAK) for t in r.likeliest))
        for r in records
    ]
    likeliest = [line.replace(_NO_BREAK, " ") for line in _texts(tied, width=width)]
    likeliest = [
        "",
        *_wrapped("the likeliest next tokens, with their probabilities", width),
        *likeliest,
    ]
    numbers = aligned([(*row[:-1], "") for row in rows])
    return [*(numbers if _fits(numbers, width) else _stacked(rows)), *likeliest]


def _stacked(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The numbers one below the other, a block a variant."""
    head = rows[0]
    lines: list[str] = []
    for row in rows[1:]:
        pairs = [
            (f"  {name}", value, "") for name, value in zip(head[1:-1], row[1:-1], strict=True)
        ]
        lines += [f"  {row[0]}", *aligned([pair for pair in pairs if pair[1] != "-"])]
    return lines


def _fits(lines: Sequence[str], width: int | None) -> bool:
    return width is None or max(map(cell_len, lines)) <= width


def _texts(rows: Sequence[tuple[str, str]], *, width: int | None) -> list[str]:
    """Names with a text each, which goes on below itself where the line is full."""
    if width is None:
        return aligned(rows)
    room = width - max(cell_len(name) for name, _ in rows) - 4
    if room < _NARROWEST_TEXT:
        return [
            line
            for name, text in rows
            for line in (f"  {name}", *(f"    {part}" for part in _wrapped(text, width - 4)))
        ]
    return aligned(
        [
            (name if number == 0 else "", part)
            for name, text in rows
            for number, part in enumerate(_wrapped(text, room))
        ]
    )


def _wrapped(text: str, width: int | None) -> list[str]:
    if width is None or cell_len(text) <= width:
        return [text]
    return wrap(text, max(1, width), replace_whitespace=False, break_on_hyphens=False) or [""]


def _name(record: ProbeRecord) -> str:
    name = on_one_line(record.variant)
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def _step(record: ProbeRecord) -> str:
    return "?" if record.step is None else str(record.step)


def _nats(value: float) -> str:
    return f"{value:.4f}"


def _token(likely: LikelyToken) -> str:
    return f"{likely.token} {likely.probability:.3f}"


def _written(record: ProbeRecord) -> str:
    """The completion in quotes, as what stands at its very start matters here."""
    stopped = str(record.decoding["stopped"]).replace("_", " ")
    end = "" if stopped == "max new tokens" else f"  ({stopped})"
    return f'"{on_one_line(record.completion)}"{end}'
