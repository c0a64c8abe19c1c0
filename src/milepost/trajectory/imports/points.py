"""Values by step, gathered one by one from a file of any format, then made into curves."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from milepost.core.errors import UsageError
from milepost.trajectory.course import MAX_TOKENS, Course, Curve
from milepost.trajectory.imports.names import (
    ACCURACIES,
    STEP_NAMES,
    is_token_count,
    metric_names,
)
from milepost.trajectory.sections.wording import enumerate_words, plural

ERROR_SUFFIX = "_stderr"

MAX_STEP = 2**53

MAX_WORDS_TOLD = 8


class Points:
    """What a source says; of two values of a metric for one step the later counts."""

    def __init__(self) -> None:
        self._values: dict[str, dict[int, float]] = defaultdict(dict)
        self._tokens: dict[int, float] = {}
        self._num_not_finite = 0
        self._num_without_step = 0

    def __len__(self) -> int:
        """How many metrics there are."""
        return len(self._values)

    def add(self, name: str, *, step: int, value: float) -> None:
        """One value under the source's own name."""
        if not math.isfinite(value):
            self._num_not_finite += 1
        elif is_token_count(name):
            self._tokens[step] = value
        else:
            self._values[name][step] = value

    def add_tokens(self, tokens: float, *, step: int) -> None:
        """The tokens seen at a step, where a source says them apart from its metrics."""
        self._tokens[step] = tokens

    def add_record(self, record: Mapping[str, Any], *, step_name: str) -> None:
        """All numbers of one record, but those of the program itself ("_runtime")."""
        step = whole_step(record.get(step_name))
        if step is None:
            self._num_without_step += 1
            return
        for name, value in record.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and name not in STEP_NAMES and not name.startswith("_"):
                self.add(name, step=step, value=_as_float(value))

    def course(
        self, name: str, *, source: str, notes: Iterable[str], tokens_per_step: int | None
    ) -> Course:
        """The values as curves, under Milepost's names where it has one.

        Args:
            name: of the course.
            source: where the values come from, in words.
            notes: stand before those on what was renamed, taken as percent or left out.
            tokens_per_step: for steps after the last at which the source counts tokens; with None
                theirs are unknown. Steps between two that it counts have proportionally many.
        """
        wrong = self._without_wrong_tokens()
        values, errors = self._with_errors()
        renamed, curves, percent = metric_names(values), {}, []
        for given, by_step in values.items():
            curve = self._curve(by_step, errors.get(given, {}), tokens_per_step)
            if renamed[given] in ACCURACIES and _is_percent(curve.values):
                curve = replace(curve, values=curve.values / 100, stderrs=curve.stderrs / 100)
                percent.append(f"{given} is taken as percent.")
            curves[renamed[given]] = curve
        # Of a hundred tasks in no order, those that the page has a place for come first.
        in_order = {metric: curves[metric] for metric in ACCURACIES if metric in curves} | curves
        told = (*notes, *wrong, *_renaming(renamed), *percent, *self._left_out())
        return Course(name, source, in_order, notes=told)

    def _without_wrong_tokens(self) -> list[str]:
        """Forgets the counts of tokens where one falls, as after a restart that counts anew, or is
        no count; says so."""
        last = 0.0
        for step in sorted(self._tokens):
            count = self._tokens[step]
            if not last <= count <= MAX_TOKENS:
                self._tokens.clear()
                where = f"{count:,.6g} at step {step:,} after {last:,.6g}"
                return [f"Its counts of tokens are left out, since they do not only grow: {where}."]
            last = count
        return []

    def _with_errors(self) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
        """The values by name, and the standard errors of those that have any."""
        values, errors = dict(self._values), {}
        for name in self._values:
            base = name.removesuffix(ERROR_SUFFIX)
            if base != name and base in values:
                errors[base] = values.pop(name)
        return values, errors

    def _curve(
        self, by_step: dict[int, float], errors: dict[int, float], tokens_per_step: int | None
    ) -> Curve:
        order = sorted(by_step)
        steps = np.array(order, dtype=np.float64)
        return Curve(
            steps=steps,
            tokens=self._tokens_at(steps, tokens_per_step),
            values=np.array([by_step[step] for step in order], dtype=np.float64),
            stderrs=np.array([errors.get(step, math.nan) for step in order], dtype=np.float64),
        )

    def _tokens_at(self, steps: np.ndarray, tokens_per_step: int | None) -> np.ndarray:
        known = {0: 0.0} | self._tokens
        counted = sorted(known)
        tokens = [known[step] for step in counted]
        if tokens_per_step is None and not self._tokens:
            return np.full(len(steps), np.nan)
        per_step = math.nan if tokens_per_step is None else tokens_per_step
        after = tokens[-1] + (steps - counted[-1]) * per_step
        return np.where(steps > counted[-1], after, np.interp(steps, counted, tokens))

    def _left_out(self) -> list[str]:
        reasons = (
            (self._num_not_finite, "value", "that is not finite"),
            (self._num_without_step, "record", "without a step"),
        )
        return [left_out(count, noun, why=why) for count, noun, why in reasons if count]


def whole_step(value: Any) -> int | None:
    """A step, also one that is written as 1000.0; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    is_whole = 0 <= value < MAX_STEP and value == int(value)
    return int(value) if is_whole else None


def left_out(count: int, noun: str, *, why: str) -> str:
    """'2 files without a step are left out.'"""
    verb, pronoun = ("is", "that is") if count == 1 else ("are", "that are")
    return f"{plural(count, noun)} {why.replace('that is', pronoun)} {verb} left out."


def refuse_several_runs(path: Path, runs: Iterable[str]) -> None:
    """Refuses a table whose rows are of more than one run.

    Raises:
        UsageError: they are; the runs are named.
    """
    names = sorted(set(runs))
    if len(names) > 1:
        raise UsageError(
            f"{path} holds {len(names)} runs: {enumerate_some(names)}",
            hint="an import is one trajectory: export one run",
        )


def enumerate_some(words: Iterable[str]) -> str:
    """All words, or the first few and how many more there are."""
    every = list(words)
    if len(every) <= MAX_WORDS_TOLD:
        return enumerate_words(every)
    more = len(every) - MAX_WORDS_TOLD
    return f"{', '.join(every[:MAX_WORDS_TOLD])} and {more:,} more"


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _is_percent(values: np.ndarray) -> bool:
    return bool(values.min() >= 0 and 1 < values.max() <= 100)


def _renaming(renamed: dict[str, str]) -> list[str]:
    changed = [f"{name} as {metric}" for name, metric in renamed.items() if name != metric]
    return [f"Shown under Milepost's names: {enumerate_some(changed)}."] if changed else []
