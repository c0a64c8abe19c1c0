"""Where an export or an import may go, and what is never deleted for it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from milepost.cli.main import run
from milepost.core.errors import StorageError
from milepost.core.files import publish_folder
from milepost.posttrain import export
from milepost.posttrain.new_folder import new_folder
from milepost.runs.layout import RunLayout
from tests.tiny_models import tiny_model, write_model_folder, write_tiny_run

pytestmark = pytest.mark.usefixtures("no_fsync")

VERBS = {"export": "--to", "import": "--run"}


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    write_model_folder(tmp_path / "model", tiny_model())
    return tmp_path / "model"


def make(model: Path, to: Path | str, *words: str, verb: str = "export") -> int:
    return run([verb, str(model), VERBS[verb], str(to), *words])


def nothing_to_refuse() -> None:
    return


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "place", ["out", "checkpoints/step-00000300", "checkpoints/step-00000200/out"]
)
def test_nothing_is_put_into_a_run(
    model_folder: Path, verb: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    layout: RunLayout = write_tiny_run(model_folder.parent / "run", 200)
    before = sorted(layout.root.rglob("*"))
    assert make(model_folder, layout.root / place, verb=verb) == 2
    assert f"lies in the run {layout.root}" in capsys.readouterr().err
    assert sorted(layout.root.rglob("*")) == before


@pytest.mark.parametrize("verb", VERBS)
def test_the_folder_a_person_is_in_is_not_replaced(
    model_folder: Path, verb: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    here = model_folder.parent / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert make(model_folder, ".", verb=verb) == 2
    said = capsys.readouterr().err
    assert f"{here} is the folder you are in" in said and f"such as {here}/model" in said
    assert make(model_folder, "model", verb=verb) == 0


def test_where_a_disk_is_mounted_is_said_before_time_is_spent(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (model_folder.parent / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "disk")
    assert make(model_folder, model_folder.parent / "disk") == 2
    assert "disk is where a disk is mounted" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a\nb", "caf\udce9", "a\x1b[31m"])
@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_a_name_that_does_not_print_is_refused(
    model_folder: Path, name: str, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(model_folder, model_folder.parent / name, "--format", form) == 2
    assert "has characters that do not print" in capsys.readouterr().err
    assert [entry.name for entry in model_folder.parent.iterdir()] == ["model"]


def add_a_file(out: Path) -> None:
    (out / "notes.txt").write_text("mine")


def add_a_folder(out: Path) -> None:
    (out / ".git").mkdir()


def edit_the_card(out: Path) -> None:
    card = out / "README.md"
    card.write_text(card.read_text().replace("Not stated.", "Apache 2.0."))


def forget_the_files(out: Path) -> None:
    (out / "milepost-export.json").write_text('{"v": 1}')


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (add_a_file, "notes.txt is not of the export that lies there"),
        (add_a_folder, ".git is not of the export that lies there"),
        (edit_the_card, "README.md has been edited since it was exported"),
        (forget_the_files, "does not say which files the export wrote"),
    ],
)
def test_what_an_export_did_not_write_is_not_overwritten(
    model_folder: Path,
    change: Callable[[Path], None],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = model_folder.parent / "out"
    assert make(model_folder, out) == 0
    change(out)
    before = {path: path.is_file() and path.read_bytes() for path in out.rglob("*")}
    assert make(model_folder, out, "--overwrite") == 2
    assert said in capsys.readouterr().err
    assert {path: path.is_file() and path.read_bytes() for path in out.rglob("*")} == before


def test_what_an_export_wrote_may_have_been_moved_away(model_folder: Path) -> None:
    out = model_folder.parent / "out"
    assert make(model_folder, out) == 0
    (out / "README.md").rename(model_folder.parent / "card.md")
    assert make(model_folder, out, "--overwrite") == 0
    record = json.loads((out / "milepost-export.json").read_text())
    assert {*record["files"], "milepost-export.json"} == {entry.name for entry in out.iterdir()}


def test_what_came_into_the_target_meanwhile_stays(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, describe = model_folder.parent / "out", export._describe

    def meanwhile(folder: Path, *arguments: object, **more: object) -> None:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        describe(folder, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(export, "_describe", meanwhile)
    assert make(model_folder, out) == 2
    assert "it holds notes.txt" in capsys.readouterr().err
    assert [entry.name for entry in out.iterdir()] == ["notes.txt"]
    assert sorted(entry.name for entry in model_folder.parent.iterdir()) == ["model", "out"]


def test_what_comes_after_the_last_look_stays_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "out"

    def late(temporary: Path, *, final: Path, doomed: Path | None) -> None:
        final.mkdir()
        (final / "theirs").write_text("mine")
        publish_folder(temporary, final=final, doomed=doomed)

    monkeypatch.setattr("milepost.posttrain.new_folder.publish_folder", late)
    with pytest.raises(StorageError, match="directory not empty"):
        with new_folder(to, refuse_filled=nothing_to_refuse) as folder:
            (folder / "ours").write_text("ours")
    assert [entry.name for entry in to.iterdir()] == ["theirs"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_is_deleted_and_a_living_ones_is_not(tmp_path: Path) -> None:
    names = [".making-out-999999", ".making-out-2-999999", ".making-out-alive", ".making-other-1"]
    for name in [*names, ".making-out-1"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("a")
    living = os.open(tmp_path / ".making-out-1", os.O_RDONLY)
    fcntl.flock(living, fcntl.LOCK_EX)
    try:
        with new_folder(tmp_path / "out", refuse_filled=nothing_to_refuse) as folder:
            (folder / "whole").write_text("a")
    finally:
        os.close(living)
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left == {"out", *names[1:], ".making-out-1"}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, verb: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[277, 3] = value
    write_model_folder(tmp_path / "model", model)
    assert make(tmp_path / "model", tmp_path / "out", verb=verb) == 4
    said = capsys.readouterr().err
    assert "model.embed_tokens.weight has values that are not finite" in said
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
