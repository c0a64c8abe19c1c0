"""The statistics of a page, worked out once: for its sentences, its tables and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from milepost.trajectory.benchmarks import main_series
from milepost.trajectory.course import Curve
from milepost.trajectory.jumps import Jump, jumps_of
from milepost.trajectory.outliers import OddCheckpoint, odd_checkpoints
from milepost.trajectory.sections.comparison import Compared, compared_metrics
from milepost.trajectory.sections.differences import Difference, differences_of
from milepost.trajectory.sections.loss_law import FittedLaw, fitted_law
from milepost.trajectory.sections.measures import rubric_groups
from milepost.trajectory.sections.together import Pair, pairs_of
from milepost.trajectory.statistics.power_law import PowerLaw
from milepost.trajectory.subject import Subject


@dataclass(frozen=True)
class Work:
    """What was worked out; lists are empty where there is nothing to work on."""

    pairs: list[Pair]
    compared: list[Compared]
    law: FittedLaw
    differences: list[Difference]
    jumps: list[Jump]
    odd: list[OddCheckpoint]


def work_out(subject: Subject) -> Work:
    """All statistics of a subject."""
    run = subject.run
    return Work(
        pairs=pairs_of(subject),
        compared=compared_metrics(subject),
        law=fitted_law(subject.course),
        differences=[] if run is None else differences_of(run),
        jumps=[] if run is None else jumps_of(run),
        odd=[] if run is None else odd_checkpoints(main_series(run.benchmarks)),
    )


def as_numbers(subject: Subject, work: Work) -> dict[str, Any]:
    """The same for programs: losses in nats, scores as fractions, intervals of 95 %."""
    return {
        "name": subject.name,
        "courses": [course.name for course in subject.courses],
        "metrics": {name: _ends(curve) for name, curve in subject.course.curves.items()},
        "rubric": [asdict(group) for group in rubric_groups(subject)],
        "correlations": [
            {"x": pair.x.metric, "y": pair.y.metric} | asdict(pair.correlation)
            for pair in work.pairs
        ],
        "loss_law": _law(work.law),
        "compared": [asdict(one) for one in work.compared],
        "differences": [_difference(one) for one in work.differences],
        "jumps": [asdict(jump) for jump in work.jumps],
        "odd_checkpoints": [asdict(odd) for odd in work.odd],
    }


def _ends(curve: Curve) -> dict[str, Any]:
    names = ("step", "tokens", "value")
    columns = (curve.steps, curve.tokens, curve.values)
    first, last = ([float(column[place]) for column in columns] for place in (0, -1))
    return {
        "n": len(curve),
        "first": dict(zip(names, first, strict=True)),
        "last": dict(zip(names, last, strict=True)),
    }


def _law(fitted: FittedLaw) -> dict[str, Any]:
    refusals = dict(fitted.refusals)
    if fitted.law is None:
        return {"metric": None, "refusals": refusals}
    loss, interval = fitted.law.predict(2 * fitted.last_tokens)
    return {
        "metric": fitted.metric,
        "refusals": refusals,
        **_public(fitted.law),
        "last_tokens": fitted.last_tokens,
        "at_twice_the_tokens": {
            "value": loss,
            "interval": None if interval is None else asdict(interval),
        },
    }


def _public(law: PowerLaw) -> dict[str, Any]:
    names = ("floor", "scale", "exponent", "n", "rmse", "first_tokens", "num_left_out")
    intervals = {
        name: None if interval is None else asdict(interval)
        for name, interval in (
            ("floor_interval", law.floor_interval),
            ("exponent_interval", law.exponent_interval),
        )
    }
    return {name: getattr(law, name) for name in names} | intervals


def _difference(difference: Difference) -> dict[str, Any]:
    result = difference.result
    told = {"absence": result} if isinstance(result, str) else asdict(result)
    return {
        "benchmark": difference.series.setting.benchmark,
        "metric": difference.series.latest.main_metric,
        "before_step": difference.before.step,
        "after_step": difference.after.step,
        "is_whole_course": difference.is_whole_course,
    } | told
