"""Float8 products, emulated on the CPU: near bfloat16's, and nothing else of a model is touched."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from milepost.config.recipe import load_recipe
from milepost.config.schema import Config
from milepost.core.errors import UsageError
from milepost.model.llama import Llama
from milepost.model.lora import LORA_TARGETS, add_lora
from milepost.train.float8 import check_float8, count_products, float8_words
from milepost.train.installed import check_installed
from milepost.train.objective import build_objective
from tests.tiny_models import random_ids, tiny_model, tiny_section
from tests.training import write_recipe

pytest.importorskip("torchao", reason="float8 is not installed (extra lowbit)")
CPU = torch.device("cpu")
EVEN = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2}
"""All dimensions are multiples of 16."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    recipe = write_recipe(tmp_path_factory.mktemp("recipe"))
    words = ("--train.precision", "bfloat16", "--data.path", "unused")
    return load_recipe(str(recipe), overrides=words)


def _with(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def _gradients(model: Llama, config: Config) -> tuple[float, torch.Tensor]:
    """Loss and all gradients of one microbatch."""
    torch._dynamo.reset()
    model.zero_grad(set_to_none=True)
    objective = build_objective(model, config=config, end_of_text_id=0)
    ids = random_ids(2, 33)
    loss, _ = objective(ids[:, :-1], ids[:, 1:], 1 / 64)
    loss.backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in found)
    return float(loss.detach()), torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize("kind", ["tensorwise", "rowwise"])
def test_loss_and_gradients_are_near_those_of_bfloat16_and_not_the_same(
    config: Config, kind: str
) -> None:
    model = tiny_model(**EVEN, initializer_range=0.1)
    loss, gradients = _gradients(model, config)
    loss_8, gradients_8 = _gradients(model, _with(config, float8=kind))
    # Weights and activations have 3 bits of mantissa, tensorwise gradients 2: errors of some 3 and
    # 6 % an element, which mostly average out in the loss and add up from block to block behind it.
    assert loss_8 == pytest.approx(loss, rel=0.01) and loss_8 != loss
    assert torch.isfinite(gradients_8).all()
    assert torch.nn.functional.cosine_similarity(gradients, gradients_8, dim=0) > 0.98
    assert float(gradients_8.norm()) == pytest.approx(float(gradients.norm()), rel=0.05)


@pytest.mark.parametrize("changes", [{}, {"recompute": "block"}, {"recompute": 1}])
def test_the_bits_are_the_same_again_and_with_recomputation(
    config: Config, changes: dict[str, Any]
) -> None:
    model = tiny_model(**EVEN)
    loss, gradients = _gradients(model, _with(config, float8="rowwise"))
    again, same = _gradients(model, _with(config, float8="rowwise", **changes))
    assert again == loss and torch.equal(gradients, same)


def test_the_model_keeps_its_modules_and_what_it_computes_by_itself(config: Config) -> None:
    model = tiny_model(**EVEN)
    names, parameters = list(model.state_dict()), list(model.parameters())
    kinds = [type(module) for module in model.modules()]
    before = model(random_ids(1, 16), compute_dtype=torch.bfloat16)
    _gradients(model, _with(config, float8="tensorwise"))
    assert list(model.state_dict()) == names
    assert [type(module) for module in model.modules()] == kinds
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(model(random_ids(1, 16), compute_dtype=torch.bfloat16), before)


def test_weights_that_changed_in_place_are_those_that_are_multiplied(config: Config) -> None:
    model, other = tiny_model(**EVEN, seed=1), tiny_model(**EVEN, seed=2)
    torch._dynamo.reset()
    eight = _with(config, float8="tensorwise")
    objective = build_objective(model, config=eight, end_of_text_id=0)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), other.parameters(), strict=True):
            parameter.copy_(value)
    ids = random_ids(2, 33)
    loss, _ = objective(ids[:, :-1], ids[:, 1:], 1 / 64)
    assert float(loss.detach()) == _gradients(other, eight)[0]


def test_a_tuned_projection_keeps_its_addition_and_its_frozen_product_is_in_float8(
    config: Config,
) -> None:
    model = tiny_model(**EVEN, initializer_range=0.1)
    add_lora(model, rank=4, alpha=16, dropout=0.0, targets=LORA_TARGETS, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(3))
    loss, gradients = _gradients(model, config)
    loss_8, gradients_8 = _gradients(model, _with(config, float8="tensorwise"))
    assert loss_8 == pytest.approx(loss, rel=0.01) and loss_8 != loss
    # Of the additions alone, whose gradients are all at the end of two or more such products.
    assert torch.nn.functional.cosine_similarity(gradients, gradients_8, dim=0) > 0.98


def test_products_with_other_dimensions_stay_as_they_are_and_are_counted(config: Config) -> None:
    # k_proj and v_proj: 32 -> 2 x 4 = 8; the intermediate size 40 is no multiple either.
    section = tiny_section(num_attention_heads=8, num_key_value_heads=2, intermediate_size=40)
    assert count_products(section) == (2, 7)
    uneven = _with(config, float8="tensorwise").model_copy(update={"model": section})
    words = float8_words(uneven, device=CPU)
    assert words.startswith("float8 tensorwise: 2 of 7 products a block, the others have")
    assert words.endswith("emulated on a CPU, which is slow: for tests")
    nothing = uneven.model_copy(update={"model": tiny_section(hidden_size=40)})
    with pytest.raises(UsageError, match="no projection of the model has dimensions"):
        check_float8(nothing, device=CPU)


def test_what_cannot_be_computed_in_float8_is_refused(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eight = _with(config, float8="rowwise")
    check_float8(eight, device=CPU)
    with pytest.raises(UsageError, match=r"train\.precision is float32 here"):
        check_float8(_with(eight, precision="float32"), device=CPU)
    for capability, is_refused in (((8, 0), True), ((8, 9), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
        if is_refused:
            with pytest.raises(UsageError, match=r"a GPU has no float8 products.* 8\.0, 8\.9"):
                check_float8(eight, device=torch.device("cuda", 0))
        else:
            check_float8(eight, device=torch.device("cuda", 0))
    recipe = str(write_recipe(tmp_path))
    for words, message in (
        ((), "needs the precision bfloat16"),
        (("--train.precision", "bfloat16", "--data.sequence_length", "24"), "multiple of 16"),
    ):
        with pytest.raises(UsageError, match=message):
            load_recipe(recipe, overrides=("--train.float8", "rowwise", *words))


def test_without_torchao_it_is_said_how_to_install_it(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_installed(config)
    with pytest.raises(UsageError, match="needs torchao") as refused:
        check_installed(_with(config, float8="tensorwise"))
    assert "milepost[lowbit]" in str(refused.value.hint)


@pytest.mark.long
def test_compiled_blocks_share_one_graph(config: Config) -> None:
    model = tiny_model(**EVEN, num_hidden_layers=3, initializer_range=0.1)
    eight = _with(config, float8="rowwise")
    loss, gradients = _gradients(model, eight)
    compiled, same = _gradients(model, _with(eight, compile=True))  # a second graph is refused
    assert compiled == pytest.approx(loss, rel=0.01)
    assert torch.nn.functional.cosine_similarity(gradients, same, dim=0) > 0.99
