"""The report of a fine-tuning: answers and losses before and after, and nothing of pretraining."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from milepost.runs.records import SampleRecord, append_sample
from milepost.trajectory.collect import Trajectory, collect
from milepost.trajectory.course import Course
from milepost.trajectory.finetuning import finetuning_of
from milepost.trajectory.opening import Request, open_subject
from milepost.trajectory.report import write_report
from milepost.trajectory.run_course import course_of
from milepost.trajectory.sections.before_after import (
    MAX_LINES_SHOWN,
    MAX_QUESTIONS_SHOWN,
    BeforeAfter,
    before_after_section,
)
from milepost.trajectory.summary import numbers, paragraphs
from tests.made_courses import told_by
from tests.made_finetunings import (
    USUAL,
    answer,
    make_answered_finetuning,
    make_finetuning,
    tune,
)
from tests.made_runs import make_killed_and_resumed_run
from tests.unit.test_trajectory_report import Page, read_page

HOSTILE = "</div><script>alert(1)</script>&amp;\x00\x1b[31m"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An answered fine-tuning with its report; to be read only."""
    root = tmp_path_factory.mktemp("made") / "first-tuned"
    make_answered_finetuning(root)
    write_report(root)
    return root


@pytest.fixture(scope="module")
def run(folder: Path) -> Trajectory:
    return collect(folder)


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return read_page(folder / "report" / "index.html")


def shown(run: Trajectory) -> BeforeAfter:
    tuned = finetuning_of(run)
    assert tuned is not None
    content = before_after_section(run, tuned).content
    assert isinstance(content, BeforeAfter)
    return content


def test_both_answers_of_a_question_stand_together_with_length_and_ending(
    run: Trajectory,
) -> None:
    asked = shown(run).asked
    assert [one.question for one in asked] == list(USUAL)
    before, after = asked[0].answers
    assert (before.who, before.model, before.text) == ("before", "the base", "of the of the")
    assert before.length == "256 tokens, cut off (max new tokens)"
    assert (after.who, after.model) == ("after", "the tuned model at step 40")
    assert after.text == "Washington." and after.length == "3 tokens, stopped by itself"
    assert before.repetition == "repeats 100 %"
    assert after.repetition == "", "three tokens hold no 4-gram"


def test_losses_are_told_with_their_perplexity_and_their_steps(run: Trajectory) -> None:
    table = shown(run).losses
    assert table is not None
    assert table.rows == (
        (
            *("held out", "2.3000\nperplexity 9.97\nstep 0"),
            *("1.5000\nperplexity 4.48\nstep 40", "−0.8000"),
        ),
        (
            *("trained on", "2.2500\nperplexity 9.49\nstep 1"),
            *("1.2000\nperplexity 3.32\nstep 40", "−1.0500"),
        ),
    )
    assert "Held out: 1,234 answer tokens" in shown(run).losses_note


def test_facts_say_what_was_tuned_and_on_what(run: Trajectory) -> None:
    facts = dict(shown(run).facts)
    assert facts["Base"].startswith("first at step 800 (SHA-256 ")
    # Rank 128 x 34,816, the in + out of the 7 projections, in the 36 layers of the paper's Table I.
    assert "LoRA of rank 128 trains 160,432,128 parameters beside 1,715,951,616" in facts["Trained"]
    assert "projections q, k, v, o, gate, up and down" in facts["Trained"]
    assert facts["Conversations"] == "900 trained on, 20 held out, of 930 rows of alpaca.jsonl"
    assert facts["Left out"] == "10: too long (8), no answer (2)"
    assert facts["Template"] == "vicuna-1.1"


def test_summary_opens_with_what_changed(run: Trajectory) -> None:
    first, outcome, *_ = paragraphs(run)
    assert first.startswith("The run tunes the model “first at step 800”: LoRA of rank 128 trains")
    assert "has done 40 of 40 steps and seen 40,000 answer tokens" in first
    assert outcome.startswith(
        "Held-out loss on answers went from 2.3000 nats per token (perplexity 9.97) at step 0 to"
        " 1.5000 nats per token (perplexity 4.48) at step 40. Asked 2 questions, the base stopped"
        " by itself once, the tuned model twice."
    )
    assert "positions per second" in outcome
    assert "bits per byte" not in " ".join(paragraphs(run))


