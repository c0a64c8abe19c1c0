"""`milepost report`: the trajectory of a run, or of several, as one page."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter


def report(
    *runs: Path,
    example: str | None = None,
    imports: Annotated[list[str] | None, Parameter(name="--import", negative="")] = None,
    baseline: str = "published",
    axis: Literal["steps", "tokens", "flops"] | None = None,
    tokens_per_step: int | None = None,
    out: Path | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Write the report of a run: one HTML page, with its data as CSV and Parquet beside it.

    The page needs no network, and no script to be whole. It tells what happened in sentences, then
    shows the six panels of the paper's Figure 1, the benchmarks, ratings, samples step by step,
    and what the run is made of. The first of all that is named is its subject; the others are
    laid over it, at most six in all.

    Example: `milepost report runs/first`

    Example: `milepost report runs/first runs/second --import lm-eval:evals/pythia-1b`

    Example: `milepost report --example paper`

    Args:
        runs: Run folders.
        example: A trajectory that comes with the install: paper.
        imports: FORMAT:PATH, what another program wrote: lm-eval (a folder of result files named
            by step), csv, tensorboard or wandb. Can be given several times.
        baseline: Levels beside the benchmarks: published (TinyLlama and Pythia), none, or a TOML
            file of one's own.
        axis: What the figures are drawn against. Default: steps, and tokens where there are
            several trajectories.
        tokens_per_step: Of imports that count no tokens.
        out: The page's file. Default: report/index.html in the first run's folder;
            milepost-report/index.html here where no run is named.
        json: Print one JSON document on stdout: the files, and the numbers of the summary and of
            the statistics.
    """
    from milepost.core.console import say, show, show_json
    from milepost.trajectory import summary
    from milepost.trajectory.opening import Request, open_subject
    from milepost.trajectory.report import left_out_courses, numbers, write_pages
    from milepost.trajectory.sections.work import as_numbers, work_out

    request = Request(
        runs=runs,
        example=example,
        imports=tuple(imports or ()),
        baseline=baseline,
        axis=axis,
        tokens_per_step=tokens_per_step,
    )
    with _no_search_for_cycles():
        subject = open_subject(request)
        found = work_out(subject)
        page, *beside = write_pages(subject, found, out=out)
    if json:
        told = {"summary": numbers(subject), "statistics": as_numbers(subject, found)}
        show_json({"report": page, "files": beside} | told)
        return
    if subject.run is not None:
        for name, count in subject.run.num_bad_lines.items():
            say(summary.skipped_lines(count, name=name))
        for sentence in summary.left_out(subject.run):
            say(sentence)
        if subject.run.answers_problem:
            say(f"no answers before and after: {subject.run.answers_problem}")
    for sentence in left_out_courses(subject):
        say(sentence)
    show(str(page))


@contextlib.contextmanager
def _no_search_for_cycles() -> Iterator[None]:
    """For the block, Python looks for no garbage.

    It would go through all that was read again and again, and free nothing: a tenth of the time
    that the report of a long run takes.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
