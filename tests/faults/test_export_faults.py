"""Row 41: exports and imports that are killed, that do not fit, and of damaged checkpoints."""

from __future__ import annotations

import contextlib
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from milepost.cli.main import run
from milepost.inference.load import load_model
from tests.tiny_models import tiny_model, write_model_folder, write_tiny_run
from tests.training import environment

VERBS = {"export": "--to", "import": "--run"}

# The program with one of its functions replaced by what kill -9 does there.
KILLED = """
import os, signal, sys, importlib
module, name, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
place = importlib.import_module(module)
real, calls = getattr(place, name), []
def killed(*arguments, **more):
    calls.append(name)
    if len(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **more)
setattr(place, name, killed)
from milepost.cli.main import run
sys.exit(run(sys.argv[4:]))
"""


def killed_at(place: str, number: int, *words: str) -> None:
    """Runs a command that is killed at the nth call of a function."""
    module, _, name = place.rpartition(".")
    command = [sys.executable, "-c", KILLED, module, name, str(number), *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    write_model_folder(tmp_path / "model", tiny_model())
    return tmp_path / "model"


def words_for(verb: str, model: Path) -> list[str]:
    return [verb, str(model), VERBS[verb], str(model.parent / "out")]


@pytest.mark.parametrize(
    ("verb", "place", "number"),
    [
        pytest.param("export", "milepost.posttrain.weight_shards.write_file", 3, id="weights"),
        pytest.param(
            "export", "milepost.posttrain.export._describe", 1, id="card", marks=pytest.mark.long
        ),
        pytest.param(
            "export", "milepost.core.files.fsync_folder", 1, id="fsync", marks=pytest.mark.long
        ),
        pytest.param(
            "import", "milepost.checkpoint.store._write_weights", 1, id="import",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "import", "milepost.runs.events.append_json_line", 1, id="event",
            marks=pytest.mark.long,
        ),
    ],
)  # fmt: skip
def test_a_killed_one_leaves_nothing_that_looks_whole_and_is_done_again(
    model_folder: Path, verb: str, place: str, number: int
) -> None:
    words = words_for(verb, model_folder)
    more = ["--max-shard-size", "20KB"] if verb == "export" else []
    killed_at(place, number, *words, *more)
    left = {entry.name for entry in model_folder.parent.iterdir()} - {"model"}
    assert all(name.startswith(".making-out-") for name in left)
    assert run(words) == 0
    assert {entry.name for entry in model_folder.parent.iterdir()} == {"model", "out"}
    load_model(model_folder.parent / "out")


@pytest.mark.long
def test_an_earlier_export_is_there_until_the_new_one_is_whole(model_folder: Path) -> None:
    words = words_for("export", model_folder)
    assert run(words) == 0
    out = model_folder.parent / "out"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    killed_at("milepost.posttrain.export._describe", 1, *words, "--overwrite")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run([*words, "--overwrite"]) == 0


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file of this process can grow above 40,000 bytes (ulimit -f)."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


@pytest.mark.parametrize(
    ("verb", "more"), [("export", []), ("export", ["--format", "gguf"]), ("import", [])]
)
def test_a_file_that_cannot_be_written_whole_is_said_and_leaves_nothing(
    model_folder: Path, verb: str, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with small_files():
        assert run([*words_for(verb, model_folder), *more]) == 7
    said = capsys.readouterr().err
    assert "error: cannot write" in said and "file too large" in said and "hint: " in said
    assert [entry.name for entry in model_folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_checkpoint_is_not_exported(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = write_tiny_run(tmp_path / "run", 100)
    file = layout.checkpoint(100) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert run(words_for("export", layout.root)) == 4
    assert f"{file} has changed" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