def test_all_weights_are_said_to_be_trained_where_they_are(tmp_path: Path) -> None:
    made = make_finetuning(tmp_path / "run", "--lora.rank", "none")
    tune(made)
    run = collect(made.layout.root)
    told = "all 1,715,951,616 parameters are trained"
    assert told in paragraphs(run)[0] and told in dict(shown(run).facts)["Trained"]
    tuned = numbers(run)["finetuning"]
    assert tuned["lora"] is None and tuned["trained_parameters"] == tuned["parameters"]


def test_numbers_for_programs_hold_losses_answers_and_counts(run: Trajectory) -> None:
    tuned = numbers(run)["finetuning"]
    assert tuned["held_out_loss"]["first"] == {
        "step": 0,
        "loss_nats": 2.3,
        "perplexity": pytest.approx(9.974182, rel=1e-6),  # e to 2.3, of float64
    }
    assert tuned["stopped_by_itself"] == {"asked": 2, "before": 1, "after": 2}
    assert tuned["answers"][0]["after"] == {
        "step": 40,
        "completion": " Washington.",
        "tokens": 3,
        "stopped_by_itself": True,
    }
    assert tuned["conversations"]["left_out"] == {"too_long": 8, "no_answer": 2}
    assert tuned["lora"]["rank"] == 128
    json.dumps(tuned, allow_nan=False)


def test_page_reads_as_that_of_a_fine_tuning(page: Page) -> None:
    headings = [text for tag, text in page.headings if tag == "h2"]
    assert headings.index("Before and after") == headings.index("Curves") + 1
    assert "Samples, step by step" not in headings, "its answers are no trajectory"
    assert "Loss against tokens" not in headings
    assert "nats per answer token, held-out conversations" in page.words
    assert "Segments" in headings and "the base" in page.words
    assert "initial weights" not in page.words
    assert "[lora]" in page.words and "[samples]" not in page.words
    assert "lineage: conversations left_out too_long" in page.words
    assert "listed" not in page.words


def test_command_that_makes_it_again_is_that_of_fine_tuning(page: Page) -> None:
    command = (
        "milepost finetune /models/first/checkpoints/step-00000800"
        " first-tuned/report/recipe.toml --data /data/alpaca.jsonl --run first-tuned-again"
    )
    assert command in page.text
    assert "milepost train" not in page.text and "data inspect" not in page.text


def test_no_fine_tuning_no_word_of_it(tmp_path: Path) -> None:
    made = make_killed_and_resumed_run(tmp_path / "first")
    page = read_page(write_report(made.layout.root))
    assert "Before and after" not in page.words
    assert "[lora]" not in page.words and "[finetune]" not in page.words
    assert numbers(collect(made.layout.root))["finetuning"] is None


def test_other_samples_of_a_fine_tuning_stand_together_by_step(tmp_path: Path) -> None:
    made = make_answered_finetuning(tmp_path / "run")
    for step, adapter in ((20, "a" * 64), (40, "b" * 64)):
        decoding = {"max_new_tokens": 8, "temperature": 0.0, "top_k": None, "top_p": None}
        quality = {"distinct_2": 0.5, "repeated_4gram_fraction": step / 100}
        record = SampleRecord(step, adapter, "Once", f" at {step}", [1], decoding, 0, quality)
        append_sample(made.layout.samples, record)
    run = collect(made.layout.root)
    [section] = [
        section
        for section in told_by(open_subject(Request((made.layout.root,)))).sections
        if section.key == "samples"
    ]
    [group] = section.content.groups
    assert group.prompt == "Once" and [c.step for c in group.completions] == [20, 40]
    assert course_of(run).curves["samples/repeated_4gram_fraction"].values.tolist() == [0.2, 0.4]


def test_flops_count_whole_conversations_and_tokens_only_answers(run: Trajectory) -> None:
    course: Course = course_of(run)
    curve = course.curves["train/loss"]
    assert curve.tokens[-1] == 40_000
    per_step = course.flops_per_step
    assert per_step is not None and per_step % 65_536 == 0, "of 65,536 positions"
    assert (
        course.positions("train/loss", axis="flops").tolist() == (curve.steps * per_step).tolist()
    )


