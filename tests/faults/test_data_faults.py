"""Rows 14, 15 and 31: data that was damaged, exchanged or cut while it is read, or is too little.

Sources that are hostile and preparations that are killed are in `test_prepare_faults.py`.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from milepost.core.errors import DataError, MilepostError
from milepost.core.files import sha256_of_file
from milepost.data.prepare import prepare
from milepost.data.shards import open_prepared
from tests.damage import Payload, cut, flip, replace_by_pipe, truncate
from tests.training import Course, events, logged_steps, start, wait_for_step, weights_sha256

SHARD = "train-00000.tokens"
FILES = [SHARD, "train-00000.offsets", "train-00000.documents.jsonl", "validation-00000.tokens"]


@pytest.fixture
def data(short: Course, tmp_path: Path) -> Path:
    """A copy of the run's data that may be damaged."""
    return Path(shutil.copytree(short.data, tmp_path / "data"))


def replace_same_size(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "damage", [flip, truncate, Path.unlink, replace_same_size, replace_by_pipe]
)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_shard_is_named_at_the_start_and_between_segments(
    name: str,
    damage: Callable[[Path], None],
    short: Course,
    half: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    damage(data / name)
    before = (half / "events.jsonl").read_bytes()
    for run in (tmp_path / "new", half):
        with pytest.raises(DataError, match=name) as caught:
            short.train_here(run, "--data.path", str(data))
        assert caught.value.hint == "prepare the data again, or restore the file from a copy"
    assert (half / "events.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink, replace_by_pipe])
def test_a_damaged_manifest_or_tokenizer_is_named(
    name: str, damage: Callable[[Path], None], short: Course, data: Path, tmp_path: Path
) -> None:
    damage(data / name)
    with pytest.raises(DataError, match=Path(name).name):
        short.train_here(tmp_path / "run", "--data.path", str(data))


def test_every_flipped_bit_of_the_manifest_is_seen(data: Path) -> None:
    manifest = data / "manifest.json"
    whole = manifest.read_bytes()
    name_of_the_hash = whole.rindex(b'"sha256"')  # without it the data counts as an older version's
    for offset in [*range(0, name_of_the_hash, 7), *range(name_of_the_hash + 8, len(whole))]:
        manifest.write_bytes(whole[:offset] + bytes([whole[offset] ^ 4]) + whole[offset + 1 :])
        with pytest.raises(DataError, match=r"manifest\.json"):
            open_prepared(data)


@pytest.mark.parametrize("count", ["num_tokens", "num_documents"])
def test_a_count_that_does_not_match_its_file_is_refused(
    count: str, short: Course, data: Path, tmp_path: Path
) -> None:
    """One token fewer would be another order of all rows."""
    manifest = json.loads((data / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["splits"]["train"]["shards"][0][count] -= 1
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="does not match its counts"):
        short.train_here(tmp_path / "run", "--data.path", str(data))


def test_a_shard_whose_time_alone_changed_is_the_same(
    short: Course, half: Path, data: Path
) -> None:
    os.utime(data / SHARD, (1, 1))
    short.train_here(half, "--data.path", str(data))
    short.check(half)


def test_a_damaged_shard_ends_the_command_with_3(short: Course, half: Path, data: Path) -> None:
    flip(data / SHARD)
    done = short.train(half, "--data.path", str(data))
    assert done.returncode == 3, done.stderr
    assert f"error: shard file {data / SHARD} has other bytes" in done.stderr
    assert "hint: " in done.stderr and "Traceback" not in done.stderr


def test_other_data_is_refused(short: Course, half: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("another text " * 2000)
    tokenizer = str(short.data / "tokenizer")
    prepare([tmp_path / "a.txt"], out=tmp_path / "other", tokenizer=tokenizer, workers=1)
    with pytest.raises(DataError, match="training shards are not those of the run"):
        short.train_here(half, "--data.path", str(tmp_path / "other"))


@pytest.mark.parametrize("name", [*FILES, "manifest.json", "tokenizer/tokenizer.json"])
def test_a_pickle_in_the_place_of_a_data_file_is_never_unpickled(
    name: str, short: Course, data: Path, tmp_path: Path
) -> None:
    """Its hash stands in the manifest, as one who wants to harm would write it."""
    marker = tmp_path / "marker"
    (data / name).write_bytes(pickle.dumps(Payload(marker)))
    if name in FILES:
        manifest = json.loads((data / "manifest.json").read_text())
        del manifest["sha256"]
        for split in manifest["splits"].values():
            for file in split["shards"][0].values():
                if isinstance(file, dict) and file["name"] == name:
                    file["size_bytes"] = (data / name).stat().st_size
                    file["sha256"] = sha256_of_file(data / name)
        (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MilepostError):
        short.train_here(tmp_path / "run", "--data.path", str(data))
        for split in (open_prepared(data).train, open_prepared(data).validation):
            list(split.documents_between(0, split.num_tokens))
    assert not marker.exists()


def test_a_shard_that_is_cut_while_it_is_read_ends_with_3_and_the_run_goes_on_once_it_is_back(
    plain: Course, tmp_path: Path
) -> None:
    """Memory mapped, it would be the end by SIGBUS."""
    run = tmp_path / "run"
    data = Path(shutil.copytree(plain.data, tmp_path / "data"))
    place = ("--data.path", str(data))
    process = start(plain.recipe, run, data, *plain.words, "--ranks", "2")
    wait_for_step(run, 12)
    os.truncate(data / SHARD, 1000)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 3, talk
    assert f"{data / SHARD} ends at byte 1000, not at" in talk and "Traceback" not in talk
    shutil.copyfile(plain.data / SHARD, data / SHARD)
    plain.train_here(run, *place)
    plain.check(run)


def test_as_many_rows_as_a_batch_are_enough_and_one_fewer_is_refused_with_the_numbers(
    short: Course, tmp_path: Path
) -> None:
    rows = (open_prepared(short.data).train.num_tokens - 1) // 32
    words = ["--train.lanes", "1", "--train.microbatch_rows", "1", "--train.stop_at_step", "1"]
    batch = "--train.global_batch_tokens"
    message = rf"{rows} rows of 32, fewer than the {rows + 1} of one batch"
    with pytest.raises(DataError, match=message) as caught:
        short.train_here(tmp_path / "one", *words, batch, str((rows + 1) * 32))
    assert "prepare more text, or lower" in str(caught.value.hint)
    short.train_here(tmp_path / "run", *words, batch, str(rows * 32))
    assert list(logged_steps(tmp_path / "run")) == [1]


def test_one_short_document_is_too_little_and_says_so(short: Course, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the")
    out, tokenizer = tmp_path / "data", str(short.data / "tokenizer")
    prepare([tmp_path / "a.txt"], out=out, tokenizer=tokenizer, workers=1)
    with pytest.raises(DataError, match=r"^\d training tokens are 0 rows of 32, fewer than the 8"):
        short.train_here(tmp_path / "run", "--data.path", str(out))


def test_a_validation_set_of_one_word_is_measured_and_an_absent_one_left_out(
    short: Course, tmp_path: Path
) -> None:
    (tmp_path / "val.txt").write_text("the")
    text = "the people of the state " * 400
    (tmp_path / "a.txt").write_text(text)
    tokenizer = str(short.data / "tokenizer")
    for name, sources in (("one", [tmp_path / "val.txt"]), ("none", [])):
        out = tmp_path / f"data-{name}"
        options = {"val_sources": sources} if sources else {}
        prepare([tmp_path / "a.txt"], out=out, tokenizer=tokenizer, workers=1, **options)
        words = ("--data.path", str(out), "--train.stop_at_step", "3")
        short.train_here(tmp_path / name, *words)
        measured = [(e["step"], e["tokens"]) for e in events(tmp_path / name, "validation")]
        num_targets = open_prepared(out).validation.num_tokens - 1 if sources else 0
        assert measured == ([(0, num_targets), (3, num_targets)] if sources else [])
    assert weights_sha256(tmp_path / "one", 3) == weights_sha256(tmp_path / "none", 3)
