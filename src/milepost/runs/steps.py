"""Which checkpoints of a run a command means: `all`, `latest`, `every:N` or a list of steps."""

from __future__ import annotations

import re
from pathlib import Path

from milepost.core.errors import CheckpointError, UsageError
from milepost.runs.layout import RunLayout, checkpoint_folders

_MOST_SHOWN = 12


def is_run(path: Path) -> bool:
    """Whether a folder is a run, not a model folder (which may have a manifest.json too)."""
    of_model = ("config.json", "adapter_config.json")
    return (path / "manifest.json").is_file() and not any((path / n).exists() for n in of_model)


def available_steps(layout: RunLayout) -> list[int]:
    """Steps of the run that have a checkpoint, ascending."""
    return [step for step, _ in checkpoint_folders(layout)]


def parse_steps(text: str, *, layout: RunLayout) -> list[int]:
    """The steps that a `--steps` option means.

    Args:
        text: "all", "latest", "every:N" (steps that N divides), or steps with commas between.
        layout: of the run; only steps with a checkpoint count.

    Returns:
        Steps, ascending, each once, at least one.

    Raises:
        UsageError: the text is not of that form.
        CheckpointError: the run has no such checkpoint; the message says which there are.
    """
    available = available_steps(layout)
    wanted = wanted_steps(text, available=available)
    if not available:
        raise CheckpointError(
            f"{layout.root} has no checkpoint yet", hint="let it train up to its first checkpoint"
        )
    missing = [step for step in wanted if step not in available]
    if missing or not wanted:
        what = f"step {missing[0]}" if missing else f"step that {text.partition(':')[2]} divides"
        raise CheckpointError(
            f"{layout.root} has no checkpoint of {what}", hint=describe_steps(available)
        )
    return wanted


def describe_steps(available: list[int], *, what: str = "checkpoints") -> str:
    """One line that says of which steps there are checkpoints, or samples; for hints."""
    if len(available) <= _MOST_SHOWN:
        return f"there are {what} of steps {', '.join(map(str, available))}"
    shown = ", ".join(map(str, available[: _MOST_SHOWN - 1]))
    return f"there are {what} of {len(available)} steps, {shown} ... {available[-1]}"


def wanted_steps(text: str, *, available: list[int]) -> list[int]:
    """The steps that a `--steps` option means; those it names may not be available.

    Raises:
        UsageError: the text is not of that form.
    """
    text = text.strip()
    if text == "all":
        return available
    if text == "latest":
        return available[-1:]
    every = re.fullmatch(r"every:([0-9]{1,12})", text)
    if every and int(every.group(1)) > 0:
        return [step for step in available if step % int(every.group(1)) == 0]
    if re.fullmatch(r"[0-9]{1,12}( *, *[0-9]{1,12})*", text):
        return sorted({int(part) for part in text.split(",")})
    raise UsageError(
        f"--steps {text!r} cannot be read",
        hint="give all, latest, every:N (N at least 1), or steps such as 100,200",
    )
