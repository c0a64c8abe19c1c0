"""What `milepost judge` shows when it has ended: scores by step, what was asked, what failed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from milepost.core import console
from milepost.evaluation.judge import Judging
from milepost.evaluation.judge_client import ChatServer
from milepost.evaluation.judge_cost import Budget
from milepost.runs.layout import RunLayout
from milepost.runs.ratings import RUBRIC, read_ratings
from milepost.runs.records import read_samples
from milepost.trajectory.ratings import RatingSummary, summarize_ratings
from milepost.trajectory.sections.wording import plural

MOST_SHOWN = 10


def show_scores(layout: RunLayout, *, model: str) -> None:
    """A row a step; every rating of this judge that is on record counts."""
    summary = _summary(layout, model=model)
    for group in summary.groups:
        names = [criterion.name.lower() for criterion in RUBRIC]
        console.show(f"{group.raters}: mean scores, 0 to 10")
        console.show(
            f"{'step':>8}{'samples':>9}"
            + "".join(f"{n:>{len(n) + 2}}" for n in names)
            + "  average"
        )
        for place, step in enumerate(group.steps):
            row = f"{step:>8}{group.counts[place]:>9}"
            for criterion, name in zip(RUBRIC, names, strict=True):
                mean = group.means[criterion.key][place]
                row += f"{'-' if mean is None else f'{mean:.2f}':>{len(name) + 2}}"
            console.show(row + f"{group.averages[place]:>9.2f}")
    for pair in summary.agreement:
        if pair.kind == "self" and pair.criterion == "average" and pair.num_samples:
            alpha = pair.absence if pair.alpha is None else f"Krippendorff's alpha {pair.alpha:.2f}"
            console.show(
                f"asked twice about {plural(pair.num_samples, 'sample')}, its averages differ by"
                f" {pair.mean_difference:.2f} points; {alpha}"
            )


def say_what_was_done(
    told: Judging, *, budget: Budget, server: ChatServer | None, path: Path
) -> None:
    """Says what was asked, what it cost and what failed."""
    if server is None:
        console.say(f"{told.num_from_record} replies read from {path}")
    elif told.num_asked:
        _say_what_was_asked(told, budget=budget, form=server.form or "text", path=path)
    if told.failures:
        console.warn(f"of {len(told.failures)} of the ratings no reply could be used:")
        for failure in told.failures[:MOST_SHOWN]:
            console.say(f"  sample {failure.sample_id}, repeat {failure.repeat}: {failure.problem}")
        if len(told.failures) > MOST_SHOWN:
            console.say(f"  and {len(told.failures) - MOST_SHOWN} more")
        console.say(f"without their lines in {path} they would be asked again")


def _say_what_was_asked(told: Judging, *, budget: Budget, form: str, path: Path) -> None:
    demanded = {"json_schema": "by a JSON schema", "json_object": "as a JSON object"}
    again = f", {told.num_retries} requests were sent again" if told.num_retries else ""
    # What another machine calls its models may hold marks that steer a terminal.
    served = "".join(c for c in ", ".join(sorted(told.served_models)) if c.isprintable())
    console.say(
        f"{told.num_asked} replies of {served}, their form demanded"
        f" {demanded.get(form, 'in words only')}; {told.num_from_record} more were on record{again}"
    )
    cost = "" if budget.cost is None else f", cost {budget.cost:.4f}"
    console.say(f"{budget.num_asked_tokens:,} tokens asked, {budget.num_said_tokens:,} said{cost}")
    if budget.num_uncounted:
        console.warn(f"the server did not count the tokens of {budget.num_uncounted} replies")
    console.say(f"raw replies in {path}")


def as_json(
    told: Judging,
    *,
    layout: RunLayout,
    model: str,
    num_due: int,
    budget: Budget,
    server: ChatServer | None,
) -> dict[str, Any]:
    """The same for programs.

    Args:
        told: how far the judge came.
        layout: of the run.
        model: the judge.
        num_due: ratings that were to be done.
        budget: what was spent.
        server: None where recorded replies were read.
    """
    return {
        "model": model,
        "ratings": layout.ratings,
        "due": num_due,
        "rated": told.num_rated,
        "left": num_due - told.num_done,
        "failures": [asdict(failure) for failure in told.failures],
        "missing": [{"sample_id": p.sample_id, "repeat": p.repeat} for p in told.missing],
        "asked": told.num_asked,
        "from_record": told.num_from_record,
        "retries": told.num_retries,
        "served_models": dict(told.served_models),
        "form": None if server is None else server.form,
        "tokens_asked": budget.num_asked_tokens,
        "tokens_said": budget.num_said_tokens,
        "cost": budget.cost,
        "is_budget_spent": told.is_budget_spent,
        "scores": [asdict(group) for group in _summary(layout, model=model).groups],
    }


def _summary(layout: RunLayout, *, model: str) -> RatingSummary:
    records, num_bad = read_ratings(layout.ratings)
    own = [r for r in records if r.rater == model and r.rater_kind == "model"]
    samples, _ = read_samples(layout.samples)
    return summarize_ratings(own, samples, num_bad_lines=num_bad)
