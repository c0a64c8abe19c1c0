"""All that a page says in words and tables, in the order in which it says it."""

from __future__ import annotations

from dataclasses import dataclass

from milepost.trajectory import summary
from milepost.trajectory.finetuning import finetuning_of
from milepost.trajectory.sections.before_after import before_after_section
from milepost.trajectory.sections.comparison import comparison_section
from milepost.trajectory.sections.completions import completions_section
from milepost.trajectory.sections.differences import differences_section
from milepost.trajectory.sections.findings import (
    comparison_sentences,
    course_paragraphs,
    jump_sentences,
    rubric_sentences,
    together_sentences,
)
from milepost.trajectory.sections.loss_law import loss_law_section
from milepost.trajectory.sections.rubric import rubric_section
from milepost.trajectory.sections.sensitivity import sensitivity_section
from milepost.trajectory.sections.spikes import spikes_section
from milepost.trajectory.sections.together import together_section
from milepost.trajectory.sections.work import Work
from milepost.trajectory.subject import Section, Subject


@dataclass(frozen=True)
class Told:
    """The words of a page.

    Attributes:
        paragraphs: of the summary, which comes first.
        sections: what stands below the figures; those without data are absent.
    """

    paragraphs: list[str]
    sections: list[Section]


def tell(subject: Subject, found: Work) -> Told:
    """The summary and the sections of one page, in which `work_out` found this."""
    run = subject.run
    tuned = None if run is None else finetuning_of(run)
    opening = [
        [] if run is None else jump_sentences(run, jumps=found.jumps, odd=found.odd),
        [*rubric_sentences(subject), *together_sentences(subject, pairs=found.pairs)],
        comparison_sentences(subject, compared=found.compared),
    ]
    paragraphs = course_paragraphs(subject.course) if run is None else summary.paragraphs(run)
    paragraphs += [" ".join(sentences) for sentences in opening if sentences]
    sections = [
        None if run is None or tuned is None else before_after_section(run, tuned),
        comparison_section(subject, compared=found.compared),
        rubric_section(subject),
        None if run is None else completions_section(run),
        None if run is None else sensitivity_section(run),
        together_section(subject, pairs=found.pairs),
        loss_law_section(found.law),
        differences_section(found.differences),
        None if run is None else spikes_section(run, jumps=found.jumps, odd=found.odd),
    ]
    return Told(paragraphs, [section for section in sections if section is not None])
