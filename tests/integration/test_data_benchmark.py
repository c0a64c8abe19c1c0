"""A rehearsal of benchmarks/data.py: every question on a few megabytes of made-up words."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training import environment

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "data.py"
SMALL = ["--megabytes", "3", "--small-megabytes", "1", "--turns", "1", "--seconds", "0.1"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    words = random.Random(1).choices(
        ["state", "of", "the", "union,", "is", "naïve", "漢字."], k=6000
    )
    path = tmp_path / "texts.jsonl"
    with path.open("w") as file:
        for start in range(0, 5000, 10):
            file.write(json.dumps({"text": " ".join(words[start : start + 1000])}) + "\n")
    return path


@pytest.mark.long
@pytest.mark.timeout(600)
def test_every_question_is_answered_with_the_same_ids(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastokens")
    pytest.importorskip("datasets")
    words = ["--source", str(source), "--folder", str(tmp_path), *SMALL]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    asked = {
        question: [r for r in rows if r["question"] == question]
        for question in (
            "encoders",
            "prepare",
            "prepare, calculated",
            "peers",
            "open",
            "order",
            "loader",
        )
    }
    assert len(asked["encoders"]) == 4 and all(row["is_same"] for row in asked["encoders"])
    parquet, lines = asked["prepare"]
    assert parquet["fingerprint"] == lines["fingerprint"]
    assert parquet["tokens"] == lines["tokens"] > 0
    assert parquet["peak_bytes"] < 1e9 and lines["peak_bytes"] < 1e9
    assert len(asked["prepare, calculated"]) == 2
    assert len({row["tokens"] for row in asked["peers"]}) == 1
    assert {"of_encoder_rate", "of_wanted_rate"} <= parquet.keys() & lines.keys()
    assert asked["order"][0]["rows"] == 10**10 // 1024
    assert asked["order"][0]["more_memory_bytes"] < 64 << 20
    assert asked["open"][0]["bytes"] == 100 * 10**9
    assert asked["loader"][0]["waited_fraction"] < 0.01
    assert not [path for path in tmp_path.iterdir() if path != source], "it leaves nothing behind"
