"""What stands on the axes beside the curves: restarts, hardware, world size, places of steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from milepost.runs.evaluations import EvaluationStore
from milepost.trajectory.collect import collect
from milepost.trajectory.course import Course, Curve
from milepost.trajectory.figures.marks import (
    Span,
    marks_in_words,
    marks_of,
    refusals_of,
    spans_in_words,
    spans_of,
)
from milepost.trajectory.figures.scale import StepPlaces, scale_of
from milepost.trajectory.opening import subject_of_run
from milepost.trajectory.refused import refused_sentences
from milepost.trajectory.subject import Subject
from tests.made_runs import MadeRun, make_run


def moved_run(folder: Path) -> MadeRun:
    """40 steps: on 2 ranks, from 10 on 1, again from 20, from 30 on 2 of another device."""
    made = make_run(folder, total_steps=40)
    old, new = {"devices": ["A6000", "A6000"]}, {"devices": ["H100", "H100"]}
    made.start(ranks=2, **old)
    made.train(1, 12)
    made.start(restored_step=10, ranks=1, **old)
    made.train(11, 20)
    made.start(restored_step=20, ranks=1, restored="weights", **old)
    made.train(21, 30)
    made.start(restored_step=30, ranks=2, **new)
    made.train(31, 40)
    return made


def test_restarts_and_changes_of_hardware_are_told_apart(tmp_path: Path) -> None:
    subject = subject_of_run(collect(moved_run(tmp_path / "run").layout.root))
    marks = marks_of(subject)
    assert [(mark.step, mark.kind, mark.label) for mark in marks] == [
        (10, "hardware", "2 → 1 rank"),
        (20, "restart", "weights only"),
        (30, "hardware", "1 → 2 ranks"),
    ]
    assert marks_in_words(marks) == (
        "Restarted at step 20; hardware changed at steps 10 (2 → 1 rank)"
        " and 30 (1 → 2 ranks, A6000 → H100)."
    )


def guarded_run(folder: Path) -> MadeRun:
    """30 steps, of which 16 to 18 were undone; step 11 was run again after a kill."""
    made = make_run(folder, total_steps=30)
    made.start()
    made.train(1, 10)
    for _ in range(2):
        made.append("batch_skipped", step=11, data_step=10, why="not finite", loss_nats=None)
        made.start(restored_step=10)
    made.train(11, 18)
    made.append("guard_warned", guard="spike", step=17, data_step=18, z=9.0)
    facts = {"first_data_step": 16, "last_data_step": 19, "skipped": 5, "rollbacks": 1}
    made.append("rolled_back", from_step=18, to_step=15, why="spike", **facts)
    made.start(restored_step=15)
    made.train(16, 17, loss_nats=1.0)
    return made


def test_rollbacks_and_skipped_batches_are_marked_and_told_once(tmp_path: Path) -> None:
    subject = subject_of_run(collect(guarded_run(tmp_path / "run").layout.root))
    marks = refusals_of(subject)
    assert [(m.step, m.kind, m.words) for m in marks] == [
        (15, "rollback", "from 18"),
        (11, "skip", "skipped"),
    ]
    assert marks_in_words(marks) == "Rolled back to step 15 (from 18); batches skipped at step 11."
    assert subject.run is not None
    assert refused_sentences(subject.run.refused) == [
        "One batch was skipped, at step 11 (not finite).",
        "It rolled back once: from 18 to 15 (spike; 4 batches left out).",
        "Guards warned of spikes at step 17.",
    ]


def test_samples_and_scores_that_a_rollback_undid_are_not_told_of(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", total_steps=30)
    made.start()
    made.train(1, 18)
    for step in (10, 15):
        made.save(step)
        made.sample(step)
        made.evaluate(step, "piqa", acc=0.5)
    made.evaluate(18, "arc_easy", acc=0.5, checkpoint_sha256=None)  # as the training itself does
    newest = list(EvaluationStore(made.layout.root).latest())[-1]
    made.append("evaluation", step=18, key=newest)
    made.append("rolled_back", from_step=18, to_step=12, why="spike", skipped=6, rollbacks=1)
    made.train(13, 14)
    trajectory = collect(made.layout.root)
    assert {sample["step"] for sample in trajectory.samples} == {10}
    scored = [(e.step, s.setting.benchmark) for s in trajectory.benchmarks for e in s.evaluations]
    assert scored == [(10, "piqa")]
    made.train(15, 15)
    made.save(15)  # the same weights in this test, so the same hash
    assert [e.step for s in collect(made.layout.root).benchmarks for e in s.evaluations] == [10, 15]


def test_what_a_rollback_undid_is_on_no_curve_and_is_no_measure_for_a_resume(
    tmp_path: Path,
) -> None:
    run = collect(guarded_run(tmp_path / "run").layout.root)
    assert run.last_step == 17, "step 18 is of no run that counts"
    assert dict(run.steps.points("loss_nats"))[16] == 1.0
    assert run.missing_steps == []
    assert [segment.replay for segment in run.segments] == [None] * 4
    assert not run.other_events


def test_world_size_of_a_step_is_that_of_the_segment_whose_values_count(tmp_path: Path) -> None:
    spans = spans_of(collect(moved_run(tmp_path / "run").layout.root))
    # Steps 11 and 12 were run again on one rank.
    assert spans == [Span(0, 10, 2), Span(10, 30, 1), Span(30, 40, 2)]
    assert spans_in_words(spans) == "World size: 2 ranks to step 10, 1 to 30, 2 to 40."
    assert spans_in_words(spans[:1]) == "World size: 2 ranks throughout."
    assert spans_in_words([]) == ""


def test_restarts_at_one_step_are_one_mark(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", total_steps=20)
    made.start()
    made.train(1, 12)
    for _ in range(3):
        made.start(restored_step=10)
    made.train(11, 20)
    (mark,) = marks_of(subject_of_run(collect(made.layout.root)))
    assert (mark.step, mark.kind, mark.label) == (10, "restart", "3 restarts")


def course(name: str, steps: list[float], tokens: list[float]) -> Course:
    values = np.linspace(4.0, 3.0, len(steps))
    curve = Curve(np.array(steps), np.array(tokens), values, np.full(len(steps), np.nan))
    return Course(name, "a test", {"val/loss": curve}, flops_per_token=6.0)


def subject_of(*courses: Course, axis: str) -> Subject:
    first, *others = courses
    return Subject("x", first, None, None, tuple(others), (), None, axis)  # type: ignore[arg-type]


def test_steps_lie_between_the_points_that_know_both_and_in_proportion_beyond() -> None:
    one = course("one", [10.0, 20.0], [1000.0, 2000.0])
    places = StepPlaces(one, axis="tokens").at([5, 15, 40])
    assert places == pytest.approx([500, 1500, 4000])
    assert StepPlaces(one, axis="flops").at([10]) == pytest.approx([6000])
    unknown = replace(one, flops_per_token=None)
    assert np.isnan(StepPlaces(unknown, axis="flops").at([10])).all()


def test_a_course_without_tokens_has_no_place_among_several() -> None:
    one = course("one", [10.0, 20.0], [1000.0, 2000.0])
    other = course("other", [10.0, 90.0], [np.nan, np.nan])
    scale = scale_of(subject_of(one, other, axis="tokens"), metrics=["val/loss"])
    assert (scale.first, scale.last) == (1000, 2000)
    assert scale.left_out == (other,)
    assert not scale_of(subject_of(one, other, axis="steps"), metrics=["val/loss"]).left_out


@pytest.mark.parametrize(("last", "is_log"), [(60_000.0, False), (60_001.0, True)])
def test_axis_is_logarithmic_where_one_course_goes_much_further(last: float, is_log: bool) -> None:
    one = course("one", [0.0, 10.0, 20.0], [0.0, 1000.0, 2000.0])
    far = course("far", [1.0, 9.0], [6000.0, last])
    scale = scale_of(subject_of(one, far, axis="tokens"), metrics=["val/loss"])
    assert scale.is_log is is_log
    assert scale.first == (1000.0 if is_log else 0.0)
