"""What the rating page's server refuses: forms, addresses, other sites, hosts, options."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from milepost.cli.main import run
from milepost.core.errors import UsageError
from milepost.core.files import append_json_line
from milepost.runs.layout import RunLayout
from milepost.runs.ratings import CRITERIA, read_ratings
from milepost.runs.records import read_samples
from milepost.serve import local
from milepost.serve.rating import PAGES
from tests.made_runs import make_run
from tests.rating_client import (
    HERE,
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


@pytest.mark.parametrize(
    "scores",
    [
        {},
        dict.fromkeys(CRITERIA[:5], 5),
        scored(5) | {"charm": 5},
        scored(5) | {"depth": 11},
        scored(5) | {"depth": -1},
        scored(5) | {"depth": 5.5},
        scored(5) | {"depth": "5"},
        scored(5) | {"depth": True},
        scored(5) | {"depth": None},
        scored(5) | {"depth": 10**30},
        [5] * 6,
        None,
    ],
)
def test_scores_out_of_form_are_refused_and_nothing_is_written(layout, scores) -> None:
    client = client_of(layout)
    answer = post(client, begin(client)["next"], scores)
    assert answer.status_code == 422
    assert answer.json()["error"]
    assert not layout.ratings.exists()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"rater": "Ada"}',
        b'{"rater": 5, "scores": {}, "seen": {}}',
        b'{"rater": "Ada", "scores": {}, "seen": {}, "rater_kind": "model"}',
        b'{"rater": "Ada", "scores": {"\\ud800": 1, "depth": "x"}, "seen": {}}',
        b'{"rater": "Ada", "scores": {"depth": ' + b"9" * 6000 + b'}, "seen": {}}',
        b"[" * 8000,
    ],
)
def test_bodies_out_of_form_are_refused_with_a_message(layout, body: bytes) -> None:
    client = client_of(layout)
    key = begin(client)["next"]
    headers = {"Content-Type": "application/json"}
    answer = client.post(f"/api/presentations/{key}", content=body, headers=headers)
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]
    assert not layout.ratings.exists()


@pytest.mark.parametrize("key", ["0", "f" * 16, "..%2f..%2fmanifest.json", "a b"])
def test_a_presentation_that_is_not_in_the_round_is_not_found(layout, key: str) -> None:
    client = client_of(layout)
    assert client.get(f"/api/presentations/{key}", params={"rater": "Ada"}).status_code == 404
    assert post(client, key, scored(5)).status_code == 404
    assert not layout.ratings.exists()


@pytest.mark.parametrize("address", ["/docs", "/openapi.json", "/manifest.json", "/../x", "/api"])
def test_there_is_nothing_else_to_be_had(layout, address: str) -> None:
    answer = client_of(layout).get(address)
    assert answer.status_code == 404
    assert answer.json()["error"]


def test_a_page_of_an_earlier_start_cannot_score_what_is_no_longer_there(layout) -> None:
    keys = set(rate_all(client_of(layout)))
    layout.ratings.unlink()
    fewer = client_of(layout, steps=[0, 100])
    statuses = {post(fewer, key, scored(5)).status_code for key in keys}
    assert statuses == {200, 404}
    records, _ = read_ratings(layout.ratings)
    of_steps = {s["sample_id"] for s in read_samples(layout.samples)[0] if s["step"] in (0, 100)}
    assert {record.sample_id for record in records} <= of_steps


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8737", 200),
        ("localhost:9000", 200),
        ("LOCALHOST", 200),
        ("[::1]:8737", 200),
        ("127.0.0.1.evil.example", 421),
        ("evil.example:8737", 421),
        ("localhost.evil.example", 421),
        ("192.168.1.7:8737", 421),
        ("0.0.0.0:8737", 421),
        ("[::1", 421),
        ("", 421),
    ],
)
def test_only_this_machine_is_served(layout, host: str, status: int) -> None:
    client = client_of(layout)
    assert client.get("/", headers={"Host": host}).status_code == status
    assert client.post("/api/rounds", json={"rater": "A"}, headers={"Host": host}).status_code == (
        status
    )


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": HERE}, 200),
        ({"Origin": "http://localhost:9000", "Host": "localhost:9000"}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:3000"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
    ],
)
def test_a_page_of_another_site_cannot_write(layout, headers, status: int) -> None:
    client = client_of(layout)
    key = begin(client)["next"]
    content = {"rater": "Ada", "scores": scored(5), "seen": {}}
    answer = client.post(f"/api/presentations/{key}", json=content, headers=headers)
    assert answer.status_code == status
    assert layout.ratings.exists() == (status == 200)


def test_a_form_of_another_site_needs_no_script_and_is_refused_too(layout) -> None:
    client = client_of(layout)
    body = json.dumps({"rater": "Ada", "scores": scored(5), "seen": {}})
    key = begin(client)["next"]
    for media_type in ("text/plain", "application/x-www-form-urlencoded"):
        headers = {"Content-Type": media_type}
        answer = client.post(f"/api/presentations/{key}", content=body, headers=headers)
        assert answer.status_code == 422
    assert not layout.ratings.exists()


def test_large_and_endless_bodies_are_refused_before_they_are_read(layout) -> None:
    client = client_of(layout)
    largest = b'{"rater": "Ada"}'.ljust(local.MOST_BODY_BYTES)
    headers = {"Content-Type": "application/json"}
    assert client.post("/api/rounds", content=largest, headers=headers).status_code == 200
    answer = client.post("/api/rounds", content=largest + b" ", headers=headers)
    assert answer.status_code == 413
    parts = (b" " for _ in range(10))
    assert client.post("/api/rounds", content=parts, headers=headers).status_code == 411


def test_every_answer_forbids_foreign_content_and_copies(layout) -> None:
    client = client_of(layout)
    for address in ("/", "/rate.js", "/api/start", "/nowhere"):
        headers = client.get(address).headers
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"


def test_the_page_asks_for_nothing_from_elsewhere(layout) -> None:
    client = client_of(layout)
    for address in PAGES:
        text = client.get(address).text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text


def test_texts_that_no_page_can_hold_are_sent_with_marks_in_their_place(layout) -> None:
    odd = {"sample_id": "odd", "step": 7, "prompt": "a\x00b", "completion": "<i>\ud800\x1b[2J"}
    append_json_line(layout.samples, {"v": 1} | odd)
    client = client_of(layout, steps=[7], fraction_repeated=0)
    shown = look(client, begin(client)["next"])
    assert shown["prompt"] == "a\ufffdb"
    assert shown["completion"] == "<i>\ufffd\ufffd[2J"


def test_a_named_rater_is_told_to_the_page(layout) -> None:
    assert client_of(layout, rater="Ada").get("/api/start").json()["rater"] == "Ada"
    assert client_of(layout).get("/api/start").json()["rater"] is None


def test_the_usual_port_gives_way_and_a_wanted_one_is_refused_when_taken(monkeypatch) -> None:
    with local.open_port("127.0.0.1", port=0) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {number} is in use"):
            local.open_port("127.0.0.1", port=number)
        monkeypatch.setattr(local, "FIRST_PORT", number)
        with local.open_port("127.0.0.1", port=None) as free:
            assert free.getsockname()[1] != number
            assert local.address_of(free) == f"http://127.0.0.1:{free.getsockname()[1]}/"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "::", "example.org", ""])
def test_a_host_that_others_can_reach_is_refused_with_the_way_through_ssh(host: str) -> None:
    with pytest.raises(UsageError, match="this machine only") as caught:
        local.open_port(host, port=9000)
    assert "ssh -L 9000:127.0.0.1:9000" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "0"], "error: --limit 0 leaves nothing to rate"),
        (["--repeat-fraction", "1.5"], "error: --repeat-fraction 1.5 is not 0 to 1"),
        (["--repeat-fraction", "nan"], "error: --repeat-fraction nan is not 0 to 1"),
        (["--steps", "7"], "error: there is no sample of step 7"),
        (["--rater", " "], "error: a rater's name has 1 to 80 printable characters"),
        (["--host", "0.0.0.0"], "error: --host 0.0.0.0: the page is served to this machine only"),
        (["--port", "70000"], "error: port 70000 of 127.0.0.1 cannot be had"),
        (["--port", "-1"], "error: port -1 of 127.0.0.1 cannot be had"),
    ],
)
def test_options_that_cannot_be_are_refused(layout, capsys, words, message) -> None:
    assert run(["rate", str(layout.root), "--no-browser", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_samples_says_how_to_get_some(tmp_path, capsys) -> None:
    made = make_run(tmp_path / "run")
    for words in ([], ["--steps", "all"]):
        assert run(["rate", str(made.layout.root), "--no-browser", *words]) == 3
        said = capsys.readouterr().err
        assert "has no samples to rate" in said
        assert "milepost sample" in said


def test_localhost_is_the_loopback_address() -> None:
    with local.open_port("localhost", port=0) as listening:
        assert listening.family == socket.AF_INET
        assert listening.getsockname()[0] == "127.0.0.1"
