"""Scores of checkpoints on benchmarks, as one series of steps for each way of scoring.

Records of different settings never share a line: fewer items, another number of solved items
before the question or another dtype give other numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from milepost.trajectory.fields import finite, text, whole

NAMES = {
    "hellaswag": "HellaSwag",
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "piqa": "PIQA",
    "winogrande": "WinoGrande",
    "openbookqa": "OpenBookQA",
    "boolq": "BoolQ",
    "boolq_reasoned": "BoolQ with reasons",
    "heldout": "Held-out endings",
}
"""What people call them, in the order of the page; others come after, by name."""

METRICS = ("acc_norm", "acc")
"""The first that a benchmark has is the one that is told."""


@dataclass(frozen=True)
class Score:
    """An accuracy and its standard error, fractions; the error is None where it is unknown."""

    value: float
    stderr: float | None

    def __str__(self) -> str:
        """'27.3 ± 0.4 %'"""
        error = "" if self.stderr is None else f" ± {100 * self.stderr:.1f}"
        return f"{100 * self.value:.1f}{error} %"


@dataclass(frozen=True)
class Setting:
    """What must be equal for two scores to stand in one line; see docs/contract.md."""

    benchmark: str
    protocol: str
    num_fewshot: int
    limit: int | None
    data_sha256: str
    dtype: str

    @property
    def name(self) -> str:
        """The benchmark as people call it."""
        return NAMES.get(self.benchmark, self.benchmark)


@dataclass(frozen=True)
class Evaluation:
    """One checkpoint on one benchmark.

    Attributes:
        key: of its record, and so of its items file; None where the record does not say.
        num_items: that were scored.
        scores: of each metric of `METRICS` that is on record.
        chance: accuracy of guessing; None where it is unknown, as the next.
        majority: accuracy of always giving the commonest place among the choices.
    """

    key: str | None
    step: int
    tokens_seen: int | None
    device: str | None
    checkpoint_sha256: str | None
    num_items: int | None
    scores: dict[str, Score]
    chance: float | None
    majority: float | None
    num_truncated: int | None

    @property
    def main_metric(self) -> str:
        """Length-normalized accuracy where there is one, else accuracy."""
        return next(name for name in METRICS if name in self.scores)

    @property
    def main_score(self) -> Score:
        """Of the main metric."""
        return self.scores[self.main_metric]

    @property
    def guessing(self) -> float | None:
        """The better of chance and majority."""
        known = [value for value in (self.chance, self.majority) if value is not None]
        return max(known, default=None)

    @property
    def beats_guessing(self) -> bool | None:
        """By more than two standard errors; None where one of the numbers is unknown.

        An error of 0, that of answers which are all right or all wrong, says as little as none.
        """
        score = self.main_score
        if not score.stderr or self.guessing is None:
            return None
        return score.value > self.guessing + 2 * score.stderr


@dataclass(frozen=True)
class Series:
    """The scores of one setting, in order of step; at least one."""

    setting: Setting
    evaluations: tuple[Evaluation, ...]

    @property
    def latest(self) -> Evaluation:
        """Of the highest step."""
        return self.evaluations[-1]

    @property
    def words(self) -> str:
        """The setting: '0-shot, 10,042 items, float32'."""
        setting, num_items = self.setting, self.latest.num_items
        count = "items unknown" if num_items is None else f"{num_items:,} items"
        is_cut = num_items is not None and num_items == setting.limit
        first = "the first " if is_cut else ""
        return f"{setting.num_fewshot}-shot, {first}{count}, {setting.dtype}"

    def points(self, metric: str) -> list[tuple[int, Score]]:
        """(step, score) wherever the metric is on record."""
        return [(e.step, e.scores[metric]) for e in self.evaluations if metric in e.scores]


def series_of(records: Iterable[dict[str, Any]]) -> tuple[list[Series], int]:
    """The series, in the order of the page, and how many records are none.

    Args:
        records: lines of evaluations.jsonl in file order; of two for one step and setting the
            later counts.
    """
    found: dict[Setting, dict[int, Evaluation]] = {}
    num_foreign = 0
    for record in records:
        setting, evaluation = _setting(record), _evaluation(record)
        if setting is None or evaluation is None:
            num_foreign += 1
        else:
            found.setdefault(setting, {})[evaluation.step] = evaluation
    series = [
        Series(setting, tuple(by_step[step] for step in sorted(by_step)))
        for setting, by_step in found.items()
    ]
    return sorted(series, key=_place), num_foreign


def main_series(series: Sequence[Series]) -> list[Series]:
    """One series a benchmark: of the most steps, of equals the one of the most items."""
    best: dict[str, Series] = {}
    for one in series:
        before = best.get(one.setting.benchmark)
        if before is None or _weight(one) > _weight(before):
            best[one.setting.benchmark] = one
    return list(best.values())


def _weight(series: Series) -> tuple[int, int]:
    return len(series.evaluations), series.latest.num_items or 0


def _place(series: Series) -> tuple[Any, ...]:
    setting, names = series.setting, list(NAMES)
    known = setting.benchmark in NAMES
    number = names.index(setting.benchmark) if known else len(names)
    # All items come before a part of them.
    part = (setting.limit is not None, -(setting.limit or 0))
    rest = (setting.num_fewshot, part, setting.dtype, setting.protocol, setting.data_sha256)
    return (number, setting.benchmark, *rest)


def _setting(record: dict[str, Any]) -> Setting | None:
    benchmark, limit = text(record.get("benchmark")), record.get("limit")
    if not benchmark or (limit is not None and whole(limit) is None):
        return None
    return Setting(
        benchmark=_printable(benchmark),
        protocol=_printable(text(record.get("protocol")) or ""),
        num_fewshot=whole(record.get("num_fewshot")) or 0,
        limit=limit,
        data_sha256=_printable(text(record.get("data_sha256")) or ""),
        dtype=_printable(text(record.get("dtype")) or "dtype unknown"),
    )


def _printable(words: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in words)


def _evaluation(record: dict[str, Any]) -> Evaluation | None:
    step, scores = whole(record.get("step")), _scores(record.get("metrics"))
    if step is None or not scores:
        return None
    return Evaluation(
        key=text(record.get("key")),
        step=step,
        tokens_seen=whole(record.get("tokens_seen")),
        device=text(record.get("device")),
        checkpoint_sha256=text(record.get("checkpoint_sha256")),
        num_items=whole(record.get("n")),
        scores=scores,
        chance=finite(record.get("chance")),
        majority=finite(record.get("majority")),
        num_truncated=whole(record.get("num_truncated")),
    )


def _scores(metrics: Any) -> dict[str, Score]:
    scores = {}
    for name in METRICS:
        entry = metrics.get(name) if isinstance(metrics, dict) else None
        value = finite(entry.get("value")) if isinstance(entry, dict) else None
        if isinstance(entry, dict) and value is not None and 0 <= value <= 1:
            scores[name] = Score(value, finite(entry.get("stderr")))
    return scores
