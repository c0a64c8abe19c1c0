"""`milepost data prepare` and `milepost data inspect` as a person calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from milepost.cli.main import run
from milepost.config.recipe import load_recipe
from milepost.data.loader import Loader, batch_sha256
from milepost.data.shards import open_prepared
from milepost.runs.events import EventWriter
from milepost.runs.layout import RunLayout
from milepost.runs.manifest import RunManifest, write_run_manifest

SEED, ROWS, LENGTH = 11, 4, 16
ORDER = ["--seed", str(SEED), "--rows-per-step", str(ROWS), "--sequence-length", str(LENGTH)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "texts.jsonl"
    lines = [
        json.dumps({"text": f"Document number {n} tells of {n * n}. " * 3, "id": f"doc-{n}"})
        for n in range(60)
    ]
    path.write_text("\n".join([*lines, '{"text": ""}']))
    return path


@pytest.fixture(scope="module")
def data(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "data"
    assert run(["data", "prepare", str(source), "--out", str(out), "--val-fraction", "0.1"]) == 0
    return out


def make_run(folder: Path, data: Path, *, fingerprint: str | None = None) -> Path:
    """A run on `data` whose step 3 was made from data_step 5: two batches were skipped."""
    prepared = open_prepared(data)
    words = ["--data.path", str(data), "--data.sequence_length", str(LENGTH)]
    words += ["--run.seed", str(SEED), "--train.global_batch_tokens", str(ROWS * LENGTH)]
    words += ["--train.microbatch_rows", "1"]
    layout = RunLayout(folder)
    write_run_manifest(
        layout,
        RunManifest(
            run_id="ab",
            created="2026-01-05T08:59:58.120Z",
            config=load_recipe("demo", overrides=words),
            recipe="demo",
            data_fingerprint=fingerprint or prepared.train.fingerprint,
            validation_fingerprint=None,
            tokenizer_sha256=prepared.tokenizer_sha256,
            environment={},
        ),
    )
    loader = Loader(prepared.train, seed=SEED, sequence_length=LENGTH, rows_per_step=ROWS)
    writer = EventWriter(layout.events, segment=1)
    writer.append("segment_started")
    for step, data_step in ((1, 0), (2, 1), (3, 5)):
        sha256 = batch_sha256(loader.batch(data_step))
        writer.append("step", step=step, data_step=data_step, batch_sha256=sha256)
    loader.close()
    return folder


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run(["data", "inspect", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def failure(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    capsys.readouterr()
    assert run(["data", *words]) == code
    talk = capsys.readouterr()
    assert talk.out == "" and talk.err.startswith("error: ") and "\nhint: " in talk.err
    return talk.err


def test_prepare_says_what_it_made(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "prepare", str(source), "--out", str(tmp_path / "out"), "--val", str(source)]
    assert run(words) == 3
    assert "every source is held out for validation" in capsys.readouterr().err
    words = words[:-2]
    assert run(words) == 0
    talk = capsys.readouterr()
    assert talk.out == f"{tmp_path / 'out'}\n"
    assert "train: 60 documents, " in talk.err and "bytes a token" in talk.err
    assert "dropped: 1 empty_text" in talk.err and "MB/s" in talk.err
    assert run([*words, "--json"]) == 0
    talk = capsys.readouterr()
    assert json.loads(talk.out)["train"]["num_documents"] == 60
    assert json.loads(talk.out)["was_done"] is True
    assert "nothing to do" in talk.err


def test_prepare_without_a_source_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no source is given" in failure(capsys, 2, "prepare", "--out", str(tmp_path / "out"))


def test_inspect_shows_counts_shards_and_first_documents(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(["data", "inspect", str(data)]) == 0
    text = capsys.readouterr().out
    prepared = open_prepared(data)
    assert f"train: {prepared.train.num_documents} documents" in text
    assert prepared.train.fingerprint in text
    assert "train-00000.tokens" in text and "'<|endoftext|>Document number" in text
    assert "dropped: empty_text 1" in text
    values = shown(capsys, str(data))
    assert values["splits"]["train"]["first_documents"][0]["first_token_ids"][0] == 50256
    assert values["splits"]["validation"]["documents"] > 0


def test_inspect_names_the_documents_of_a_step(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = shown(capsys, str(data), "--step", "3", *ORDER)
    train = open_prepared(data).train
    with Loader(train, seed=SEED, sequence_length=LENGTH, rows_per_step=ROWS) as loader:
        batch, ids = loader.batch(2), loader.row_ids(2)
    assert values["data_step"] == 2 and values["batch_sha256"] == batch_sha256(batch)
    assert values["equals_logged_batch"] is None
    assert [row["row_id"] for row in values["rows"]] == ids.tolist()
    for row in values["rows"]:
        assert sum(document["tokens"] for document in row["documents"]) == LENGTH + 1
        places = [document["position"] for document in row["documents"]]
        assert places[0] == 0 and places == sorted(places)
        first = train.document_at(row["first_token"])
        assert row["documents"][0]["name"] == first.name
    assert run(["data", "inspect", str(data), "--step", "3", *ORDER]) == 0
    assert "doc-" in capsys.readouterr().out


def test_inspect_shows_the_text_of_a_row(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = shown(capsys, str(data), "--step", "1", "--row", "2", *ORDER)
    (row,) = values["rows"]
    tokenizer = open_prepared(data).tokenizer()
    text = "".join(document["text"] for document in row["documents"])
    assert text == tokenizer.decode(row["token_ids"]) and len(row["token_ids"]) == LENGTH + 1
    assert run(["data", "inspect", str(data), "--step", "1", "--row", "2", *ORDER]) == 0
    assert row["documents"][0]["text"] in capsys.readouterr().out


def test_inspect_of_a_run_follows_the_data_step_of_its_events(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run", data)
    for words in ([str(folder)], [str(data), "--run", str(folder)]):
        values = shown(capsys, *words, "--step", "3")
        assert values["data_step"] == 5 and values["equals_logged_batch"] is True
        ahead = shown(capsys, *words, "--step", "9")
        assert ahead["data_step"] == 8 and ahead["equals_logged_batch"] is None
    assert shown(capsys, str(folder))["folder"] == str(data)


def test_inspect_refuses_what_does_not_go_together(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run", data)
    other = make_run(tmp_path / "other", data, fingerprint="0" * 64)
    inspect = ("inspect", str(data))
    message = "--seed, --rows-per-step, --sequence-length missing"
    assert message in failure(capsys, 2, *inspect, "--step", "3")
    assert "--row is given without --step" in failure(capsys, 2, *inspect, "--row", "0")
    assert "there is no step 0" in failure(capsys, 2, *inspect, "--step", "0", *ORDER)
    assert "has no row 4" in failure(capsys, 2, *inspect, "--step", "1", "--row", "4", *ORDER)
    assert "--seed: given beside a run" in failure(
        capsys, 2, "inspect", str(folder), "--step", "1", "--seed", "3"
    )
    assert "its fingerprint is" in failure(capsys, 3, "inspect", str(other), "--step", "1")
    assert "fewer than the 4000 of one batch" in failure(
        capsys, 3, *inspect, "--step", "1", *ORDER[:3], "4000", *ORDER[4:]
    )
    assert "holds no prepared data" in failure(capsys, 3, "inspect", str(tmp_path))
