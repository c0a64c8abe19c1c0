"""Benchmarks in the trajectory: which records share a line, what is drawn, told and tabled."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from milepost.runs.evaluations import EvaluationStore
from milepost.trajectory.benchmarks import main_series, series_of
from milepost.trajectory.collect import collect
from milepost.trajectory.figures.benchmark_figures import MAX_PANELS, draw_benchmarks, plots_of
from milepost.trajectory.figures.scale import scale_of
from milepost.trajectory.opening import subject_of_run
from milepost.trajectory.report import shown_metrics, write_report
from milepost.trajectory.summary import numbers, paragraphs
from tests.made_runs import MadeRun, make_run
from tests.unit.test_trajectory_report import read_page


def record(step: int = 10, benchmark: str = "piqa", **fields: Any) -> dict[str, Any]:
    metrics = {"acc": {"value": 0.6, "stderr": 0.01}, "acc_norm": {"value": 0.65, "stderr": 0.01}}
    usual = {
        "step": step,
        "benchmark": benchmark,
        "protocol": "p",
        "num_fewshot": 0,
        "limit": None,
        "data_sha256": "d",
        "dtype": "float32",
        "n": 100,
        "metrics": metrics,
        "chance": 0.5,
        "majority": 0.52,
    }
    return usual | fields


def scored(value: float, stderr: float | None = 0.01) -> dict[str, Any]:
    return {"acc": {"value": value, "stderr": stderr}}


def evaluated_run(folder: Path) -> MadeRun:
    made = make_run(folder, total_steps=200)
    made.start()
    made.train(1, 200)
    for step, acc in ((0, 0.24), (100, 0.28), (200, 0.30)):
        made.evaluate(step, "hellaswag", acc=acc, n=10042)
        made.evaluate(step, "boolq", acc=0.62 - step / 2000, n=3270)
    made.evaluate(200, "heldout", acc=0.4)
    return made


@pytest.mark.parametrize(
    "changed",
    [
        {"benchmark": "boolq"},
        {"protocol": "q"},
        {"num_fewshot": 5},
        {"limit": 100},
        {"data_sha256": "e"},
        {"dtype": "bfloat16"},
    ],
)
def test_other_settings_never_share_a_line(changed: dict[str, Any]) -> None:
    series, num_foreign = series_of([record(), record() | changed])
    assert len(series) == 2 and num_foreign == 0
    assert [len(one.evaluations) for one in series] == [1, 1]


@pytest.mark.parametrize("changed", [{"device": "cuda"}, {"checkpoint_sha256": None}, {"n": 7}])
def test_the_later_record_of_a_step_counts(changed: dict[str, Any]) -> None:
    later = record(metrics=scored(0.7)) | changed
    [series], _ = series_of([record(20), record(), later])
    assert [e.step for e in series.evaluations] == [10, 20]
    assert series.evaluations[0].scores["acc"].value == 0.7
    assert "acc_norm" not in series.evaluations[0].scores


@pytest.mark.parametrize(
    "changed",
    [
        {"step": None},
        {"step": "10"},
        {"benchmark": None},
        {"benchmark": ""},
        {"limit": "all"},
        {"metrics": None},
        {"metrics": {}},
        {"metrics": {"acc": 0.5}},
        {"metrics": scored(math.nan)},
        {"metrics": scored(55.0)},  # percent
        {"metrics": {"f1": {"value": 0.5, "stderr": 0.1}}},
    ],
)
def test_records_that_say_nothing_are_counted(changed: dict[str, Any]) -> None:
    assert series_of([record() | changed]) == ([], 1)


def test_benchmarks_come_in_the_order_of_the_page_and_whole_sets_first() -> None:
    names = ("zebra", "boolq", "hellaswag", "aardvark", "heldout", "arc_easy")
    records = [record(benchmark=name) for name in names]
    records += [record(benchmark="hellaswag", limit=limit) for limit in (50, 500)]
    ordered = [(s.setting.benchmark, s.setting.limit) for s in series_of(records)[0]]
    assert ordered == [
        *(("hellaswag", None), ("hellaswag", 500), ("hellaswag", 50), ("arc_easy", None)),
        *(("boolq", None), ("heldout", None), ("aardvark", None), ("zebra", None)),
    ]


def test_the_main_line_of_a_benchmark_has_the_most_steps_then_the_most_items() -> None:
    records = [record(10), record(10, limit=50, n=50), record(20, limit=50, n=50)]
    [main] = main_series(series_of(records)[0])
    assert main.setting.limit == 50
    [main] = main_series(series_of(records[:2])[0])
    assert main.setting.limit is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"metrics": scored(0.55)}, True),
        ({"metrics": scored(0.54)}, False),  # two standard errors above 0.52, not more
        ({"metrics": scored(0.55), "majority": 0.6}, False),
        ({"metrics": scored(0.55), "majority": None}, True),
        ({"metrics": scored(0.55, None)}, None),
        ({"metrics": scored(1.0, 0.0)}, None),  # all answers alike
        ({"chance": None, "majority": None}, None),
    ],
)
def test_guessing_is_beaten_by_more_than_two_standard_errors(
    fields: dict[str, Any], expected: bool | None
) -> None:
    [series], _ = series_of([record(**fields)])
    assert series.latest.beats_guessing is expected


def test_page_tells_draws_and_tables_the_scores(tmp_path: Path) -> None:
    made = evaluated_run(tmp_path / "run")
    page = read_page(write_report(made.layout.root))
    headings = [text for tag, text in page.headings if tag == "h2"]
    assert headings[:3] == ["Curves", "Benchmarks", "Samples, step by step"]
    assert (
        "HellaSwag (0-shot, 10,042 items, float32): acc_norm went from 26.4 ± 1.5 % at step 0 to"
        " 33.0 ± 1.5 % at step 200; guessing gives at best 26.8 %. At the latest step, more than"
        " two standard errors above chance and majority: HellaSwag and Held-out endings."
        " Below that: BoolQ." in page.words
    )
    assert (
        "BoolQ (0-shot, 3,270 items, float32). acc, 3 values: first 62.0 ± 0.8 % at step 0,"
        " highest 62.0 ± 0.8 % at step 0, last 52.0 ± 0.9 % at step 200; chance 50.0 %;"
        " majority 62.2 %; TinyLlama-1.1B (2 T tokens) 63.2 %; Pythia-1.0B (300 B tokens) 60.8 %."
        in page.words
    )
    assert "BoolQ 0-shot, 3,270 items, float32 200 52.0 ± 0.9 % – 50.0 % 62.2 % no" in page.words
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_the_course_of_heldout_is_told_where_there_is_no_hellaswag(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run")
    made.start()
    for step in (0, 100):
        made.evaluate(step, "boolq", acc=0.6)
        made.evaluate(step, "heldout", acc=0.25 + step / 1000, limit=600, n=600)
    told = "\n".join(paragraphs(collect(made.layout.root)))
    assert (
        "Held-out endings (0-shot, the first 600 items, float32): acc_norm went from"
        " 27.5 ± 1.5 % at step 0 to 38.5 ± 1.5 % at step 100; guessing gives at best 26.8 %."
        in told
    )


@pytest.mark.parametrize(
    ("limit", "n", "words"),
    [
        (None, 600, "0-shot, 600 items, float32"),
        (599, 599, "0-shot, the first 599 items, float32"),
        (600, 600, "0-shot, the first 600 items, float32"),
        (601, 600, "0-shot, 600 items, float32"),
        (600, None, "0-shot, items unknown, float32"),
    ],
)
def test_items_are_called_the_first_only_where_the_limit_was_reached(
    limit: int | None, n: int | None, words: str
) -> None:
    [series], _ = series_of([record(limit=limit, n=n)])
    assert series.words == words


def test_scores_of_other_runs_are_left_out_and_counted(tmp_path: Path) -> None:
    made = evaluated_run(tmp_path / "run")
    expected = collect(made.layout.root).benchmarks
    made.evaluate(200, "hellaswag", acc=0.9, n=10042, run_id="another")
    made.evaluate(300, "boolq", acc=0.9, run_id=None)
    found = collect(made.layout.root)
    assert found.benchmarks == expected and not found.num_bad_lines
    assert numbers(found)["left_out_scores"] == {"foreign": 2, "not_whole": 0}
    assert "2 scores of other runs or models are left out." in "\n".join(paragraphs(found))


@pytest.mark.parametrize("content", [None, b"", b"other items"])
def test_scores_without_a_whole_items_file_are_left_out_and_counted(
    tmp_path: Path, content: bytes | None
) -> None:
    made = make_run(tmp_path / "run")
    made.evaluate(100, "boolq", acc=0.6)
    expected = collect(made.layout.root).benchmarks
    made.evaluate(200, "boolq", acc=0.7)
    line = json.loads(made.layout.evaluations.read_text().splitlines()[-1])
    file = EvaluationStore(made.layout.root).items_file(line["key"])
    file.unlink() if content is None else file.write_bytes(content)
    found = collect(made.layout.root)
    assert found.benchmarks == expected and not found.num_bad_lines
    assert numbers(found)["left_out_scores"] == {"foreign": 0, "not_whole": 1}
    assert "1 score without a whole file of items is left out." in "\n".join(paragraphs(found))


def test_a_score_that_was_made_again_is_not_told_as_left_out(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run")
    made.evaluate(100, "boolq", acc=0.6)
    line = json.loads(made.layout.evaluations.read_text())
    torn = json.dumps(line | {"items_sha256": "of the file before"})
    made.layout.evaluations.write_text(f"{torn}\n{json.dumps(line)}\n")
    found = collect(made.layout.root)
    assert len(found.benchmarks) == 1
    assert numbers(found)["left_out_scores"] == {"foreign": 0, "not_whole": 0}


def test_a_panel_shows_its_metrics_its_errors_and_what_guessing_gives(tmp_path: Path) -> None:
    made = evaluated_run(tmp_path / "run")
    subject = subject_of_run(collect(made.layout.root))
    scale = scale_of(subject, metrics=shown_metrics(subject))
    hellaswag, boolq, heldout = draw_benchmarks(plots_of(subject), scale=scale)
    assert [hellaswag.title, boolq.title, heldout.title] == [
        "HellaSwag",
        "BoolQ",
        "Held-out endings",
    ]
    assert hellaswag.latest == "acc_norm 33.0 ± 1.5 % at step 200"
    assert ">chance 25.0 %<" in hellaswag.svg and ">majority 26.8 %<" in hellaswag.svg
    assert ">chance 50.0 %<" in boolq.svg and ">majority 62.2 %<" in boolq.svg
    assert [panel.svg.count("opacity: 0.18") for panel in (hellaswag, boolq)] == [2, 1]
    # A single score has no band but a bar.
    assert [p.svg.count("-error") for p in (hellaswag, boolq, heldout)] == [0, 0, 2]
    # acc is dashed where acc_norm is not, beside the dashes of chance and majority; BoolQ has two
    # published levels more, those of HellaSwag lie far above the axis.
    assert [p.svg.count("stroke-dasharray") for p in (hellaswag, boolq, heldout)] == [3, 5, 3]
    assert ">TinyLlama-1.1B (2 T tokens) 63.2 %<" in boolq.svg
    assert ">↑ TinyLlama-1.1B (2 T tokens) 54.6 %<" in hellaswag.svg
    assert "TinyLlama" not in heldout.svg


def test_csv_holds_every_score_to_the_last_bit(tmp_path: Path) -> None:
    made = evaluated_run(tmp_path / "run")
    out = write_report(made.layout.root)
    with out.with_name("benchmarks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in made.layout.evaluations.read_text().splitlines()]
    assert len(rows) == len(lines) == 7
    by_key = {(int(row["step"]), row["benchmark"]): row for row in rows}
    for line in lines:
        row = by_key[line["step"], line["benchmark"]]
        assert int(row["n"]) == line["n"] and row["limit"] == ""
        assert row["checkpoint_sha256"] == line["checkpoint_sha256"]
        for name in ("acc", "acc_norm"):
            score = line["metrics"].get(name)
            value, stderr = row[name], row[f"{name}_stderr"]
            if score is None:
                assert value == stderr == ""
            else:
                assert (float(value), float(stderr)) == (score["value"], score["stderr"])


def test_a_run_without_evaluations_says_nothing_of_them(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", total_steps=5)
    made.start()
    made.train(1, 5)
    out = write_report(made.layout.root)
    page = read_page(out)
    assert "Benchmarks" not in page.text
    assert "benchmark" not in "\n".join(paragraphs(collect(made.layout.root)))
    assert not out.with_name("benchmarks.csv").exists()
    assert numbers(collect(made.layout.root))["benchmarks"] == []


def test_evaluations_of_a_run_without_events_are_shown(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run")
    made.evaluate(50, "piqa", acc=0.6)
    page = read_page(write_report(made.layout.root))
    assert "PIQA (0-shot, 1,000 items, float32). acc_norm 66.0 ± 1.5 % at step 50" in page.words


def test_unreadable_and_foreign_records_are_counted(tmp_path: Path) -> None:
    made = evaluated_run(tmp_path / "run")
    with made.layout.evaluations.open("a") as file:
        file.write('{"v": 1, "step": 3}\n{"v": 1, "step": 300, "bench')
    page = read_page(write_report(made.layout.root))
    assert "2 unreadable lines of evaluations.jsonl skipped." in page.words


def test_hostile_names_stay_text_and_many_settings_stay_within_the_page(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run")
    made.start()
    made.append("step", **made.step_fields(1))
    made.evaluate(1, "</desc><script>alert(1)</script>\x1b&", acc=0.5, dtype="<b>")
    for number in range(MAX_PANELS + 3):
        made.evaluate(1, "piqa", acc=0.5, limit=number + 1)
    page = read_page(write_report(made.layout.root))
    assert page.num_scripts == 2
    assert "b>" not in {tag for tag, _ in page.tags}
    assert "</desc><script>alert(1)</script>\ufffd&" in page.text
    assert f"The first {MAX_PANELS} of {MAX_PANELS + 4} settings are drawn." in page.words


def test_numbers_for_programs_hold_the_latest_scores(tmp_path: Path) -> None:
    made = evaluated_run(tmp_path / "run")
    told = numbers(collect(made.layout.root))["benchmarks"]
    assert [(b["benchmark"], b["step"], b["n"]) for b in told] == [
        *(("hellaswag", 200, 10042), ("boolq", 200, 3270), ("heldout", 200, 1000)),
    ]
    assert told[1]["metrics"]["acc"]["value"] == 0.52
    assert (told[1]["chance"], told[1]["majority"]) == (0.5, 0.6217)
