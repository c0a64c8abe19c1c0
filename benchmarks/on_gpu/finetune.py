"""Speed and memory of instruction tuning with LoRA at full size.

The base has the recipe's shape and first weights, so the loss tells nothing but that it falls.
Without `--instructions` the conversations are made-up words, long enough to fill the rows.
"""

from __future__ import annotations

import argparse
import json
import random
from functools import partial
from pathlib import Path

import torch

from milepost.checkpoint.store import MODEL_FILE
from milepost.checkpoint.tensor_files import write_bytes, write_tensors
from milepost.config.schema import Config
from milepost.posttrain.finetuning import open_finetuning
from milepost.text.tokenizer import load_tokenizer
from milepost.train.pretraining import whole_model_files
from on_gpu.measured_steps import measure_steps, planned_bytes
from on_gpu.setting import (
    GPT2_VOCAB_SIZE,
    Setting,
    new_model,
    new_optimizer,
    new_stepper,
    open_setting,
    show_row,
    tell,
)

QUESTION = "how fast is instruction tuning with LoRA, and how much memory does it take?"
RECIPE = "sft-alpaca"
STEPS = 20
CONVERSATIONS = 4000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is tuned on."""
    parser.add_argument("--instructions", type=Path, help="as milepost finetune's --data")


def answer(arguments: argparse.Namespace) -> int:
    """One row."""
    setting = open_setting(arguments)
    config = _with_place(setting, arguments.instructions)
    subject = open_finetuning(config)
    tell(subject.introduction(config))
    model = subject.make_model(config)
    subject.set_first_weights(model, config=config)
    model.to(setting.device)
    stepper = new_stepper(
        model,
        optimizer=new_optimizer(model, config=config),
        config=config,
        world=setting.world,
        end_of_text_id=subject.tokenizer.end_of_text_id,
    )
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(setting.device)
    show_row(
        "finetune",
        setting=setting,
        optimizer=config.optimizer.name,
        precision=config.train.precision,
        compile=config.train.compile,
        microbatch_rows=config.train.microbatch_rows,
        recompute=config.train.recompute,
        trained_parameters=subject.num_trained(config),
        tokens_per_step=config.train.global_batch_tokens,
        planned_bytes=planned_bytes(config),
        **measure_steps(
            stepper,
            subject.batches(config),
            config=config,
            steps=arguments.steps,
            setting=setting,
        ),
    )
    return 0


def _with_place(setting: Setting, instructions: Path | None) -> Config:
    """The config with a base and conversations, made where they are not given."""
    config = setting.config
    base = setting.folder / "base"
    if not (base / MODEL_FILE).exists():
        base.mkdir(parents=True, exist_ok=True)
        _write_base(base, config=config)
    data = instructions or _made_up_conversations(setting.folder / "conversations.jsonl")
    place = {"base": str(base), "data": str(data)}
    return config.model_copy(update={"finetune": config.finetune.model_copy(update=place)})


def _write_base(folder: Path, *, config: Config) -> None:
    assert config.model.vocab_size == GPT2_VOCAB_SIZE, "the base's tokenizer is GPT-2's"
    for name, content in whole_model_files(config, tokenizer=load_tokenizer("gpt2")).items():
        write_bytes(folder / name, content)
    model = new_model(config, device=torch.device("cpu"))
    write_tensors(folder / MODEL_FILE, model.state_dict(), metadata={"format": "pt"})


def _made_up_conversations(path: Path) -> Path:
    if path.exists():
        return path
    source = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["".join(source.choices(letters, k=source.randint(2, 9))) for _ in range(5000)]
    text = partial(source.choices, vocabulary)
    with path.open("w") as file:
        for _ in range(CONVERSATIONS):
            question, reply = text(k=source.randint(5, 20)), text(k=source.randint(5, 60))
            row = {"instruction": " ".join(question), "input": "", "output": " ".join(reply)}
            file.write(json.dumps(row) + "\n")
    return path
