"""The laboratory's results in sentences and tables."""

from __future__ import annotations

from collections.abc import Sequence

from milepost.experiments.lab.measures import HELD_VALUES, NOISE_DEVIATIONS, Mean, Measure
from milepost.experiments.lab.results import STEP_WIDTH, ArmResult, Results
from milepost.runs.metric_names import GRAD_NORM, TRAIN_LOSS, VAL_LOSS
from milepost.trajectory.sections.text_table import Column, TextTable, numbers
from milepost.trajectory.sections.wording import (
    NONE,
    benchmark_of,
    capitalized,
    enumerate_words,
    interval_words,
    metric_words,
    plain,
    plural,
    signed,
)
from milepost.trajectory.statistics.bootstrap import Interval

QUESTION = (
    "A run was stopped and started again, and its loss jumped: which part of the restart did it? "
    "The paper names the optimizer's state, which its restarts did not restore; its script also "
    "stretched the schedule and, with another number of GPUs, measured on other text. Here each "
    "is done alone, from the same checkpoint, against the same run without an interruption."
)


def unit_of(metric: str) -> str:
    """What a metric's differences are counted in."""
    if metric in (VAL_LOSS, TRAIN_LOSS):
        return "nats"
    return "share of items" if benchmark_of(metric) else "L2"


def name_of(metric: str) -> str:
    """A metric inside a sentence; of a score its error is measured, so that high is bad."""
    score = benchmark_of(metric)
    return f"error on {score[0]}" if score else metric_words(metric)


def answer(results: Results) -> list[str]:
    """What the laboratory says, a few sentences; fewer where arms are missing."""
    told = [_exact(results), _moments(results), _authors(results), _diverged(results)]
    return [sentence for sentence in told if sentence]


def _exact(results: Results) -> str:
    found = [arm for arm in results.arms if arm.arm.keeps_bits]
    runs = [run for arm in found for run in arm.runs if run.has_parents_bits is not None]
    if not runs:
        return ""
    equal = sum(bool(run.has_parents_bits) for run in runs)
    which = "; ".join(arm.arm.title.lower() for arm in found)
    steps = results.setting.steps_after
    if equal == len(runs):
        return (
            f"A restart that restores everything costs nothing: {_of(equal, len(runs), 'restart')} "
            f"({which}) had the parent's bits in every one of {steps:,} steps and in the weights."
        )
    return (
        f"Only {_of(equal, len(runs), 'restart')} that restored everything had the parent's bits."
    )


def _of(count: int, total: int, noun: str) -> str:
    return f"{count} of {total} {noun}{'' if total == 1 else 's'}"


def _moments(results: Results) -> str:
    found = results.of("moments")
    if found is None or (spike := found.spike(VAL_LOSS)) is None:
        return ""
    z = found.spike_z(VAL_LOSS)
    if z is not None and z <= NOISE_DEVIATIONS:
        told = (
            "Losing the optimizer's moments alone does not show in the validation loss: "
            f"{_mean(spike)} nats at the worst, which is within the noise"
        )
    else:
        told = (
            f"Losing the optimizer's moments alone moves the validation loss by {_mean(spike)} "
            f"nats at the worst, {_recovery(found.measures(VAL_LOSS), results)}"
        )
    end = found.end(VAL_LOSS)
    if end is not None:
        told += f"; at the end it stands {_mean(end)} nats from the parent's"
    anew = results.of("warmup")
    if anew is not None and (other := anew.spike(VAL_LOSS)) is not None:
        told += f"; with a new warm-up the worst is {_mean(other)}"
        if (end := anew.end(VAL_LOSS)) is not None:
            told += f", the end {_mean(end)}"
    return told + "."


