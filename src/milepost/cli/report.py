"""`milepost report`: the trajectory of a run as one page."""

from __future__ import annotations

from pathlib import Path


def report(run: Path, *, out: Path | None = None, json: bool = False) -> None:
    """Write the report of a run: one HTML page, with the data of its figures as CSV beside it.

    The page needs no network and no script. It tells what happened in sentences, then shows the
    six panels of the paper's Figure 1, samples step by step, segments, checkpoints and what the
    run is made of.

    Example: `milepost report runs/first`

    Args:
        run: The run folder.
        out: The page's file. Default: RUN/report/index.html.
        json: Print one JSON document on stdout: the files and the numbers of the summary.
    """
    from milepost.core.console import say, show, show_json
    from milepost.trajectory import summary
    from milepost.trajectory.collect import collect
    from milepost.trajectory.report import write_pages

    trajectory = collect(run)
    page, *beside = write_pages(trajectory, out=out)
    if json:
        show_json({"report": page, "files": beside, "summary": summary.numbers(trajectory)})
        return
    for name, count in trajectory.num_bad_lines.items():
        say(summary.skipped_lines(count, name=name))
    show(str(page))
