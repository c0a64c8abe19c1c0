"""Drawn curves: several courses apart, levels at their places, points for the script."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from milepost.trajectory.collect import collect
from milepost.trajectory.course import Course, Curve
from milepost.trajectory.figures.benchmark_figures import draw_benchmarks, plots_of
from milepost.trajectory.figures.panels import Panel, draw_panels
from milepost.trajectory.figures.scale import scale_of
from milepost.trajectory.figures.strokes import LABEL_HEIGHT, LOOKS, MAX_COURSES, kept_apart
from milepost.trajectory.opening import subject_of_run
from milepost.trajectory.report import render, shown_metrics
from milepost.trajectory.sections.work import work_out
from milepost.trajectory.subject import Subject
from tests.made_runs import make_run


def curve(*values: float, stderr: float = np.nan) -> Curve:
    steps = np.arange(1.0, len(values) + 1) * 10
    return Curve(steps, steps * 100, np.array(values), np.full(len(values), stderr))


def course(name: str, **curves: Curve) -> Course:
    return Course(name, "a test", {key.replace("__", "/"): c for key, c in curves.items()})


def page_of(subject: Subject) -> str:
    return render(subject, work_out(subject))


def subject_of(*courses: Course, **fields: Any) -> Subject:
    first, *others = courses
    plain = Subject(first.name, first, None, None, tuple(others), (), None, "steps")
    return replace(plain, **fields)


def panels(subject: Subject) -> dict[str, Panel]:
    drawn = draw_panels(subject, scale=scale_of(subject, metrics=shown_metrics(subject)))
    return {panel.kind.letter: panel for panel in drawn}


def hover_data(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="hover-data">(.*?)</script>', page)
    assert found is not None
    return json.loads(found[1])  # type: ignore[no-any-return]


def test_courses_laid_over_one_another_differ_by_dashes_and_are_named_at_their_ends() -> None:
    names = [f"course {n}" for n in range(MAX_COURSES)]
    drawn = panels(subject_of(*[course(name, val__loss=curve(3, 2.5, 2.4)) for name in names]))
    svg = drawn["A"].svg
    assert svg is not None
    for name in names:
        assert svg.count(f">{name}</text>") == 1
        assert f"{name}: " in drawn["A"].description
    assert len({look.dashes for look in LOOKS}) == len({look.color for look in LOOKS}) == 6


@pytest.mark.parametrize("heights", [[0.5] * 6, [0.0, 0.01, 0.02], [1.2, 0.99, -3.0], [0.3]])
def test_labels_at_line_ends_keep_apart_within_the_axes(heights: list[float]) -> None:
    placed = sorted(kept_apart(heights))
    assert min(placed) >= 0 and max(placed) <= 1
    assert all(b - a >= LABEL_HEIGHT - 1e-9 for a, b in itertools.pairwise(placed))


def test_values_at_the_ends_of_what_a_number_can_hold_are_drawn() -> None:
    drawn = panels(subject_of(course("huge", val__loss=curve(-1.7e308, 1.0, 1.7e308))))
    assert drawn["A"].svg is not None and "inf" not in drawn["A"].svg


def test_labels_keep_the_order_of_their_lines() -> None:
    heights = [0.5, 0.52, 0.51]
    assert np.argsort(kept_apart(heights)).tolist() == np.argsort(heights).tolist()


def benchmark_svg(subject: Subject) -> str:
    scale = scale_of(subject, metrics=shown_metrics(subject))
    (panel,) = draw_benchmarks(plots_of(subject), scale=scale)
    assert panel.svg is not None
    return panel.svg


def y_of_points(svg: str) -> list[float]:
    return [float(y) for y in re.findall(r'<use [^>]*y="([\d.]+)"', svg)]


def test_a_baseline_far_off_is_an_arrow_and_leaves_the_curve_its_height() -> None:
    own = course("own", eval__arc_easy__acc_norm=curve(0.25, 0.27, 0.29))
    near = course("near", eval__arc_easy__acc_norm=curve(0.30))
    far = course("far", eval__arc_easy__acc_norm=curve(0.75))
    plain = benchmark_svg(subject_of(own))
    with_near = benchmark_svg(subject_of(own, baselines=(near,)))
    with_far = benchmark_svg(subject_of(own, baselines=(far,)))
    assert ">near 30.0 %<" in with_near
    assert ">↑ far 75.0 %<" in with_far
    spans = [max(y_of_points(svg)) - min(y_of_points(svg)) for svg in (plain, with_far)]
    assert spans[1] > 0.85 * spans[0]


def test_guessing_is_drawn_however_far_below() -> None:
    svg = benchmark_svg(subject_of(course("own", eval__piqa__acc=curve(0.79, 0.8))))
    assert ">chance 50.0 %<" in svg


def test_points_of_the_script_are_those_of_the_drawing() -> None:
    own = course("own <b>", val__loss=curve(3.1234, 2.5, 2.4), eval__piqa__acc=curve(0.5, 0.6))
    subject = subject_of(own)
    page = page_of(subject)
    data = hover_data(page)
    (line,) = data["validation_loss"]["lines"]
    assert line["n"] == "own <b>"
    assert line["v"] == ["3.1234", "2.50", "2.40"]
    assert line["s"] == [10, 20, 30]
    assert line["t"] == ["1 K", "2 K", "3 K"]
    svg = panels(subject)["A"].svg
    assert svg is not None
    marked = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', svg)
    drawn = [(float(x), float(y)) for x, y in marked]
    assert [*zip(line["x"], line["y"], strict=True)] == [
        (pytest.approx(x, abs=0.06), pytest.approx(y, abs=0.06)) for x, y in drawn
    ]
    assert data["benchmark1"]["lines"][0]["v"] == ["50.0 %", "60.0 %"]


def test_a_value_with_a_standard_error_says_it() -> None:
    page = page_of(subject_of(course("own", eval__piqa__acc=curve(0.5, 0.6, stderr=0.012))))
    assert hover_data(page)["benchmark1"]["lines"][0]["v"] == ["50.0 ± 1.2 %", "60.0 ± 1.2 %"]


def test_only_the_pages_own_script_may_run(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", total_steps=3)
    made.start()
    made.train(1, 3)
    page = page_of(subject_of_run(collect(made.layout.root)))
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert len(script) < 4096
    # Only the columns of the panels that are drawn.
    assert "hellaswag" not in hover_data(page)


def test_long_curves_are_told_as_medians(tmp_path: Path) -> None:
    values = np.linspace(5, 3, 2000)
    page = page_of(subject_of(course("own", train__loss=curve(*values))))
    (line,) = hover_data(page)["training_loss"]["lines"]
    assert line["n"] == "own, median"
    assert len(line["x"]) == len(line["v"]) == 360


def test_names_with_markup_and_formulas_stay_text() -> None:
    bad = "$\\frac{</text><script>alert(1)</script>\x00\x1b\ud800"
    own = course(bad, val__loss=curve(3, 2), eval__odd__acc=curve(0.1, 0.2))
    page = page_of(subject_of(own, course("日本 " + bad, val__loss=curve(2, 1))))
    assert "<script>alert" not in page
    assert page.count("<script") == 2
    assert not {"\x00", "\x1b", "\ud800"} & set(page)


def test_panels_without_values_are_named_not_drawn_where_there_is_no_run() -> None:
    page = page_of(subject_of(course("own", val__loss=curve(3, 2))))
    assert page.count("<figure") == 1
    assert "Not given by the source: HellaSwag, training loss, tokens per second" in page
