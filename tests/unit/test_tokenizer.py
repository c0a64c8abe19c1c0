"""GPT-2 exact, any tokenizer.json, training one; a text never becomes a control token."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost.core.errors import DataError, UsageError
from milepost.core.files import sha256_of_json
from milepost.text import codecs
from milepost.text.byte_level import gpt2_ranks, gpt2_tokenizer_json, gpt2_vocab
from milepost.text.codecs import JsonCodec
from milepost.text.tokenizer import GPT2_SHA256, Tokenizer, load_tokenizer, train_tokenizer
from tests.tiny_models import tiny_tokenizer

HOSTILE = [
    "",
    " ",
    "\n",
    "  \n\n \t x",
    "I'll we've 's 'S it's 'll'LL",
    "<|endoftext|>",
    "a<|endoftext|><|endoftext|>b <|im_start|>",
    "naïve café — “quotes” … ½ ² ٣ Ⅷ",
    "日本語の文章、中文字符。한국어 텍스트",
    "👩‍👩‍👧‍👦🇫🇷 e\u0301\u200d\ufeff\u00ad",
    "\x00\x01\x1c\x1d\x1e\x1f\x7f\x85\xa0\u2028\u3000x",
    "1234567890 12,345.678e-9",
    "tail  ",
    "tail \n \n",
    "\r\n\r\nwindows\r\n",
    "def f(x):\n        return x  # comment\n\n\n",
    "\U0010ffff\ufffd",
]
SEVERAL_SPACES = st.text(st.sampled_from(" \t\n\u00a0\u2003\x1cab1.'é日"), max_size=60)


@pytest.fixture(scope="module")
def oracle() -> JsonCodec:
    """The other implementation: Hugging Face's tokenizers."""
    return JsonCodec(gpt2_tokenizer_json())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("trained")
    texts = [f"The union of the {n} states, my fellow citizens, is strong." for n in range(200)]
    (folder / "tokenizer.json").write_bytes(train_tokenizer(texts, vocab_size=320))
    return load_tokenizer(str(folder))


def test_the_vocabulary_that_derives_from_the_merges_is_the_published_one(
    shared_data: Path,
) -> None:
    published = json.loads((shared_data / "gpt2" / "encoder.json").read_text(encoding="utf-8"))
    assert gpt2_vocab() == published
    lines = (shared_data / "gpt2" / "r50k_base.tiktoken").read_text().split("\n")
    pairs = (line.split() for line in lines if line)
    assert gpt2_ranks() == {base64.b64decode(token): int(rank) for token, rank in pairs}


def test_gpt2_is_what_it_says(gpt2: Tokenizer) -> None:
    assert (gpt2.name, gpt2.vocab_size, gpt2.end_of_text_id) == ("gpt2", 50257, 50256)
    assert gpt2.sha256 == GPT2_SHA256 == sha256_of_json(gpt2_tokenizer_json())
    assert gpt2.encode("hello world") == [31373, 995]


@pytest.mark.parametrize("text", HOSTILE)
def test_gpt2_equals_the_other_implementation_on_hostile_text(
    gpt2: Tokenizer, oracle: JsonCodec, text: str
) -> None:
    ids = gpt2.encode(text)
    assert ids == oracle.encode(text).tolist()
    assert gpt2.decode(ids) == text
    assert gpt2.count_bytes(ids) == len(text.encode())
    assert gpt2.end_of_text_id not in ids


@given(text=st.text(max_size=200) | SEVERAL_SPACES)
@settings(max_examples=80, deadline=None)
def test_gpt2_equals_the_other_implementation_on_any_text(
    gpt2: Tokenizer, oracle: JsonCodec, text: str
) -> None:
    ids = gpt2.encode(text)
    assert ids == oracle.encode(text).tolist()
    assert gpt2.decode(ids) == text
    assert gpt2.count_bytes(np.array(ids, dtype=np.uint32)) == len(text.encode())


def test_gpt2_equals_the_other_implementation_on_real_text(
    gpt2: Tokenizer, oracle: JsonCodec, shared_data: Path
) -> None:
    import pyarrow

    path = str(shared_data / "corpus" / "val-00000.jsonl.zst")
    lines = pyarrow.input_stream(path, compression="zstd").read().splitlines()
    for line in lines[::3]:
        text = json.loads(line)["text"]
        assert gpt2.encode(text) == oracle.encode(text).tolist()


