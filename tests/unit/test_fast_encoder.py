"""The fast encoder: the tokenizer's ids or none, one thread, and a clear word where it differs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost.core.errors import DataError, MilepostError
from milepost.data import preparation, tokenize
from milepost.text import codecs, fast_encoder
from milepost.text.fast_encoder import FastEncoder, NoFastEncoderError, open_fast_encoder
from milepost.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from tests.sources import content_of, lines_of, run

fastokens = pytest.importorskip("fastokens")

ANY_TEXT = st.text(max_size=80)
SPACED_TEXT = st.text(
    st.sampled_from(" \t\n\r\u00a0\u2003\u3000\x1c\x85ab1.'s<|>é日👩\u200d"), max_size=80
)

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("trained")
    texts = [f"The union of the {n} states, my fellow citizens, is strong." for n in range(200)]
    (folder / "tokenizer.json").write_bytes(train_tokenizer(texts, vocab_size=320))
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def fast_gpt2(gpt2: Tokenizer) -> FastEncoder:
    return open_fast_encoder(gpt2)


@pytest.fixture(scope="module")
def fast_trained(trained: Tokenizer) -> FastEncoder:
    return open_fast_encoder(trained)


def same(fast: FastEncoder, tokenizer: Tokenizer, texts: list[str]) -> bool:
    """Whether both give the same ids; the fast one alone, without its own checks."""
    arrays = zip(fast.encode_unchecked(texts), tokenizer.encode_batch(texts), strict=True)
    return all(np.array_equal(ids, right) for ids, right in arrays)


@settings(max_examples=300, deadline=None)
@given(st.lists(ANY_TEXT | SPACED_TEXT, max_size=5))
def test_any_texts_get_the_ids_of_the_tokenizer(
    fast_gpt2: FastEncoder,
    gpt2: Tokenizer,
    fast_trained: FastEncoder,
    trained: Tokenizer,
    texts: list[str],
) -> None:
    assert same(fast_gpt2, gpt2, texts)
    assert same(fast_trained, trained, texts)


@pytest.mark.parametrize("character", ["a", " ", "\n", "7", "!", "漢", "👩", "\u0301"])
def test_words_and_spaces_without_end_get_the_ids_of_the_tokenizer(
    fast_gpt2: FastEncoder, gpt2: Tokenizer, character: str
) -> None:
    texts = [character * 100_000, character * 30_000 + "w", "w" + character * 30_000]
    assert same(fast_gpt2, gpt2, texts)


def test_long_texts_are_cut_where_no_token_spans_the_cut(
    fast_gpt2: FastEncoder, gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["short", "It's 12 o'clock,  and\n\n all is  well. " * 50, "", "x" * 500, " y" * 500]
    whole = gpt2.encode_batch(texts)
    for module in (codecs, fast_encoder):
        monkeypatch.setattr(module, "MAX_ENCODED_CHARACTERS", 100)
    assert len(list(codecs.parts(texts[1]))) > 10
    arrays = fast_gpt2.encode_batch(texts)
    assert [ids.tolist() for ids in arrays] == [ids.tolist() for ids in whole]
    assert all(ids.dtype == np.uint32 for ids in arrays)


def test_no_text_becomes_the_control_token(fast_gpt2: FastEncoder, trained: Tokenizer) -> None:
    text = "<|endoftext|> a<|endoftext|>"
    assert 50256 not in fast_gpt2.encode_batch([text])[0]
    assert trained.end_of_text_id not in open_fast_encoder(trained).encode_batch([text])[0]


def test_half_a_character_is_refused_as_the_tokenizer_refuses_it(fast_gpt2: FastEncoder) -> None:
    with pytest.raises(DataError, match="lone surrogate at character 2"):
        fast_gpt2.encode_batch(["fine", "ab\ud800c"])
    assert fast_gpt2.encode_batch(["fine"])[0].tolist() == [38125]


def test_one_text_in_a_thousand_is_encoded_by_the_tokenizer_too(
    gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = open_fast_encoder(gpt2)
    seen: list[str] = []

    def remember(texts: Iterable[str]) -> list[codecs.Ids]:
        seen.extend(texts := list(texts))
        return Tokenizer.encode_batch(gpt2, texts)

    monkeypatch.setattr(gpt2, "encode_batch", remember)
    texts = [f"text {number}" for number in range(2500)]
    for begin in range(0, 2500, 70):
        fast.encode_batch(texts[begin : begin + 70])
    assert seen == ["text 0", "text 1000", "text 2000"]


def test_another_id_in_the_work_stops_it_with_a_clear_word(
    gpt2: Tokenizer, fast_trained: FastEncoder
) -> None:
    wrong = FastEncoder(gpt2, encoder=fast_trained._encoder, name="fastokens 9")
    with pytest.raises(MilepostError, match=r"fastokens 9 gives other ids .*: 'The union'") as seen:
        wrong.encode_batch(["The union"])
    assert seen.value.hint is not None and "pip uninstall fastokens" in seen.value.hint


class OfAnotherVersion:
    """A library that does what a test says where ids are asked for."""

    def __init__(self, error: BaseException | None = None) -> None:
        self._error = error

    @staticmethod
    def from_json_str(content: str) -> OfAnotherVersion:
        return OfAnotherVersion()

    def encode_batch_flat(self, texts: list[str], **options: Any) -> tuple[bytes, bytes]:
        if self._error is not None:
            raise self._error
        return b"", b"\0" * 8


class PanicException(BaseException):  # as that of pyo3, which is no Exception either
    """What the library raises where Rust panics."""


@pytest.mark.parametrize(
    "method", [None, lambda self, texts: [], OfAnotherVersion.encode_batch_flat]
)
def test_a_library_of_another_version_is_never_opened(
    gpt2: Tokenizer, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastokens, "Tokenizer", OfAnotherVersion)
    monkeypatch.setattr(OfAnotherVersion, "encode_batch_flat", method)
    with pytest.raises(NoFastEncoderError, match=r"fastokens 0\..* failed: (Type|Index)Error"):
        open_fast_encoder(gpt2)


@pytest.mark.parametrize("error", [PanicException("at 12"), RuntimeError("at 12")])
def test_a_library_that_fails_in_the_work_is_named_with_what_to_do(
    gpt2: Tokenizer, error: BaseException
) -> None:
    library: Any = OfAnotherVersion(error)
    fast = FastEncoder(gpt2, encoder=library, name="fastokens 9")
    with pytest.raises(MilepostError, match=r"fastokens 9 failed: .*: at 12") as seen:
        fast.encode_batch(["a"])
    assert seen.value.hint is not None and "the same command goes on" in seen.value.hint


def test_ctrl_c_in_the_library_stays_ctrl_c(gpt2: Tokenizer) -> None:
    library: Any = OfAnotherVersion(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        FastEncoder(gpt2, encoder=library, name="fastokens 9").encode_batch(["a"])


def test_a_library_that_panics_at_once_is_never_opened(
    gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def panic(content: str) -> None:
        raise PanicException("at 12")

    monkeypatch.setattr(OfAnotherVersion, "from_json_str", panic)
    monkeypatch.setattr(fastokens, "Tokenizer", OfAnotherVersion)
    with pytest.raises(NoFastEncoderError, match="fastokens failed: PanicException: at 12"):
        open_fast_encoder(gpt2)


CUT_TEXT = st.text(
    st.sampled_from(" \t\n\u3000ab1.,'s<|>-é日語。！、ア٣½\u0301\u200d👩"), max_size=120
)


@settings(max_examples=300, deadline=None)
@given(CUT_TEXT | ANY_TEXT)
def test_a_text_cut_at_every_safe_place_keeps_its_ids(
    fast_gpt2: FastEncoder, gpt2: Tokenizer, trained: Tokenizer, text: str
) -> None:
    whole = gpt2.encode_batch([text])[0].tolist()
    whole_trained = trained.encode_batch([text])[0].tolist()
    with pytest.MonkeyPatch.context() as patch:
        for module in (codecs, fast_encoder):
            patch.setattr(module, "MAX_ENCODED_CHARACTERS", 1)
        assert gpt2.encode_batch([text])[0].tolist() == whole
        assert fast_gpt2.encode_unchecked([text])[0].tolist() == whole
        assert trained.encode_batch([text])[0].tolist() == whole_trained


@pytest.mark.parametrize("text", ["日本語の文章、", "漢字。\n", "QmFzZTY0+/9", "f(x)=1;", "line\n"])
def test_long_texts_without_spaces_are_cut_too(text: str) -> None:
    long = text * (300_000 // len(text))
    assert not codecs._has_long_word(long), "it would take the path of 200 bytes a character"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codecs, "MAX_ENCODED_CHARACTERS", 1000)
        assert max(map(len, codecs.parts(long))) < 1100
        assert "".join(codecs.parts(long)) == long


def test_an_encoder_that_gives_another_id_is_never_opened(
    gpt2: Tokenizer, trained: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpt2, "gpt2_like", trained.gpt2_like)
    with pytest.raises(NoFastEncoderError, match=r"fastokens 0\..* gives other ids than"):
        open_fast_encoder(gpt2)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", {"type": "NFC"}),
        ("pre_tokenizer", BYTE_LEVEL | {"add_prefix_space": True}),
        ("pre_tokenizer", BYTE_LEVEL | {"use_regex": False}),
        ("pre_tokenizer", {"type": "Whitespace"}),
        ("pre_tokenizer", None),
    ],
)
def test_a_tokenizer_of_another_kind_has_no_fast_encoder(
    trained: Tokenizer, tmp_path: Path, part: str, value: Any
) -> None:
    content = json.loads(trained.files()["tokenizer.json"]) | {part: value}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(NoFastEncoderError, match="not of GPT-2's kind"):
        open_fast_encoder(load_tokenizer(str(tmp_path)))


def test_an_added_word_that_is_no_control_token_has_no_fast_encoder(
    trained: Tokenizer, tmp_path: Path
) -> None:
    content = json.loads(trained.files()["tokenizer.json"])
    word = content["added_tokens"][0] | {"id": 320, "content": "[x]", "special": False}
    content["added_tokens"].append(word)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(NoFastEncoderError, match="not of GPT-2's kind"):
        open_fast_encoder(load_tokenizer(str(tmp_path)))


ONE_THREAD = """
import os
from milepost.text.fast_encoder import open_fast_encoder
from milepost.text.tokenizer import load_tokenizer
tokenizer = load_tokenizer("gpt2")
before = len(os.listdir("/proc/self/task"))
encoder = open_fast_encoder(tokenizer)
encoder.encode_batch(["So it goes, and on, and on. " * 40_000] * 20)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_it_starts_no_thread() -> None:
    words = [sys.executable, "-c", ONE_THREAD]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "0\n"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source of which every size is worth the fast encoder."""
    monkeypatch.setattr(preparation, "FAST_FROM_BYTES", 0)
    tokenize.fast_encoder.cache_clear()
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of([f"It's text {n} — “naïve”.\n\n  <|endoftext|>" for n in range(300)]))
    return path


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("tokenizer", ["gpt2", "train:300"])
def test_prepared_data_has_the_same_bytes_with_and_without_it(
    source: Path,
    tmp_path: Path,
    tokenizer: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options: dict[str, Any] = {"tokenizer": tokenizer, "val_fraction": 0.2, "workers": 1}
    run(source, tmp_path / "fast", **options)
    assert "encoding with fastokens 0." in capsys.readouterr().err
    tokenize.fast_encoder.cache_clear()
    monkeypatch.setitem(sys.modules, "fastokens", None)
    run(source, tmp_path / "plain", **options)
    talk = capsys.readouterr().err
    told = [line for line in talk.splitlines() if "fastokens is not installed" in line]
    assert len(told) == 1 and "pip install 'milepost[fast]' makes the encoding" in told[0]
    assert content_of(tmp_path / "fast") == content_of(tmp_path / "plain")


@pytest.mark.usefixtures("no_fsync")
def test_small_sources_are_encoded_without_it(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(preparation, "FAST_FROM_BYTES", source.stat().st_size + 1)
    run(source, tmp_path / "out")
    assert "encoding" not in capsys.readouterr().err


@pytest.mark.long
def test_workers_give_the_same_bytes_with_it(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "one", workers=1)
    run(source, tmp_path / "two", workers=2)
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")
