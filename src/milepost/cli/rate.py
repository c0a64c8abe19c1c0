"""`milepost rate`: a page on this machine where people rate completions blind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from milepost.core import console

if TYPE_CHECKING:
    from milepost.runs.layout import RunLayout
    from milepost.serve.rounds import Progress, Rounds


def rate(
    run: Path,
    *,
    rater: str | None = None,
    steps: str | None = None,
    limit: int | None = None,
    repeat_fraction: float = 0.1,
    host: str = "127.0.0.1",
    port: int | None = None,
    browser: bool = True,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Serve a page where people rate the completions of a run, blind.

    Every recorded sample is scored from 0 to 10 on six criteria, by keyboard. Step and model are
    hidden, the order is shuffled for each rater, some completions come twice. Any number of
    people can rate, one after the other or at once; whoever comes back goes on where they
    stopped. Scores go to ratings.jsonl in the run. Ctrl-C ends the page.

    Example: `milepost rate runs/demo --rater Ada`

    Parameters
    ----------
    run
        The run folder, with samples.
    rater
        Who rates. Default: the page asks.
    steps
        Rate samples of these steps only: all, latest, every:N, or steps such as 100,200.
    limit
        At most so many samples, evenly over the steps, the same for every rater.
    repeat_fraction
        How many of the samples are shown twice, 0 to 1.
    host
        An address of this machine. Others are refused: from elsewhere go through ssh -L.
    port
        Port of the page; 0 takes any free one. Default: 8737, or the next that is free.
    browser
        Open the page in the browser, where there is a screen.
    json
        When the page has ended, one JSON document on stdout: who rated how many.
    """
    from milepost.runs.layout import RunLayout
    from milepost.serve.local import address_of, open_port, serve_until_stopped
    from milepost.serve.rating import build_app
    from milepost.serve.rounds import checked_name

    layout = RunLayout(run)
    rounds = _rounds(layout, steps=steps, limit=limit, repeat_fraction=repeat_fraction)
    name = None if rater is None else rounds.open(checked_name(rater)).rater
    with open_port(host, port=port) as listening:
        address = address_of(listening)
        console.say(f"rating page: {address}")
        console.say(_how_far(rounds, name))
        console.say("Ctrl-C ends it; every completion is recorded as soon as it is rated")
        if browser:
            _open_browser(address)
        serve_until_stopped(build_app(rounds, rater=name), listening=listening)
    saved = rounds.saved_now()
    console.say(_what_was_rated(saved, layout=layout))
    if json:
        console.show_json(_as_json(saved, layout=layout))


def _rounds(
    layout: RunLayout, *, steps: str | None, limit: int | None, repeat_fraction: float
) -> Rounds:
    """What is to be rated, with how much of it said; refuses what leaves nothing to rate."""
    from milepost.core.errors import DataError, UsageError
    from milepost.evaluation.rating_plan import Presentation, rating_plan, sample_steps
    from milepost.runs.events import utc_now
    from milepost.runs.manifest import read_run_manifest
    from milepost.runs.records import read_samples
    from milepost.serve.rounds import Rounds

    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} leaves nothing to rate", hint="give 1 or more")
    if not 0 <= repeat_fraction <= 1:
        raise UsageError(
            f"--repeat-fraction {repeat_fraction} is not 0 to 1",
            hint="0.1 shows one sample of ten twice",
        )
    manifest = read_run_manifest(layout)
    samples, num_bad = read_samples(layout.samples)
    if num_bad:
        console.say(f"{layout.samples.name}: {num_bad} lines could not be read and are left out")
    if not rating_plan(samples, seed="", fraction_repeated=0):
        raise DataError(
            f"{layout.root} has no samples to rate",
            hint=f"milepost sample {layout.root} --steps all records some",
        )
    wanted = sample_steps(samples, text=steps)

    def plan(rater: str) -> list[Presentation]:
        return rating_plan(
            samples, seed=rater, fraction_repeated=repeat_fraction, limit=limit, steps=wanted
        )

    return Rounds(layout.ratings, plan=plan, secret=manifest.run_id, now=utc_now)


def _how_far(rounds: Rounds, rater: str | None) -> str:
    """What waits for the rater, or for whoever will come."""
    if rater is not None:
        progress = rounds.open(rater)
        return f"{progress.rater}: {progress.rated} of {progress.total} completions rated"
    people = [f"{p.rater} {p.rated} of {p.total}" for p in rounds.so_far()]
    return f"rated so far: {', '.join(people)}" if people else "nobody has rated this run yet"


def _open_browser(address: str) -> None:
    """Opens the page where there is a screen; elsewhere a browser would take the terminal."""
    import os
    import sys
    import webbrowser

    if sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(address)


def _what_was_rated(saved: Mapping[str, tuple[int, Progress]], *, layout: RunLayout) -> str:
    if not saved:
        return "ended; nothing was rated"
    lines = [
        f"{rater} rated {count} {'completion' if count == 1 else 'completions'},"
        f" {progress.rated} of {progress.total} in all"
        for rater, (count, progress) in saved.items()
    ]
    lines.append(f"recorded in {layout.ratings}; milepost report {layout.root} shows them")
    return "\n".join(lines)


def _as_json(saved: Mapping[str, tuple[int, Progress]], *, layout: RunLayout) -> dict[str, object]:
    raters = [
        {"rater": rater, "now": count, "rated": progress.rated, "total": progress.total}
        for rater, (count, progress) in saved.items()
    ]
    return {"ratings": layout.ratings, "raters": raters}