@given(text=SEVERAL_SPACES)
@settings(max_examples=80, deadline=None)
def test_cutting_a_text_into_parts_changes_no_id(
    gpt2: Tokenizer, oracle: JsonCodec, text: str
) -> None:
    whole = (text + "  x y ") * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codecs, "MAX_ENCODED_CHARACTERS", 5)
        assert gpt2.encode(whole) == oracle.encode(whole).tolist()


@pytest.mark.parametrize(
    "text",
    [
        "a" * 1_000_000,
        " " * 1_000_000,
        "x" + " " * 1_000_000 + "y",
        "x" + "\n \t" * 3000 + "y" + "\u3000" * 1500 + " z" + " " * 999 + "." + " " * 1000 + "!",
        "0" * 30_000 + " " + "=" * 30_000 + " b" * 10_000,
    ],
    ids=["letters", "spaces", "spaces-inside", "mixed", "digits-and-signs"],
)
def test_gpt2_is_exact_on_very_long_runs(gpt2: Tokenizer, oracle: JsonCodec, text: str) -> None:
    ids = gpt2.encode(text)
    assert gpt2.decode(ids) == text
    assert ids == oracle.encode(text).tolist()


def test_a_lone_surrogate_is_refused(gpt2: Tokenizer) -> None:
    with pytest.raises(DataError, match="lone surrogate at character 2"):
        gpt2.encode("ab\ud800c")


def test_an_id_outside_the_vocabulary_is_refused(gpt2: Tokenizer) -> None:
    with pytest.raises(DataError, match="token id 50257 is not in the vocabulary of 50257"):
        gpt2.decode([50257])


def test_the_end_of_text_token_counts_no_byte(gpt2: Tokenizer, trained: Tokenizer) -> None:
    for tokenizer in (gpt2, trained):
        ids = [tokenizer.end_of_text_id, *tokenizer.encode("état"), tokenizer.end_of_text_id]
        assert tokenizer.count_bytes(ids) == 5
        assert tokenizer.decode(ids) == "<|endoftext|>état<|endoftext|>"


@pytest.mark.parametrize("with_llama_config", [False, True])
def test_the_files_load_as_a_hugging_face_tokenizer(
    gpt2: Tokenizer, trained: Tokenizer, tmp_path: Path, with_llama_config: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    for tokenizer in (gpt2, trained):
        folder = tmp_path / tokenizer.name
        folder.mkdir()
        for name, content in tokenizer.files().items():
            (folder / name).write_bytes(content)
        if with_llama_config:
            config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
            (folder / "config.json").write_text(json.dumps(config))
        loaded = transformers.AutoTokenizer.from_pretrained(folder)
        assert loaded.bos_token_id == loaded.eos_token_id == tokenizer.end_of_text_id
        assert len(loaded) == tokenizer.vocab_size
        for text in (t for t in HOSTILE if "<|endoftext|>" not in t):
            assert loaded.encode(text) == tokenizer.encode(text)
            assert loaded.decode(loaded.encode(text)) == text
        again = load_tokenizer(str(folder))
        assert again.sha256 == tokenizer.sha256
        assert again.encode("it's so") == tokenizer.encode("it's so")


def test_training_gives_the_size_asked_for_and_the_same_bytes_again(trained: Tokenizer) -> None:
    texts = [f"The union of the {n} states, my fellow citizens, is strong." for n in range(200)]
    assert trained.vocab_size == 320
    assert load_and_hash(train_tokenizer(iter(texts), vocab_size=320)) == trained.sha256


def load_and_hash(content: bytes) -> str:
    return sha256_of_json(json.loads(content))


@given(text=st.text(max_size=100))
@settings(max_examples=50, deadline=None)
def test_a_trained_tokenizer_gives_back_any_text(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.count_bytes(ids) == len(text.encode())
    assert trained.end_of_text_id not in ids


@pytest.mark.parametrize("size", [0, 256, 2**20 + 1])
def test_a_vocabulary_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match=f"a vocabulary of {size} cannot be trained"):
        train_tokenizer(["text"], vocab_size=size)


def test_too_little_text_for_a_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match=r"give a vocabulary of 2\d\d, not 5000"):
        train_tokenizer(["too little text"], vocab_size=5000)


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no tokenizer") as caught:
        load_tokenizer(str(tmp_path))
    assert "give gpt2" in str(caught.value.hint)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {}}', "[" * 100_000, "\udcff"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"tokenizer.json is not a tokenizer.json"):
        load_tokenizer(str(path))


