"""Files of benchmark rows: which one is taken, in which forms, and what is refused."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from milepost.core.errors import DataError
from milepost.text.tokenizer import Tokenizer
from tests.benchmark_rows import ROWS, jsonl, opened, parquet, write

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("boolq.jsonl", jsonl(ROWS["boolq"])),
        ("boolq-val.jsonl.gz", gzip.compress(jsonl(ROWS["boolq"]))),
        ("boolq_dev.jsonl.zst", pyarrow.compress(jsonl(ROWS["boolq"]), "zstd", asbytes=True)),
        ("boolq_validation.parquet", parquet([{**r, "idx": 9} for r in ROWS["boolq"]])),
        (
            "boolq_val.jsonl",
            b"\xef\xbb\xbf\n"
            + jsonl(
                [
                    {"answer": bool(r["label"]), "passage": r["passage"], "question": r["question"]}
                    for r in ROWS["boolq"]
                ]
            ),
        ),
    ],
    ids=["plain", "gzip", "zstd", "parquet", "as its authors gave it"],
)
def test_every_form_of_the_same_rows_gives_the_same_items_and_hash(
    file: str, content: bytes, tmp_path: Path, gpt2: Tokenizer
) -> None:
    plain = opened(write(tmp_path / "plain", "boolq.jsonl", ROWS["boolq"]), "boolq", gpt2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / file).write_bytes(content)
    assert opened(tmp_path / "other", "boolq", gpt2) == plain


def test_the_hash_is_of_all_rows_and_sees_every_change(tmp_path: Path, gpt2: Tokenizer) -> None:
    folder = write(tmp_path / "rows", "boolq.jsonl", ROWS["boolq"])
    whole = opened(folder, "boolq", gpt2)
    first = opened(folder, "boolq", gpt2, limit=1)
    assert first.data_sha256 == whole.data_sha256
    assert first.items == whole.items[:1]
    assert (first.limit, whole.limit) == (1, None)
    turned = [ROWS["boolq"][0], ROWS["boolq"][1] | {"label": 1}]
    changed = opened(write(folder, "boolq.jsonl", turned), "boolq", gpt2)
    assert changed.data_sha256 != whole.data_sha256


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("boolq", {"passage": None}, "field 'passage' is missing"),
        ("boolq", {"passage": 7}, "field 'passage' is 7, not a text"),
        ("boolq", {"label": 2}, "field 'label' is 2, not one of 0, 1"),
        ("boolq", {"label": "1"}, "field 'label' is \"1\", not one of 0, 1"),
        ("boolq", {"passage": "\ud800"}, "half a character"),
        ("piqa", {"label": -1}, "field 'label' is -1, not one of 0, 1"),
        ("piqa", {"sol2": " "}, "field 'sol2' is an empty choice"),
        ("hellaswag", {"label": ""}, 'is "", not one of "0", "1", "2", "3"'),
        ("hellaswag", {"label": 4}, "field 'label' is 4, not one of 0, 1, 2, 3"),
        ("hellaswag", {"endings": []}, "field 'endings' holds 0 choices"),
        ("hellaswag", {"endings": ["a", 3]}, "field 'endings' is 3, not a text"),
        ("hellaswag", {"endings": "abcd"}, 'is "abcd", not a list'),
        ("arc_easy", {"answerKey": "D"}, 'is "D", not one of "1", "2", "3"'),
        ("arc_easy", {"choices": ["ice"]}, 'is ["ice"], not an object'),
        (
            "arc_easy",
            {"choices": {"text": ["a", "b"], "label": ["A"]}},
            "has 1 labels for 2 texts",
        ),
        ("openbookqa", {"choices": {"text": ["a", "b"]}}, "field 'choices.label' is missing"),
        ("winogrande", {"sentence": "No gap."}, "field 'sentence' has no gap '_'"),
        ("winogrande", {"answer": 1}, 'is 1, not one of "1", "2"'),
    ],
)
def test_a_bad_row_is_refused_with_its_place_and_field(
    name: str, change: dict[str, Any], message: str, tmp_path: Path, gpt2: Tokenizer
) -> None:
    rows = [ROWS[name][0], ROWS[name][0] | change]
    folder = write(tmp_path / "rows", f"{name}.jsonl", rows)
    with pytest.raises(DataError) as caught:
        opened(folder, name, gpt2)
    assert f"{name}.jsonl:2: " in caught.value.message
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("piqa.jsonl", b"", "holds no rows"),
        ("piqa.jsonl", b"\n[1]\n", "piqa.jsonl:2 is not a JSON object"),
        ("piqa.jsonl", b'{"goal": NaN}', "piqa.jsonl:1 is not JSON: NaN"),
        ("piqa.jsonl", b'{"goal": "a", "goal": "b"}', "a field stands twice"),
        ("piqa.jsonl", b"\xff", "piqa.jsonl:1 is not JSON"),
        ("piqa.jsonl", b"[" * 200_000, "nested too deep"),
        ("piqa.jsonl.gz", gzip.compress(jsonl(ROWS["piqa"]))[:-9], "cannot be read"),
        ("piqa.parquet", parquet(ROWS["piqa"])[:-9], "cannot be read as Parquet"),
    ],
    ids=["empty", "array", "nan", "twice", "utf8", "deep", "gzip", "parquet"],
)
def test_a_damaged_file_is_refused_by_name(
    file: str, content: bytes, message: str, tmp_path: Path, gpt2: Tokenizer
) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        opened(tmp_path, "piqa", gpt2)
    assert file in caught.value.message


def test_the_file_of_the_split_that_is_scored_is_taken(tmp_path: Path, gpt2: Tokenizer) -> None:
    for split, rows in (("train", []), ("test", []), ("val", ROWS["piqa"]), ("", [])):
        write(tmp_path, f"piqa_{split}.jsonl".replace("_.", "."), rows)
    for name in ("piqato_val.jsonl", "piqa_val.txt", "my_piqa_val.jsonl"):
        write(tmp_path, name, [])
    assert len(opened(tmp_path, "piqa", gpt2).items) == 1


def test_without_the_file_the_message_says_how_to_name_it(tmp_path: Path, gpt2: Tokenizer) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        opened(tmp_path / "nowhere", "piqa", gpt2)
    write(tmp_path, "piqa_test.jsonl", ROWS["piqa"])
    with pytest.raises(DataError, match=r"no validation rows of piqa, only piqa_test\.jsonl") as no:
        opened(tmp_path, "piqa", gpt2)
    assert "piqa_validation" in (no.value.hint or "")
    write(tmp_path, "piqa_val.jsonl", ROWS["piqa"])
    write(tmp_path, "piqa_dev.jsonl", ROWS["piqa"])
    with pytest.raises(DataError, match=r"more than once: piqa_dev\.jsonl, piqa_val\.jsonl"):
        opened(tmp_path, "piqa", gpt2)
