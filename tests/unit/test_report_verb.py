"""`milepost report`: what can be named, where the page lies, what is refused and what is said."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from milepost.cli.report import report
from milepost.core.errors import UsageError
from tests.made_runs import MadeRun, make_run
from tests.unit.test_trajectory_report import read_page


def small_run(folder: Path, *, name: str = "") -> MadeRun:
    made = make_run(folder, total_steps=5, name=name)
    made.start()
    made.train(1, 5)
    return made


def table(path: Path, *, steps: int = 5) -> Path:
    lines = ["step,val/loss", *(f"{step},{4 - step / 10}" for step in range(1, steps + 1))]
    path.write_text("\n".join(lines) + "\n")
    return path


def refused(*runs: Path, **options: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        report(*runs, **options)
    return caught.value


def test_example_is_told_where_no_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    report(example="paper")
    assert capsys.readouterr().out == "milepost-report/index.html\n"
    folder = tmp_path / "milepost-report"
    assert {path.name for path in folder.iterdir()} == {
        *("index.html", "trajectory.csv", "trajectory.parquet"),
    }
    page = read_page(folder / "index.html")
    headings = [text for tag, text in page.headings if tag == "h2"]
    assert headings[:2] == ["Curves", "Benchmarks"]
    assert headings[-1] == "Provenance"
    assert "arXiv 2412.13335" in page.words
    assert "Restarted at steps 8,750 and 10,250." in page.words
    assert "Segments" not in headings and "Config" not in headings


def test_several_trajectories_lie_over_one_another_against_tokens(tmp_path: Path) -> None:
    first = small_run(tmp_path / "first", name="one")
    second = small_run(tmp_path / "second", name="one")
    file = table(tmp_path / "other.csv")
    report(first.layout.root, second.layout.root, imports=[f"csv:{file}"], tokens_per_step=8192)
    page = read_page(first.layout.report)
    assert page.html.count(">tokens seen</text>") == 5
    # The two of one name are told apart.
    assert "one (2)" in page.words and "other" in page.words
    with first.layout.report.with_name("trajectory.csv").open(newline="") as found:
        runs = {row["run"] for row in csv.DictReader(found)}
    assert runs == {"one", "one (2)", "other"}


def test_what_has_no_place_on_the_axis_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run(tmp_path / "run")
    report(run.layout.root, imports=[f"csv:{table(tmp_path / 'other.csv')}"])
    said = (
        "other is not in the figures: its source gives no tokens; --tokens-per-step would give them"
    )
    assert said in capsys.readouterr().err
    page = read_page(run.layout.report)
    assert f"{said}." in page.words
    # On steps it has its place.
    report(run.layout.root, imports=[f"csv:{tmp_path / 'other.csv'}"], axis="steps")
    assert "not in the figures" not in capsys.readouterr().err


def test_left_out_scores_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = small_run(tmp_path / "run")
    run.evaluate(5, "piqa", acc=0.5, run_id="another")
    report(run.layout.root)
    assert "1 score of other runs or models is left out." in capsys.readouterr().err


def test_baseline_is_published_or_a_file_or_none(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    run.evaluate(5, "piqa", acc=0.6)
    own = tmp_path / "own.toml"
    own.write_text(
        '[[models]]\nname = "Mine"\nsource = "a test"\n'
        'columns = ["tokens", "eval/piqa/acc_norm"]\nrows = [[1e9, 0.65]]\n'
    )

    def words(baseline: str) -> str:
        report(run.layout.root, baseline=baseline)
        return read_page(run.layout.report).words

    assert "TinyLlama-1.1B (2 T tokens) 70.7 %" in words("published")
    assert "Mine (1 B tokens) 65.0 %" in words(str(own))
    assert "TinyLlama" not in words("none")


def test_json_names_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "paper.html"
    report(example="paper", out=out, json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["report"] == str(out)
    assert sorted(Path(name).name for name in told["files"]) == [
        "paper-trajectory.csv",
        "paper-trajectory.parquet",
    ]
    (course,) = told["summary"]["courses"]
    assert course["metrics"]["val/loss"]["last"] == {
        "step": 43250,
        "tokens": 43250 * 524288,
        "value": 2.47,
    }


def test_same_words_give_same_bytes(tmp_path: Path) -> None:
    out = tmp_path / "index.html"
    report(example="paper", out=out)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    report(example="paper", out=out)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_nothing_named_is_refused() -> None:
    error = refused()
    assert error.message == "nothing to report on"
    assert error.hint == "name a run folder, --example paper, or --import FORMAT:PATH"


def test_a_run_without_values_and_metrics_without_a_figure_are_said_to_be_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "new").layout
    other = tmp_path / "other.csv"
    other.write_text("step,mine\n1,2\n")
    report(run.root, imports=[f"csv:{other}"])
    said = capsys.readouterr().err
    assert "new is not in the figures: nothing of it is measured yet\n" in said
    assert "other is not in the figures: none of its metrics has a figure\n" in said


def test_what_cannot_be_read_of_a_run_that_is_laid_over_another_is_said(tmp_path: Path) -> None:
    first, second = (small_run(tmp_path / name) for name in ("first", "second"))
    with second.layout.events.open("a") as log:
        log.write("torn\n[1]\n")
    report(first.layout.root, second.layout.root)
    said = "2 lines of events.jsonl could not be read and were skipped."
    assert said in read_page(first.layout.report).words


def test_names_that_are_numbered_stay_different(tmp_path: Path) -> None:
    runs = [small_run(tmp_path / str(n), name=name) for n, name in enumerate(["a", "a", "a (2)"])]
    report(*[run.layout.root for run in runs])
    with runs[0].layout.report.with_name("trajectory.csv").open(newline="") as found:
        assert {row["run"] for row in csv.DictReader(found)} == {"a", "a (3)", "a (2)"}


def test_what_is_named_twice_is_refused(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run").layout.root
    assert "is named twice" in refused(run, tmp_path / "." / "run").message
    spec = f"csv:{table(tmp_path / 'a.csv')}"
    assert "is given twice" in refused(imports=[spec, spec]).message


def test_more_than_a_figure_can_hold_is_refused(tmp_path: Path) -> None:
    error = refused(*[tmp_path / str(n) for n in range(7)])
    assert (error.message, error.hint) == (
        "7 trajectories are more than a figure can tell apart",
        "name at most 6",
    )


@pytest.mark.parametrize("spec", ["csv", ":x", "csv:"])
def test_import_without_format_or_path_is_refused(spec: str) -> None:
    error = refused(imports=[spec])
    assert error.message == f"--import {spec} does not say both format and path"
    assert "lm-eval, csv, tensorboard, wandb" in str(error.hint)


def test_tokens_per_step_is_refused_where_it_means_nothing(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run").layout.root
    assert "without an --import" in refused(run, tokens_per_step=10).message
    for number in (0, 10**400):
        error = refused(imports=["csv:x"], tokens_per_step=number)
        assert f"is {number}, not 1 to 1,000,000,000,000" in error.message


def test_baseline_that_is_no_file_is_refused(tmp_path: Path) -> None:
    error = refused(small_run(tmp_path / "run").layout.root, baseline="publisht")
    assert error.message == "--baseline publisht: there is no such file"
    assert error.hint == "give published, none or a TOML file of levels"
