"""Tokens and text as they come: the same as at once, never half a character, ended in time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost.core.errors import DivergedError, UsageError
from milepost.inference import decoder
from milepost.inference.decoder import FastDecoder
from milepost.inference.engine import complete
from milepost.inference.kv_cache import KVCache
from milepost.inference.sampling import Decoding
from milepost.inference.screened_head import ScreenedHead
from milepost.inference.stream import SamplingOptions, stream_text, stream_tokens
from milepost.inference.text_stream import TextStream
from milepost.model.packed_weight import packed
from milepost.text.tokenizer import load_tokenizer
from tests.tiny_models import VOCAB_SIZE, random_ids, tiny_model, tiny_tokenizer

GREEDY = Decoding(12, 0.0, None, None)
PROMPTS = [[0, 40, 41], [0], [0, 7, 8, 9, 10, 11]]


def _tokens(model, prompts=PROMPTS, decoding=GREEDY, **settings):
    values = {"end_ids": frozenset({0}), "vocab_size": VOCAB_SIZE} | settings
    steps = list(stream_tokens(model, prompts, decoding, **values))
    return [[t for step in steps for t in step if t.row == row] for row in range(len(prompts))]


def test_what_is_streamed_is_what_is_completed_at_once(tmp_path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer(tmp_path)
    prompts = ["The state", "", "of the people"]
    ids = [[tokenizer.end_of_text_id, *tokenizer.encode(prompt)] for prompt in prompts]
    steps = list(stream_text(model, tokenizer, ids, SamplingOptions(12)))
    for row, completion in enumerate(complete(model, tokenizer, prompts, max_new_tokens=12)):
        own = [new for step in steps for new in step if new.row == row]
        assert "".join(new.text for new in own) == completion.text
        assert [new.stopped for new in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].stopped == completion.stopped


def test_a_seed_gives_the_same_draws_and_equal_prompts_differ(tmp_path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer(tmp_path)

    def texts(seed: int) -> list[str]:
        options = SamplingOptions(12, temperature=1.0, seed=seed)
        steps = list(stream_text(model, tokenizer, [[0, 40], [0, 40]], options))
        return ["".join(n.text for s in steps for n in s if n.row == row) for row in (0, 1)]

    assert texts(1) == texts(1) != texts(2)
    assert texts(1)[0] != texts(1)[1]


@pytest.mark.parametrize("smallest_screened", [0, 1 << 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_decoder_writes_the_tokens_of_the_model_as_it_lies(
    monkeypatch, dtype, smallest_screened: int
) -> None:
    monkeypatch.setattr(decoder, "SMALLEST_SCREENED_BYTES", smallest_screened)
    prompts = [random_ids(length, seed=length).tolist() for length in (3, 9, 9, 1)]
    expected = _tokens(tiny_model(), prompts, compute_dtype=dtype)
    fast = FastDecoder(tiny_model(), compute_dtype=dtype, vocab_size=VOCAB_SIZE)
    assert _tokens(fast, prompts) == expected
    for row in range(4):
        alone = _tokens(fast, prompts[row : row + 1])[0]
        assert [t.token_id for t in alone] == [t.token_id for t in expected[row]]


def test_the_fast_decoder_draws_as_the_model_as_it_lies() -> None:
    draws = {"decoding": Decoding(12, 1.0, 40, 0.9), "seeds": [5, 6, 7]}
    fast = FastDecoder(tiny_model(), compute_dtype=torch.float32, vocab_size=VOCAB_SIZE)
    assert _tokens(fast, **draws) == _tokens(tiny_model(), **draws)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_decoder_reads_a_prompt_in_parts_as_the_model_does_at_once(dtype) -> None:
    model, ids = tiny_model(), random_ids(2, 17)
    expected = model(ids)
    fast = FastDecoder(model, compute_dtype=dtype, vocab_size=VOCAB_SIZE)
    cache = KVCache(model.config, num_rows=2, capacity=17, dtype=dtype)
    parts = [fast.read(part, cache) for part in ids[:, :16].split([9, 1, 6], dim=1)]
    found = torch.cat(parts, dim=1)
    # float32 in another order; a few roundings to 8 bits on the way.
    atol = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found.float(), expected[:, :16], atol=atol, rtol=0)
    last = fast.step(ids[:, 16], cache)
    torch.testing.assert_close(last.float(), expected[:, 16], atol=atol, rtol=0)


def test_the_fast_decoder_leaves_the_model_as_it_computes() -> None:
    model, ids = tiny_model(), random_ids(2, 9)
    before = model(ids)
    FastDecoder(model, compute_dtype=torch.float32, vocab_size=VOCAB_SIZE)
    assert torch.equal(model(ids), before)


def _screened(weight: torch.Tensor) -> ScreenedHead:
    head = ScreenedHead.of(weight)
    if head is None:
        pytest.skip("this machine has no fast products of bytes")
    return head


@pytest.mark.parametrize("vocab_size", [991, 992, 993])
def test_the_screened_head_finds_the_largest_logit_where_all_are_negative(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = 1 + 0.1 * torch.randn(vocab_size, 64, generator=generator)
    hidden = -1 + 0.1 * torch.randn(50, 64, generator=generator)
    logits = hidden @ weight.t()
    assert logits.max() < -40
    assert _screened(weight).likeliest(hidden) == logits.argmax(dim=1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_products_of_bytes_the_tokens_are_the_same(monkeypatch, dtype) -> None:
    monkeypatch.setattr(decoder, "SMALLEST_SCREENED_BYTES", 0)
    expected = _tokens(tiny_model(), compute_dtype=dtype)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert ScreenedHead.of(torch.ones(64, 32)) is None
    fast = FastDecoder(tiny_model(), compute_dtype=dtype, vocab_size=VOCAB_SIZE)
    assert _tokens(fast) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 2, 8, 17])
def test_a_packed_weight_multiplies_as_the_weight(dtype, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(101, 64, generator=generator).to(dtype)
    rows = torch.randn(num_rows, 64, generator=generator).to(dtype)
    # Sums of 64 products in another order; in bfloat16 rounded to 8 bits once.
    rtol, atol = (8e-3, 1e-4) if dtype == torch.bfloat16 else (1e-5, 1e-5)
    expected = (rows.double() @ weight.double().t()).to(dtype)
    torch.testing.assert_close(packed(weight)(rows), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1e-3, 0.02, 1.0])
def test_the_screened_head_finds_the_largest_logit(dtype, spread: float) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = (spread * torch.randn(1003, 64, generator=generator)).to(dtype)
    weight[500:520] = weight[30:50]  # of equal logits the first
    hidden = torch.randn(300, 64, generator=generator).to(dtype)
    hidden[:20] = weight[510] / spread
    head = _screened(weight)
    logits = (hidden.double() @ weight.double().t()).to(dtype).float()
    for start, stop in ((0, 1), (0, 8), (8, 300)):
        found = head.likeliest(hidden[start:stop])
        largest = logits[start:stop].amax(dim=1)
        # What it names is the largest, up to the last bits of a sum of 64 products.
        torch.testing.assert_close(
            logits[range(start, stop), found], largest, rtol=8e-3 if dtype.itemsize == 2 else 1e-5,
            atol=1e-6,
        )  # fmt: skip
    assert not set(head.likeliest(hidden)) & set(range(500, 520))


def test_logits_that_are_not_finite_are_refused_by_the_fast_decoder_too() -> None:
    model = tiny_model()
    model.model.norm.weight.data[3] = torch.nan
    fast = FastDecoder(model, compute_dtype=torch.float32, vocab_size=VOCAB_SIZE)
    with pytest.raises(DivergedError, match="logits are not finite"):
        _tokens(fast)


def test_log_probabilities_are_those_of_the_model() -> None:
    model = tiny_model()
    (tokens,) = _tokens(model, [[0, 40, 41]], num_likeliest=3)
    ids = torch.tensor([[0, 40, 41, *(t.token_id for t in tokens)]])
    with torch.no_grad():
        nats = (model(ids)[0] @ model.head_weight.t()).log_softmax(dim=-1)
    for place, token in enumerate(tokens, start=2):
        # float32 sums of 32 products in another order.
        assert token.log_probability == pytest.approx(float(nats[place, token.token_id]), abs=1e-5)
        assert [i for i, _ in token.likeliest] == nats[place].topk(3).indices.tolist()
        assert token.likeliest[0] == (token.token_id, token.log_probability)


def test_a_closed_stream_computes_nothing_more(monkeypatch) -> None:
    model = tiny_model()
    steps = stream_tokens(model, PROMPTS, GREEDY, end_ids=frozenset(), vocab_size=VOCAB_SIZE)
    next(steps)
    steps.close()
    assert list(steps) == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([[0], []], "prompt 2 has no tokens"), ([[0] * 48], "prompt 1 has 48 tokens")],
)
def test_a_prompt_that_cannot_be_continued_is_refused(prompts, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _tokens(tiny_model(), prompts)


def test_an_empty_stop_text_is_refused() -> None:
    with pytest.raises(UsageError, match="a stop text is empty"):
        SamplingOptions(stop=("",))


def test_a_stop_text_ends_a_row_and_only_that(tmp_path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer(tmp_path)
    free = list(stream_text(model, tokenizer, PROMPTS, SamplingOptions(12)))
    texts = ["".join(n.text for s in free for n in s if n.row == row) for row in range(3)]
    stop = texts[0][3:6]
    steps = list(stream_text(model, tokenizer, PROMPTS, SamplingOptions(12, stop=(stop,))))
    for row, text in enumerate(texts):
        own = [new for step in steps for new in step if new.row == row]
        assert "".join(new.text for new in own) == text.split(stop)[0]
        assert (own[-1].stopped == "stop") == (stop in text)
    assert stop in texts[0]


_PIECES = st.lists(
    st.one_of(st.integers(0, 255), st.sampled_from([220, 11, 198, 50000, 19567, 12520, 97, 222]))
)


@settings(max_examples=200, deadline=None)
@given(ids=_PIECES, stop=st.lists(st.sampled_from(["\ufffd", "a", "\n!", "\ufffd\ufffd"])))
def test_pieces_of_text_are_the_text_up_to_the_first_stop(ids: list[int], stop: list[str]) -> None:
    tokenizer = load_tokenizer("gpt2")
    stream = TextStream(tokenizer, stop=stop)
    pieces = [stream.add(token_id) for token_id in ids]
    text = tokenizer.decode(ids)
    ends = [text.find(s) for s in stop if s in text]
    assert "".join([*pieces, stream.finish()]) == text[: min(ends, default=len(text))]
    assert stream.is_stopped == bool(ends)


def test_no_piece_ends_in_half_a_character() -> None:
    tokenizer = load_tokenizer("gpt2")
    text = "naïve 漢字 😀!"
    stream = TextStream(tokenizer)
    pieces = [stream.add(token_id) for token_id in tokenizer.encode(text)]
    assert "\ufffd" not in "".join(pieces) and "".join(pieces) == text


def test_what_may_become_a_stop_text_is_held_back_until_it_is_not() -> None:
    tokenizer = load_tokenizer("gpt2")
    (us,), (er,), (es,) = (tokenizer.encode(part) for part in (" US", "ER", "ES"))
    stream = TextStream(tokenizer, stop=["USER:"])
    assert [stream.add(us), stream.add(es)] == [" ", "USES"]
    assert [stream.add(us), stream.add(er), stream.finish()] == [" ", "", "USER"]