def _authors(results: Results) -> str:
    found = results.of("authors")
    if found is None or (spike := found.spike(VAL_LOSS)) is None:
        return ""
    told = (
        "What the authors did moves the measured validation loss by "
        f"{_mean(spike)} nats at the worst"
    )
    parts = []
    if (moments := results.of("moments")) and (spike := moments.spike(VAL_LOSS)):
        parts.append(f"the lost moments {_mean(spike)}")
    if (other := results.of("validation")) and (start := other.start(VAL_LOSS)):
        parts.append(f"the other text {_mean(start)} from the checkpoint itself on")
    if (stretched := results.of("schedule")) and (end := stretched.end(VAL_LOSS)):
        parts.append(f"the stretched schedule {_mean(end)} at the end")
    return f"{told}; alone, {', '.join(parts)}." if parts else f"{told}."


def _diverged(results: Results) -> str:
    parts = [
        f"{arm.arm.title.lower()}: {_of(arm.num_diverged, len(arm.runs), 'seed')}"
        for arm in results.arms
        if arm.num_diverged
    ]
    told = (
        [f"Restarts that diverged: {'; '.join(parts)}. Means are of the others."] if parts else []
    )
    if lost := results.lost_seeds:
        seeds = enumerate_words([str(seed) for seed in lost])
        told.append(
            f"The parent of {'seed' if len(lost) == 1 else 'seeds'} {seeds} diverged itself, so "
            "that there is nothing to hold a restart against."
        )
    return " ".join(told)


def separated(results: Results) -> TextTable | None:
    """What the paper could not tell apart, each alone."""
    rows = []
    for cause, name in _CAUSES.items():
        found = results.of(name)
        if found is None or not (found.measures(VAL_LOSS) or found.num_diverged):
            continue
        rows.append(
            (
                f"{cause}\n{found.arm.title}",
                _cell(found.start(VAL_LOSS)),
                _cell(found.spike(VAL_LOSS)),
                _recovery_cell(found, VAL_LOSS),
                _cell(found.end(VAL_LOSS)),
            )
        )
    columns = (
        Column("Cause"),
        *numbers(
            "At the checkpoint itself\nnats",
            "Peak over the parent\nnats",
            "Back in the noise\nsteps",
            "At the end\nnats",
        ),
    )
    caption = "Validation loss, each cause alone, then together"
    return TextTable(caption, columns, tuple(rows), is_plain=True) if rows else None


_CAUSES = {
    "Optimizer state": "moments",
    "Schedule": "schedule",
    "Data order": "data",
    "Validation set": "validation",
    "Hardware (1 to 2 ranks)": "ranks",
    "State, schedule and set together": "authors",
}


def table_of(results: Results, metric: str) -> TextTable:
    """Every arm's spike, recovery and end for one metric."""
    rows = [_row(found, metric, results) for found in results.arms]
    unit = unit_of(metric)
    columns = (
        Column("Arm"),
        *numbers(
            f"Peak over the parent\n{unit}",
            "In deviations\nof its noise",
            "Back in the noise\nsteps",
            f"At the end\n{unit}",
            "Bits of the parent\nseeds",
        ),
    )
    return TextTable(capitalized(name_of(metric)), columns, tuple(rows), is_plain=True)


def _row(found: ArmResult, metric: str, results: Results) -> tuple[str, ...]:
    z = found.spike_z(metric)
    checked = [run.has_parents_bits for run in found.runs if run.has_parents_bits is not None]
    bits = f"{sum(checked)} of {len(checked)}" if checked else NONE
    diverged = _of(found.num_diverged, len(found.runs), "seed")
    title = f"{found.arm.title}\n{diverged} diverged" if found.num_diverged else found.arm.title
    return (
        title,
        _cell(found.spike(metric)),
        NONE if z is None else plain(z, decimals=1),
        _recovery_cell(found, metric),
        _cell(found.end(metric)),
        bits,
    )


def _decimals(value: float) -> int:
    """Three for the hundredths that matter here, none for what is in the thousands."""
    return 3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0


def _mean(mean: Mean) -> str:
    """'+0.123 (95 %: 0.08 to 0.16)'; an interval that holds zero is said to."""
    decimals = _decimals(mean.value)
    told = signed(mean.value, decimals=decimals)
    if (interval := _shown(mean.interval)) is None:
        return told
    unclear = ", not told apart from zero" if interval.holds(0.0) else ""
    return f"{told} (95 %: {interval_words(interval, decimals=decimals)}{unclear})"


