"""LoRA: what it adds, what it leaves alone, and what of it is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from milepost.config.recipe import load_recipe
from milepost.core.errors import CheckpointError, UsageError
from milepost.distributed.world import World
from milepost.inference.adapter_files import load_lora, read_adapter
from milepost.model.llama import Llama, run_block
from milepost.model.lora import (
    LORA_TARGETS,
    add_lora,
    base_sha256,
    has_lora,
    lora_shape,
    lora_state,
    merge_lora,
    set_lora_state,
)
from milepost.train.gradients import LaneGradients
from tests.adapters import adapted, save_adapter
from tests.tiny_models import random_ids, tiny_model

IDS = random_ids(2, 24)


@torch.no_grad()
def logits(model: Llama, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    hidden = model(IDS, compute_dtype=dtype)
    return (hidden @ model.head_weight.to(dtype).T).float()


def saved(folder: Path, model: Llama | None = None) -> Path:
    model = model or adapted()
    save_adapter(folder, model, base="the-base", base_sha256=base_sha256(model))
    return folder


def changed_config(folder: Path, **changes: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_the_paper_trains_160432128_parameters() -> None:
    """The issue's number for rank 128 on all projections of dmas-1.7b."""
    with torch.device("meta"):
        model = Llama(load_recipe("dmas-1.7b").model)
    add_lora(model, rank=128, alpha=16, dropout=0.0, targets=LORA_TARGETS, seed=1)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 160_432_128
    assert lora_shape(model).targets == LORA_TARGETS


def test_new_additions_change_nothing_to_the_last_bit() -> None:
    assert torch.equal(logits(adapted(filled=False)), logits(tiny_model()))
    assert not torch.equal(logits(adapted()), logits(tiny_model()))


def test_a_is_kaiming_uniform_and_depends_on_seed_and_name_only() -> None:
    model, other = adapted(filled=False), tiny_model(seed=9)
    add_lora(other, rank=4, alpha=1, dropout=0.0, targets=("k_proj", "down_proj"), seed=3)
    state, less = lora_state(model), lora_state(other)
    assert all(torch.equal(state[name], tensor) for name, tensor in less.items())
    for name, tensor in state.items():
        if ".lora_A." in name:
            bound = tensor.shape[1] ** -0.5  # torch's kaiming_uniform_ with a = sqrt(5)
            assert bound * 0.9 < tensor.abs().max() <= bound
            assert abs(float(tensor.std()) - bound / 3**0.5) < 0.15 * bound
        else:
            assert not tensor.any()


def test_only_additions_have_gradients_and_buffers() -> None:
    model = adapted()
    gradients = LaneGradients(model)
    gradients.begin_lane()
    model(IDS).square().sum().backward()
    gradients.end_lane()
    flat = gradients.sum_all(world=World(0, 1, torch.device("cpu")))
    assert flat.numel() == sum(t.numel() for t in lora_state(model).values())
    for name, parameter in model.named_parameters():
        is_addition = ".lora_" in name
        assert parameter.requires_grad == is_addition, name
        assert (parameter.grad is not None) == is_addition, name
        assert not is_addition or parameter.grad.any(), name


