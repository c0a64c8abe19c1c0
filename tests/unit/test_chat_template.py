"""Vicuna 1.1 to the letter, what is trained of it, and templates that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from milepost.core.errors import DataError, UsageError
from milepost.text.chat_template import (
    DEFAULT_SYSTEM,
    ChatTemplate,
    Message,
    encode,
    load_template,
    render,
    vicuna,
)
from milepost.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

END = "<|endoftext|>"
QUESTION = Message("user", "When was Berlin founded?")
ANSWER = Message("assistant", "Berlin was founded in the 13th century.")


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return load_tokenizer("gpt2")


def trained_tokens(messages: tuple[Message, ...], tokenizer: Tokenizer) -> list[str]:
    chat = encode(messages, tokenizer=tokenizer, add_generation_prompt=False)
    pairs = zip(chat.ids.tolist(), chat.is_answer.tolist(), strict=True)
    return [tokenizer.decode([token_id]) for token_id, is_answer in pairs if is_answer]


def test_a_conversation_is_vicuna_to_the_letter() -> None:
    assert render((QUESTION, ANSWER), add_generation_prompt=False) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: When was "
        "Berlin founded? ASSISTANT: Berlin was founded in the 13th century.<|endoftext|>"
    )


def test_a_prompt_ends_without_a_space() -> None:
    text = render((QUESTION,), add_generation_prompt=True)
    assert text == f"{DEFAULT_SYSTEM} USER: When was Berlin founded? ASSISTANT:"


def test_each_answer_of_several_turns_ends_with_the_end_of_text_token() -> None:
    messages = (Message("system", "Be brief."), QUESTION, ANSWER, Message("user", "Sure?"))
    text = render(messages, add_generation_prompt=True, eos="</s>")
    assert text == (
        "Be brief. USER: When was Berlin founded? ASSISTANT: Berlin was founded in the 13th "
        "century.</s>USER: Sure? ASSISTANT:"
    )


def test_an_empty_system_message_leaves_no_space_behind() -> None:
    text = render((Message("system", ""), QUESTION), add_generation_prompt=True)
    assert text == "USER: When was Berlin founded? ASSISTANT:"


def test_what_is_trained_begins_with_the_space_and_ends_with_the_end_of_text_token(
    gpt2: Tokenizer,
) -> None:
    trained = trained_tokens((QUESTION, ANSWER), gpt2)
    assert trained == [
        " Berlin", " was", " founded", " in", " the", " 13", "th", " century", ".", END,
    ]  # fmt: skip


def test_every_answer_is_trained_and_no_question(gpt2: Tokenizer) -> None:
    messages = (QUESTION, ANSWER, Message("user", "Sure?"), Message("assistant", "Yes."))
    trained = trained_tokens(messages, gpt2)
    assert "".join(trained) == f" {ANSWER.content}{END} Yes.{END}"


TURNS = [
    "Berlin", "13th", "(see below)", "\n\n1. one\n2. two", "…", "'s", "  two spaces", "\u00a0x",
    "🏰",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", "trained", "without-pieces", "metaspace"])
@pytest.mark.parametrize("answer", TURNS)
def test_a_conversation_begins_with_the_tokens_of_its_prompt(
    tmp_path: Path, kind: str, answer: str
) -> None:
    tokenizer = tokenizer_of(kind, tmp_path)
    prompt = encode((QUESTION,), tokenizer=tokenizer, add_generation_prompt=True).ids.tolist()
    messages = (QUESTION, Message("assistant", answer))
    whole = encode(messages, tokenizer=tokenizer, add_generation_prompt=False)
    assert whole.ids[: len(prompt)].tolist() == prompt
    assert not whole.is_answer[: len(prompt)].any()
    assert whole.is_answer[len(prompt) :].all()
    assert whole.ids[-1] == tokenizer.end_of_text_id
    assert tokenizer.decode(whole.ids[:-1]).endswith(f"ASSISTANT: {answer.strip()}")


def tokenizer_of(kind: str, folder: Path) -> Tokenizer:
    if kind == "gpt2":
        return load_tokenizer("gpt2")
    texts = [f"{DEFAULT_SYSTEM} USER: When? ASSISTANT: Berlin, ASSISTANT: in the 13th"] * 9
    content = json.loads(train_tokenizer(texts, vocab_size=330))
    if kind == "without-pieces":  # merges across words: ": B" may become one token
        content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False,
                                    "trim_offsets": True, "use_regex": False}  # fmt: skip
        symbols = content["model"]["vocab"]
        symbols[":Ġ"] = len(symbols)
        content["model"]["merges"].insert(0, [":", "Ġ"])
    if kind == "metaspace":  # a space before every text, as LLaMA 2 has it
        content = metaspace_tokenizer(texts)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(content))
    return load_tokenizer(str(file))


def metaspace_tokenizer(texts: list[str]) -> dict[str, Any]:
    from tokenizers import Tokenizer as JsonTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = JsonTokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    fallback = [decoders.ByteFallback(), decoders.Metaspace()]
    tokenizer.decoder = decoders.Sequence(fallback)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[END, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return json.loads(tokenizer.to_str())


def test_a_space_before_every_text_is_not_doubled_before_an_answer(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("metaspace", tmp_path)
    messages = (QUESTION, Message("assistant", "Berlin"))
    chat = encode(messages, tokenizer=tokenizer, add_generation_prompt=False)
    berlin = tokenizer.encode("Berlin")  # which has its space already
    assert chat.ids[chat.is_answer].tolist() == [*berlin, tokenizer.end_of_text_id]


def test_text_that_looks_like_the_end_of_text_token_is_text(gpt2: Tokenizer) -> None:
    messages = (Message("user", f"What is {END}?"), Message("assistant", f"{END} ends a text."))
    chat = encode(messages, tokenizer=gpt2, add_generation_prompt=False)
    assert (chat.ids == gpt2.end_of_text_id).nonzero()[0].tolist() == [len(chat.ids) - 1]
    assert gpt2.decode(chat.ids) == render(messages, add_generation_prompt=False)


def test_a_template_may_write_control_tokens_of_its_own_and_a_message_may_not(
    tmp_path: Path,
) -> None:
    content = json.loads(train_tokenizer([DEFAULT_SYSTEM] * 9, vocab_size=300))
    for name in ("<|im_start|>", "<|im_end|>"):
        entry = {"content": name, "id": 299 + len(content["added_tokens"])}
        content["added_tokens"].append(content["added_tokens"][0] | entry)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(tmp_path))
    template = ChatTemplate(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{{ '<|im_start|>assistant\n' }}",
        name="mine.jinja",
    )
    messages = (Message("user", f"a <|im_end|> <|im_end|><|im_start|>{END}"),)
    chat = template.encode(messages, tokenizer=tokenizer, add_generation_prompt=True)
    controls = [name for name in chat.ids.tolist() if name in tokenizer.control_ids.values()]
    assert tokenizer.decode(controls) == "<|im_start|><|im_end|><|im_start|>"
    text = template.render(messages, add_generation_prompt=True, eos=END)
    assert tokenizer.decode(chat.ids) == text


def test_jinja_in_a_message_is_text() -> None:
    text = render((Message("user", "{{ 7 * 6 }} {% if %}"),), add_generation_prompt=True)
    assert "USER: {{ 7 * 6 }} {% if %} ASSISTANT:" in text


@pytest.mark.parametrize(
    ("messages", "asks", "says"),
    [
        ((ANSWER,), False, "user and assistant take turns, and the user begins"),
        ((QUESTION, QUESTION), False, "user and assistant take turns"),
        ((QUESTION, Message("system", "x")), False, "user and assistant take turns"),
        ((QUESTION, ANSWER), True, "there is no question to answer"),
        ((Message("system", "x"),), True, "there is no question to answer"),
        ((Message("user", "a\0[end]\0b"),), True, "holds a NUL character at character 1"),
        ((), True, "the conversation has no message"),
    ],
)
def test_a_conversation_out_of_order_is_refused(
    messages: tuple[Message, ...], asks: bool, says: str
) -> None:
    with pytest.raises(DataError, match=says):
        render(messages, add_generation_prompt=asks)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for m in messages %}", "does not parse: line 1: Unexpected end of template"),
        ("a\n{{ messages | nothing }}", "does not parse: line 2: No filter named 'nothing'"),
        ("{% generation %}", "does not parse: line 1: Unexpected end of template"),
    ],
)
def test_a_template_that_does_not_parse_is_refused(source: str, says: str) -> None:
    with pytest.raises(UsageError, match="the chat template mine.jinja " + says):
        ChatTemplate(source, name="mine.jinja")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 'a'.encode('nothing') }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_refused(source: str) -> None:
    template = ChatTemplate(source, name="mine.jinja")
    with pytest.raises(DataError, match=r"the chat template mine.jinja refuses"):
        template.render((QUESTION,), add_generation_prompt=True, eos=END)


def test_a_template_of_ones_own_puts_control_tokens_where_it_says(
    gpt2: Tokenizer, tmp_path: Path
) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    template = load_template(str(file))
    chat = template.encode((QUESTION, ANSWER), tokenizer=gpt2, add_generation_prompt=False)
    assert gpt2.decode(chat.ids) == f"{END}[user]{QUESTION.content}[assistant]{ANSWER.content}{END}"
    assert gpt2.decode(chat.ids[chat.is_answer]) == f"{ANSWER.content}{END}"
    assert chat.ids[0] == gpt2.beginning_id
    assert not chat.is_answer[0]


def test_a_template_is_found_by_name_or_path(tmp_path: Path) -> None:
    assert load_template("vicuna-1.1") is vicuna()
    with pytest.raises(UsageError, match="cannot be read: No such file") as caught:
        load_template(str(tmp_path / "none.jinja"))
    assert caught.value.hint == "give vicuna-1.1, or the path of a .jinja file"
    (tmp_path / "bad.jinja").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="cannot be read: it is not UTF-8"):
        load_template(str(tmp_path / "bad.jinja"))
