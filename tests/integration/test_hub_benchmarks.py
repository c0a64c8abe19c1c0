"""Rows of a benchmark from the hub: the real client against a local server of the hub's shape."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.benchmark_rows import parquet
from tests.hub_server import HubServer

ROWS = [
    {
        "ind": number,
        "activity_label": "Counting",
        "ctx_a": f"A child counts to {number}.",
        "ctx_b": "then",
        "ctx": "",
        "endings": [f"goes on to {number + 1}.", "stops.", "sings.", "runs."],
        "source_id": "made up",
        "split": "val",
        "split_type": "indomain",
        "label": "0",
    }
    for number in range(5)
]

OPEN = """
import json, sys
from pathlib import Path
from milepost.core.console import say_error
from milepost.core.errors import MilepostError
from milepost.evaluation.benchmarks import open_benchmark
from milepost.text.tokenizer import load_tokenizer
try:
    items = open_benchmark(
        "hellaswag",
        tokenizer=load_tokenizer("gpt2"),
        context_length=64,
        data_dir=Path(sys.argv[1]) if sys.argv[1:] else None,
        limit=None,
    )
except MilepostError as error:
    say_error(error)
    sys.exit(error.exit_code)
print(json.dumps([items.data_sha256, len(items.items)]))
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    files = {
        "default/validation/0000.parquet": parquet(ROWS[:3]),
        "default/validation/0001.parquet": parquet(ROWS[3:]),
        "default/train/0000.parquet": b"not needed",
    }
    server = HubServer(files)
    server.repository = "Rowan/hellaswag"
    with server:
        yield server


def open_hellaswag(
    cache: Path, *words: str, endpoint: str = "http://127.0.0.1:9", offline: str = "0"
) -> subprocess.CompletedProcess[str]:
    """In a process of its own, whose hub is at `endpoint`, by default where nobody answers."""
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(cache / "hf-home"),
        "HF_TOKEN": "",
        "NO_PROXY": "127.0.0.1",
        "XDG_CACHE_HOME": str(cache),
    }
    return subprocess.run(
        [sys.executable, "-c", OPEN, *words], env=environment, capture_output=True, text=True
    )


def test_rows_are_fetched_once_and_equal_those_of_a_file(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "hellaswag_val.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    from_file = open_hellaswag(tmp_path / "file-cache", str(tmp_path / "rows"))
    assert from_file.returncode == 0, from_file.stderr

    cache = tmp_path / "cache"
    fetched = open_hellaswag(cache, endpoint=hub.endpoint)
    assert fetched.returncode == 0, fetched.stderr
    assert json.loads(fetched.stdout) == json.loads(from_file.stdout)
    assert json.loads(fetched.stdout)[1] == 5
    num_requests = len(hub.requests)
    again = open_hellaswag(cache)  # without any hub
    assert again.stdout == fetched.stdout

    (cache / "milepost" / "items").rename(cache / "milepost" / "gone")
    folder = cache / "milepost" / "benchmarks" / "hellaswag_validation"
    (first, _) = sorted(folder.iterdir())
    first.write_bytes(first.read_bytes()[:-1])
    mended = open_hellaswag(cache, endpoint=hub.endpoint)
    assert mended.stdout == fetched.stdout
    assert len(hub.requests) > num_requests
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("offline", ["0", "1"])
def test_without_the_hub_the_error_names_the_other_way(offline: str, tmp_path: Path) -> None:
    done = open_hellaswag(tmp_path, offline=offline)
    assert done.returncode == 3
    error, hint = done.stderr.strip().splitlines()[-2:]
    assert error.startswith("error: hf://datasets/Rowan/hellaswag@")
    assert "cannot be fetched" in error
    assert hint.startswith("hint: ") and "--data-dir" in hint
