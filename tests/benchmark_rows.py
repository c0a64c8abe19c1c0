"""Small made-up benchmarks in the form of the real ones' rows, for tests."""

from __future__ import annotations

import json
from pathlib import Path

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
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder
