"""A preparation that is killed, starved of disk or left alone by its parent."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from milepost.core.errors import DataError
from milepost.data.shards import open_prepared
from tests.sources import content_of

PREPARE = """
import sys
from milepost.cli.main import run
from milepost.data import blocks, preparation
blocks.BLOCK_BYTES, blocks.READ_BYTES = 30_000, 5_000
preparation.FAST_FROM_BYTES = 0
sys.exit(run(["data", "prepare", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "a.jsonl"
    with path.open("w") as file:
        for number in range(1200):
            text = " ".join(f"word{(number * 7 + place) % 997}" for place in range(60))
            file.write(json.dumps({"text": text, "id": str(number)}) + "\n")
    return path


def start(source: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", PREPARE, str(source), "--out", str(out)]
    words += ["--val-fraction", "0.1", "--tokenizer", "train:300"]
    return subprocess.Popen(
        [*words, *options], stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def num_pieces(out: Path) -> int:
    return len(list((out / ".partial" / "pieces").glob("*/[0-9]*.json")))


def wait_for_pieces(out: Path, process: subprocess.Popen[str], count: int) -> None:
    deadline = time.monotonic() + 60
    while num_pieces(out) < count and process.poll() is None:
        assert time.monotonic() < deadline, "no piece came"
        time.sleep(0.002)


def test_a_killed_preparation_goes_on_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    whole = start(source, tmp_path / "whole", "--workers", "1")
    assert whole.wait(timeout=120) == 0
    out = tmp_path / "killed"
    for kill_at in (1, 6, 12):
        process = start(source, out, "--workers", "1")
        wait_for_pieces(out, process, kill_at)
        assert process.poll() is None, "it ended before it could be killed"
        process.kill()
        process.wait()
        with pytest.raises(DataError, match="holds no prepared data"):
            open_prepared(out)
    done_before = {p: p.stat().st_mtime_ns for p in out.glob(".partial/pieces/*/[0-9]*.json")}
    last = start(source, out, "--workers", "1")
    _, talk = last.communicate(timeout=120)
    assert last.returncode == 0, talk
    assert "going on with" in talk
    assert len(done_before) >= 12
    assert content_of(out) == content_of(tmp_path / "whole")


def test_workers_end_with_a_parent_that_is_killed(source: Path, tmp_path: Path) -> None:
    process = start(source, tmp_path / "out", "--workers", "2")
    wait_for_pieces(tmp_path / "out", process, 2)
    group = process.pid
    process.kill()
    process.wait()
    deadline = time.monotonic() + 15
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def test_ctrl_c_ends_a_preparation_without_a_traceback(source: Path, tmp_path: Path) -> None:
    process = start(source, tmp_path / "out", "--workers", "2")
    wait_for_pieces(tmp_path / "out", process, 2)
    os.killpg(process.pid, signal.SIGINT)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in talk


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_is_said_and_leaves_nothing_that_looks_whole(
    source: Path, tmp_path: Path, workers: str
) -> None:
    """No file may grow above a limit that the pieces reach, or the shards do."""
    out = tmp_path / "out"
    limit = 14_000 if workers == "2" else 400_000  # of a piece, of a shard
    options = ["--workers", workers]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        process = start(source, out, *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    _, talk = process.communicate(timeout=120)
    assert process.returncode == 7, talk
    errors = [line for line in talk.splitlines() if line.startswith("error: ")]
    place = ".partial/pieces" if workers == "2" else "train-00000.tokens"
    assert len(errors) == 1 and "Traceback" not in talk
    assert "cannot write" in errors[0] and place in errors[0]
    with pytest.raises(DataError, match="holds no prepared data"):
        open_prepared(out)
    if workers == "1":
        again = start(source, out, *options)
        _, talk = again.communicate(timeout=120)
        assert again.returncode == 0, talk
        list(open_prepared(out).train.verify())


def test_a_gzip_bomb_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    """300 MiB of one letter in 1 MB: above the limit of a line."""
    import gzip

    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "good"}\n{"text": "')
        for _ in range(300):
            file.write(b"a" * (1 << 20))
        file.write(b'"}\n{"text": "fine"}\n')
    talk, peak_kib = run_and_measure(path, tmp_path / "out", "--skip-bad")
    assert "dropped: 1 too_long" in talk
    assert open_prepared(tmp_path / "out").train.num_documents == 2
    assert peak_kib < 700 * 1024


@pytest.mark.long
def test_a_table_that_is_one_row_group_takes_no_more_memory_than_others(tmp_path: Path) -> None:
    """100 MB of text; the row group, its ids and its file together would take 400 MB."""
    import pyarrow
    import pyarrow.parquet

    text = "a b c d e f g h i j " * 500
    rows = pyarrow.table({"text": [f"{number} {text}" for number in range(10_000)]})
    options = {"compression": "none", "use_dictionary": False, "row_group_size": 10_000}
    pyarrow.parquet.write_table(rows, tmp_path / "a.parquet", **options)
    _, peak_kib = run_and_measure(tmp_path / "a.parquet", tmp_path / "out", "--workers", "1")
    assert open_prepared(tmp_path / "out").train.num_documents == 10_000
    assert peak_kib < 350 * 1024


MEASURED = """
import sys
from pathlib import Path
from milepost.cli.main import run
code = run(["data", "prepare", *sys.argv[1:]])
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
sys.exit(code)
"""


def run_and_measure(source: Path, out: Path, *options: str) -> tuple[str, int]:
    """Prepares; returns what was said and the peak of memory in KiB.

    VmHWM counts from the start of the program; ru_maxrss would count the test session that it
    was forked from.
    """
    words = [sys.executable, "-c", MEASURED, str(source), "--out", str(out), *options]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr, int(done.stdout.splitlines()[-1])