def word_level(*, added: list[dict[str, Any]], tokens: list[str]) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": {
            "max_length": 2,
            "strategy": "LongestFirst",
            "stride": 0,
            "direction": "Right",
        },
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "unk_token": "[unk]",
        },
    }


def save(folder: Path, content: dict[str, Any]) -> str:
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


def test_a_foreign_tokenizer_does_not_truncate_or_make_its_control_token(tmp_path: Path) -> None:
    entry = {"id": 3, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": False}  # fmt: skip
    content = word_level(added=[entry], tokens=["[unk]", "a", "b"])
    tokenizer = load_tokenizer(save(tmp_path, content))
    assert (tokenizer.vocab_size, tokenizer.end_of_text_id) == (4, 3)
    assert tokenizer.encode("a b a </s> b") == [1, 2, 1, 0, 2]


def test_the_configured_end_of_text_token_goes_before_the_usual_names(tmp_path: Path) -> None:
    content = word_level(added=[], tokens=["[unk]", "[end]", "</s>", "a"])
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "[end]"}}')
    with pytest.raises(DataError, match=r"the plain text \[end\] is the control token"):
        load_tokenizer(save(tmp_path, content))


def test_a_tokenizer_without_an_end_of_text_token_is_refused(tmp_path: Path) -> None:
    content = word_level(added=[], tokens=["[unk]", "a"])
    with pytest.raises(DataError, match="has no end-of-text token") as caught:
        load_tokenizer(save(tmp_path, content))
    assert "<|endoftext|>" in str(caught.value.hint)


def template(*parts: str) -> dict[str, Any]:
    """A post-processor that puts control tokens around a text, which is written A."""
    ids = {"[begin]": 3, "</s>": 4}
    single = [
        {"Sequence": {"id": "A", "type_id": 0}}
        if part == "A"
        else {"SpecialToken": {"id": part, "type_id": 0}}
        for part in parts
    ]
    special = {part: {"id": part, "ids": [ids[part]], "tokens": [part]} for part in ids}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": special,
    }


@pytest.mark.parametrize(
    ("parts", "config", "ids_around", "beginning_id"),
    [
        (("A",), None, ((), ()), 4),  # the end-of-text token
        (("[begin]", "A"), None, ((3,), ()), 3),
        (("[begin]", "A", "</s>"), None, ((3,), (4,)), 3),
        (("A", "</s>"), '{"bos_token": "[begin]"}', ((), (4,)), 3),
        (("A",), '{"bos_token": {"content": "[begin]"}}', ((), ()), 3),
        (("[begin]", "A"), '{"bos_token": "</s>"}', ((3,), ()), 4),
    ],
)
def test_what_stands_around_a_text_is_read_from_the_files(
    tmp_path: Path,
    parts: tuple[str, ...],
    config: str | None,
    ids_around: tuple[tuple[int, ...], tuple[int, ...]],
    beginning_id: int,
) -> None:
    added = [
        {"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for token, number in (("[begin]", 3), ("</s>", 4))
    ]  # fmt: skip
    content = word_level(added=added, tokens=["[unk]", "a", "b"])
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(config)
    tokenizer = load_tokenizer(save(tmp_path, content | {"post_processor": template(*parts)}))
    assert tokenizer.ids_around == ids_around
    assert tokenizer.beginning_id == beginning_id
    assert tokenizer.encode("a b </s>") == [1, 2, 0]


def test_a_text_never_takes_fewer_tokens_than_is_said_without_encoding_it(tmp_path, gpt2) -> None:
    for tokenizer in (gpt2, tiny_tokenizer(tmp_path)):
        for text in ("", "a", " " * 3000, "The state of the union. " * 50, "日本" * 40):
            assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text))
        assert tokenizer.fewest_tokens("a" * 1_000_000) > 1000
