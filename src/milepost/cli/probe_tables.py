"""Probes as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from milepost.cli.evaluation_tables import aligned
from milepost.posttrain.visible_tokens import LINE_BREAK, SPACE, on_one_line
from milepost.runs.probes import LikelyToken, ProbeRecord

FORWARD, REVERSE, ASIDE = "KL(base‖it)", "KL(it‖base)", "blanks aside"

_SHOWN_AROUND = 2
"""Tokens shown before and after those that differ from the base's."""

_COLUMNS_AT_ONCE = 8
_LONGEST_NAME = 24


def shown_model(records: Sequence[ProbeRecord], *, title: str) -> list[str]:
    """The lines about one model: numbers, then tokens, then completions.

    Args:
        records: one a variant, the base first.
        title: what the model is called.
    """
    lines = [f"{title}, the next token after each prompt (nats)", *_numbers(records), ""]
    lines += [
        f"the prompts as tokens: {SPACE} is a space, {LINE_BREAK} a line break, … as the base"
    ]
    lines += aligned([(_name(r), difference(records[0], r)) for r in records])
    if any(record.decoding["max_new_tokens"] for record in records):
        most = records[0].decoding["max_new_tokens"]
        lines += ["", f"what the model writes, the likeliest token each time, at most {most}"]
        lines += aligned([(_name(r), _written(r)) for r in records])
    return lines


def course(by_model: Sequence[Sequence[ProbeRecord]]) -> list[str]:
    """The lines about several checkpoints: a row a step, a column a variant."""
    names = [_name(record) for record in by_model[0][1:]]
    lines = ["KL(base‖variant) of the next token, nats, by step"]
    for start in range(0, max(1, len(names)), _COLUMNS_AT_ONCE):
        part = slice(1 + start, 1 + start + _COLUMNS_AT_ONCE)
        rows: list[tuple[str, ...]] = [
            ("step", *names[start : start + _COLUMNS_AT_ONCE], "likeliest after the base")
        ]
        for records in by_model:
            divergences = (_nats(record.kl_nats) for record in records[part])
            rows.append((_step(records[0]), *divergences, _token(records[0].likeliest[0])))
        lines += [*aligned(rows), ""]
    return lines[:-1]


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


def _numbers(records: Sequence[ProbeRecord]) -> list[str]:
    rows: list[tuple[str, ...]] = [("", "tokens", FORWARD, REVERSE, ASIDE, "entropy", "likeliest")]
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
    return aligned(rows)


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
