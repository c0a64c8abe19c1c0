"""Small made-up benchmarks in the form of the real ones' rows, for tests."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from milepost.evaluation.benchmarks import open_benchmark
from milepost.evaluation.items import ItemSet
from milepost.text.tokenizer import Tokenizer

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
"""One or two rows of each benchmark, with what is odd about them."""

NUM_ROWS = 6


def write_rows(folder: Path, *, num_rows: int = NUM_ROWS) -> Path:
    """Files of PIQA and BoolQ rows that the tiny tokenizer writes in few tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    piqa = [
        {
            "goal": f"the state of {number}",
            "sol1": "the union" if number % 2 else "states are",
            "sol2": f"the people {number}",
            "label": number % 2,
        }
        for number in range(num_rows)
    ]
    boolq = [
        {
            "passage": f"the union is {number}",
            "question": f"is it {number}",
            "answer": number % 3 == 0,
        }
        for number in range(num_rows)
    ]
    for name, rows in (("piqa_val", piqa), ("boolq_val", boolq)):
        write(folder, f"{name}.jsonl", rows)
    return folder


def jsonl(rows: list[Any]) -> bytes:
    """Rows as JSONL."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    """Rows as Parquet."""
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def write(folder: Path, name: str, rows: list[Any]) -> Path:
    """Adds a JSONL file to a folder, which it returns."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(jsonl(rows))
    return folder


def opened(folder: Path, name: str, tokenizer: Tokenizer, **options: Any) -> ItemSet:
    """The items of a benchmark whose rows lie in `folder`."""
    settings = {"context_length": 256, "data_dir": folder, "limit": None} | options
    return open_benchmark(name, tokenizer=tokenizer, **settings)