def _shown(interval: Interval | None) -> Interval | None:
    """None where there is nothing to tell: one seed, or every seed has the same."""
    return None if interval is None or interval.high == interval.low else interval


def _cell(mean: Mean | None) -> str:
    if mean is None:
        return NONE
    decimals = _decimals(mean.value)
    told = signed(mean.value, decimals=decimals)
    interval = _shown(mean.interval)
    return f"{told}\n{interval_words(interval, decimals=decimals)}" if interval else told


def _recovery(measures: Sequence[Measure], results: Results) -> str:
    """'back in the noise after 40 to 70 steps', with what never was."""
    after = sorted(m.recovered_after for m in measures if m.recovered_after is not None)
    never = len(measures) - len(after)
    steps = results.setting.steps_after
    if not after:
        return f"not back in the noise within {steps:,} steps"
    told = f"{after[0]:,}" if after[0] == after[-1] else f"{after[0]:,} to {after[-1]:,}"
    words = f"back in the noise after {told} steps"
    return f"{words} ({never} of {len(measures)} not within {steps:,})" if never else words


def _recovery_cell(found: ArmResult, metric: str) -> str:
    if found.arm.has_other_text and metric == VAL_LOSS:
        return NONE
    return ", ".join(
        _recovered(run.measures.get(metric)) if run.status == "done" else run.status
        for run in found.runs
    )


def _recovered(found: Measure | None) -> str:
    if found is None:
        return NONE
    return "never" if found.recovered_after is None else f"{found.recovered_after:,}"


def method(results: Results) -> list[str]:
    """How it was measured, and what it does not say."""
    setting = results.setting
    seeds = len(results.parents)
    told = [
        f"Recipe {setting.name}, {seeds} parent{'' if seeds == 1 else 's'} of different seeds, "
        f"each trained without interruption to step {setting.last_step:,}. Every arm begins with "
        f"the parent's checkpoint of step {setting.at:,} and trains {setting.steps_after:,} steps; "
        "each is a run folder of its own, made with milepost train.",
        "Differences are paired: an arm less its parent, at the same step and the same seed. Peak: "
        f"the highest difference; training loss and {name_of(GRAD_NORM)} are means of the last "
        f"{STEP_WIDTH} steps (of fewer at first). Noise: the standard deviation of the parent's "
        "own curve from one value to the next; times the square root of two where the arm sees "
        "other batches, since then both curves add theirs. Back in the noise: the first step after "
        f"the peak from which {HELD_VALUES} values in a row (of a short curve a quarter) are no "
        "more than two such deviations above the parent; 0 where the peak itself is not. "
        "At the end: the mean over the last tenth of the steps.",
        "The peak is a maximum, so that noise alone makes it greater than zero: read it beside its "
        "deviations.",
    ]
    if any(found.arm.has_other_text for found in results.arms):
        told.append(
            "An arm that is measured on other text stands off the parent from the checkpoint "
            "itself on, with the same weights: no way back into the parent's noise is given for it."
            " Whether it stands above or below is chance: it is how hard that text is. All seeds "
            "have the same, so that their interval says nothing of yet another text."
        )
    if any(found.arm.has_other_batches for found in results.arms):
        told.append(
            "Where the data begin anew, the arm trains on text that its weights have seen: a lower "
            "training loss is memory, and only the validation loss tells what was gained or lost."
        )
    if seeds > 1:
        told.append(
            f"Intervals are those of Student's t over {seeds} seeds "
            f"({plural(seeds - 1, 'degree')} of freedom), 95 %. With so few they are "
            "wide: they say where the mean lies, not that an effect is absent."
        )
    else:
        told.append("One seed has no interval: what it shows may be its own.")
    told.append(
        "A small model and a few hundred steps: sizes of effects are those of this model, data and "
        "place in the schedule, and say nothing of a model a thousand times as large."
    )
    return told
