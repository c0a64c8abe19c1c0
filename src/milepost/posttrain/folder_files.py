"""The files beside the weights of a Hugging Face folder: config, tokenizer, chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from milepost.config.schema import ModelSection
from milepost.core.errors import CheckpointError
from milepost.core.files import plain_file, read_json, storage_errors
from milepost.model.huggingface import hf_config, hf_generation_config
from milepost.text.tokenizer import MAX_TOKENIZER_BYTES, Tokenizer

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
CONFIG_FILES = (CONFIG_FILE, GENERATION_FILE)
"""Of a whole model; an adapter's folder has neither."""
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def folder_files(
    folder: Path, *, model: ModelSection, tokenizer: Tokenizer, dtype: str
) -> dict[str, bytes]:
    """What a model folder holds beside its weights, for a copy of it in another dtype.

    The tokenizer's files and the chat template are copied to the byte; config.json is written
    anew, with the control tokens that the old one names, so that nothing in it can ask for code.

    Args:
        folder: of the model; what it lacks is made from the tokenizer.
        model: its architecture.
        tokenizer: its tokenizer.
        dtype: of the weights in the copy.

    Raises:
        CheckpointError: a file is not a plain file, or not what its name says.
        StorageError: a file cannot be read.
    """
    config = hf_config(model, end_of_text_id=tokenizer.end_of_text_id, dtype=dtype)
    generation = hf_generation_config(end_of_text_id=tokenizer.end_of_text_id)
    files = {
        CONFIG_FILE: _json(config | _named_ids(folder / CONFIG_FILE)),
        GENERATION_FILE: _json(generation | _named_ids(folder / GENERATION_FILE)),
    }
    copied = {name: read_file(folder / name) for name in (*TOKENIZER_FILES, TEMPLATE_FILE)}
    found = {name: content for name, content in copied.items() if content is not None}
    return files | ({} if "tokenizer.json" in found else tokenizer.files()) | found


def chat_template(files: dict[str, bytes]) -> str | None:
    """The Jinja text of a folder's chat template, None where it has none.

    Args:
        files: as `folder_files` gives them.
    """
    if TEMPLATE_FILE in files:
        return files[TEMPLATE_FILE].decode(errors="replace")
    try:
        template = json.loads(files.get("tokenizer_config.json", b"{}")).get("chat_template")
    except (ValueError, RecursionError, AttributeError):
        return None
    return template if isinstance(template, str) else None


def read_file(path: Path) -> bytes | None:
    """The bytes of one small file of a model folder, None where it is not there.

    Raises:
        CheckpointError: it is no plain file, or larger than any such file.
        StorageError: it cannot be read.
    """
    if not (path.exists() or path.is_symlink()):
        return None
    size = plain_file(path, error=CheckpointError).stat().st_size
    if size > MAX_TOKENIZER_BYTES:
        raise CheckpointError(f"{path} has {size} bytes, at most {MAX_TOKENIZER_BYTES} are read")
    with storage_errors(path, verb="read"):
        return path.read_bytes()


def _named_ids(path: Path) -> dict[str, Any]:
    """The ids of control tokens that a JSON file of the folder names."""
    if not (path.exists() or path.is_symlink()):
        return {}
    values = read_json(plain_file(path, error=CheckpointError), error=CheckpointError)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return {name: values[name] for name in _TOKEN_IDS if _is_id(values.get(name))}


def _is_id(value: Any) -> bool:
    ids = value if isinstance(value, list) else [value]
    return bool(ids) and all(type(number) is int and number >= 0 for number in ids)


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
