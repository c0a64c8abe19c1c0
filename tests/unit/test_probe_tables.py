"""Tables of probes at the widths that people's terminals have."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.cells import cell_len

from milepost.cli.probe_tables import course, shown_model
from milepost.runs.probes import LikelyToken, ProbeRecord

BASE = ProbeRecord(
    step=100,
    checkpoint_sha256="ab",
    adapter=None,
    variant="base",
    base="The state of the union",
    prompt="The state of the union",
    token_ids=list(range(30)),
    tokens=["·union"] * 30,
    kl_nats=0.0,
    reverse_kl_nats=0.0,
    kl_nats_aside_from_blanks=0.0,
    entropy_nats=4.5,
    likeliest=[LikelyToken(number, f"·word{number}", 0.125) for number in range(8)],
    completion="of the people, " * 9,
    completion_ids=[1] * 24,
    decoding={"max_new_tokens": 24, "stopped": "max_new_tokens"},
    device="a plain processor",
    milepost="0",
    time="2026-01-01T00:00:00.000Z",
)
NAMES = ("space", "日本語 as a name", "line breaks", "other system", "x" * 60)
RECORDS = [
    BASE,
    *(
        replace(
            BASE,
            variant=name,
            kl_nats=0.25 + number,
            reverse_kl_nats=0.5,
            kl_nats_aside_from_blanks=0.125,
            token_ids=[*range(29), 99 + number],
        )
        for number, name in enumerate(NAMES)
    ),
]


def shown(width: int | None) -> list[str]:
    return shown_model(RECORDS, title="step 100", width=width)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    assert max(map(cell_len, shown(width))) <= width


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_of_a_course_is_wider_than_the_terminal(width: int) -> None:
    assert max(map(cell_len, course([RECORDS, RECORDS], width=width))) <= width


@pytest.mark.parametrize("width", [40, 80, None])
def test_nothing_is_lost_where_lines_are_short(width: int | None) -> None:
    words = " ".join(shown(width)).split()
    for name in ("space", "line", "breaks", "日本語"):
        assert name in words
    assert [words.count(f"·word{number}") for number in range(8)] == [len(RECORDS)] * 8
    assert words.count("·union") >= 30
    for number in range(len(NAMES)):
        assert f"{0.25 + number:.4f}" in words
    text = "".join(course([RECORDS, RECORDS], width=width))
    assert all(f"{0.25 + number:.4f}" in text for number in range(len(NAMES)))


def test_a_probability_stays_beside_its_token() -> None:
    for line in shown(40):
        if "0.125" in line.split() and "·word" in line:
            assert line.rstrip().endswith("0.125")


def test_columns_stand_below_each_other_where_characters_are_wide() -> None:
    table = shown(None)[2:8]
    places = {cell_len(line[: line.index("4.5000")]) for line in table}
    assert len(places) == 1
