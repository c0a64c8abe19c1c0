"""Decoding: which token is taken, when it ends, and what it depends on."""

from __future__ import annotations

import math

import pytest
import torch

from milepost.core.errors import DivergedError, UsageError
from milepost.inference import engine
from milepost.inference.engine import complete
from milepost.inference.sampling import Decoding, next_token
from tests.adapters import adapted
from tests.tiny_models import tiny_model, tiny_tokenizer

LOGITS = torch.tensor([0.1, 0.5, 0.2, 0.15, 0.05]).log()


def _counts(decoding: Decoding, *, draws: int = 2000) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    drawn = [next_token(LOGITS, decoding=decoding, generator=generator) for _ in range(draws)]
    return [drawn.count(token) / draws for token in range(len(LOGITS))]


@pytest.mark.parametrize(
    ("decoding", "expected"),
    [
        (Decoding(1, 0.0, None, None), [0, 1, 0, 0, 0]),
        (Decoding(1, 1.0, None, None), [0.1, 0.5, 0.2, 0.15, 0.05]),
        (Decoding(1, 1.0, 1, None), [0, 1, 0, 0, 0]),
        (Decoding(1, 1.0, 2, None), [0, 5 / 7, 2 / 7, 0, 0]),
        (Decoding(1, 1.0, 99, None), [0.1, 0.5, 0.2, 0.15, 0.05]),
        (Decoding(1, 1.0, None, 1.0), [0.1, 0.5, 0.2, 0.15, 0.05]),
        (Decoding(1, 1.0, None, 0.6), [0, 5 / 7, 2 / 7, 0, 0]),
        (Decoding(1, 1.0, None, 1e-9), [0, 1, 0, 0, 0]),
        (Decoding(1, 1.0, 3, 0.8), [0, 5 / 7, 2 / 7, 0, 0]),  # 0.8 of what top_k left
        (Decoding(1, 1e-300, None, None), [0, 1, 0, 0, 0]),
        (Decoding(1, 0.5, None, None), [0.01 / 0.325, 0.25 / 0.325, 0.04 / 0.325, None, None]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should(decoding, expected) -> None:
    for found, wanted in zip(_counts(decoding), expected, strict=True):
        # 2000 draws: three standard deviations are 0.034 at most.
        assert wanted is None or found == pytest.approx(wanted, abs=0.034 if 0 < wanted < 1 else 0)


@pytest.mark.parametrize("spread", [0.1, 2.0, 5.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(None, 0.9), (None, 0.01), (None, 1.0), (7, None), (300, 0.5), (900, 1.0)]
)
def test_what_is_drawn_from_is_what_a_sort_of_all_tokens_leaves(spread, top_k, top_p) -> None:
    logits = (spread * torch.randn(900, generator=torch.Generator().manual_seed(1))).round(
        decimals=1
    )
    probabilities, ids = torch.softmax(logits.double(), dim=0).sort(descending=True, stable=True)
    probabilities, ids = probabilities[:top_k], ids[:top_k]
    if top_p is not None:
        before = probabilities.cumsum(dim=0) - probabilities
        left = int((before < top_p * probabilities.sum()).sum())
        probabilities, ids = probabilities[:left], ids[:left]
    for seed in range(20):
        drawn = torch.rand((), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        cumulative = probabilities.cumsum(dim=0)
        expected = ids[min(int((cumulative <= drawn * cumulative[-1]).sum()), len(ids) - 1)]
        found = next_token(
            logits,
            decoding=Decoding(1, 1.0, top_k, top_p),
            generator=torch.Generator().manual_seed(seed),
        )
        assert found == int(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message: str) -> None:
    values = {"max_new_tokens": 1, "temperature": 0.0, "top_k": None, "top_p": None} | settings
    with pytest.raises(UsageError) as caught:
        Decoding(**values)
    assert caught.value.message == message and caught.value.hint


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits = LOGITS.clone()
    logits[2] = bad
    with pytest.raises(DivergedError, match="logits are not finite"):
        next_token(logits, decoding=Decoding(1, 0.0, None, None), generator=torch.Generator())


def test_a_prompt_is_continued_alike_alone_and_among_others(tmp_path, monkeypatch) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer(tmp_path)
    prompts = ["The state", "", "of the people of the union is", "and", "The state"]
    settings = {"max_new_tokens": 20, "temperature": 1.0, "top_k": 50, "seed": 4}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    together = complete(model, tokenizer, prompts, **settings)
    assert torch.equal(torch.get_rng_state(), state)

    assert [c.prompt for c in together] == prompts
    for place in range(4):
        assert complete(model, tokenizer, prompts[place : place + 1], **settings) == [
            together[place]
        ]
    assert together[0].text != together[4].text  # the same prompt again: another draw
    monkeypatch.setattr(engine, "_ROWS_AT_ONCE", 2)
    assert complete(model, tokenizer, prompts, **settings) == together
    other_seed = complete(model, tokenizer, prompts, **(settings | {"seed": 5}))
    assert [c.text for c in other_seed] != [c.text for c in together]


def test_text_is_that_of_the_tokens_and_the_limit_is_kept(tmp_path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer(tmp_path)
    (completion,) = complete(model, tokenizer, ["The"], max_new_tokens=1)
    assert len(completion.token_ids) == 1 and completion.stopped == "max_new_tokens"
    assert completion.text == tokenizer.decode(completion.token_ids)
    assert complete(model, tokenizer, [], max_new_tokens=1) == []


def test_a_completion_ends_at_the_end_of_text_token(tmp_path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer(tmp_path)
    with torch.no_grad():
        model.head_weight.zero_()
    # All logits are 0, and of equal ones the first is taken: id 0, the end-of-text token.
    assert tokenizer.end_of_text_id == 0
    for completion in complete(model, tokenizer, ["The", ""], max_new_tokens=5):
        assert completion.token_ids == [] and completion.text == ""
        assert completion.stopped == "end_of_text"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_model, adapted])
def test_completing_leaves_the_model_as_it_was(tmp_path, make, dtype) -> None:
    model, tokenizer = make(), tiny_tokenizer(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = [(p.requires_grad, p.data_ptr()) for p in model.parameters()]
    first = complete(model, tokenizer, ["It was"], max_new_tokens=6, compute_dtype=dtype)
    again = complete(model, tokenizer, ["It was"], max_new_tokens=6, compute_dtype=dtype)
    assert again == first
    assert [(p.requires_grad, p.data_ptr()) for p in model.parameters()] == wanted
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_context_ends_a_completion_and_refuses_a_prompt_that_fills_it(tmp_path) -> None:
    model, tokenizer = tiny_model(max_position_embeddings=8), tiny_tokenizer(tmp_path)
    prompts = ["z" * 5, "zzz", "z" * 6]
    completions = complete(model, tokenizer, prompts, max_new_tokens=50, temperature=1.0, seed=1)
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.stopped == "context"
        assert len(completion.token_ids) == 8 - 1 - len(prompt)

    with pytest.raises(UsageError) as caught:
        complete(model, tokenizer, ["ok", "z" * 7], max_new_tokens=1)
    assert caught.value.message == (
        "prompt 2 has 8 tokens with the end-of-text token before it; the model's context is 8"
    )
    assert caught.value.hint == "shorten it to at most 6 tokens"


def test_ids_beyond_the_tokenizers_vocabulary_are_never_drawn(tmp_path) -> None:
    model, tokenizer = tiny_model(vocab_size=320), tiny_tokenizer(tmp_path)
    with torch.no_grad():
        model.head_weight[280:] = 100 * model.head_weight[1]
    (completion,) = complete(model, tokenizer, [""], max_new_tokens=30, temperature=1.0)
    assert max(completion.token_ids, default=0) < 280


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_decoding_is_that_of_the_model_without_a_cache(tmp_path, dtype) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer(tmp_path)
    (completion,) = complete(model, tokenizer, ["The"], max_new_tokens=1, compute_dtype=dtype)
    ids = torch.tensor([[tokenizer.end_of_text_id, *tokenizer.encode("The")]])
    hidden = model(ids, compute_dtype=dtype)[0, -1]
    expected = int((model.head_weight.to(dtype) @ hidden).argmax())
    assert completion.token_ids == ([] if expected == 0 else [expected])