def test_answers_that_older_weights_gave_are_told_with_their_step(tmp_path: Path) -> None:
    made = make_finetuning(tmp_path / "run")
    tune(made)
    answer(made, USUAL, step=20)
    run = collect(made.layout.root)
    assert shown(run).asked[0].answers[1].model == "the tuned model at step 20"
    assert "the tuned model of step 20 twice" in " ".join(paragraphs(run))


def test_without_held_out_conversations_the_page_says_what_that_means(tmp_path: Path) -> None:
    made = make_finetuning(tmp_path / "run", is_scored=False)
    tune(made, is_scored=False)
    run = collect(made.layout.root)
    assert "No conversation is held out" in paragraphs(run)[1]
    assert "Training loss went from 2.2500 nats" in paragraphs(run)[1]
    assert "does not show whether other questions" in shown(run).losses_note
    assert "There is no validation on record" not in " ".join(paragraphs(run))


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove, "No questions have been answered yet"),
        (lambda path: path.write_text("{"), "cannot be read as JSON"),
        (lambda path: path.write_text('{"v": 1, "key": "k", "step": 1}'), "lacks 'answers'"),
        (lambda path: path.write_text('{"v": 2}'), "schema version 2, this program reads 1"),
    ],
)
def test_without_answers_the_rest_is_told_and_why_they_are_not_there(
    tmp_path: Path, damage: Callable[[Path], Any], words: str
) -> None:
    made = make_answered_finetuning(tmp_path / "run")
    damage(made.layout.answers)
    page = read_page(write_report(made.layout.root))
    assert words in page.words
    assert "Held-out loss on answers went from 2.3000" in page.words
    assert page.words.count("cannot be read") <= 2


def test_a_run_that_has_only_begun_has_its_section(tmp_path: Path) -> None:
    made = make_finetuning(tmp_path / "run", conversations={})
    page = read_page(write_report(made.layout.root))
    assert "Before and after" in page.words and "not on record" in page.words
    made.start()
    assert "There is no validation on record." in " ".join(paragraphs(collect(made.layout.root)))


def test_hostile_answers_stay_text_and_are_cut_to_what_a_page_holds(tmp_path: Path) -> None:
    made = make_finetuning(tmp_path / "run")
    tune(made)
    answer(
        made,
        {
            HOSTILE: ((HOSTILE, 9, False), ("", 0, True)),
            "long word": (("x" * 50_000, 9, False), (" \n \n", 2, True)),
            "blank": (("a" + "\n \n" * 900 + "b", 9, False), ("\u202eevil", 1, True)),
            "list": (("- a\n" * 900, 9, False), ("one", 1, True)),
        },
    )
    page = read_page(write_report(made.layout.root))
    assert page.num_scripts == 2
    assert "</div><script>alert(1)</script>&amp;��[31m" in page.text
    assert "(no text)" in page.words and "(white space only)" in page.words
    assert "… 48,000 more characters" in page.words
    blank, listed = (asked.answers[0] for asked in shown(collect(made.layout.root)).asked[2:])
    assert blank.text == "a\n\nb"
    assert listed.text.splitlines() == ["- a"] * MAX_LINES_SHOWN
    assert listed.num_cut_characters == 4 * (900 - MAX_LINES_SHOWN) + 1


def test_many_questions_stay_within_the_page(tmp_path: Path) -> None:
    made = make_finetuning(tmp_path / "run")
    tune(made)
    said = (("y" * 5000, 9, False), ("z" * 5000, 9, True))
    answer(made, {f"question {n}": said for n in range(MAX_QUESTIONS_SHOWN + 3)})
    content = shown(collect(made.layout.root))
    assert len(content.asked) == MAX_QUESTIONS_SHOWN and content.num_more == 3
    page = write_report(made.layout.root)
    assert "3 more questions are in compare.json." in read_page(page).words
    assert page.stat().st_size < 400_000


def test_a_loss_beyond_measure_has_no_perplexity(tmp_path: Path) -> None:
    made = make_finetuning(tmp_path / "run")
    made.start()
    for step, loss in ((0, 49.0), (10, 800.0)):
        made.append("validation", step=step, loss_nats=loss, tokens=1, seconds=0.1)
    run = collect(made.layout.root)
    assert "to 800.0000 nats per token at step 10;" in " ".join(paragraphs(run))
    assert numbers(run)["finetuning"]["held_out_loss"]["last"]["perplexity"] is None
