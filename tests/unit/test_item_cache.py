"""The cache of items: read where it is whole, made again where not, and not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from milepost.evaluation import benchmarks
from milepost.evaluation.item_cache import load_items, user_cache_folder
from milepost.text.tokenizer import Tokenizer
from tests.benchmark_rows import ROWS, opened, write

pytestmark = pytest.mark.usefixtures("own_cache")


def forbid_making(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*_: Any, **__: Any) -> None:
        raise AssertionError("the cache was not used")

    monkeypatch.setattr(benchmarks, "_make_items", make)


def test_items_come_from_the_cache_the_second_time(
    tmp_path: Path, gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "rows", "hellaswag_val.jsonl", ROWS["hellaswag"])
    made = opened(folder, "hellaswag", gpt2)
    forbid_making(monkeypatch)
    assert opened(folder, "hellaswag", gpt2) == made
    for options in ({"limit": 1}, {"context_length": 64}):
        with pytest.raises(AssertionError, match="the cache was not used"):
            opened(folder, "hellaswag", gpt2, **options)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another's"])
def test_a_damaged_cache_is_made_again(
    damage: str, tmp_path: Path, gpt2: Tokenizer, own_cache: Path
) -> None:
    folder = write(tmp_path / "rows", "piqa.jsonl", ROWS["piqa"])
    made = opened(folder, "piqa", gpt2)
    (file,) = (own_cache / "items").iterdir()
    data = file.read_bytes()
    if damage == "another's":
        opened(folder, "piqa", gpt2, context_length=99)
        (other,) = set((own_cache / "items").iterdir()) - {file}
        damaged = other.read_bytes()
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        damaged = {"cut": data[:middle], "flipped": flipped, "empty": b""}[damage]
    file.write_bytes(damaged)
    assert load_items(file, key=file.name) is None
    assert opened(folder, "piqa", gpt2) == made
    assert file.read_bytes() == data


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert user_cache_folder() == tmp_path / "file" / "milepost"
    folder = write(tmp_path / "rows", "piqa.jsonl", ROWS["piqa"])
    assert len(opened(folder, "piqa", gpt2).items) == 1
