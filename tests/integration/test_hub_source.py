"""hf:// sources with the real client against a local server of the hub's shape."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
import pytest

from milepost.data.shards import open_prepared
from tests.hub_server import COMMIT, HubServer

TEXTS = [f"Page {number} of the web, which teaches {number * 3} things." for number in range(40)]


def parquet(texts: list[str]) -> bytes:
    """A file with the columns of FineWeb-Edu."""
    count = len(texts)
    table = pyarrow.table(
        {
            "text": texts,
            "id": [f"<urn:uuid:{text[5:7].strip()}>" for text in texts],
            "dump": ["CC-MAIN-2024-10"] * count,
            "url": ["http://example.org"] * count,
            "file_path": ["s3://x"] * count,
            "language": ["en"] * count,
            "language_score": [0.9] * count,
            "token_count": [12] * count,
            "score": [3.2] * count,
            "int_score": [3] * count,
        }
    )
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, row_group_size=7)
    return buffer.getvalue()


FILES = {
    "README.md": b"# a dataset",
    "data/CC-MAIN-2024-10/train-00000.parquet": parquet(TEXTS[:20]),
    "data/CC-MAIN-2024-10/train-00001.parquet": parquet(TEXTS[20:]),
    "data/other/more.jsonl": b'{"text": "more"}\n',
    "sample.txt": b"a sample",
}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(dict(FILES)) as server:
        yield server


PREPARE = """
import sys
from milepost.cli.main import run
from milepost.data import hub
hub.FETCH_BYTES = 1000
sys.exit(run(["data", "prepare", *sys.argv[1:]]))
"""


def start(hub: HubServer, source: str, out: Path, *options: str) -> subprocess.Popen[str]:
    """`milepost data prepare`, in a process whose hub is the local server."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(out.parent / "hf-home"),
        "HF_TOKEN": "",
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, source, "--out", str(out), *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Done(NamedTuple):
    """What a process left."""

    returncode: int
    stdout: str
    stderr: str


def prepare(hub: HubServer, source: str, out: Path, *options: str) -> Done:
    process = start(hub, source, out, *options)
    stdout, stderr = process.communicate(timeout=120)
    return Done(process.returncode, stdout, stderr)


def texts_of(out: Path) -> list[str]:
    data = open_prepared(out)
    text = data.tokenizer().decode(data.train.read(0, data.train.num_tokens))
    return text.split("<|endoftext|>")[1:]


def test_a_pattern_is_fetched_prepared_and_named(hub: HubServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = "hf://datasets/owner/name@v1.0/data/*/train-0000[0-1].parquet"
    done = prepare(hub, source, out, "--json")
    assert done.returncode == 0, done.stderr
    assert texts_of(out) == TEXTS
    data = open_prepared(out)
    names = [entry["name"] for entry in data.manifest["sources"]]
    folder = f"hf://datasets/owner/name@{COMMIT}/data/CC-MAIN-2024-10"
    assert names == [f"{folder}/train-00000.parquet", f"{folder}/train-00001.parquet"]
    assert data.train.document_at(0).name == "<urn:uuid:0>"
    assert json.loads(done.stdout)["train"]["num_documents"] == 40
    assert {path.name for path in out.iterdir()} >= {"manifest.json"}
    assert not (out / ".partial").exists()
    fetched = len(hub.downloads())
    again = prepare(hub, source, out)
    assert again.returncode == 0 and "nothing to do" in again.stderr
    assert len(hub.downloads()) == fetched


@pytest.mark.parametrize(
    ("path", "count"), [("sample.txt", 1), ("data/other", 1), ("", 42), ("**/*.jsonl", 1)]
)
def test_a_file_a_folder_or_all_is_found(
    hub: HubServer, tmp_path: Path, path: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys; from milepost.data.sources import find_files\n"
        "for file in find_files([sys.argv[1]]): print(file.hub.path)"
    )
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
    found = subprocess.run(
        [sys.executable, "-c", code, f"hf://datasets/owner/name/{path}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    expected = {
        "sample.txt": ["sample.txt"],
        "data/other": ["data/other/more.jsonl"],
        "": sorted(set(FILES) - {"README.md"}),
        "**/*.jsonl": ["data/other/more.jsonl"],
    }
    assert found.stdout.splitlines() == expected[path], found.stderr


def test_a_download_that_breaks_off_or_is_killed_goes_on_where_it_stopped(
    hub: HubServer, tmp_path: Path
) -> None:
    path = "data/CC-MAIN-2024-10/train-00001.parquet"
    source = "hf://datasets/owner/name/data/CC-MAIN-2024-10"
    hub.broken_off.add((path, 1500))
    hub.held.add((path, 3500))
    process = start(hub, source, tmp_path / "out")
    assert hub.is_held.wait(timeout=60)
    process.kill()
    process.communicate()
    hub.held.clear()
    before = len(hub.downloads())
    again = prepare(hub, source, tmp_path / "out")
    assert again.returncode == 0, again.stderr
    assert texts_of(tmp_path / "out") == TEXTS
    assert "2.9 KiB are here already" in again.stderr
    ranges = [wanted for name, wanted in hub.downloads()[before:] if name == path]
    assert ranges[0] == "bytes=3000-3999"


def test_a_file_with_other_bytes_than_the_hub_says_is_refused(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.spoiled.add("sample.txt")
    done = prepare(hub, "hf://datasets/owner/name/sample.txt", tmp_path / "out")
    assert done.returncode == 3
    assert "sample.txt came with other bytes than the hub says" in done.stderr
    hub.spoiled.clear()
    assert prepare(hub, "hf://datasets/owner/name/sample.txt", tmp_path / "out").returncode == 0
    assert texts_of(tmp_path / "out") == ["a sample"]


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [
        ("hf://datasets/owner/absent/x.parquet", 3, "there is no dataset for"),
        ("hf://datasets/owner/name@v9/sample.txt", 3, "there is no dataset for"),
        ("hf://datasets/owner/name/absent.parquet", 3, "holds no file that is read"),
        ("hf://datasets/owner", 2, "is not the name of a dataset on the hub"),
        ("hf://models/owner/name", 2, "is not the name of a dataset on the hub"),
    ],
)
def test_what_the_hub_does_not_have_is_said(
    hub: HubServer, tmp_path: Path, source: str, code: int, message: str
) -> None:
    done = prepare(hub, source, tmp_path / "out")
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(f"error: {message}") or message in done.stderr.splitlines()[0]
    assert "hint: " in done.stderr and "Traceback" not in done.stderr


def test_a_hub_that_is_not_there_is_said(tmp_path: Path) -> None:
    server = HubServer({})
    with server:
        pass
    done = prepare(server, "hf://datasets/owner/name/sample.txt", tmp_path / "out")
    assert done.returncode == 3, done.stderr
    assert "cannot be fetched" in done.stderr and "check the network" in done.stderr
    assert "Traceback" not in done.stderr
