"""Collecting, segments, drawn lines and sentences of a trajectory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from milepost.core.errors import UsageError
from milepost.trajectory.collect import collect
from milepost.trajectory.figures.drawing import tick_text
from milepost.trajectory.figures.lines import MAX_RAW_POINTS, line_of
from milepost.trajectory.figures.panels import Panel, draw_panels
from milepost.trajectory.figures.scale import scale_of
from milepost.trajectory.opening import subject_of_run
from milepost.trajectory.report import shown_metrics
from milepost.trajectory.samples import MAX_STEPS_SHOWN, evenly_spread, sample_groups
from milepost.trajectory.sections.wording import enumerate_words
from milepost.trajectory.summary import numbers, paragraphs
from tests.made_runs import MadeRun, make_killed_and_resumed_run, make_run


def summary_of(folder: Path) -> str:
    return "\n".join(paragraphs(collect(folder)))


def test_later_entry_for_a_step_wins(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", total_steps=10)
    made.start()
    made.append("step", **(made.step_fields(1) | {"loss_nats": 9.0}))
    made.append("step", **(made.step_fields(2) | {"loss_nats": 8.0}))
    made.append("step", **(made.step_fields(1) | {"loss_nats": 7.0}))
    assert collect(made.layout.root).steps.points("loss_nats") == [(1, 7.0), (2, 8.0)]


def test_steps_that_differ_after_a_resume_are_named(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run")
    made.start()
    made.train(1, 30)
    made.start(restored_step=20)
    made.replay(21, 30, differing=(24, 25))
    text = summary_of(made.layout.root)
    assert "Not every resume was exact: 8 of 10 steps" in text
    assert "They differ at step 24 and 25." in text


@pytest.mark.parametrize(("loss", "equal"), [(None, 5), (3.25, 4)])
def test_log_is_compared_where_a_killed_segment_could_not_say(
    tmp_path: Path, loss: float | None, equal: int
) -> None:
    made = make_run(tmp_path / "run")
    made.start()
    made.train(1, 30)
    made.start(restored_step=20)
    made.train(21, 24)
    fields = made.step_fields(25)
    made.append("step", **(fields if loss is None else fields | {"loss_nats": loss}))
    trajectory = collect(made.layout.root)
    replay = trajectory.segments[1].replay
    assert replay is not None
    assert (replay.compared, replay.equal, replay.found_here) == (5, equal, True)
    assert replay.differing_steps == ([] if loss is None else [25])
    text = summary_of(made.layout.root)
    assert "The newest segment has reached step 25; the values after it are those" in text


def test_resume_without_steps_to_compare_claims_nothing(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run")
    made.start()
    made.train(1, 20)
    made.end("stop requested", step=20, training_seconds=5.0)
    made.start(restored_step=20, exactness="approximate", reason="2 threads a rank")
    made.train(21, 22)
    text = summary_of(made.layout.root)
    assert "segment 1 (steps 1 to 20) stopped on request" in text
    assert "No step was run again after a resume, so there was nothing to compare." in text
    assert "1 resume is approximate by the segment's own word: 2 threads a rank." in text


def test_many_segments_are_counted_by_their_ends(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run")
    for number in range(8):
        made.start(restored_step=number or None, restored="weights" if number == 3 else "full")
        made.train(number + 1, number + 1)
    made.end("diverged", step=8, training_seconds=1.0)
    text = summary_of(made.layout.root)
    assert "It ran in 8 segments: 7 was killed" not in text
    assert "It ran in 8 segments: 7 killed (no end on record); 1 stopped because" in text
    assert "Segment 4 restored weights only." in text


def test_clock_that_goes_backwards_gives_no_wall_time(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run")
    made.start()
    made.append("step", **made.step_fields(1), time="2020-01-01T00:00:00Z")
    assert collect(made.layout.root).segments[0].wall_seconds is None
    assert "the wall time of the segments is unknown" in summary_of(made.layout.root)


def test_quarantined_checkpoint_and_other_events_are_told(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run")
    made.start()
    made.save(100)
    made.append("checkpoint_quarantined", step=100)
    made.append("override", field="optimizer.learning_rate", old=0.003, new=0.001)
    trajectory = collect(made.layout.root)
    assert [c.state for c in trajectory.checkpoints] == ["quarantined"]
    assert "Also on record: checkpoint_quarantined (1) and override (1)." in summary_of(
        made.layout.root
    )


def test_lowest_validation_is_told_where_the_last_is_not_it(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run")
    made.start()
    for step, loss in ((0, 8.0), (10, 3.0), (20, 3.5)):
        made.append("validation", step=step, loss_nats=loss)
    assert "to 3.5000 at step 20; the lowest was 3.0000 at step 10." in summary_of(made.layout.root)


def test_numbers_for_programs(tmp_path: Path) -> None:
    made = make_killed_and_resumed_run(tmp_path / "run")
    values = numbers(collect(made.layout.root))
    json.dumps(values, allow_nan=False)
    assert values["last_step"] == values["total_steps"] == 1000
    assert (values["compared_steps"], values["equal_steps"]) == (37, 37)
    assert values["last_validation"]["step"] == 1000
    assert values["training_seconds"] == 437 * 0.25 + 150.0
    assert values["unreadable_lines"] == {}


def panels_of(made: MadeRun) -> dict[str, Panel]:
    subject = subject_of_run(collect(made.layout.root))
    panels = draw_panels(subject, scale=scale_of(subject, metrics=shown_metrics(subject)))
    return {panel.kind.letter: panel for panel in panels}


def test_hellaswag_is_drawn_once_it_is_evaluated(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run")
    made.start()
    made.evaluate(10, "hellaswag", acc=0.2)
    made.evaluate(20, "hellaswag", acc=0.25)
    made.evaluate(20, "hellaswag", acc=0.5, limit=100)
    made.evaluate(30, "piqa", acc=0.5)
    panel = panels_of(made)["B"]
    assert panel.svg is not None
    assert panel.latest == "27.5 % at step 20"


def test_spike_turns_the_axis_logarithmic(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run")
    made.start()
    for step in range(1, 40):
        fields = made.step_fields(step)
        made.append("step", **(fields | {"grad_norm": 1e5 if step == 30 else 0.5}))
    by_letter = panels_of(made)
    assert by_letter["F"].is_log_scale
    assert not by_letter["C"].is_log_scale


def test_short_line_is_drawn_as_it_is_and_broken_at_gaps() -> None:
    steps = np.array([1.0, 2, 3, 10, 20, 21, 22])
    line = line_of(steps, 2 * steps)
    assert line.low is None
    kept = ~np.isnan(line.y)
    assert [*line.x[kept]] == [*steps]
    assert [*line.y[kept]] == [*(2 * steps)]
    assert list(line.lone_x) == [10]


def test_line_through_points_without_a_usual_distance_has_no_gaps() -> None:
    steps = np.array([2700.0, 3300, 5100, 7500, 15_700, 20_000, 23_900, 35_000])
    line = line_of(steps, steps)
    assert not np.isnan(line.y).any()


@pytest.mark.parametrize("count", [1, 2, MAX_RAW_POINTS, MAX_RAW_POINTS + 1, 20_000])
def test_drawn_line_spans_all_steps_and_values(count: int) -> None:
    values = np.sin(np.arange(1.0, count + 1))
    line = line_of(np.arange(1.0, count + 1), values)
    assert (line.x[0], line.x[-1]) == (1, count)
    assert len(line.x) <= MAX_RAW_POINTS
    low, high = (line.y, line.y) if line.low is None or line.high is None else (line.low, line.high)
    assert (np.nanmin(low), np.nanmax(high)) == (values.min(), values.max())


def test_long_line_keeps_its_gaps() -> None:
    steps = np.array([*range(1, 2000), *range(4000, 6000)], dtype=np.float64)
    line = line_of(steps, np.ones(len(steps)))
    absent = line.x[np.isnan(line.y)]
    assert 2000 <= absent.min() < absent.max() <= 4000


@pytest.mark.parametrize(
    ("count", "expected"), [(1, 1), (MAX_STEPS_SHOWN, MAX_STEPS_SHOWN), (450, MAX_STEPS_SHOWN)]
)
def test_shown_steps_are_spread_from_first_to_last(count: int, expected: int) -> None:
    steps = list(range(0, 100 * count, 100))
    shown = evenly_spread(steps)
    assert len(shown) == expected
    assert (shown[0], shown[-1]) == (steps[0], steps[-1])


def test_samples_are_grouped_by_prompt_and_decoding_and_the_later_wins() -> None:
    def record(step: Any, prompt: str, text: str, **decoding: Any) -> dict[str, Any]:
        return {
            "step": step,
            "prompt": prompt,
            "completion": text,
            "seed": 7,
            "decoding": {"temperature": 0.0} | decoding,
        }

    records = [
        record(10, "other", " x"),
        record(10, "own", " first"),
        record(10, "own", " again"),
        record(5, "own", " early"),
        record(10, "own", " warm", temperature=0.8, top_k=40),
        record(None, "own", "of no step"),
        {"prompt": 3},
    ]
    groups, num_more = sample_groups(records, prompts=["own"])
    assert num_more == 0
    found = [(g.prompt, g.decoding, [(c.step, c.text) for c in g.completions]) for g in groups]
    assert found == [
        ("own", "greedy", [(5, "early"), (10, "again")]),
        ("own", "temperature 0.8, top 40, seed 7", [(10, "warm")]),
        ("other", "greedy", [(10, "x")]),
    ]


def test_axis_numbers_are_short() -> None:
    texts = [tick_text(v) for v in (0, 0.003, 6e-5, 2.5, -1, 8000, 12_000, 1e6, 1e20)]
    assert texts == ["0", "0.003", "6e−05", "2.5", "−1", "8,000", "12 K", "1 M", "1e+20"]


def test_words_are_enumerated() -> None:
    assert enumerate_words([]) == ""
    assert enumerate_words(["a"]) == "a"
    assert enumerate_words(["a", "b", "c"]) == "a, b and c"


def test_command_prints_the_page_or_one_json_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from milepost.cli.report import report

    made = make_run(tmp_path / "run", total_steps=5)
    made.start()
    made.train(1, 5)
    with made.layout.events.open("a") as file:
        file.write('{"torn": \n')
    report(made.layout.root)
    told = capsys.readouterr()
    assert told.out == f"{made.layout.report}\n"
    assert "1 line of events.jsonl could not be read and was skipped" in told.err
    report(made.layout.root, json=True)
    document = json.loads(capsys.readouterr().out)
    assert document["report"] == str(made.layout.report)
    assert document["summary"]["last_step"] == 5
    assert len(document["files"]) == 11
    with pytest.raises(UsageError, match="is not a run folder"):
        report(tmp_path)


def test_repetition_of_a_sample_is_told_where_it_was_counted() -> None:
    quality = {"distinct_2": 0.25, "repeated_4gram_fraction": 0.5, "longest_repeat_tokens": 3}
    foreign = ({"distinct_2": "low"}, {"repeated_4gram_fraction": None}, "none", None)
    records = [
        {"step": step, "prompt": "a", "completion": "b", "quality": value}
        for step, value in enumerate((quality, {"distinct_2": 1.0}, *foreign))
    ]
    records.append({"step": 9, "prompt": "a", "completion": "of an older version"})
    [group], _ = sample_groups(records, prompts=["a"])
    assert [completion.repetition for completion in group.completions] == [
        ("repeats 50 %", "distinct-2 0.25"),
        ("distinct-2 1.00",),
        *[()] * 5,
    ]
