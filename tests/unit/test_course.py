"""Curves of runs, examples and published scores, and the one tidy table of them."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest

from milepost.core.errors import UsageError
from milepost.core.files import append_json_line
from milepost.planner.cost import flops_per_token
from milepost.trajectory.collect import collect
from milepost.trajectory.course import Course, Curve
from milepost.trajectory.example import load_example
from milepost.trajectory.fields import all_finite, finite
from milepost.trajectory.published import published_baselines, read_baselines, usual_baselines
from milepost.trajectory.ratings import RatingSummary, RubricScores
from milepost.trajectory.run_course import course_of
from milepost.trajectory.tidy import tidy_table, write_tidy
from tests.made_runs import BATCH_TOKENS, MadeRun, make_killed_and_resumed_run, make_run

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "import.md"


def _curve(steps: list[float], values: list[float]) -> Curve:
    array = np.array(steps, dtype=np.float64)
    return Curve(array, array * 10, np.array(values), np.full(len(steps), np.nan))


def _sample(made: MadeRun, step: int, prompt: str, distinct: float, **fields: object) -> None:
    quality = {"distinct_2": distinct, "repeated_4gram_fraction": 0.5}
    line = {"step": step, "prompt": prompt, "decoding": {"temperature": 0}, "quality": quality}
    append_json_line(made.layout.samples, line | fields)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    made = make_killed_and_resumed_run(tmp_path_factory.mktemp("runs") / "first")
    for step in (500, 1000):
        made.evaluate(step, "hellaswag", acc=0.3)
        made.evaluate(step, "boolq", acc=0.6)
    return made


def test_a_runs_curves_carry_the_names_that_trackers_use(resumed: MadeRun) -> None:
    course = course_of(collect(resumed.layout.root))
    assert list(course.curves) == [
        *("train/loss", "train/grad_norm", "train/learning_rate", "perf/tokens_per_second"),
        *("perf/step_seconds", "val/loss", "val/bits_per_byte"),
        *("eval/hellaswag/acc_norm", "eval/hellaswag/acc", "eval/boolq/acc"),
    ]
    loss = course.curves["train/loss"]
    assert list(loss.steps) == list(range(1, 1001))
    assert loss.tokens[-1] == 1000 * BATCH_TOKENS
    assert loss.values[-1] == resumed.step_fields(1000)["loss_nats"]
    assert course.curves["val/loss"].tokens[0] == 0
    assert course.curves["eval/hellaswag/acc_norm"].stderrs.tolist() == [0.015, 0.015]
    assert course.restarts == (400,)


def test_flops_are_those_that_the_planner_counts(resumed: MadeRun) -> None:
    trajectory = collect(resumed.layout.root)
    course, config = course_of(trajectory), trajectory.manifest.config
    expected = flops_per_token(config.model, sequence_length=config.data.sequence_length)
    assert course.positions("val/loss", axis="flops")[-1] == 1000 * BATCH_TOKENS * expected


def test_tokens_of_a_step_that_does_not_say_go_on_from_the_last_that_does(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run")
    made.start()
    for step, tokens in ((1, 5000), (2, None), (4, None)):
        made.append("step", **(made.step_fields(step) | {"tokens_seen": tokens}))
    made.validate(0)
    trajectory = collect(made.layout.root)
    batch = trajectory.manifest.config.train.global_batch_tokens
    course = course_of(trajectory)
    assert course.curves["train/loss"].tokens.tolist() == [5000, 5000 + batch, 5000 + 3 * batch]
    assert course.curves["val/loss"].tokens.tolist() == [0]


def test_sample_quality_is_the_mean_over_the_prompts_that_were_always_sampled(
    tmp_path: Path,
) -> None:
    made = make_run(tmp_path / "run")
    for step, distinct in ((100, 0.2), (200, 0.4)):
        _sample(made, step, "one", distinct)
        _sample(made, step, "two", distinct + 0.2)
    _sample(made, 200, "asked once", 0.9)
    _sample(made, 200, "one", 0.9, decoding={"temperature": 1.0})
    _sample(made, 200, "one", 0.6)
    curve = course_of(collect(made.layout.root)).curves["samples/distinct_2"]
    assert curve.steps.tolist() == [100, 200]
    assert curve.values.tolist() == pytest.approx([0.3, 0.6])


def test_people_and_each_of_two_judges_are_metrics_of_their_own(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run")
    groups = [
        RubricScores(
            raters=raters,
            rater_kind=kind,
            steps=(100, 200),
            means={"depth": (None, 4.0)},
            averages=(score, score + 1),
            intervals=(None, None),
            counts=(3, 3),
        )
        for raters, kind, score in (
            ("people (3 raters)", "person", 5.0),
            ("judge a", "model", 6.0),
            ("judge b", "model", 7.0),
        )
    ]
    summary = RatingSummary(tuple(groups), (), (), 0, 0, 0)
    curves = course_of(collect(made.layout.root), ratings=summary).curves
    assert curves["rubric/person/average"].values.tolist() == [5.0, 6.0]
    assert curves["rubric/person/depth"].steps.tolist() == [200]
    assert curves["rubric/model:judge a/average"].values.tolist() == [6.0, 7.0]
    assert curves["rubric/model:judge b/average"].values.tolist() == [7.0, 8.0]


def test_the_papers_tables_give_the_correlations_they_give() -> None:
    example = load_example("paper")
    curves = example.course.curves
    average = curves["rubric/published/average"]

    def with_average(values: np.ndarray) -> float:
        return float(np.corrcoef(values, average.values)[0, 1])

    assert with_average(average.steps) == pytest.approx(0.930, abs=5e-4)
    assert with_average(curves["val/loss"].values) == pytest.approx(-0.956, abs=5e-4)
    hellaswag = curves["eval/hellaswag/acc_norm"].values
    assert with_average(hellaswag) == pytest.approx(0.966, abs=5e-4)
    assert with_average(np.log(average.steps)) == pytest.approx(0.969, abs=5e-4)
    assert list(example.printed_correlations.values()) == [0.928, -0.945, 0.963]


def test_the_papers_averages_are_those_of_its_six_criteria() -> None:
    rubric = load_example("paper").rubric
    for place, average in enumerate(rubric.averages):
        criteria = [rubric.means[name][place] for name in rubric.means]
        assert average == pytest.approx(np.mean(criteria), abs=5e-3)
    assert rubric.rater_kind == "published"
    assert set(rubric.counts) == {None}


def test_the_papers_tokens_and_flops_follow_from_its_batch_and_its_shape() -> None:
    course = load_example("paper").course
    assert course.curves["val/loss"].tokens[-1] == 43250 * 524288
    assert course.flops_per_token == pytest.approx(1.013e10, rel=1e-3)
    assert course.restarts == (8750, 10250)


def test_an_unknown_example_names_those_there_are() -> None:
    with pytest.raises(UsageError, match="no example 'papre'") as caught:
        load_example("papre")
    assert caught.value.hint == "did you mean paper? examples are paper"


@pytest.mark.parametrize("count", [-1, 1.7e308])
def test_a_number_that_is_no_count_of_tokens_is_passed_over(tmp_path: Path, count: float) -> None:
    made = make_run(tmp_path / "run")
    made.start()
    made.append("step", **made.step_fields(1))
    made.append("step", **(made.step_fields(2) | {"tokens_seen": count}))
    run = collect(made.layout.root)
    tokens = course_of(run).curves["train/loss"].tokens
    per_step = run.manifest.config.train.global_batch_tokens
    assert tokens.tolist() == [BATCH_TOKENS, BATCH_TOKENS + per_step]


def test_published_baselines_are_levels_of_one_point_by_tokens() -> None:
    baselines = published_baselines()
    assert len(baselines) == 8
    assert all(course.is_baseline and course.source for course in baselines)
    usual = {course.name: course for course in usual_baselines()}
    assert list(usual) == ["TinyLlama-1.1B (2 T tokens)", "Pythia-1.0B (300 B tokens)"]
    boolq = usual["TinyLlama-1.1B (2 T tokens)"].curves["eval/boolq/acc"]
    assert (boolq.tokens.tolist(), boolq.values.tolist()) == ([2e12], [0.6321])


def test_the_baseline_file_that_the_guide_shows_is_read(tmp_path: Path) -> None:
    shown = re.search(r"```toml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert shown is not None
    file = tmp_path / "mine.toml"
    file.write_text(shown.group(1))
    (course,) = read_baselines(file)
    assert (course.name, course.source) == ("My 1B (1 T tokens)", "its model card, zero-shot")
    assert course.curves["eval/boolq/acc"].values.tolist() == [0.604]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("models = 1 = 2", "cannot be read as TOML"),
        ("", "names no models"),
        ('[[models]]\nname = "A"', "without a source"),
        ('[[models]]\nname = "A"\nsource = "s"\ncolumns = ["step"]', 'must be "tokens"'),
        (
            '[[models]]\nname = "A"\nsource = "s"\ncolumns = ["tokens", "eval/piqa/acc"]\n'
            "rows = [[1]]",
            "row 1 does not have 2 numbers",
        ),
        (
            '[[models]]\nname = "A"\nsource = "s"\ncolumns = ["tokens", "eval/piqa/acc"]\n'
            "rows = [[1, 60.5]]",
            "scores are fractions",
        ),
        (
            '[[models]]\nname = "A"\nsource = "s"\ncolumns = ["tokens", "eval/piqa/acc"]\n'
            "rows = [[1, -0.6]]",
            "scores are fractions",
        ),
        (
            '[[models]]\nname = "A"\nsource = "s"\ncolumns = ["tokens", "piqa"]\nrows = [[1, 0.6]]',
            "'piqa' is no accuracy of a benchmark",
        ),
        (
            '[[models]]\nname = "A"\nsource = "s"\ncolumns = ["tokens", "eval/piqa/acc"]\n'
            "rows = [[1, 0.6]]\nnotes = 5",
            "notes must be a list of texts",
        ),
    ],
)
def test_a_baseline_file_of_another_form_is_refused(
    tmp_path: Path, content: str, problem: str
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(content)
    with pytest.raises(UsageError, match=problem) as caught:
        read_baselines(file)
    assert caught.value.hint is not None and "[[models]]" in caught.value.hint


def test_the_tidy_table_has_a_row_a_step_and_knows_segments_and_checkpoints(
    resumed: MadeRun,
) -> None:
    trajectory = collect(resumed.layout.root)
    rows = tidy_table([course_of(trajectory)], run=trajectory).to_pylist()
    assert [row["step"] for row in rows] == list(range(1001))
    # The resumed segment ran steps 401 to 437 again, and the later entry counts.
    assert [rows[step]["segment"] for step in (400, 401, 437, 438)] == [1, 2, 2, 2]
    assert [step for step in range(1001) if rows[step]["is_checkpoint"]][:2] == [100, 200]
    assert (rows[1]["ranks"], rows[1]["device"]) == (2, "cpu")
    assert rows[1]["train/loss"] == resumed.step_fields(1)["loss_nats"]
    assert rows[1]["val/loss"] is None
    assert rows[500]["eval/hellaswag/acc_norm_stderr"] == 0.015
    assert rows[500]["tokens_seen"] == 500 * BATCH_TOKENS
    assert "val/loss_stderr" not in rows[0]


def test_several_courses_are_more_rows_of_one_table() -> None:
    first = Course("first", "a file", {"val/loss": _curve([10, 20], [3.0, 2.0])})
    second = Course("second", "a file", {"x": _curve([10], [1.0])}, flops_per_token=6.0)
    rows = tidy_table([first, second, usual_baselines()[0]]).to_pylist()
    assert [(row["run"], row["step"], row["val/loss"], row["x"]) for row in rows] == [
        ("first", 10, 3.0, None),
        ("first", 20, 2.0, None),
        ("second", 10, None, 1.0),
        ("TinyLlama-1.1B (2 T tokens)", None, None, None),
    ]
    assert [row["flops"] for row in rows] == [None, None, 600.0, None]
    assert rows[3]["tokens_seen"] == 2_000_000_000_000
    assert rows[3]["eval/boolq/acc"] == 0.6321


def test_metrics_that_are_called_as_other_columns_do_not_take_their_place() -> None:
    first = Course("first", "a file", {"run": _curve([10], [3.0]), "x_stderr": _curve([10], [4.0])})
    with_error = Curve(*[np.array([value]) for value in (10.0, 100.0, 5.0, 0.5)])
    rows = tidy_table([first, Course("second", "a file", {"x": with_error})]).to_pylist()
    assert [(row["run"], row["run (metric)"]) for row in rows] == [("first", 3.0), ("second", None)]
    assert [row["x_stderr"] for row in rows] == [4.0, None]
    assert [row["x_stderr (metric)"] for row in rows] == [None, 0.5]


def test_csv_and_parquet_hold_the_table_to_the_last_bit_with_the_same_bytes(
    tmp_path: Path, resumed: MadeRun
) -> None:
    trajectory = collect(resumed.layout.root)
    table = tidy_table([course_of(trajectory)], run=trajectory)
    once = write_tidy(table, folder=tmp_path)
    first = [path.read_bytes() for path in once]
    again = write_tidy(tidy_table([course_of(trajectory)], run=trajectory), folder=tmp_path)
    assert [path.name for path in again] == ["trajectory.csv", "trajectory.parquet"]
    assert [path.read_bytes() for path in again] == first
    assert pyarrow.parquet.read_table(again[1]).equals(table)
    values = pyarrow.csv.read_csv(again[0]).column("train/loss").to_pylist()
    assert values == table.column("train/loss").to_pylist()


def test_names_that_no_file_can_hold_do_not_stop_the_table(tmp_path: Path) -> None:
    course = Course('a "name",\nof \ud800', "a file", {"a/\udfff": _curve([1], [2.0])})
    csv_file, _ = write_tidy(tidy_table([course]), folder=tmp_path)
    assert pyarrow.csv.read_csv(
        csv_file, parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True)
    ).column("run").to_pylist() == ['a "name",\nof ?']


@pytest.mark.parametrize(
    "values",
    [
        [1.5, None, 2.5],
        [],
        [None],
        [1.5, math.nan, math.inf, None],
        [1.5, 3, True, "2.5", 10**400, [1.0]],
    ],
)
def test_a_columns_numbers_are_those_of_each_value_by_itself(values: list[Any]) -> None:
    assert all_finite(values) == [finite(value) for value in values]


def test_no_curves_at_all_are_a_table_without_rows(tmp_path: Path) -> None:
    trajectory = collect(make_run(tmp_path / "run").layout.root)
    table = tidy_table([course_of(trajectory)], run=trajectory)
    assert table.num_rows == 0
    assert write_tidy(table, folder=tmp_path, prefix="a-")[0].name == "a-trajectory.csv"
