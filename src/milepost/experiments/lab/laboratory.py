"""The resume laboratory from its first run to its report."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from milepost.core.console import say, warn
from milepost.core.errors import MilepostError
from milepost.core.files import exclusive_lock, storage_errors
from milepost.core.units import format_duration
from milepost.distributed.devices import count_gpus
from milepost.experiments.lab.arms import all_arms, arms_begun, choose_arms
from milepost.experiments.lab.page import write_page
from milepost.experiments.lab.results import Results, collect_results
from milepost.experiments.lab.running import train_all
from milepost.experiments.lab.setting import Setting, open_folder, read_setting


class NotExact(MilepostError):
    """A restart that restores everything did not give the parent's bits."""


@dataclass(frozen=True)
class Finished:
    """What a laboratory has shown.

    Attributes:
        left_out: arms that this machine cannot train, with the reason.
        seconds: of this command, which may have found some runs done.
    """

    results: Results
    report: Path
    left_out: dict[str, str]
    seconds: float


def run_laboratory(setting: Setting, *, only: str | None) -> Finished:
    """Trains what is not done yet and writes the report, after every seed once more.

    Args:
        setting: of the laboratory.
        only: names of arms with commas between; None: all that this machine can train.

    Raises:
        UsageError: the folder is of something else, or an arm cannot be.
        RunInUseError: another process is at work in it.
        NotExact: an arm that must have the parent's bits has others; the report is written.
        MilepostError: a training failed, or a stop was asked for; the same command goes on.
    """
    started = time.monotonic()
    arms, left_out = choose_arms(setting, only=only, num_gpus=count_gpus())
    with storage_errors(setting.out):
        setting.out.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(setting.out / ".lock", what=str(setting.out)):
        open_folder(setting)
        for name, reason in left_out.items():
            warn(f"the arm {name} is left out: {reason}")
        say(
            f"{setting.out}: {setting.num_seeds} seeds, a parent and {len(arms)} arms each, "
            f"restarted at step {setting.at}, {setting.steps_after} steps after it"
        )

        names = {arm.name for arm in [*arms, *arms_begun(setting)]}
        shown = [arm for arm in all_arms(setting) if arm.name in names]

        def on_seed(seed: int) -> None:
            write_page(collect_results(setting, shown), left_out=left_out)
            say(f"seed {seed}: the report has it, {setting.report}")

        train_all(setting, arms, on_seed=on_seed)
        results = collect_results(setting, shown)
    finished = Finished(results, setting.report, left_out, time.monotonic() - started)
    _refuse_other_bits(finished)
    return finished


def report_laboratory(out: Path) -> Results:
    """Writes the report of what is done by now, also while the laboratory is at work.

    Raises:
        UsageError: the folder holds no laboratory.
    """
    setting = read_setting(out)
    results = collect_results(setting, arms_begun(setting))
    write_page(results, left_out={})
    return results


def _refuse_other_bits(finished: Finished) -> None:
    different = [
        f"{found.arm.name} of seed {run.seed}"
        for found in finished.results.arms
        for run in found.runs
        if run.has_parents_bits is False
    ]
    if different:
        raise NotExact(
            f"not exact: {different[0]} does not have the parent's bits; the report at "
            f"{finished.report} was written",
            hint="report this with the runs' folders; milepost doctor says what this machine is",
        )


def in_words(finished: Finished) -> str:
    """One line for the end of the command."""
    runs = f"{finished.results.num_done} of {finished.results.num_runs} runs"
    took = format_duration(finished.seconds)  # of this command: earlier ones may have done others
    return f"{runs}; this command took {took}; report: {finished.report}"
