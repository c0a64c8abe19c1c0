"""The sections as HTML: tables that a screen reader can follow, and text that stays text."""

from __future__ import annotations

import re
from dataclasses import replace

import jinja2
import pytest

from milepost.runs.ratings import CRITERIA
from milepost.trajectory.course import Course
from milepost.trajectory.example import load_example
from milepost.trajectory.ratings import RatingSummary, RubricScores
from milepost.trajectory.samples import sample_groups
from milepost.trajectory.sections.completions import Completions
from milepost.trajectory.sections.text_table import Column, TextTable
from milepost.trajectory.statistics.correlation import Interval
from milepost.trajectory.subject import Section, Subject
from tests.made_courses import curve, told_by

HOSTILE = "<script>alert(1)</script>&amp;\"'"


@pytest.fixture(scope="module")
def templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("milepost.trajectory"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def html_of(section: Section, templates: jinja2.Environment) -> str:
    return templates.get_template(section.template).render(content=section.content)


def test_papers_sections_come_in_the_order_a_reader_needs_them(
    templates: jinja2.Environment,
) -> None:
    example = load_example("paper")
    subject = Subject(example.title, example.course, None, example, (), (), None, "steps")
    sections = told_by(subject).sections
    assert [section.key for section in sections] == ["rubric", "together", "loss-law"]
    rubric, together, law = (html_of(section, templates) for section in sections)
    assert rubric.count("<tr") == 11 and "published" not in rubric
    assert "Its own tables give 0.930, −0.956, 0.966." in together
    assert "× tokens^−" in law and "no promise" in law


def test_every_cell_has_a_role_and_the_name_of_its_column(templates: jinja2.Environment) -> None:
    table = TextTable(
        "Two", (Column("Name"), Column("Value\nunit", is_number=True)), (("a", "1\n2"),)
    )
    show = templates.get_template("sections/table.jinja").module.show
    html = str(show(table))
    assert '<th role="rowheader" scope="row" data-label="Name"><span>a</span></th>' in html
    assert (
        '<td role="cell" class="number" data-label="Value"><span>1<br><span class="note">2</span>'
        "</span></td>" in html
    )
    assert html.count('role="columnheader" scope="col"') == 2
    assert 'aria-label="Two"' in html and "scroll" not in html
    scrolled = str(show(replace(table, is_plain=True)))
    assert '<div class="scroll" role="region" aria-label="Two" tabindex="0">' in scrolled


def test_text_with_html_in_it_stays_text(templates: jinja2.Environment) -> None:
    scores = RubricScores(
        raters=HOSTILE,
        rater_kind="person",
        steps=(1, 2, 3),
        means=dict.fromkeys(CRITERIA, (1.0, 2.0, 3.0)),
        averages=(1.0, 2.0, 3.0),
        intervals=(None, Interval(1.0, 3.0), None),
        counts=(3, 3, 3),
    )
    ratings = RatingSummary((scores, replace(scores, rater_kind="model")), (), (), 0, 0, 0)
    curves = {
        "val/loss": curve([1, 2, 3], [4.0, 3.0, 2.5]),
        f"eval/{HOSTILE}/acc": curve([1, 2, 3], [0.2, 0.3, 0.28]),
    }
    course = Course(HOSTILE, HOSTILE, curves)
    other = replace(course, name="other")
    subject = Subject(HOSTILE, course, None, None, (other,), (), ratings, "tokens")
    sections = told_by(subject).sections
    assert {s.key for s in sections} == {"comparison", "rubric", "together", "loss-law"}
    for section in sections:
        html = html_of(section, templates)
        assert "<script" not in html
        if section.key != "loss-law":
            assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;amp;" in html


def test_completions_are_escaped_between_the_marks(templates: jinja2.Environment) -> None:
    records = [
        {"step": step, "prompt": HOSTILE, "completion": text}
        for step, text in ((1, "a <b>bold</b> claim"), (2, "a <b>bold</b> <ins>claim</ins> & more"))
    ]
    groups, _ = sample_groups(records, prompts=[])
    section = Section("samples", "", "sections/completions.jinja", Completions(groups, 0, {1: 3.0}))
    html = html_of(section, templates)
    assert "a &lt;b&gt;bold&lt;/b&gt; <ins>&lt;ins&gt;claim&lt;/ins&gt; &amp; more</ins>" in html
    assert "val. loss 3.000" in html and "3 of 5 words new" in html
    assert "<script" not in html
    assert re.search(r"<ins>Underlined</ins> words are new", html)
