"""The report of a run: one HTML page that needs nothing else, and its data beside it as CSV."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from milepost.core.errors import UsageError
from milepost.core.files import write_atomically
from milepost.trajectory import provenance, rows, samples, summary
from milepost.trajectory.benchmark_figures import draw_benchmarks
from milepost.trajectory.collect import Trajectory, collect
from milepost.trajectory.data_files import data_files
from milepost.trajectory.figures import draw_panels

PAGE_NAME = "index.html"
RECIPE_NAME = "recipe.toml"

_NOT_FOR_PAGES = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


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
    return write_pages(collect(run), out=out)[0]


def write_pages(trajectory: Trajectory, *, out: Path | None = None) -> list[Path]:
    """Writes the report of what was collected; returns the page and the files beside it."""
    page = trajectory.layout.report if out is None else out
    if page.is_dir():
        raise UsageError(f"{page} is a folder", hint="give --out the name of an HTML file")
    # Beside a page of another name may lie another run's: its files carry its name.
    prefix = "" if page.name == PAGE_NAME else f"{page.stem}-"
    config = trajectory.manifest.config
    files = data_files(trajectory) | {RECIPE_NAME: provenance.recipe_toml(config)}
    written = []
    for name, text in files.items():
        written.append(page.with_name(prefix + name))
        write_atomically(written[-1], _without_controls(text))
    # The page comes last: where it is, what it names is there too.
    write_atomically(page, render(trajectory, prefix=prefix))
    return [page, *written]


def render(trajectory: Trajectory, *, prefix: str = "") -> str:
    """The page as HTML.

    Args:
        trajectory: what to tell.
        prefix: of the names of the files beside it.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("milepost.trajectory"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_for_a_page,
    )
    return environment.get_template("page.html.jinja").render(_context(trajectory, prefix))


def _context(trajectory: Trajectory, prefix: str) -> dict[str, Any]:
    manifest = trajectory.manifest
    groups, num_more_groups = samples.sample_groups(
        trajectory.samples, prompts=manifest.config.samples.prompts
    )
    recipe = (
        f"{trajectory.layout.name}/report/{RECIPE_NAME}" if not prefix else prefix + RECIPE_NAME
    )
    return {
        "name": trajectory.name,
        "folder": trajectory.layout.name,
        "paragraphs": summary.paragraphs(trajectory),
        "panels": draw_panels(trajectory),
        "benchmark_panels": draw_benchmarks(trajectory),
        "benchmark_metrics": {m for s in trajectory.benchmarks for m in s.latest.scores},
        "benchmarks": rows.benchmark_rows(trajectory.benchmarks),
        "has_resumes": any(s.resumed_at is not None for s in trajectory.segments),
        "groups": groups,
        "num_more_groups": num_more_groups,
        "has_repetition": any(c.repetition for group in groups for c in group.completions),
        "losses": dict(trajectory.validation.points("loss_nats")),
        "segments": rows.segment_rows(trajectory.segments),
        "num_segments": len(trajectory.segments),
        "checkpoints": rows.checkpoint_rows(trajectory.checkpoints),
        "num_checkpoints": len(trajectory.checkpoints),
        "config": provenance.config_sections(manifest.config),
        "environment": provenance.environment(manifest),
        "identity": provenance.identity(manifest),
        "commands": provenance.commands(trajectory, recipe=recipe),
        "bad_lines": trajectory.num_bad_lines,
        "prefix": prefix,
    }


def _for_a_page(value: Any) -> Any:
    """What stands for a value in the page; trusted markup passes as it is."""
    return _without_controls(value) if type(value) is str else value


def _without_controls(text: str) -> str:
    """The text without what neither HTML nor UTF-8 can hold, such as lone surrogates."""
    return _NOT_FOR_PAGES.sub("�", text)
