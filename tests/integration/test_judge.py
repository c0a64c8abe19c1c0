"""`milepost judge` through OpenAI's own client against a local server."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from milepost.cli.main import run as run_command
from milepost.core.files import exclusive_lock
from milepost.evaluation.judge_prompt import read_scores
from milepost.runs.layout import RunLayout
from milepost.runs.ratings import CRITERIA, RatingRecord, append_rating, read_ratings
from milepost.runs.records import read_samples
from tests.judge_server import SERVED_NAME, JudgeServer, scores_of
from tests.made_runs import make_run

FIVES, ELEVENS = (json.dumps(dict.fromkeys(CRITERIA, score)) for score in (5, 11))
NUM_SAMPLES = 6
"""Two prompts at three steps, each rated twice."""


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer() as running:
        yield running


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_fsync: None) -> RunLayout:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made = make_run(tmp_path / "run")
    for step in (100, 200, 400):
        made.sample(step)
    return made.layout


def judge(layout: RunLayout, server: JudgeServer | None, *words: str) -> int:
    """One command; returns its exit code."""
    address = [] if server is None else ["--base-url", server.base_url]
    return run_command(["judge", str(layout.root), "--model", "judge-1", *address, *words])


def scores(layout: RunLayout) -> dict[tuple[str, int, str], int]:
    """What is on record: sample, repeat and criterion to score."""
    records, _ = read_ratings(layout.ratings)
    return {(r.sample_id, r.repeat, r.criterion): r.score for r in records}


def replies(layout: RunLayout) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (layout.judge / "replies.jsonl").open()]


def test_every_sample_is_rated_twice_and_no_question_is_asked_again(
    layout: RunLayout, server: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judge(layout, server, "--prices", "2,10", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert len(server.requests) == told["asked"] == told["rated"] == 2 * NUM_SAMPLES
    assert told["cost"] == pytest.approx(2 * NUM_SAMPLES * (500 * 2 + 50 * 10) / 1e6)
    assert (told["form"], told["left"]) == ("json_schema", 0)
    assert told["served_models"] == {SERVED_NAME: 2 * NUM_SAMPLES}
    assert server.keys[0] == "Bearer none"

    for request in server.requests:
        assert (request["temperature"], request["max_tokens"]) == (0, 1024)
        assert request["response_format"]["json_schema"]["strict"] is True
        assert not {"100", "200", "400"} & set(json.dumps(request["messages"]).split())

    records, num_bad = read_ratings(layout.ratings)
    assert num_bad == 0
    assert {(r.rater, r.rater_kind) for r in records} == {("judge-1", "model")}
    given = scores(layout)
    assert len(given) == 2 * NUM_SAMPLES * len(CRITERIA)
    for line in replies(layout):
        wanted = scores_of(line["request"])
        assert read_scores(line["reply"]["choices"][0]["message"]["content"]) == wanted
        for criterion, score in wanted.items():
            assert given[line["sample_id"], line["repeat"], criterion] == score
        assert line["reply"]["model"] == SERVED_NAME

    layout.ratings.unlink()
    assert judge(layout, server) == 0
    shown = capsys.readouterr()
    assert len(server.requests) == 2 * NUM_SAMPLES
    assert len(scores(layout)) == len(given)
    assert f"{2 * NUM_SAMPLES} ratings to do" in shown.err
    assert "asked twice about 6 samples" in shown.out

    assert judge(layout, server) == 0
    assert f"0 ratings to do, {2 * NUM_SAMPLES} on record" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("refused", "form"),
    [({"json_schema"}, "json_object"), ({"json_schema", "json_object"}, None)],
)
def test_a_server_that_refuses_a_form_is_asked_in_the_next(
    layout: RunLayout,
    server: JudgeServer,
    refused: set[str],
    form: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.refused_forms = refused
    assert judge(layout, server) == 0
    assert len(server.requests) == 2 * NUM_SAMPLES + len(refused)  # found out once
    assert server.requests[-1].get("response_format", {}).get("type") == form
    words = "as a JSON object" if form else "in words only"
    assert f"their form demanded {words}" in capsys.readouterr().err


def test_a_busy_server_is_asked_again(
    layout: RunLayout, server: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults = [429, 503, 500]
    assert judge(layout, server, "--concurrency", "1", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["rated"], told["retries"], told["left"]) == (2 * NUM_SAMPLES, 3, 0)


def test_a_server_that_stays_busy_ends_the_command_with_what_it_said(
    layout: RunLayout, server: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults = [FIVES, *[429] * 6]
    assert judge(layout, server, "--concurrency", "1") == 1
    assert f"error: {server.base_url} says 429: fault 429" in capsys.readouterr().err
    assert len(scores(layout)) == len(CRITERIA)  # the first is kept
    assert judge(layout, server) == 0
    assert len(scores(layout)) == 2 * NUM_SAMPLES * len(CRITERIA)


def test_a_reply_that_takes_too_long_is_asked_for_again(
    layout: RunLayout, server: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults = ["hang"]
    words = ["--timeout-seconds", "0.3", "--limit", "1", "--json"]
    assert judge(layout, server, *words) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["rated"], told["retries"]) == (2, 1)


@pytest.mark.parametrize(
    ("faults", "problem"),
    [
        (["I like it.", "Still do."], "it holds no JSON object with the scores"),
        ([ELEVENS, ELEVENS], "coherence is 11, not a whole number 0 to 10"),
        (["cut", "cut"], "it was cut off at 1024 tokens"),
        (["refuse", "refuse"], "the model refused to answer"),
    ],
)
def test_a_reply_that_cannot_be_used_is_corrected_once_then_counted(
    layout: RunLayout,
    server: JudgeServer,
    faults: list[str | int],
    problem: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.faults = [faults[0]]  # the correction helps
    assert judge(layout, server, "--concurrency", "1", "--limit", "1") == 0
    assert problem in server.requests[1]["messages"][-1]["content"]
    assert len(scores(layout)) == 2 * len(CRITERIA)

    layout.ratings.unlink()
    (layout.judge / "replies.jsonl").unlink()
    server.faults = list(faults)  # it does not
    capsys.readouterr()
    assert judge(layout, server, "--concurrency", "1", "--limit", "1", "--json") == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert [failure["problem"] for failure in told["failures"]] == [problem]
    assert (told["rated"], told["left"]) == (1, 0)
    assert "of 1 of the ratings no reply could be used" in err
    assert len(replies(layout)) == 3


def test_a_reply_that_was_cut_off_is_asked_for_again_where_it_can_be_longer(
    layout: RunLayout, server: JudgeServer
) -> None:
    server.faults = ["cut", "cut"]
    words = ["--concurrency", "1", "--limit", "1"]
    assert judge(layout, server, *words) == 0
    assert len(server.requests) == 3
    assert judge(layout, server, *words) == 1  # as before, from the record
    assert len(server.requests) == 3
    assert judge(layout, server, *words, "--max-reply-tokens", "2048") == 0
    assert len(server.requests) == 4
    assert server.requests[-1]["max_tokens"] == 2048
    assert len(scores(layout)) == 2 * len(CRITERIA)


def test_a_question_that_the_server_refuses_does_not_stop_the_others(
    layout: RunLayout, server: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults = [FIVES, 400]
    assert judge(layout, server, "--concurrency", "1", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rated"] == 2 * NUM_SAMPLES - 1
    assert [f["problem"] for f in told["failures"]] == ["the server refused it: fault 400"]


def test_a_server_that_refuses_everything_is_not_asked_for_ever(
    layout: RunLayout, server: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults = [400] * 100
    assert judge(layout, server, "--concurrency", "1") == 1
    assert "error: the server refuses every question: fault 400" in capsys.readouterr().err
    assert len(server.requests) == 9


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (401, "says 401: fault 401"),
        ("page", "does not answer as an OpenAI-compatible server"),
    ],
)
def test_what_waiting_does_not_mend_ends_the_command(
    layout: RunLayout,
    server: JudgeServer,
    fault: str | int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.faults = [fault] * 4
    assert judge(layout, server) == 1
    assert f"error: {server.base_url} {message}" in capsys.readouterr().err
    assert not layout.ratings.exists()


def test_a_model_that_the_server_lacks_is_named_with_those_it_has(
    layout: RunLayout, server: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.model = "judge-2"
    assert judge(layout, server) == 1
    assert "says 404: The model 'judge-1' does not exist" in capsys.readouterr().err
    server.model = "judge-1"
    words = ["judge", str(layout.root), "--model", "nobody", "--base-url", server.base_url]
    assert run_command(words) == 1
    assert "hint: it has these models: judge-1" in capsys.readouterr().err


def test_a_server_that_is_away_is_told_at_once(
    layout: RunLayout, capsys: pytest.CaptureFixture[str]
) -> None:
    with JudgeServer() as server:
        away = server.base_url
    words = ["judge", str(layout.root), "--model", "judge-1", "--base-url", away]
    assert run_command(words) == 1
    error, hint, *more = capsys.readouterr().err.splitlines()[1:]
    assert error.startswith(f"error: cannot reach {away}: ")
    assert hint.startswith("hint: start the server") and not more


def test_the_cost_stays_below_its_limit(
    layout: RunLayout, server: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    # A reply costs 550 of these; one under way can cost up to about 3,500.
    limits = ["--prices", "1e6,1e6", "--max-cost", "5000"]
    assert judge(layout, server, *limits, "--json") == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["is_budget_spent"] is True
    assert 1500 <= told["cost"] <= 5000
    assert told["left"] == 2 * NUM_SAMPLES - told["rated"] > 0
    assert f"stopped before --max-cost is exceeded; {told['left']} ratings are left" in err


def test_a_stop_lets_the_replies_under_way_come_in_and_the_next_command_goes_on(
    layout: RunLayout, server: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(count: int) -> None:
        if count == 5:
            os.kill(os.getpid(), signal.SIGINT)

    server.before_reply = interrupt
    assert judge(layout, server, "--concurrency", "2") == 75
    num_asked = len(server.requests)
    assert 5 <= num_asked <= 7
    assert len(scores(layout)) == num_asked * len(CRITERIA)
    err = capsys.readouterr().err
    assert f"stopped on request; {2 * NUM_SAMPLES - num_asked} ratings are left" in err

    assert judge(layout, server) == 0
    assert len(server.requests) == 2 * NUM_SAMPLES
    assert len(scores(layout)) == 2 * NUM_SAMPLES * len(CRITERIA)


def test_scores_that_a_kill_cut_short_are_recorded_again_from_the_reply(
    layout: RunLayout, server: JudgeServer
) -> None:
    assert judge(layout, server, "--concurrency", "1") == 0
    lines = layout.ratings.read_text().splitlines(keepends=True)
    whole = scores(layout)
    layout.ratings.write_text("".join(lines[:9]) + lines[9][:30])  # 1.5 ratings and a torn line
    assert judge(layout, server) == 0
    assert read_ratings(layout.ratings)[1] == 1
    assert len(server.requests) == 2 * NUM_SAMPLES
    assert scores(layout) == whole


def test_recorded_replies_stand_in_for_a_server(
    layout: RunLayout, server: JudgeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judge(layout, server) == 0
    whole = tmp_path / "replies.jsonl"
    lines = (layout.judge / "replies.jsonl").read_text().splitlines(keepends=True)
    rated = scores(layout)
    num_asked = len(server.requests)

    whole.write_text("".join(lines[3:]))
    layout.ratings.unlink()
    capsys.readouterr()
    assert judge(layout, None, "--replay", str(whole)) == 1
    err = capsys.readouterr().err
    assert f"error: {whole} lacks 3 of the replies" in err
    for line in map(json.loads, lines[:3]):
        assert f"no reply: sample {line['sample_id']}, repeat {line['repeat']}" in err

    whole.write_text("".join(lines))
    assert judge(layout, None, "--replay", str(whole)) == 0
    assert scores(layout) == rated
    assert len(server.requests) == num_asked


def test_the_key_comes_from_the_variable_that_is_named(
    layout: RunLayout,
    server: JudgeServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-of-the-judge")
    assert judge(layout, server, "--api-key-env", "JUDGE_KEY", "--limit", "1") == 0
    assert server.keys[0] == "Bearer sk-of-the-judge"
    written = (layout.judge / "replies.jsonl").read_text() + layout.ratings.read_text()
    assert "sk-of-the-judge" not in written + "".join(capsys.readouterr())


def test_the_name_of_a_person_is_not_a_judges(
    layout: RunLayout, server: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    sample, *_ = read_samples(layout.samples)[0]
    told = ("judge-1", "person", "depth", 5, 0, "2026-01-05T09:00:00.000Z")
    append_rating(layout.ratings, RatingRecord(sample["sample_id"], *told))
    assert judge(layout, server) == 2
    assert "error: a person rated this run under the name 'judge-1'" in capsys.readouterr().err


def test_two_judges_of_one_run_do_not_pay_twice(
    layout: RunLayout, server: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with exclusive_lock(layout.judge / ".lock", what="the judge"):
        assert judge(layout, server) == 6
    assert f"is in use by process {os.getpid()}" in capsys.readouterr().err
    assert not server.requests
