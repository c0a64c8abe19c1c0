"""The report: one HTML page that needs nothing else, and its data beside it."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re
from pathlib import Path
from typing import Any

from milepost.core.errors import UsageError
from milepost.core.files import write_atomically
from milepost.core.page_text import for_pages
from milepost.trajectory import provenance, rows, summary
from milepost.trajectory.collect import collect
from milepost.trajectory.course import Course
from milepost.trajectory.data_files import data_files
from milepost.trajectory.figures.benchmark_figures import draw_benchmarks, plots_of
from milepost.trajectory.figures.hover import hover_json
from milepost.trajectory.figures.mark_drawing import band_shades
from milepost.trajectory.figures.marks import (
    marks_in_words,
    marks_of,
    refusals_of,
    spans_in_words,
    spans_of,
)
from milepost.trajectory.figures.panel_kinds import PANEL_KINDS, PanelKind
from milepost.trajectory.figures.panels import draw_panels
from milepost.trajectory.figures.scale import MISSING, Scale, scale_of
from milepost.trajectory.figures.strokes import LOOKS
from milepost.trajectory.opening import subject_of_run
from milepost.trajectory.published import USUAL
from milepost.trajectory.sections.all import tell
from milepost.trajectory.sections.wording import benchmark_of
from milepost.trajectory.sections.work import Work, work_out
from milepost.trajectory.subject import Subject
from milepost.trajectory.tidy import tidy_table, write_tidy

PAGE_NAME = "index.html"
RECIPE_NAME = "recipe.toml"
FOLDER_WITHOUT_RUN = "milepost-report"
"""In the current folder: where a report lies whose subject is no run."""


def write_report(run: Path, *, out: Path | None = None) -> Path:
    """Writes the report of a run folder.

    Args:
        run: the run folder.
        out: the page's file; None is RUN/report/index.html.

    Returns:
        The page's path.

    Raises:
        UsageError: `run` is no run folder, or `out` is a folder.
        CheckpointError: the manifest is damaged, or a record is of a later schema.
        StorageError: the report cannot be written.
    """
    subject = subject_of_run(collect(run))
    return write_pages(subject, work_out(subject), out=out)[0]


def write_pages(subject: Subject, found: Work, *, out: Path | None = None) -> list[Path]:
    """Writes the report of what was read; returns the page and the files beside it.

    Args:
        subject: what to tell.
        found: what `work_out` found in it.
        out: the page's file; None is the run's own place, or `FOLDER_WITHOUT_RUN` here.

    Raises:
        UsageError: `out` is a folder.
        StorageError: the report cannot be written.
    """
    page = _place(subject) if out is None else out
    if page.is_dir():
        raise UsageError(f"{page} is a folder", hint="give --out the name of an HTML file")
    # Beside a page of another name may lie another run's: its files carry its name.
    prefix = "" if page.name == PAGE_NAME else f"{page.stem}-"
    files = {}
    if subject.run is not None:
        config = subject.run.manifest.config
        files = data_files(subject.run) | {RECIPE_NAME: provenance.recipe_toml(config)}
    written = []
    for name, text in files.items():
        written.append(page.with_name(prefix + name))
        write_atomically(written[-1], for_pages(text))
    table = tidy_table(subject.courses, run=subject.run)
    written += write_tidy(table, folder=page.parent, prefix=prefix)
    # The page comes last: where it is, what it names is there too.
    write_atomically(page, render(subject, found, prefix=prefix))
    return [page, *written]


def _place(subject: Subject) -> Path:
    if subject.run is not None:
        return subject.run.layout.report
    return Path(FOLDER_WITHOUT_RUN) / PAGE_NAME


def render(subject: Subject, found: Work, *, prefix: str = "") -> str:
    """The page as HTML.

    Args:
        subject: what to tell.
        found: what `work_out` found in it.
        prefix: of the names of the files beside it.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("milepost.trajectory"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    told = tell(subject, found)
    script = _script()
    context = {
        "name": subject.name,
        "run": subject.run,
        "courses": subject.courses,
        "script": script,
        "script_sha256": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "paragraphs": told.paragraphs,
        "sections": told.sections,
        "prefix": prefix,
    }
    context |= _figures(subject) | _records(subject, prefix)
    return for_pages(environment.get_template("page.html.jinja").render(context))


def shown_metrics(subject: Subject) -> list[str]:
    """Metrics with a figure of their own: their points span the horizontal axis."""
    scores = {name for course in subject.courses for name in course.curves if name[:5] == "eval/"}
    return [*(kind.metric for kind in PANEL_KINDS), *sorted(scores)]


def numbers(subject: Subject) -> dict[str, Any]:
    """The page for programs: the numbers of the summary, and the ends of every curve."""
    own = {"name": subject.name} if subject.run is None else summary.numbers(subject.run)
    return own | {"courses": [_ends(course) for course in subject.courses]}


def _ends(course: Course) -> dict[str, Any]:
    curves = {
        name: {
            end: {
                "step": float(curve.steps[place]),
                "tokens": float(curve.tokens[place]),
                "value": float(curve.values[place]),
            }
            for end, place in (("first", 0), ("last", -1))
        }
        for name, curve in sorted(course.curves.items())
    }
    return {"name": course.name, "source": course.source, "metrics": curves}


def left_out_courses(subject: Subject) -> list[str]:
    """Says which courses have no place on the axis, and why."""
    scale = scale_of(subject, metrics=shown_metrics(subject))
    return [_left_out_words(course, subject, scale) for course in scale.left_out]


def _left_out_words(course: Course, subject: Subject, scale: Scale) -> str:
    reason = MISSING[scale.axis]
    if not course.curves:
        reason = "nothing of it is measured yet"
    elif not course.curves.keys() & shown_metrics(subject):
        reason = "none of its metrics has a figure"
    return f"{course.name} is not in the figures: {reason}"


def _figures(subject: Subject) -> dict[str, Any]:
    scale = scale_of(subject, metrics=shown_metrics(subject))
    panels = draw_panels(subject, scale=scale)
    plots = plots_of(subject)
    small = draw_benchmarks(plots, scale=_scale_of_scores(subject, scale))
    hovers = [*(panel.hover for panel in panels), *(panel.hover for panel in small)]
    marks = [*marks_of(subject), *refusals_of(subject)]
    spans = spans_of(subject.run) if subject.run else []
    used = {v.name for plot in plots for v in plot.levels if v.is_baseline}
    baselines = [course for course in subject.baselines if course.name in used]
    return {
        # What a run has not measured yet has its place; what a source does not give has none.
        "panels": panels if subject.run else [panel for panel in panels if panel.svg],
        "absent": [] if subject.run else [_in_words(p.kind) for p in panels if not p.svg],
        "benchmark_panels": small,
        "num_plots": len(plots),
        "benchmark_metrics": frozenset().union(*(panel.metrics for panel in small)),
        "level_kinds": frozenset().union(*(panel.levels for panel in small)),
        "baselines": baselines,
        "is_published": all(course.name in USUAL for course in baselines),
        "sources": provenance.sources(subject, baselines=baselines),
        "axis_words": scale.label,
        "looks": list(zip(subject.courses, LOOKS, strict=False)),
        "mark_kinds": {mark.kind for mark in marks},
        "marks_words": marks_in_words(marks),
        "shades": band_shades(spans) if len({s.ranks for s in spans}) > 1 else {},
        "spans_words": spans_in_words(spans),
        "left_out": left_out_courses(subject),
        "hover": hover_json([hover for hover in hovers if hover is not None]),
    }


def _in_words(kind: PanelKind) -> str:
    """What a panel shows, inside a sentence."""
    return kind.title if benchmark_of(kind.metric) else kind.title.lower()


def _scale_of_scores(subject: Subject, scale: Scale) -> Scale:
    """The axis of all figures, but where it is logarithmic: the first steps, which no benchmark
    is scored at, would take most of it."""
    scores = [name for name in shown_metrics(subject) if name.startswith("eval/")]
    return scale_of(subject, metrics=scores) if scale.is_log and scores else scale


def _records(subject: Subject, prefix: str) -> dict[str, Any]:
    """What only a run has; empty for all else."""
    run = subject.run
    if run is None:
        return {"benchmarks": [], "num_checkpoints": 0, "bad_lines": {}}
    manifest = run.manifest
    recipe = f"{run.layout.name}/report/{RECIPE_NAME}" if not prefix else prefix + RECIPE_NAME
    return {
        "folder": run.layout.name,
        "benchmarks": rows.benchmark_rows(run.benchmarks),
        "segments": rows.segment_rows(
            run.segments, first_weights="the base" if run.is_finetuning else "initial weights"
        ),
        "num_segments": len(run.segments),
        "checkpoints": rows.checkpoint_rows(run.checkpoints),
        "num_checkpoints": len(run.checkpoints),
        "config": provenance.config_sections(manifest.config),
        "environment": provenance.environment(manifest),
        "identity": provenance.identity(manifest),
        "commands": provenance.commands(run, recipe=recipe),
        "same_where": provenance.same_where(manifest.config),
        "bad_lines": run.num_bad_lines,
    }


def _script() -> str:
    """The page's script without the indentation of its source."""
    templates = importlib.resources.files("milepost.trajectory") / "templates"
    source = (templates / "hover.js").read_text(encoding="utf-8")
    return re.sub(r"\n\s*", "\n", source)
