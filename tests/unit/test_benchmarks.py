"""The seven benchmarks: how their rows become the items that a model is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from milepost.core.errors import DataError, UsageError
from milepost.evaluation.benchmarks import BENCHMARKS
from milepost.evaluation.items import ItemSet
from milepost.text.tokenizer import Tokenizer, load_tokenizer
from tests.benchmark_rows import ROWS, opened, write

pytestmark = pytest.mark.usefixtures("own_cache")


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
