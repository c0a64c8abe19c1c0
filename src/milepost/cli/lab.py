"""`milepost lab`: experiments that are more than one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

OPTIONS = ("at", "out", "seeds", "steps-after", "only", "json", "debug")


def resume(
    recipe: str,
    *overrides: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    at: int,
    out: Path = Path("resume-lab"),
    seeds: int = 3,
    steps_after: int | None = None,
    only: str | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Measure what a restart costs, and which part of it costs what.

    A run is trained without interruption. Then it is restarted from one of its checkpoints in
    several ways, the arms, that differ in one thing each: the moments lost, the data begun anew,
    the schedule stretched, and so on. A report compares their curves with the run's own. Every
    arm is a run folder of its own; what is done is not done again, so that the same command goes
    on after an interruption.

    Example: `milepost lab resume lab --at 300 --data.path data/lab`

    Parameters
    ----------
    recipe
        A packaged recipe, such as lab, or a .toml file.
    at
        The step of the checkpoint that all arms begin with.
    out
        The laboratory's folder.
    seeds
        How many runs are trained and restarted, with seeds in a row.
    steps_after
        Updates after the restart. Default: 300, or as many as the recipe has left.
    only
        Arms with commas between: moments, warmup, data, validation, schedule, ranks, lowbit,
        restart, authors. The full restore is always among them. Default: all.
    json
        Print one JSON document at the end.
    """
    from milepost.config.recipe import load_recipe
    from milepost.core import console
    from milepost.experiments.lab.laboratory import in_words, run_laboratory
    from milepost.experiments.lab.page import as_plain, sentences
    from milepost.experiments.lab.setting import make_setting

    setting = make_setting(
        load_recipe(recipe, overrides=overrides, options=OPTIONS),
        name=recipe,
        out=out,
        at=at,
        steps_after=steps_after,
        num_seeds=seeds,
    )
    finished = run_laboratory(setting, only=only)
    if json:
        console.show_json(as_plain(finished.results, left_out=finished.left_out))
        return
    for sentence in sentences(finished.results):
        console.show(sentence)
    console.say(in_words(finished))


def report(
    folder: Path = Path("resume-lab"),
    *,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Write the report of a laboratory as far as it is, and train nothing.

    It may be written while the laboratory is at work, and after it was stopped.

    Example: `milepost lab report resume-lab`

    Parameters
    ----------
    folder
        The laboratory's folder, as `--out` named it.
    json
        Print one JSON document.
    """
    from milepost.core import console
    from milepost.experiments.lab.laboratory import report_laboratory
    from milepost.experiments.lab.page import as_plain, sentences

    results = report_laboratory(folder)
    if json:
        console.show_json(as_plain(results, left_out={}))
        return
    for sentence in sentences(results):
        console.show(sentence)
    console.say(
        f"{results.num_done} of {results.num_runs} runs that have begun are done; "
        f"report: {results.setting.report}"
    )