def test_gradients_are_those_of_the_formula() -> None:
    """Against the merged weight's own gradient G: dA = s B^T G, dB = s G A^T."""
    model, merged = adapted(), adapted()
    merge_lora(merged)
    for each in (model, merged):
        each(IDS).square().sum().backward()
    layer = model.model.layers[1].mlp.up_proj
    whole = merged.model.layers[1].mlp.up_proj.weight.grad
    a, b = layer.lora_A.weight, layer.lora_B.weight
    # float32 sums over 48 tokens in another order.
    torch.testing.assert_close(a.grad, 2 * b.T @ whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(b.grad, 2 * whole @ a.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("targets", [LORA_TARGETS, ("q_proj", "v_proj")])
def test_merging_changes_logits_by_rounding_only(targets: tuple[str, ...]) -> None:
    model = adapted(targets=targets)
    exact, rounded = logits(model), logits(model, torch.bfloat16)
    merge_lora(model)
    assert not has_lora(model)
    assert set(model.state_dict()) == set(tiny_model().state_dict())
    assert all(p.requires_grad for p in model.parameters())
    # Logits of some tens; float32 has 24 bits.
    torch.testing.assert_close(logits(model), exact, atol=1e-4, rtol=1e-5)
    # In bfloat16 the merged model is no farther from the truth than the unmerged one may be.
    error = (logits(model, torch.bfloat16) - exact).abs().max()
    assert error < 2 * (rounded - exact).abs().max()


def test_dropout_is_refused_with_the_reason() -> None:
    with pytest.raises(UsageError, match=r"lora.dropout is 0.1, only 0") as caught:
        add_lora(tiny_model(), rank=4, alpha=8, dropout=0.1, targets=LORA_TARGETS, seed=1)
    assert "continued exactly" in str(caught.value.hint)


@pytest.mark.long
def test_all_blocks_share_one_compiled_graph() -> None:
    torch._dynamo.reset()
    block = torch.compile(run_block, dynamic=False, fullgraph=True)
    model, plain = adapted(), adapted()
    with torch._dynamo.config.patch(error_on_recompile=True):
        model(IDS, run_block=block).square().sum().backward()
    plain(IDS).square().sum().backward()
    for (name, one), two in zip(model.named_parameters(), plain.parameters(), strict=True):
        if one.grad is not None:  # fused sums are rounded in another order
            torch.testing.assert_close(one.grad, two.grad, atol=1e-3, rtol=1e-3, msg=name)


def test_a_state_of_another_shape_is_refused_whole() -> None:
    model = adapted()
    before = {name: t.clone() for name, t in lora_state(model).items()}
    state = {name: torch.ones_like(t) for name, t in before.items()}
    last = list(state)[-1]
    for bad, message in (
        ({k: v for k, v in state.items() if k != last}, "lacks"),
        (state | {"more": torch.ones(1)}, "has unknown more"),
        (state | {last: torch.ones(2, 2)}, r"has shape \[2, 2\], the model needs"),
    ):
        with pytest.raises(CheckpointError, match=message):
            set_lora_state(model, bad)
    assert all(torch.equal(before[name], t) for name, t in lora_state(model).items())


def test_a_saved_adapter_gives_the_same_bits(tmp_path: Path) -> None:
    model = adapted()
    folder = saved(tmp_path / "adapter", model)
    again = tiny_model()
    adapter = load_lora(again, folder)
    assert torch.equal(logits(again), logits(model))
    assert adapter.base == "the-base"
    assert adapter.base_sha256 == base_sha256(model) == base_sha256(tiny_model())
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "adapter",
        "adapter_base.json",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_an_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    other = tiny_model(seed=2)
    before = logits(other)
    with pytest.raises(CheckpointError, match="was trained on another base") as caught:
        load_lora(other, folder)
    assert "the-base" in str(caught.value.hint)
    assert torch.equal(logits(other), before) and not has_lora(other)


def test_one_changed_weight_is_another_base() -> None:
    model = tiny_model()
    before = base_sha256(model)
    model.model.norm.weight.data[3] += 1e-6
    assert base_sha256(model) != before


def test_an_adapter_of_another_size_is_refused_without_a_recorded_base(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    (folder / "adapter_base.json").unlink()
    wider = tiny_model(intermediate_size=64)
    with pytest.raises(CheckpointError, match=r"has shape \[48, 4\], rank 4 .* \[64, 4\]"):
        load_lora(wider, folder)
    deeper = tiny_model(num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"lacks .*layers\.2"):
        load_lora(deeper, folder)
    assert not has_lora(wider) and not has_lora(deeper)


@pytest.mark.parametrize("content", ["[]", "{}", '{"v": 2, "base_sha256": "0"}', '{"v": 1}', "{"])
def test_a_damaged_record_of_the_base_is_refused(tmp_path: Path, content: str) -> None:
    folder = saved(tmp_path / "adapter")
    (folder / "adapter_base.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"adapter_base\.json"):
        load_lora(tiny_model(), folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"what_peft_may_add": 1}, "what_peft_may_add is 1"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"r": "4"}, "r is '4'"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_alpha": None}, "lora_alpha is None"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = changed_config(saved(tmp_path / "adapter"), **changes)
    with pytest.raises(UsageError, match=message) as caught:
        read_adapter(folder)
    assert "plain LoRA" in str(caught.value.hint)


def test_a_rank_that_is_not_the_tensors_is_refused(tmp_path: Path) -> None:
    folder = changed_config(saved(tmp_path / "adapter"), r=8)
    with pytest.raises(CheckpointError, match=r"has shape .* rank 8"):
        load_lora(tiny_model(), folder)


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_a_pickle_is_refused_and_never_loaded(tmp_path: Path) -> None:
    folder, marker = saved(tmp_path / "adapter"), tmp_path / "marker"
    weights = folder / "adapter_model.safetensors"
    weights.unlink()
    payload = pickle.dumps(_Payload(marker))
    (folder / "adapter_model.bin").write_bytes(payload)
    with pytest.raises(CheckpointError, match=r"adapter_model.bin, a pickle"):
        read_adapter(folder)
    weights.write_bytes(payload)
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        read_adapter(folder)
    assert not marker.exists()


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    state = load_file(weights)
    name = next(iter(state))
    for bad, message in (
        ({"a.b": torch.ones(1)}, "has no LoRA tensors"),
        (state | {f"{name}x": torch.ones(1)}, "has the unknown tensor"),
        (state | {name: state[name].to(torch.int32)}, "has type I32"),
        ({k: v for k, v in state.items() if k != name}, "lacks"),
    ):
        save_file(bad, weights)
        with pytest.raises(CheckpointError, match=message):
            load_lora(tiny_model(), folder)
    weights.unlink()
    weights.symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError):
        read_adapter(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is missing"):
        read_adapter(folder)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no adapter_config.json"):
        read_adapter(tmp_path)
