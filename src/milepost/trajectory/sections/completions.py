"""Completions of the same prompts along the steps, with what is new in each marked."""

from __future__ import annotations

from dataclasses import dataclass

from milepost.trajectory.collect import Trajectory
from milepost.trajectory.finetuning import other_samples
from milepost.trajectory.samples import SampleGroup, sample_groups
from milepost.trajectory.subject import Section


@dataclass(frozen=True)
class Completions:
    """What the section shows.

    Attributes:
        num_more_groups: prompts that are on record and not shown.
        losses: validation loss by step.
    """

    groups: list[SampleGroup]
    num_more_groups: int
    losses: dict[int, float]

    @property
    def has_repetition(self) -> bool:
        """Whether somebody counted how much any of them repeats itself."""
        return any(c.repetition for group in self.groups for c in group.completions)

    @property
    def has_marks(self) -> bool:
        """Whether a word of any of them is marked as new."""
        pieces = (p for g in self.groups for c in g.completions for p in c.pieces)
        return any(piece.is_new for piece in pieces)


def completions_section(run: Trajectory) -> Section | None:
    """The section, which says so where there are no samples.

    A fine-tuning takes none by itself; without any it has no such section.
    """
    samples, prompts = other_samples(run), run.manifest.config.samples.prompts
    groups, num_more = sample_groups(samples, prompts=prompts)
    if run.is_finetuning and not groups:
        return None
    losses = dict(run.validation.points("loss_nats"))
    return Section(
        key="samples",
        title="Samples, step by step",
        template="sections/completions.jinja",
        content=Completions(groups, num_more, losses),
    )
