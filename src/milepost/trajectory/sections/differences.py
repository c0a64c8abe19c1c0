"""Whether a benchmark's score moved between two checkpoints, item by item."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from milepost.runs.evaluations import EvaluationStore
from milepost.trajectory.benchmarks import Evaluation, Series, main_series
from milepost.trajectory.collect import Trajectory
from milepost.trajectory.sections.text_table import Column, TextTable, numbers
from milepost.trajectory.sections.wording import enumerate_words, interval_words, p_words, signed
from milepost.trajectory.statistics.paired import PairedTest, paired_test
from milepost.trajectory.subject import Section

MAX_CHECKPOINTS = 8
"""Of a benchmark, evenly spread; the first and the last are always among them."""

ITEMS_READ = 60_000
"""Of all benchmarks together, as far as the first and the last checkpoints leave a choice: some
half a second of reading and testing."""

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Difference:
    """A benchmark at two checkpoints.

    Attributes:
        result: the test, or why there is none.
        is_whole_course: from the first scored checkpoint to the last.
    """

    series: Series
    before: Evaluation
    after: Evaluation
    result: PairedTest | str
    is_whole_course: bool


@dataclass(frozen=True)
class Differences:
    """What the section shows; a table without rows is None."""

    ends: TextTable | None
    between: TextTable | None
    note: str
    absences: tuple[str, ...]


def differences_of(run: Trajectory) -> list[Difference]:
    """The tests of each benchmark: first against last, then each checkpoint with the next."""
    all_series = [s for s in main_series(run.benchmarks) if len(s.evaluations) > 1]
    share = ITEMS_READ // max(1, len(all_series))
    return [test for s in all_series for test in _tests(s, run=run, max_items=share)]


def differences_section(differences: Sequence[Difference]) -> Section | None:
    """The section; None where no benchmark has two scored checkpoints."""
    if not differences:
        return None
    tested = [(d, d.result) for d in differences if isinstance(d.result, PairedTest)]
    verdicts = holm([test.p_value for _, test in tested])
    rows = [
        (d.is_whole_course, _row(d, test, holds=holds))
        for (d, test), holds in zip(tested, verdicts, strict=True)
    ]
    content = Differences(
        ends=_table("First and last scored checkpoint", [r for is_whole, r in rows if is_whole]),
        between=_table(
            "From one checkpoint to the next", [r for is_whole, r in rows if not is_whole]
        ),
        note=_note(len(tested)) if tested else "",
        absences=tuple(_absences(differences)),
    )
    title = "Benchmarks between checkpoints"
    return Section("differences", title, "sections/differences.jinja", content)


def holm(p_values: Sequence[float]) -> list[bool]:
    """Which of several tests hold when all are made at once (Holm 1979, Scand. J. Statist. 6).

    The smallest p-value has to be at most 0.05 over the number of tests, the next 0.05 over one
    fewer, and so on until one is not.
    """
    holds = [False] * len(p_values)
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[place] > SIGNIFICANT / (len(p_values) - rank):
            break
        holds[place] = True
    return holds


def _tests(series: Series, *, run: Trajectory, max_items: int) -> Iterator[Difference]:
    chosen = _spread(series.evaluations, _num_checkpoints(series, max_items=max_items))
    store = EvaluationStore(run.layout.root)

    @cache
    def items(key: str | None) -> list[dict[str, Any]] | None:
        return _items(store, key)

    pairs = [(chosen[0], chosen[-1], True)]
    if len(chosen) > 2:
        pairs += [(a, b, False) for a, b in pairwise(chosen)]
    for before, after, is_whole_course in pairs:
        old, new = items(before.key), items(after.key)
        result: PairedTest | str = "the items of a score cannot be read"
        if old is not None and new is not None:
            result = paired_test(old, new, metric=series.latest.main_metric)
        yield Difference(series, before, after, result, is_whole_course)


def _num_checkpoints(series: Series, *, max_items: int) -> int:
    num_items = series.latest.num_items or 1
    return max(2, min(MAX_CHECKPOINTS, max_items // max(1, num_items)))


def _spread(evaluations: Sequence[Evaluation], count: int) -> list[Evaluation]:
    last = len(evaluations) - 1
    places = {round(n * last / (count - 1)) for n in range(count)}
    return [evaluations[place] for place in sorted(places)]


def _items(store: EvaluationStore, key: str | None) -> list[dict[str, Any]] | None:
    """None for a file that is whole and yet no file of items."""
    if key is None:
        return None
    try:
        lines = store.items({"key": key})
    except (ValueError, EOFError):
        return None
    return lines if all(isinstance(line, dict) for line in lines) else None


def _row(difference: Difference, test: PairedTest, *, holds: bool) -> tuple[str, ...]:
    series, told = difference.series, signed(100 * test.difference, decimals=1)
    return (
        f"{series.setting.name}\n{series.latest.main_metric}, {test.n:,} items",
        f"{difference.before.step:,} to {difference.after.step:,}",
        f"{100 * test.before:.1f}",
        f"{100 * test.after:.1f}",
        f"{told}\n{interval_words(test.interval, decimals=1, scale=100)}",
        f"{test.num_gained:,}\n{test.num_lost:,} lost",
        p_words(test.p_value),
        verdict(test, holds=holds),
    )


def _table(caption: str, rows: Sequence[tuple[str, ...]]) -> TextTable | None:
    columns = (
        Column("Benchmark"),
        Column("Steps"),
        *numbers("Before %", "After %", "Difference, 95 %", "Items gained", "p"),
        Column("Verdict"),
    )
    return TextTable(caption, columns, tuple(rows)) if rows else None


def verdict(test: PairedTest, *, holds: bool) -> str:
    """What a test shows, in words."""
    if not holds:
        return "no difference shown"
    return "better" if test.difference > 0 else "worse"


def _note(num_tests: int) -> str:
    told = (
        "Each test compares the same items before and after (McNemar, exact, two-sided): only items"
        " that changed sides count."
    )
    if num_tests > 1:
        told += (
            f" {num_tests} tests are made here, so that some have a small p by chance alone; the"
            " verdict is Holm’s, which keeps the chance of any false one at 5 %."
        )
    return told + " “No difference shown” does not say that there is none."


def _absences(differences: Sequence[Difference]) -> Iterator[str]:
    """A sentence for each reason why there is no test, with the benchmarks it is true of."""
    names: dict[str, dict[str, None]] = {}
    for d in differences:
        if isinstance(d.result, str):
            names.setdefault(d.result, {})[d.series.setting.name] = None
    for reason, benchmarks in names.items():
        yield f"No test for {enumerate_words(list(benchmarks))}: {reason}."
