"""Validation: a fixed set, the same numbers however it is dealt, given up on request."""

from __future__ import annotations

import numpy as np
import torch

from milepost.config.recipe import load_recipe
from milepost.evaluation.validation import ValidationResult, ValidationSet, validate
from milepost.model.init import initialize
from milepost.model.llama import Llama
from tests.evaluations import ALONE


def tiny_model() -> Llama:
    overrides = ("--model.vocab_size", "50", "--model.hidden_size", "32")
    config = load_recipe("demo", overrides=(*overrides, "--model.max_position_embeddings", "256"))
    model = Llama(config.model)
    initialize(model, config=config.model, seed=1)
    return model


def scored(rows: ValidationSet, *, microbatch_rows: int = 2) -> ValidationResult | None:
    return validate(
        tiny_model(),
        rows=rows,
        microbatch_rows=microbatch_rows,
        compute_dtype=torch.float32,
        chunk_rows=64,
        world=ALONE,
    )


def made_up_rows(*, num_rows: int, num_bytes: int = 100) -> ValidationSet:
    source = np.random.default_rng(1)
    ids = source.integers(0, 50, size=(num_rows, 9))
    return ValidationSet(ids[:, :-1], ids[:, 1:].copy(), num_bytes=num_bytes)


def test_the_mean_is_that_of_plain_cross_entropy() -> None:
    rows = made_up_rows(num_rows=5)
    model = tiny_model()
    with torch.no_grad():
        hidden = model(torch.from_numpy(rows.inputs))
        logits = (hidden @ model.head_weight.t()).double()
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(rows.targets).flatten()
    )
    result = scored(rows)
    assert result is not None
    assert abs(result.loss_nats - expected.item()) < 1e-6
    bits = result.loss_nats * rows.num_tokens / np.log(2) / rows.num_bytes
    assert result.bits_per_byte is not None
    assert abs(result.bits_per_byte - bits) < 1e-12


def test_padding_counts_for_nothing() -> None:
    rows = made_up_rows(num_rows=4)
    rows.targets[3, 2:] = -1
    result = scored(rows)
    assert result is not None
    assert result.num_tokens == 3 * 8 + 2


def test_a_stop_gives_the_scoring_up() -> None:
    asked = []

    def stop_after_one() -> bool:
        asked.append(1)
        return len(asked) > 1

    result = validate(
        tiny_model(),
        rows=made_up_rows(num_rows=8),
        microbatch_rows=2,
        compute_dtype=torch.float32,
        chunk_rows=64,
        world=ALONE,
        stop_requested=stop_after_one,
    )
    assert result is None
    assert len(asked) == 2
