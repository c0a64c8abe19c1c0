"""Trajectories from tables and from lm-evaluation-harness, and what is said of other formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from milepost.core.errors import UsageError
from milepost.trajectory.collect import collect
from milepost.trajectory.imports import lm_eval, table_csv
from milepost.trajectory.imports.formats import READERS, import_course
from milepost.trajectory.imports.names import metric_names
from milepost.trajectory.run_course import course_of
from milepost.trajectory.tidy import tidy_table, write_tidy
from tests.made_runs import make_killed_and_resumed_run

OLD_SCORES = {"acc": 0.25, "acc_stderr": 0.01, "acc_norm": 0.5, "acc_norm_stderr": 0.02}
NEW_SCORES = {
    "alias": "hellaswag",
    "acc,none": 0.25,
    "acc_stderr,none": "N/A",
    "acc_norm,none": 0.5,
    "acc_norm_stderr,none": 0.02,
    "exact_match,strict-match": 0.75,
    "exact_match_stderr,strict-match": 0.03,
}


def _csv(tmp_path: Path, content: str, name: str = "run.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode())
    return path


def _results(path: Path, scores: dict[str, Any], **fields: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"results": {"hellaswag": scores}} | fields))


def _old_config(model: str, **fields: Any) -> dict[str, Any]:
    return {"model_args": f"use_accelerate=True,pretrained=o/{model},revision=s"} | fields


def test_a_table_becomes_curves_under_milepost_names(tmp_path: Path) -> None:
    path = _csv(tmp_path, "Step,loss,val_loss,lr,note,mine\n10,3.5,,0.1,hi,1\n20,3.0,2.5,0.1,ho,\n")
    course = import_course("csv", path)
    assert course.name == "run"
    assert set(course.curves) == {"train/loss", "val/loss", "train/learning_rate", "mine"}
    assert course.curves["val/loss"].steps.tolist() == [20]
    assert np.isnan(course.curves["train/loss"].tokens).all()
    assert course.notes == (
        "Shown under Milepost's names: loss as train/loss, lr as train/learning_rate and"
        " val_loss as val/loss.",
    )


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ("step;x\n1;2,5\n", 2.5),
        ("step\tx\n1\t2.5\n", 2.5),
        ("\ufeffstep,x\r\n1,2.5\r\n", 2.5),
        ('step,x\n"1","2.5"', 2.5),
        ("global_step,_step,x\n1,900,2.5\n", 2.5),
        ("step,x\n1.0,1\n1e0,2.5\n", 2.5),
    ],
    ids=["semicolons", "tabs", "byte order mark", "quotes", "step names", "later row"],
)
def test_tables_are_read_as_programs_write_them(tmp_path: Path, content: str, value: float) -> None:
    curve = import_course("csv", _csv(tmp_path, content)).curves["x"]
    assert (curve.steps.tolist(), curve.values.tolist()) == ([1], [value])


def test_tokens_come_from_a_column_else_from_tokens_per_step_else_are_unknown(
    tmp_path: Path,
) -> None:
    path = _csv(tmp_path, "step,tokens,x\n10,1000,1\n15,,2\n20,2000,3\n30,,4\n")
    tokens = import_course("csv", path).curves["x"].tokens
    assert tokens[:3].tolist() == [1000, 1500, 2000]
    assert np.isnan(tokens[3])
    given = import_course("csv", path, tokens_per_step=7).curves["x"].tokens
    assert given.tolist() == [1000, 1500, 2000, 2070]


@pytest.mark.parametrize(
    ("counts", "where"),
    [
        ((1000, 2000, 500), "500 at step 3 after 2,000"),
        ((-5, 0, 5), "-5 at step 1 after 0"),
        ((1, 2, 1e300), "1e+300 at step 3 after 2"),
    ],
)
def test_counts_of_tokens_that_fall_are_left_out_and_said(
    tmp_path: Path, counts: tuple[float, ...], where: str
) -> None:
    rows = [f"{step},{count},3" for step, count in enumerate(counts, start=1)]
    course = import_course("csv", _csv(tmp_path, "\n".join(["step,tokens,x", *rows])))
    assert np.isnan(course.curves["x"].tokens).all()
    assert course.notes == (
        f"Its counts of tokens are left out, since they do not only grow: {where}.",
    )


def test_percent_of_a_known_benchmark_becomes_fractions_and_is_said(tmp_path: Path) -> None:
    path = _csv(tmp_path, "step,hellaswag_acc_norm,hellaswag_acc_norm_stderr,mfu\n1,31.9,0.5,40\n")
    course = import_course("csv", path)
    curve = course.curves["eval/hellaswag/acc_norm"]
    assert curve.values.tolist() == pytest.approx([0.319])
    assert curve.stderrs.tolist() == pytest.approx([0.005])
    assert course.curves["mfu"].values.tolist() == [40]
    assert "hellaswag_acc_norm is taken as percent." in course.notes


def test_what_a_table_has_in_excess_is_left_out_and_counted(tmp_path: Path) -> None:
    path = _csv(tmp_path, "step,x\n1,nan\n2,5\n,6\n2.5,7\n-1,8\n3,1,1\n\n4,1")
    course = import_course("csv", path)
    assert course.curves["x"].steps.tolist() == [2, 4]
    assert course.notes == (
        "1 row of another length is left out.",
        "1 value that is not finite is left out.",
        "3 records without a step are left out.",
    )


def test_two_columns_of_one_meaning_stay_two_metrics() -> None:
    assert metric_names(["loss", "train/loss", "training_loss"]) == {
        "loss": "loss",
        "train/loss": "train/loss",
        "training_loss": "training_loss",
    }
    assert metric_names(["eval_loss", "val_loss"]) == {
        "eval_loss": "val/loss",
        "val_loss": "val_loss",
    }


def test_milepost_own_table_comes_back_as_the_same_curves(tmp_path: Path) -> None:
    made = make_killed_and_resumed_run(tmp_path / "first")
    made.evaluate(1000, "hellaswag", acc=0.3)
    course = course_of(collect(made.layout.root))
    path, _ = write_tidy(tidy_table([course]), folder=tmp_path)
    back = import_course("csv", path)
    assert back.name == "first"
    assert set(back.curves) == set(course.curves)
    for name, curve in course.curves.items():
        for field in ("steps", "tokens", "values", "stderrs"):
            assert np.array_equal(
                getattr(back.curves[name], field), getattr(curve, field), equal_nan=True
            )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch,loss\n1,2\n", "has no column of steps; its columns are epoch and loss"),
        ("step,loss\n", "has no numbers beside step"),
        ("step,x,x\n1,2,3\n", "has two columns 'x'"),
        ("run,step,x\na,1,2\nb,1,2\n", "holds 2 runs: a and b"),
        ("only words\n", "is a text that begins with 'only words'"),
        ("", "is an empty file"),
        ("<html><body>", "is a page of HTML or XML"),
        ("a\0,b\n", "is a file that is not text"),
        ('{"results": {}}', "is a JSON file"),
        ('{"step": 1, "loss": 2}', "is a JSON file"),
    ],
)
def test_a_table_that_is_none_is_refused_with_what_it_is(
    tmp_path: Path, content: str, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        import_course("csv", _csv(tmp_path, content))
    assert message in caught.value.message


def test_the_format_that_a_path_looks_like_is_suggested(tmp_path: Path) -> None:
    path = _csv(tmp_path, "step,x\n1,2\n")
    with pytest.raises(UsageError) as caught:
        import_course("lm-eval", path)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(f"it looks like the format csv: --import csv:{path};")


@pytest.mark.parametrize("format", READERS)
def test_a_path_with_nothing_at_it_is_said(tmp_path: Path, format: str) -> None:
    with pytest.raises(UsageError, match="there is nothing at"):
        import_course(format, tmp_path / "away")


@pytest.mark.parametrize("format", READERS)
def test_an_empty_folder_and_an_empty_file_are_refused(tmp_path: Path, format: str) -> None:
    for path in (tmp_path / "folder", _csv(tmp_path, "")):
        if path.name == "folder":
            path.mkdir()
        with pytest.raises(UsageError) as caught:
            import_course(format, path)
        assert caught.value.hint is not None and "expected" in caught.value.hint


def test_an_unknown_format_names_those_there_are() -> None:
    with pytest.raises(UsageError, match="no import format 'lm_eval'") as caught:
        import_course("lm_eval", Path("x"))
    assert caught.value.hint == (
        "did you mean lm-eval? formats are lm-eval, csv, tensorboard, wandb"
    )


def test_a_file_too_large_to_hold_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_csv, "MAX_FILE_BYTES", 5)
    with pytest.raises(UsageError, match="a table is read up to 5 B"):
        import_course("csv", _csv(tmp_path, "step,x\n1,2\n"))


@pytest.mark.parametrize("scores", [OLD_SCORES, NEW_SCORES], ids=["old", "new"])
def test_results_of_old_and_new_harnesses_give_the_same_curve(
    tmp_path: Path, scores: dict[str, Any]
) -> None:
    for step in (1000, 16, 0):
        _results(tmp_path / "zero-shot" / f"1b_step{step}.json", scores)
    course = import_course("lm-eval", tmp_path / "zero-shot", tokens_per_step=2)
    curve = course.curves["eval/hellaswag/acc_norm"]
    assert curve.steps.tolist() == [0, 16, 1000]
    assert curve.tokens.tolist() == [0, 32, 2000]
    assert curve.values.tolist() == [0.5] * 3
    assert curve.stderrs.tolist() == [0.02] * 3
    assert course.source == "3 files of lm-evaluation-harness, zero-shot/1b_step*.json"


def test_a_standard_error_the_harness_does_not_know_is_unknown(tmp_path: Path) -> None:
    _results(tmp_path / "step1" / "results_2024.json", NEW_SCORES)
    curves = import_course("lm-eval", tmp_path).curves
    assert np.isnan(curves["eval/hellaswag/acc"].stderrs).all()
    assert curves["eval/hellaswag/exact_match,strict-match"].stderrs.tolist() == [0.03]


@pytest.mark.parametrize(
    "folder", ["checkpoint-1000", "step-00001000", "global_step1000", "m__iter_0001000"]
)
def test_the_step_of_a_folder_counts_and_its_later_results(tmp_path: Path, folder: str) -> None:
    _results(tmp_path / folder / "results_2024-01-02.json", {"acc,none": 0.2})
    _results(tmp_path / folder / "results_2024-01-01.json", {"acc,none": 0.1})
    curve = import_course("lm-eval", tmp_path).curves["eval/hellaswag/acc"]
    assert (curve.steps.tolist(), curve.values.tolist()) == ([1000], [0.2])


def test_the_model_and_the_shots_are_said(tmp_path: Path) -> None:
    config = _old_config("pythia-1b", num_fewshot=5, limit=100)
    for step in (1, 2):
        _results(tmp_path / f"x_step{step}.json", OLD_SCORES, config=config)
    course = import_course("lm-eval", tmp_path)
    assert course.name == "pythia-1b"
    assert "The scores are 5-shot." in course.notes
    assert "Scored on a part of the items (limit 100)." in course.notes
    assert import_course("lm-eval", tmp_path, name="mine").name == "mine"


@pytest.mark.parametrize("as_text", [True, False])
def test_the_step_of_the_revision_counts_where_no_name_says_one(
    tmp_path: Path, as_text: bool
) -> None:
    for step in (1000, 2000):
        given: Any = {"pretrained": "o/pythia-1b", "revision": f"step{step}"}
        if as_text:
            given = ",".join(f"{key}={value}" for key, value in given.items())
        file = tmp_path / "o__pythia-1b" / f"results_2024-01-0{step // 1000}.json"
        _results(file, NEW_SCORES, config={"model_args": given})
    course = import_course("lm-eval", tmp_path)
    assert course.name == "pythia-1b"
    assert course.curves["eval/hellaswag/acc"].steps.tolist() == [1000, 2000]


def test_tokens_that_a_name_says_are_taken(tmp_path: Path) -> None:
    for step, tokens in ((1000, "4B"), (2000, "8.5B")):
        _results(tmp_path / f"olmo-step{step}-tokens{tokens}.json", OLD_SCORES)
    curve = import_course("lm-eval", tmp_path).curves["eval/hellaswag/acc"]
    assert curve.tokens.tolist() == [4e9, 8.5e9]


def test_a_folder_of_several_trajectories_names_them_and_one_can_be_given(tmp_path: Path) -> None:
    for step in (1, 2):
        _results(tmp_path / "zero" / f"a_step{step}.json", OLD_SCORES)
        _results(tmp_path / "zero" / f"a-long_step{step}.json", OLD_SCORES)
    with pytest.raises(UsageError, match="holds 2 trajectories") as caught:
        import_course("lm-eval", tmp_path)
    wanted = f"{tmp_path}/zero/a_step*.json"
    assert wanted in caught.value.message
    assert len(import_course("lm-eval", Path(wanted)).curves["eval/hellaswag/acc"]) == 2


def test_a_path_that_is_no_pattern_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is no pattern: .*'\*\*'"):
        import_course("lm-eval", tmp_path / "a**b" / "*.json")


def test_the_parts_of_one_benchmark_do_not_bury_the_others(tmp_path: Path) -> None:
    parts = {f"mmlu_{number}": OLD_SCORES for number in range(10)}
    file = tmp_path / "x_step1.json"
    file.write_text(json.dumps({"results": parts | {"mmlu": OLD_SCORES, "piqa": OLD_SCORES}}))
    course = import_course("lm-eval", tmp_path)
    assert {name.split("/")[1] for name in course.curves} == {"mmlu", "piqa"}
    assert "10 tasks mmlu_* are left out, as parts of one." in course.notes
    file.write_text(json.dumps({"results": parts}))
    assert len(import_course("lm-eval", tmp_path).curves) == 20


def test_files_that_are_no_results_are_left_out_and_counted(tmp_path: Path) -> None:
    _results(tmp_path / "x_step1.json", OLD_SCORES)
    (tmp_path / "x_step2.json").write_text('{"results": {"hellaswag": {"acc": 0.')
    (tmp_path / "x_step3.json").write_text('["a list"]')
    (tmp_path / "x_step4.json").write_text('{"results": {"hellaswag": 1}}')
    (tmp_path / "summary.json").write_text("{}")
    course = import_course("lm-eval", tmp_path)
    assert course.curves["eval/hellaswag/acc"].steps.tolist() == [1]
    assert "3 JSON files without readable results are left out." in course.notes
    assert "1 JSON file without a step is left out." in course.notes


def test_json_files_without_steps_or_without_results_are_refused(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(UsageError, match=r"none names a step: summary\.json"):
        import_course("lm-eval", tmp_path)
    (tmp_path / "step1.json").write_text("{}")
    with pytest.raises(UsageError, match="1 name a step and none of those has results"):
        import_course("lm-eval", tmp_path)


def test_a_json_file_of_another_size_than_results_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _results(tmp_path / "step1.json", OLD_SCORES)
    _results(tmp_path / "step2.json", OLD_SCORES, padding="x" * 1000)
    monkeypatch.setattr(lm_eval, "MAX_FILE_BYTES", 500)
    assert len(import_course("lm-eval", tmp_path).curves["eval/hellaswag/acc"]) == 1
