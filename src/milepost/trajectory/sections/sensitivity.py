"""What small changes of a prompt do along the steps: how far they move the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from milepost.trajectory.collect import Trajectory
from milepost.trajectory.fields import finite, text, whole
from milepost.trajectory.samples import evenly_spread
from milepost.trajectory.sections.text_table import Column, TextTable, numbers
from milepost.trajectory.sections.wording import NONE, plain, plural
from milepost.trajectory.subject import Section

MAX_PROMPTS_SHOWN = 6
MAX_VARIANTS_SHOWN = 10
MAX_NAME_CHARACTERS = 40
MAX_PROMPT_CHARACTERS = 100
"""Of a prompt's end, which the template's first sentence would hide."""


@dataclass(frozen=True)
class Sensitivity:
    """What the section shows.

    Attributes:
        tables: one a prompt.
        num_more: prompts that are on record and not shown.
    """

    tables: tuple[TextTable, ...]
    num_more: int


_Probed = dict[str, dict[int, float]]
"""Variant to step to divergence, in the order they were recorded."""


def sensitivity_section(run: Trajectory) -> Section | None:
    """The section; None where nothing of the run was probed."""
    probed = _probed(run)
    if not probed:
        return None
    shown = list(probed.items())[:MAX_PROMPTS_SHOWN]
    tables = tuple(_table(prompt, found) for (prompt, _), found in shown)
    content = Sensitivity(tables, len(probed) - len(shown))
    template = "sections/sensitivity.jinja"
    return Section("sensitivity", "Prompt sensitivity", template, content)


def _probed(run: Trajectory) -> dict[tuple[str, str], _Probed]:
    """By prompt and by the adapter that was put on; a fine-tuning's own are those of its steps."""
    found: dict[tuple[str, str], _Probed] = {}
    for line in run.probes:
        prompt, variant = text(line.get("base")), text(line.get("variant"))
        step, divergence = whole(line.get("step")), finite(line.get("kl_nats"))
        if prompt is None or variant is None or step is None or divergence is None:
            continue
        if line.get("prompt") == prompt:  # the base against itself
            continue
        adapter = "" if run.is_finetuning else text(line.get("adapter")) or ""
        of_prompt = found.setdefault((prompt, adapter), {})
        of_prompt.setdefault(variant, {})[step] = divergence
    return found


def _table(prompt: str, probed: _Probed) -> TextTable:
    names = list(probed)[:MAX_VARIANTS_SHOWN]
    steps = sorted({step for by_step in probed.values() for step in by_step})
    shown = evenly_spread(steps)
    rows = tuple(
        (f"{step:,}", *(_cell(probed[name].get(step)) for name in names)) for step in shown
    )
    columns = (Column("Step", is_number=True), *numbers(*map(_short, names)))
    return TextTable(_caption(prompt, probed, steps, shown), columns, rows, is_plain=True)


def _caption(prompt: str, probed: _Probed, steps: Sequence[int], shown: Sequence[int]) -> str:
    end = prompt if len(prompt) <= MAX_PROMPT_CHARACTERS else "…" + prompt[-MAX_PROMPT_CHARACTERS:]
    told = f"“{end}”"
    if (more := len(probed) - MAX_VARIANTS_SHOWN) > 0:
        told += f", {plural(more, 'variant')} more on record"
    if len(shown) < len(steps):
        told += f", {len(shown)} of {plural(len(steps), 'step')}"
    return told


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME_CHARACTERS else name[:MAX_NAME_CHARACTERS] + "…"


def _cell(divergence: float | None) -> str:
    return NONE if divergence is None else plain(divergence, decimals=4)
