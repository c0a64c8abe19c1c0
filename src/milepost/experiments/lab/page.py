"""The laboratory's page, the data beside it, and the same for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from milepost.core.environment import describe_environment
from milepost.core.files import write_atomically
from milepost.core.page_text import for_pages
from milepost.core.units import format_count, format_duration
from milepost.experiments.lab.figures import draw_differences, draw_overlay
from milepost.experiments.lab.measures import Mean, difference
from milepost.experiments.lab.results import Results, RunResult
from milepost.experiments.lab.setting import PARENT
from milepost.experiments.lab.wording import (
    QUESTION,
    answer,
    method,
    name_of,
    separated,
    table_of,
)
from milepost.planner.cost import count_parameters
from milepost.runs.events import read_history
from milepost.runs.layout import RunLayout

CURVES_NAME, MEASURES_NAME, TABLE_NAME = "curves.csv", "measures.csv", "curves.parquet"
_CURVE_COLUMNS = ("seed", "arm", "metric", "steps_after", "value", "difference")
_MEASURE_COLUMNS = (
    *("seed", "arm", "status", "metric", "start", "spike", "spike_step", "noise", "spike_z"),
    *("recovered_after", "end", "is_equal", "has_parents_bits"),
)


def sentences(results: Results) -> list[str]:
    """The answer for people at a terminal."""
    return answer(results) or ["There is no arm to compare yet."]


def as_plain(results: Results, *, left_out: dict[str, str]) -> dict[str, Any]:
    """The results for programs."""
    return {
        "out": str(results.setting.out),
        "report": str(results.setting.report),
        "at": results.setting.at,
        "steps_after": results.setting.steps_after,
        "seeds": sorted(results.parents),
        "runs_done": results.num_done,
        "runs": results.num_runs,
        "answer": answer(results),
        "left_out": left_out,
        "arms": {
            found.arm.name: {
                "what": found.arm.what,
                "restore": found.arm.restore,
                "settings": list(found.arm.words),
                "diverged": found.num_diverged,
                "has_parents_bits": [run.has_parents_bits for run in found.runs],
                "metrics": {
                    metric: {
                        "spike": _plain_mean(found.spike(metric)),
                        "end": _plain_mean(found.end(metric)),
                        "seeds": [asdict(one) for one in found.measures(metric)],
                    }
                    for metric in results.metrics
                },
            }
            for found in results.arms
        },
    }


def _plain_mean(mean: Mean | None) -> dict[str, Any] | None:
    return None if mean is None else asdict(mean)


def write_page(results: Results, *, left_out: dict[str, str]) -> Path:
    """Writes the page and its data; returns the page.

    Raises:
        StorageError: they cannot be written.
    """
    page = results.setting.report
    rows = list(_curve_rows(results))
    write_atomically(page.with_name(CURVES_NAME), _csv(_CURVE_COLUMNS, rows))
    write_atomically(page.with_name(MEASURES_NAME), _csv(_MEASURE_COLUMNS, _measure_rows(results)))
    write_atomically(page.with_name(TABLE_NAME), _parquet(rows))
    write_atomically(page, render(results, left_out=left_out))
    return page


def render(results: Results, *, left_out: dict[str, str]) -> str:
    """The page as HTML."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [
                jinja2.PackageLoader("milepost.experiments.lab"),
                jinja2.PackageLoader("milepost.trajectory"),
            ]
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    context = {
        "setting": results.setting,
        "question": QUESTION,
        "sentences": sentences(results),
        "is_partial": results.num_done < results.num_runs,
        "results": results,
        "overlay": draw_overlay(results),
        "differences": [
            (name_of(metric), draw_differences(results, metric)) for metric in results.metrics
        ],
        "tables": [table_of(results, metric) for metric in results.metrics] if results.arms else [],
        "separated": separated(results),
        "method": method(results),
        "left_out": left_out,
        "facts": _facts(results),
        "files": (CURVES_NAME, MEASURES_NAME, TABLE_NAME),
    }
    return for_pages(environment.get_template("lab.html.jinja").render(context))


def _facts(results: Results) -> list[tuple[str, str]]:
    setting = results.setting
    config, environment = setting.config, describe_environment()
    seconds = [
        float(event.get("step_seconds") or 0.0)
        for seed in results.parents
        for event in read_history(RunLayout(setting.run(PARENT, seed=seed)).events).of_kind("step")
    ]
    return [
        ("recipe", setting.name),
        ("parameters", format_count(count_parameters(config.model).total)),
        ("tokens of an update", f"{config.train.global_batch_tokens:,}"),
        ("tokens of a validation", f"{config.validation.tokens:,}"),
        ("a validation every", f"{config.validation.every_steps} steps"),
        ("steps of the schedule", f"{config.train.total_steps:,}"),
        ("seeds", ", ".join(map(str, sorted(results.parents))) or "none yet"),
        ("a step of a parent", format_duration(np.median(seconds).item() if seconds else None)),
        ("runs", f"{results.num_done} of {results.num_runs}"),
        ("data", config.data.path),
        ("machine", f"{environment.get('cpu')}, {environment.get('cores')} cores"),
        ("milepost", str(environment.get("milepost"))),
    ]


def _curve_rows(results: Results) -> Iterator[tuple[Any, ...]]:
    runs = [*results.parents.values(), *(run for arm in results.arms for run in arm.runs)]
    for run in runs:
        parent = results.parents[run.seed]
        for metric, curve in run.curves.items():
            apart: dict[int, float] = {}
            if metric in parent.curves:
                found = difference(curve, parent.curves[metric])
                apart = dict(zip(found.steps.tolist(), found.values.tolist(), strict=True))
            for step, value in zip(curve.steps.tolist(), curve.values.tolist(), strict=True):
                yield (run.seed, _name(run), metric, step, value, apart.get(step))


def _measure_rows(results: Results) -> Iterator[tuple[Any, ...]]:
    for arm in results.arms:
        for run in arm.runs:
            for metric, found in run.measures.items():
                values = asdict(found)
                own = tuple(values[name] for name in _MEASURE_COLUMNS[4:-1])
                yield (run.seed, arm.arm.name, run.status, metric, *own, run.has_parents_bits)


def _name(run: RunResult) -> str:
    return PARENT if run.arm is None else run.arm.name


def _csv(columns: tuple[str, ...], rows: Any) -> str:
    """Numbers as Python writes them, so that they read back to the last bit; None is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def _parquet(rows: list[tuple[Any, ...]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    types = ("int64", "string", "string", "int64", "float64", "float64")
    fields = [
        (name, pyarrow.type_for_alias(kind))
        for name, kind in zip(_CURVE_COLUMNS, types, strict=True)
    ]
    lines = [dict(zip(_CURVE_COLUMNS, row, strict=True)) for row in rows]
    table = pyarrow.Table.from_pylist(lines, schema=pyarrow.schema(fields))
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()
