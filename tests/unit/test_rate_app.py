"""The rating page's server: what it sends, what it records, how a round goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from milepost.core.errors import StorageError
from milepost.core.files import append_json_line
from milepost.evaluation.rating_plan import rating_plan
from milepost.runs.layout import RunLayout
from milepost.runs.ratings import CRITERIA, RatingRecord, append_rating, read_ratings
from milepost.runs.records import read_samples
from milepost.serve import rating_log
from milepost.serve.rating import PAGES
from tests.made_runs import RUN_ID
from tests.rating_client import (
    begin,
    client_of,
    look,
    post,
    rate_all,
    run_with_samples,
    scored,
)


@pytest.fixture
def layout(tmp_path: Path) -> RunLayout:
    return run_with_samples(tmp_path / "run")


def test_a_whole_round_is_recorded_with_who_what_and_which_time(layout) -> None:
    client = client_of(layout)
    keys = rate_all(client)
    records, num_bad = read_ratings(layout.ratings)
    assert num_bad == 0
    assert len(keys) == len(set(keys)) == 8 + 2
    assert len(records) == 10 * 6
    plan = rating_plan(
        read_samples(layout.samples)[0], seed="Ada", fraction_repeated=0.25, limit=None
    )
    for number, shown in enumerate(plan):
        of_this = [r for r in records if (r.sample_id, r.repeat) == (shown.sample_id, shown.repeat)]
        assert {record.criterion for record in of_this} == set(CRITERIA)
        assert {record.score for record in of_this} == {number}
    assert {(record.rater, record.rater_kind) for record in records} == {("Ada", "person")}
    assert begin(client) | {"last": ""} == {
        "rater": "Ada", "total": 10, "rated": 10, "next": None, "last": ""
    }  # fmt: skip


def test_nothing_that_is_sent_tells_step_sample_run_or_repetition(layout) -> None:
    samples, _ = read_samples(layout.samples)
    client = client_of(layout)
    answers = [client.get(address) for address in (*PAGES, "/api/start")]
    progress = begin(client)
    while progress["next"] is not None:
        key = progress["next"]
        answers.append(client.get(f"/api/presentations/{key}", params={"rater": "Ada"}))
        assert set(answers[-1].json()) == {
            "key", "position", "prompt", "completion", "scores", "previous", "next"
        }  # fmt: skip
        assert answers[-1].json()["scores"] == {}, "a repeat must not show the first scores"
        answers.append(post(client, key, scored(5)))
        progress = answers[-1].json()
    hidden = [RUN_ID, layout.root.name + "/", '"step"', "sample_id", '"repeat"']
    hidden += [sample["sample_id"] for sample in samples]
    for answer in answers:
        sent = answer.text + str(answer.headers) + str(answer.url)
        assert not [word for word in hidden if word in sent]


def test_raters_have_orders_and_keys_of_their_own(layout) -> None:
    client = client_of(layout)
    rounds_of = {rater: rate_all(client, rater) for rater in ("Ada", "Ben")}
    assert not set(rounds_of["Ada"]) & set(rounds_of["Ben"])
    texts = {
        rater: [look(client, key, rater)["prompt"] for key in keys]
        for rater, keys in rounds_of.items()
    }
    assert texts["Ada"] != texts["Ben"]
    assert client.get("/api/start").json()["raters"] == ["Ada", "Ben"]
    key = rounds_of["Ada"][0]
    assert post(client, key, scored(1), rater="Ben").status_code == 404


def test_a_restart_goes_on_at_the_first_that_is_not_rated(layout) -> None:
    client = client_of(layout)
    first = begin(client)["next"]
    second = post(client, first, scored(3)).json()["next"]
    again = client_of(layout)
    assert begin(again)["rated"] == 1
    assert begin(again)["next"] == second
    assert look(again, second)["previous"] == first
    assert look(again, first)["scores"] == scored(3)


def test_of_a_changed_score_the_later_counts_and_the_rest_is_not_written_again(layout) -> None:
    client = client_of(layout)
    key = begin(client)["next"]
    post(client, key, scored(3, 3, 3, 3, 3, 3))
    answer = post(client, key, scored(3, 3, 10, 3, 3, 3), seen=scored(3))
    assert answer.json()["rated"] == 1
    lines = layout.ratings.read_text().splitlines()
    assert len(lines) == 7
    assert json.loads(lines[-1])["criterion"] == "relevance"
    assert look(client, key)["scores"] == scored(3, 3, 10, 3, 3, 3)


def test_a_save_that_was_answered_into_the_void_can_be_repeated(layout) -> None:
    client = client_of(layout)
    key = begin(client)["next"]
    assert post(client, key, scored(4)).json() == post(client, key, scored(4)).json()
    assert len(layout.ratings.read_text().splitlines()) == 6


def test_two_windows_do_not_overwrite_each_other_unseen(layout) -> None:
    one, other = client_of(layout), client_of(layout)
    key = begin(one)["next"]
    assert post(one, key, scored(4)).status_code == 200
    refused = post(other, key, scored(9))
    assert refused.status_code == 409
    assert refused.json()["scores"] == scored(4)
    assert look(one, key)["scores"] == scored(4)
    assert post(other, key, scored(9), seen=scored(4)).status_code == 200
    assert look(one, key)["scores"] == scored(9)


def test_a_disk_that_fails_half_way_marks_nothing_as_rated(layout, monkeypatch) -> None:
    client = client_of(layout)
    key = begin(client)["next"]
    real, written = append_rating, []

    def fails_at_the_fourth(path: Path, record: RatingRecord) -> None:
        if len(written) == 3:
            raise StorageError(f"cannot write {path}: no space left on device", hint="free some")
        written.append(record)
        real(path, record)

    monkeypatch.setattr(rating_log, "append_rating", fails_at_the_fourth)
    answer = post(client, key, scored(6))
    assert answer.status_code == 507
    assert "no space left" in answer.json()["error"]
    assert begin(client)["rated"] == 0
    assert begin(client)["next"] == key
    monkeypatch.setattr(rating_log, "append_rating", real)
    assert post(client, key, scored(6)).json()["rated"] == 1
    assert len(layout.ratings.read_text().splitlines()) == 6


def test_where_the_disk_fails_is_said_in_the_terminal_and_not_on_the_page(layout, capsys) -> None:
    client = client_of(layout)
    key = begin(client)["next"]
    layout.ratings.mkdir()
    answer = post(client, key, scored(6))
    assert answer.status_code == 507
    assert str(layout.root) not in answer.text
    assert "not a regular file" in answer.json()["error"]
    assert f"error: cannot read {layout.ratings}: it is not a regular" in capsys.readouterr().err


def test_foreign_and_torn_lines_do_not_stop_a_round(layout) -> None:
    client = client_of(layout)
    key = begin(client)["next"]
    post(client, key, scored(2))
    append_json_line(layout.ratings, {"v": 1, "rater": "Ada", "score": "high"})
    with layout.ratings.open("a") as file:
        file.write('{"v": 1, "sample_id": "torn')
    assert begin(client)["rated"] == 1
    assert post(client, begin(client)["next"], scored(7)).json()["rated"] == 2
    assert read_ratings(layout.ratings)[1] == 2


def test_a_log_that_is_replaced_or_gone_is_read_from_its_start(layout) -> None:
    client = client_of(layout)
    keys = rate_all(client)
    whole = layout.ratings.read_bytes()
    half = b"".join(whole.splitlines(keepends=True)[: 6 * 4])
    for content, rated in ((half, 4), (whole, len(keys)), (whole[:-30], len(keys) - 1)):
        layout.ratings.with_name("new").write_bytes(content)
        layout.ratings.with_name("new").replace(layout.ratings)
        assert begin(client)["rated"] == rated
    layout.ratings.unlink()
    assert begin(client)["rated"] == 0


def test_a_line_without_its_end_counts_now_and_once(layout) -> None:
    client = client_of(layout)
    key = begin(client)["next"]
    post(client, key, scored(3))
    layout.ratings.write_bytes(layout.ratings.read_bytes()[:-1])
    again = client_of(layout)
    assert begin(again)["rated"] == 1
    assert post(again, key, scored(3, 3, 3, 3, 3, 4), seen=scored(3)).json()["rated"] == 1
    assert look(again, key)["scores"] == scored(3, 3, 3, 3, 3, 4)


@pytest.mark.parametrize(
    ("typed", "known"),
    [("ada", "Ada"), ("  Ada ", "Ada"), ("ADA", "Ada"), ("Jose\u0301", "José"), ("Adam", "Adam")],
)
def test_names_that_differ_in_case_or_space_only_are_one_rater(layout, typed, known) -> None:
    client = client_of(layout)
    for name in ("Ada", "José"):
        post(client, begin(client, name)["next"], scored(1), rater=name)
    assert begin(client, typed)["rater"] == known


@pytest.mark.parametrize("name", ["", "  ", "x" * 81, "A\u202eB", "A\x00", "\ud800"])
def test_names_that_cannot_be_shown_are_refused(layout, name: str) -> None:
    body = json.dumps({"rater": name})
    headers = {"Content-Type": "application/json"}
    answer = client_of(layout).post("/api/rounds", content=body, headers=headers)
    assert answer.status_code == 422
    assert not layout.ratings.exists()


def test_names_that_were_written_by_hand_stop_nothing(layout) -> None:
    sample = read_samples(layout.samples)[0][0]
    time = "2026-01-05T10:00:00.000Z"
    for name in ("x" * 200, "\x1b[2J", "judge-7b"):
        append_rating(
            layout.ratings, RatingRecord(sample["sample_id"], name, "person", "depth", 9, 0, time)
        )
    append_rating(
        layout.ratings, RatingRecord(sample["sample_id"], "judge-7b", "model", "depth", 9, 0, time)
    )
    client = client_of(layout)
    assert client.get("/api/start").json()["raters"] == ["x" * 200, "judge-7b"]
    assert begin(client)["rated"] == 0


def test_a_models_name_is_not_taken_by_a_person(layout) -> None:
    sample = read_samples(layout.samples)[0][0]
    time = "2026-01-05T10:00:00.000Z"
    record = RatingRecord(sample["sample_id"], "judge-7b", "model", "depth", 9, 0, time)
    append_rating(layout.ratings, record)
    client = client_of(layout)
    answer = client.post("/api/rounds", json={"rater": "Judge-7B"})
    assert answer.status_code == 422
    assert "model that judged this run" in answer.json()["error"]
    assert client.get("/api/start").json()["raters"] == []
