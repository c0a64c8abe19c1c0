"""The seven benchmarks: rows from files and the hub, what is refused, items and their cache."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from milepost.core.errors import DataError, UsageError
from milepost.evaluation import benchmarks
from milepost.evaluation.benchmarks import BENCHMARKS, open_benchmark
from milepost.evaluation.item_cache import load_items, user_cache_folder
from milepost.evaluation.items import ItemSet
from milepost.text.tokenizer import Tokenizer, load_tokenizer

ROWS: dict[str, list[dict[str, Any]]] = {
    "hellaswag": [
        {
            "ind": 4,
            "activity_label": "Roof shingles",
            "ctx_a": "A man sits on a roof.",
            "ctx_b": "he",
            "endings": ["[header] sings.", "starts  to lift tiles.", "flies.", "is  [x] a cat."],
            "label": "1",
        },
        {
            "ind": 4,
            "activity_label": "Baking",
            "ctx_a": "Bake a pie [title] Mix it.",
            "ctx_b": "",
            "endings": ["Eat the bowl.", "Stir.", "Call."],
            "label": "0",
        },
    ],
    "arc_easy": [
        {
            "id": "Q1",
            "question": "What melts?",
            "choices": {"text": ["ice", "fire", "air"], "label": ["1", "2", "3"]},
            "answerKey": "1",
        },
        {
            "id": "Q2",
            "question": "What is warm?",
            "choices": {"text": ["snow", "the sun"], "label": ["A", "B"]},
            "answerKey": "B",
        },
    ],
    "boolq": [
        {"passage": "Ice is cold.", "question": "is ice cold", "label": 1},
        {"passage": "Fire is hot.", "question": "is fire cold", "label": 0},
    ],
    "openbookqa": [
        {
            "id": "7-1",
            "question_stem": "Frost comes with",
            "choices": {"text": ["heat", "cold", "rain", "song"], "label": ["A", "B", "C", "D"]},
            "answerKey": " B",
        }
    ],
    "piqa": [{"goal": "Open a jar", "sol1": "turn the lid", "sol2": "eat the lid", "label": 0}],
    "winogrande": [
        {
            "sentence": "Ann thanked Bea because _ was helped.",
            "option1": "Ann",
            "option2": "Bea",
            "answer": "1",
        }
    ],
}
ROWS["arc_challenge"] = ROWS["arc_easy"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "milepost"


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return load_tokenizer("gpt2")


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def write(folder: Path, name: str, rows: list[Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(lines(rows))
    return folder


def opened(folder: Path, name: str, tokenizer: Tokenizer, **options: Any) -> ItemSet:
    settings = {"context_length": 256, "data_dir": folder, "limit": None} | options
    return open_benchmark(name, tokenizer=tokenizer, **settings)


def texts(items: ItemSet, tokenizer: Tokenizer) -> list[list[tuple[str, str]]]:
    """Context and target of each choice of each item."""
    return [
        [(tokenizer.decode(c.context_ids), tokenizer.decode(c.target_ids)) for c in item.choices]
        for item in items.items
    ]


EXPECTED = {
    "hellaswag": [
        (
            "Roof shingles: A man sits on a roof. He",
            ["  sings.", " starts to lift tiles.", " flies.", " is  a cat."],
            1,
        ),
        ("Baking: Bake a pie. Mix it.", [" Eat the bowl.", " Stir.", " Call."], 0),
    ],
    "arc_easy": [
        ("Question: What melts?\nAnswer:", [" ice", " fire", " air"], 0),
        ("Question: What is warm?\nAnswer:", [" snow", " the sun"], 1),
    ],
    "boolq": [
        ("Ice is cold.\nQuestion: is ice cold?\nAnswer:", [" no", " yes"], 1),
        ("Fire is hot.\nQuestion: is fire cold?\nAnswer:", [" no", " yes"], 0),
    ],
    "openbookqa": [("Frost comes with", [" heat", " cold", " rain", " song"], 1)],
    "piqa": [("Question: Open a jar\nAnswer:", [" turn the lid", " eat the lid"], 0)],
}


@pytest.mark.parametrize("name", list(EXPECTED))
def test_rows_become_the_prompts_of_the_harness(name: str, tmp_path: Path, gpt2: Tokenizer) -> None:
    folder = write(tmp_path / "rows", f"{name}_{BENCHMARKS[name].split}.jsonl", ROWS[name])
    items = opened(folder, name, gpt2)
    found = [
        (choices[0][0], [target for _, target in choices], item.gold)
        for choices, item in zip(texts(items, gpt2), items.items, strict=True)
    ]
    assert found == EXPECTED[name]
    for item, (_, targets, _) in zip(items.items, EXPECTED[name], strict=True):
        assert len({choice.context_ids for choice in item.choices}) == 1
        if name != "hellaswag":  # whose texts are cleaned
            assert [c.num_characters for c in item.choices] == [len(t) - 1 for t in targets]


def test_winogrande_scores_what_follows_each_option(tmp_path: Path, gpt2: Tokenizer) -> None:
    folder = write(tmp_path / "rows", "winogrande.jsonl", ROWS["winogrande"])
    items = opened(folder, "winogrande", gpt2)
    assert texts(items, gpt2) == [
        [
            ("Ann thanked Bea because Ann", " was helped."),
            ("Ann thanked Bea because Bea", " was helped."),
        ]
    ]
    assert items.metrics == ("acc",)


def test_an_empty_context_is_the_end_of_text_token(tmp_path: Path, gpt2: Tokenizer) -> None:
    row = ROWS["openbookqa"][0] | {"question_stem": ""}
    items = opened(write(tmp_path / "rows", "openbookqa.jsonl", [row]), "openbookqa", gpt2)
    assert {choice.context_ids for choice in items.items[0].choices} == {(gpt2.end_of_text_id,)}


def test_items_have_the_rows_own_names_or_their_numbers(tmp_path: Path, gpt2: Tokenizer) -> None:
    twice = [*ROWS["arc_easy"], ROWS["arc_easy"][0]]
    items = opened(write(tmp_path / "rows", "arc_easy_test.jsonl", twice), "arc_easy", gpt2)
    assert [item.item_id for item in items.items] == ["Q1", "Q2", "Q1#2"]
    items = opened(write(tmp_path / "rows", "boolq.jsonl", ROWS["boolq"]), "boolq", gpt2)
    assert [item.item_id for item in items.items] == ["0", "1"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("boolq.jsonl", lines(ROWS["boolq"])),
        ("boolq-val.jsonl.gz", gzip.compress(lines(ROWS["boolq"]))),
        ("boolq_dev.jsonl.zst", pyarrow.compress(lines(ROWS["boolq"]), "zstd", asbytes=True)),
        ("boolq_validation.parquet", table([{**r, "idx": 9} for r in ROWS["boolq"]])),
        (
            "boolq_val.jsonl",
            b"\xef\xbb\xbf\n"
            + lines(
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
        ("piqa.jsonl.gz", gzip.compress(lines(ROWS["piqa"]))[:-9], "cannot be read"),
        ("piqa.parquet", table(ROWS["piqa"])[:-9], "cannot be read as Parquet"),
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


@pytest.mark.parametrize("options", [{"limit": 0}, {"num_fewshot": -1}])
def test_numbers_out_of_range_are_refused(
    options: dict[str, int], tmp_path: Path, gpt2: Tokenizer
) -> None:
    with pytest.raises(UsageError):
        opened(write(tmp_path, "boolq.jsonl", ROWS["boolq"]), "boolq", gpt2, **options)


def test_long_contexts_lose_their_beginning_and_are_counted(
    tmp_path: Path, gpt2: Tokenizer
) -> None:
    folder = write(tmp_path / "rows", "piqa.jsonl", ROWS["piqa"])
    whole = opened(folder, "piqa", gpt2).items[0].choices
    longest = max(len(choice.context_ids) + len(choice.target_ids) for choice in whole)
    for context_length, num_truncated in ((longest - 1, 0), (longest - 2, 2), (3, 2)):
        items = opened(folder, "piqa", gpt2, context_length=context_length)
        assert items.num_truncated == num_truncated
        for choice, before in zip(items.items[0].choices, whole, strict=True):
            ids = choice.context_ids + choice.target_ids
            assert ids == (before.context_ids + before.target_ids)[-(context_length + 1) :]
            assert choice.target_ids == before.target_ids
    with pytest.raises(UsageError, match=r"a choice has 3 tokens, the model's context 2"):
        opened(folder, "piqa", gpt2, context_length=2)


def test_solved_questions_stand_before_each_question(tmp_path: Path, gpt2: Tokenizer) -> None:
    folder = write(tmp_path / "rows", "boolq_val.jsonl", ROWS["boolq"])
    with pytest.raises(DataError, match="no train rows of boolq, only boolq_val"):
        opened(folder, "boolq", gpt2, num_fewshot=1)
    write(folder, "boolq_train.jsonl", ROWS["boolq"])
    items = opened(folder, "boolq", gpt2, num_fewshot=1)
    ice, fire = (text for text, _, _ in EXPECTED["boolq"])
    # Each question is left out of its own solved ones, so that the other one is left.
    assert [choices[0][0] for choices in texts(items, gpt2)] == [
        f"{fire} no\n\n{ice}",
        f"{ice} yes\n\n{fire}",
    ]
    assert items.data_sha256 != opened(folder, "boolq", gpt2).data_sha256
    with pytest.raises(DataError, match="2 solved questions are drawn from 3 or more rows"):
        opened(folder, "boolq", gpt2, num_fewshot=2)


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


def test_a_choice_that_melts_into_its_context_is_refused(tmp_path: Path) -> None:
    end = {"id": 7, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False,
           "normalized": False, "special": True}  # fmt: skip
    tokens = ["x", " ", "y", "z", "x ", "x y", "?"]
    model = {
        "type": "BPE",
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": [["x", " "], ["x ", "y"]],
        "unk_token": "?",
    }
    content = {"version": "1.0", "added_tokens": [end], "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    row = {
        "question_stem": "x",
        "choices": {"text": ["z", "y"], "label": ["A", "B"]},
        "answerKey": "A",
    }
    folder = write(tmp_path / "rows", "openbookqa.jsonl", [row])
    with pytest.raises(DataError, match="a choice has no tokens of its own"):
        opened(folder, "openbookqa", load_tokenizer(str(tmp_path)))
