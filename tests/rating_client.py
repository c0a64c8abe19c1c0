"""The rating page's server without a browser: a made-up run, and what the page would ask."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from milepost.evaluation.rating_plan import rating_plan
from milepost.runs.layout import RunLayout
from milepost.runs.ratings import CRITERIA
from milepost.runs.records import read_samples
from milepost.serve.rating import build_app
from milepost.serve.rounds import Rounds
from tests.made_runs import RUN_ID, make_run

HERE = "http://127.0.0.1:8737"
STEPS = (0, 100, 200, 1000)


def run_with_samples(folder: Path) -> RunLayout:
    """A run with two samples at each of the steps."""
    made = make_run(folder)
    for step in STEPS:
        made.sample(step)
    return made.layout


def client_of(layout: RunLayout, **changes: Any) -> TestClient:
    """A server of the run, as `milepost rate` builds it."""
    samples, _ = read_samples(layout.samples)
    options: dict[str, Any] = {"fraction_repeated": 0.25, "limit": None, "steps": None}
    options |= {name: value for name, value in changes.items() if name != "rater"}
    seconds = itertools.count()
    made = Rounds(
        layout.ratings,
        plan=lambda rater: rating_plan(samples, seed=rater, **options),
        secret=RUN_ID,
        now=lambda: f"2026-01-05T10:00:{next(seconds) % 60:02d}.000Z",
    )
    return TestClient(build_app(made, rater=changes.get("rater")), base_url=HERE)


def begin(client: TestClient, rater: str = "Ada") -> dict[str, Any]:
    answer = client.post("/api/rounds", json={"rater": rater})
    assert answer.status_code == 200, answer.text
    return answer.json()


def look(client: TestClient, key: str, rater: str = "Ada") -> dict[str, Any]:
    answer = client.get(f"/api/presentations/{key}", params={"rater": rater})
    assert answer.status_code == 200, answer.text
    return answer.json()


def post(client: TestClient, key: str, scores: dict, *, rater: str = "Ada", seen=None):
    content = {"rater": rater, "scores": scores, "seen": seen or {}}
    return client.post(f"/api/presentations/{key}", json=content)


def scored(*scores: int) -> dict[str, int]:
    """The six criteria with these scores; one score is for all."""
    return dict(zip(CRITERIA, scores if len(scores) == 6 else scores * 6, strict=True))


def rate_all(client: TestClient, rater: str = "Ada") -> list[str]:
    """A whole round, each presentation with its position as scores; the keys in order."""
    keys, progress = [], begin(client, rater)
    while progress["next"] is not None:
        keys.append(progress["next"])
        answer = post(client, keys[-1], scored((len(keys) - 1) % 11), rater=rater)
        assert answer.status_code == 200, answer.text
        progress = answer.json()
    return keys
