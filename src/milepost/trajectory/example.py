"""Published trajectories that come with the install, read from `examples/`.

Numbers and where they come from only; what follows from them is worked out like a run's.
"""

from __future__ import annotations

import difflib
import importlib.resources
import tomllib
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from milepost.config.schema import ModelSection
from milepost.core.errors import UsageError
from milepost.planner.cost import flops_per_token
from milepost.runs.metric_names import rubric_metric
from milepost.runs.ratings import CRITERIA
from milepost.trajectory.course import Course, Curve
from milepost.trajectory.ratings import RubricScores

EXAMPLES = ("paper",)
"""Names that `milepost report --example` takes."""

RATER_KIND: Final = "published"


@dataclass(frozen=True)
class Example:
    """A trajectory as its authors print it.

    Attributes:
        title: as people call it.
        source: what to cite.
        course: the curves, those of the rubric among them.
        rubric: the rubric's scores by step.
        printed_correlations: Pearson's r with the average rubric score as the source prints it;
            keys "steps", "validation_loss", "hellaswag".
        facts: (name, words) of what is known of the training.
        notes: what a reader of the numbers has to know, a sentence each.
    """

    name: str
    title: str
    source: str
    course: Course
    rubric: RubricScores
    printed_correlations: dict[str, float]
    facts: list[tuple[str, str]]
    notes: tuple[str, ...]


def load_example(name: str) -> Example:
    """A packaged example by its name.

    Raises:
        UsageError: there is none of that name; the names are given.
    """
    if name not in EXAMPLES:
        close = difflib.get_close_matches(name, EXAMPLES, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise UsageError(
            f"there is no example {name!r}", hint=f"{meant}examples are {', '.join(EXAMPLES)}"
        )
    return _example(packaged_table(name))


def packaged_table(name: str) -> dict[str, Any]:
    """The content of one file of `examples/`."""
    file = importlib.resources.files("milepost.trajectory.examples") / f"{name}.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))


def columns_of(table: dict[str, Any]) -> dict[str, np.ndarray]:
    """A table of `columns` and `rows` as float64[N] by column name."""
    values = np.array(table["rows"], dtype=np.float64)
    return {name: values[:, place] for place, name in enumerate(table["columns"])}


def _example(table: dict[str, Any]) -> Example:
    rubric = columns_of(table["rubric"])
    return Example(
        name=table["name"],
        title=table["title"],
        source=table["source"],
        course=_course(table, rubric=rubric),
        rubric=_rubric_scores(rubric, raters=table["raters"]),
        printed_correlations=table["printed_correlations"],
        facts=[(name, words) for name, words in table["facts"]],
        notes=tuple(table["notes"]),
    )


def _course(table: dict[str, Any], *, rubric: dict[str, np.ndarray]) -> Course:
    measured, model = columns_of(table["measurements"]), ModelSection(**table["model"])
    per_step = table["tokens_per_step"]
    curves = {name: _curve(measured, name, per_step=per_step) for name in measured}
    curves |= {
        rubric_metric(RATER_KIND, name): _curve(rubric, name, per_step=per_step) for name in rubric
    }
    steps = ("step", rubric_metric(RATER_KIND, "step"))
    return Course(
        name=table["title"],
        source=table["source"],
        curves={name: curve for name, curve in curves.items() if name not in steps},
        # The rows were as long as the longest context (the authors' script).
        flops_per_token=flops_per_token(model, sequence_length=model.max_position_embeddings),
        restarts=tuple(table["restarts"]),
        notes=tuple(table["notes"]),
    )


def _curve(columns: dict[str, np.ndarray], name: str, *, per_step: int) -> Curve:
    steps, values = columns["step"], columns[name]
    return Curve(steps, steps * per_step, values, np.full(len(values), np.nan))


def _rubric_scores(columns: dict[str, np.ndarray], *, raters: str) -> RubricScores:
    steps = [int(step) for step in columns["step"]]
    return RubricScores(
        raters=raters,
        rater_kind=RATER_KIND,
        steps=tuple(steps),
        means={criterion: _floats(columns[criterion]) for criterion in CRITERIA},
        averages=_floats(columns["average"]),
        intervals=(None,) * len(steps),
        counts=(None,) * len(steps),
    )


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
