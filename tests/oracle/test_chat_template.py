"""The chat template against transformers: the same text, the same tokens, the same mask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from milepost.text.chat_template import VICUNA_JINJA, Message, encode, render
from milepost.text.tokenizer import Tokenizer, load_tokenizer
from tests.tiny_models import tiny_tokenizer

transformers = pytest.importorskip("transformers")

SYSTEM = Message("system", "You know geography.")
QUESTION = Message("user", "When was Berlin founded?\nName the century.")
ANSWER = Message("assistant", "Berlin was founded in the 13th century.")

CONVERSATIONS = {
    "one-turn": (QUESTION, ANSWER),
    "system": (SYSTEM, QUESTION, ANSWER),
    "empty-system": (Message("system", " "), QUESTION, ANSWER),
    "two-turns": (QUESTION, ANSWER, Message("user", "And Cölln? 🏰"), Message("assistant", "Too.")),
    "white-space": (
        Message("user", "  spaces \n"),
        Message("assistant", "\n\n- a list\n- of two "),
    ),
    "punctuation": (Message("user", "?"), Message("assistant", '"(…)" is what I say')),
}


def gpt2(_: Path) -> Tokenizer:
    return load_tokenizer("gpt2")


@pytest.fixture(params=[gpt2, tiny_tokenizer], ids=["gpt2", "trained"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Tokenizer, Any]:
    """Our tokenizer, and transformers' from the folder that a checkpoint would be."""
    make: Callable[[Path], Tokenizer] = request.param
    tokenizer = make(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    (folder / "chat_template.jinja").write_text(VICUNA_JINJA)
    return tokenizer, transformers.AutoTokenizer.from_pretrained(folder)


def as_dicts(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_a_conversation_has_transformers_text_tokens_and_mask(
    both: tuple[Tokenizer, Any], messages: tuple[Message, ...]
) -> None:
    tokenizer, oracle = both
    text = oracle.apply_chat_template(as_dicts(messages), tokenize=False)
    assert render(messages, add_generation_prompt=False) == text
    theirs = oracle.apply_chat_template(
        as_dicts(messages), return_dict=True, return_assistant_tokens_mask=True
    )
    ours = encode(messages, tokenizer=tokenizer, add_generation_prompt=False)
    assert ours.ids.tolist() == theirs["input_ids"]
    assert ours.is_answer.astype(int).tolist() == theirs["assistant_masks"]
    assert 0 < ours.is_answer.sum() < len(ours.ids)


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_a_prompt_has_transformers_text_and_tokens(
    both: tuple[Tokenizer, Any], messages: tuple[Message, ...]
) -> None:
    tokenizer, oracle = both
    prompt = messages[:-1]
    text = oracle.apply_chat_template(as_dicts(prompt), tokenize=False, add_generation_prompt=True)
    assert render(prompt, add_generation_prompt=True) == text
    theirs = oracle.apply_chat_template(
        as_dicts(prompt), return_dict=True, add_generation_prompt=True
    )
    ours = encode(prompt, tokenizer=tokenizer, add_generation_prompt=True)
    assert ours.ids.tolist() == theirs["input_ids"]
