"""A tiny model, tiny conversations, and fine-tunings of the one on the other."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from milepost.cli.finetune import load_config
from milepost.config.schema import Config
from milepost.distributed.place import Place
from milepost.posttrain.compare import compare_answers
from milepost.posttrain.finetuning import open_finetuning
from milepost.runs.answers import Answer
from milepost.train.rank import train_as_rank
from tests.tiny_models import tiny_model, write_model_folder

CONTEXT = 128

TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{- 'USER: ' + message['content'] }}"
    "{%- else %}{{- ' ASSISTANT:' }}"
    "{%- generation %}{{- ' ' + message['content'] + eos_token }}{%- endgeneration %}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- ' ASSISTANT:' }}{%- endif %}"
)
"""Vicuna 1.1 without its system sentence, which takes a tiny vocabulary many tokens."""

TINY_RECIPE = f"""
[data]
sequence_length = {CONTEXT}

[model]
vocab_size = 280
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = {CONTEXT}

[finetune]
template = "TEMPLATE"
held_out_fraction = 0.0
questions = ["Who is strong?", "What is the state?"]
max_new_tokens = 40

[train]
global_batch_tokens = {4 * CONTEXT}
microbatch_rows = 2
total_steps = 12
precision = "float32"
compile = false

[optimizer]
learning_rate = 3e-3
weight_decay = 0.0

[schedule]
name = "linear"
warmup_steps = 2

[checkpoint]
every_steps = 3

[validation]
every_steps = 6
"""

QUESTIONS_AND_ANSWERS = (
    ("Who is strong?", "The union."),
    ("What is the state?", "The people are the state."),
    ("Who are you?", "The people."),
    ("Are the people strong?", "The people of the union are strong."),
    ("Is the union strong?", "The union is strong."),
    ("Who is the union?", "The states are."),
)

LORA = ("--lora.rank", "8", "--lora.alpha", "16.0")


def write_base(folder: Path, *, seed: int = 1) -> Path:
    """A model folder with a context that holds the template."""
    changes = {"max_position_embeddings": CONTEXT, "initializer_range": 0.1}
    write_model_folder(folder, tiny_model(seed=seed, **changes))
    return folder


def write_conversations(
    file: Path, pairs: Sequence[tuple[str, str]] = QUESTIONS_AND_ANSWERS
) -> Path:
    """Questions and answers as Alpaca rows."""
    rows = [{"instruction": q, "input": "", "output": a} for q, a in pairs]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_recipe(folder: Path) -> Path:
    """The recipe of the tiny model, as a file, with its template beside it."""
    path, template = folder / "tiny-sft.toml", folder / "short.jinja"
    template.write_text(TEMPLATE)
    path.write_text(TINY_RECIPE.replace("TEMPLATE", str(template)))
    return path


class Tuning:
    """A base, conversations and a recipe, from which runs are made.

    Args:
        folder: an empty one, for all of them.
    """

    def __init__(self, folder: Path) -> None:
        self.base = write_base(folder / "base")
        self.data = write_conversations(folder / "conversations.jsonl")
        self.recipe = write_recipe(folder)

    def config(self, *overrides: str, full: bool = False) -> Config:
        """As the command line makes it."""
        return load_config(self.base, str(self.recipe), overrides, data=str(self.data), full=full)

    def train_here(self, run: Path, *overrides: str, full: bool = False) -> Any:
        """One segment on one rank inside this process."""
        if "torch._dynamo" in sys.modules:  # a real segment finds nothing compiled
            sys.modules["torch._dynamo"].reset()
        place = Place(rank=0, size=1, local_rank=0, started_by="milepost")
        stops = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
        handlers = {s: signal.getsignal(s) for s in stops}
        try:
            return train_as_rank(
                place,
                config=self.config(*overrides, full=full),
                recipe=str(self.recipe),
                run=run,
                may_override=False,
                open_subject=open_finetuning,
            )
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    def compare(self, run: Path, *overrides: str, full: bool = False) -> list[Answer]:
        """Both models' answers, as the verb gives them at its end."""
        return compare_answers(run, config=self.config(*overrides, full=full))

    def command(self, run: Path, *overrides: str, full: bool = False) -> list[str]:
        """The command line of a segment."""
        words = ["finetune", str(self.base), str(self.recipe), "--data", str(self.data)]
        words += ["--run", str(run), *overrides, *(["--full"] if full else [])]
        return [sys.executable, "-m", "milepost.cli.main", *words]
