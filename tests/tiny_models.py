"""Tiny real models and tokenizers, and folders that hold them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from milepost.config.schema import ModelSection
from milepost.core.files import sha256_of_file, write_json
from milepost.model.huggingface import hf_config, hf_generation_config
from milepost.model.init import initialize
from milepost.model.llama import Llama
from milepost.runs.layout import RunLayout
from milepost.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

VOCAB_SIZE = 280
_TEXT = "The state of the union is strong, and the people of the states are the union. "


def tiny_section(**changes: Any) -> ModelSection:
    """2 layers x 32 wide, 4 query heads that share 2 key/value heads."""
    values = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 48,
        "initializer_range": 0.2,  # far from uniform, so that a wrong term shows
    }
    return ModelSection(**(values | changes))


def tiny_model(*, seed: int = 1, **changes: Any) -> Llama:
    config = tiny_section(**changes)
    model = Llama(config)
    initialize(model, config=config, seed=seed)
    return model


def random_ids(*shape: int, seed: int = 2, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def _tokenizer_json() -> bytes:
    return train_tokenizer([_TEXT * 20], vocab_size=VOCAB_SIZE)


def tiny_tokenizer(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    file.write_bytes(_tokenizer_json())
    return load_tokenizer(str(file))


def write_model_folder(
    folder: Path,
    model: Llama,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: Tokenizer | None = None,
) -> Tokenizer:
    """A Hugging Face model folder as a checkpoint holds it, by default with the tiny tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or tiny_tokenizer(folder)
    end, name = tokenizer.end_of_text_id, str(dtype).removeprefix("torch.")
    config = hf_config(model.config, end_of_text_id=end, dtype=name)
    (folder / "config.json").write_text(json.dumps(config))
    generation = hf_generation_config(end_of_text_id=end)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    for file, content in tokenizer.files().items():
        (folder / file).write_bytes(content)
    weights = {key: value.to(dtype) for key, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return tokenizer


def write_tiny_run(root: Path, *steps: int, **changes: Any) -> RunLayout:
    """A run folder with checkpoints; the model of step s has seed s."""
    layout = RunLayout(root)
    root.mkdir()
    layout.manifest.write_text("{}")
    for step in steps:
        folder = layout.checkpoint(step)
        write_model_folder(folder, tiny_model(seed=step, **changes))
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
            for path in folder.iterdir()
        }
        write_json(folder / "manifest.json", {"v": 1, "run_id": "0", "step": step, "files": files})
    return layout
