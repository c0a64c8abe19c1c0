"""What may be asked of an evaluation, and how the rest is refused: tasks, words, models, ranks."""

from __future__ import annotations

import json

import pytest

from milepost.cli.main import run
from milepost.core.errors import DataError, UsageError
from milepost.distributed.devices import choose_scoring_ranks
from milepost.evaluation.catalog import PAPER_BENCHMARKS, parse_tasks
from milepost.evaluation.evaluate import evaluate
from tests.evaluations import ALONE, asked
from tests.tiny_models import tiny_model, write_model_folder

pytestmark = pytest.mark.usefixtures("own_cache")


def test_task_names_are_read() -> None:
    assert parse_tasks(["boolq, piqa", "boolq"]) == ("boolq", "piqa")
    assert parse_tasks(["paper"]) == PAPER_BENCHMARKS and len(PAPER_BENCHMARKS) == 7
    assert parse_tasks(["piqa,paper"])[0] == "piqa"
    with pytest.raises(UsageError) as caught:
        parse_tasks(["hellaswagg"])
    assert caught.value.message == "there is no task 'hellaswagg'"
    assert (caught.value.hint or "").startswith("did you mean hellaswag? tasks: ")
    with pytest.raises(UsageError) as caught:
        parse_tasks(["ARC-Easy"])
    assert "did you mean arc_easy?" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="no task is named"):
        parse_tasks([","])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "boolqq"], "did you mean boolq?"),
        (["--limit", "0"], "--limit 0 leaves no item"),
        (["--num-fewshot", "-1"], "--num-fewshot -1 cannot be"),
        (["--dtype", "float64"], "--dtype 'float64' cannot be"),
        (["--log-samples"], "--log-samples needs a place"),
        (["--prepared", "data"], "--prepared is for heldout, which is not among the tasks"),
        (["--tasks", "piqa", "--prepared", "data"], "add heldout to --tasks"),
        (["--model", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_a_wrong_command_is_refused_before_a_process_is_started(
    tiny_run, capsys, words: list[str], message: str
) -> None:
    model = [] if "--model" in words else [str(tiny_run.root)]
    assert run(["evaluate", *model, *words]) == 2
    talk = capsys.readouterr().err
    assert message in talk and "\nhint: " in talk and "Traceback" not in talk


def test_missing_rows_and_foreign_models_are_named(tiny_run, rows, tmp_path) -> None:
    with pytest.raises(DataError, match="hellaswag"):
        evaluate(asked(tiny_run.root, rows, tasks=("hellaswag",)), world=ALONE)
    with pytest.raises(UsageError, match="heldout"):
        write_model_folder(tmp_path / "model", tiny_model())
        request = asked(tmp_path / "model", rows, steps=None, tasks=("heldout",))
        evaluate(request, world=ALONE)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(UsageError, match="model_type is 'gpt2'"):
        evaluate(asked(tmp_path / "model", rows, steps=None), world=ALONE)
    with pytest.raises(UsageError, match="--steps needs a run"):
        evaluate(asked(tmp_path / "model", rows), world=ALONE)


def test_solved_items_are_refused_where_a_task_has_none(tiny_run, rows) -> None:
    with pytest.raises(UsageError, match="boolq_reasoned has no solved items"):
        evaluate(asked(tiny_run.root, rows, tasks=("boolq_reasoned",), num_fewshot=2), world=ALONE)


@pytest.mark.parametrize(
    ("requested", "num_gpus", "rank_bytes", "expected"),
    [(None, 2, 1, 2), (None, 0, 1 << 60, 1), (3, 0, 1, 3), (1, 2, 1, 1)],
)
def test_ranks_are_one_a_gpu_or_as_many_as_fit(requested, num_gpus, rank_bytes, expected) -> None:
    chosen = choose_scoring_ranks(requested=requested, num_gpus=num_gpus, rank_bytes=rank_bytes)
    assert chosen == expected


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(UsageError, match="--ranks 3 cannot be"):
        choose_scoring_ranks(requested=3, num_gpus=2, rank_bytes=1)
