"""8-bit AdamW: its update, and that it is saved and restored to the same bits."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from milepost.checkpoint.host_copy import HostCopy
from milepost.checkpoint.state import Progress, TrainState
from milepost.checkpoint.store import load_train_state, save_checkpoint
from milepost.config.schema import OptimizerSection
from milepost.core.errors import CheckpointError, UsageError
from milepost.model.llama import Llama
from milepost.model.lora import LORA_TARGETS, add_lora
from milepost.runs.layout import RunLayout
from milepost.train.code_table import make_table
from milepost.train.lowbit import UPDATE_NUMBERS
from milepost.train.optimizer import (
    build_optimizer,
    moments_by_name,
    moments_bytes,
    restore_moments,
    set_learning_rate,
)
from tests.tiny_models import tiny_model

pytest.importorskip("torchao", reason="the 8-bit optimizer is not installed (extra lowbit)")


class Training:
    """A model with some parameters of 4096 numbers and more and some smaller, being trained."""

    def __init__(self, name: str = "adamw8bit", *, lora_rank: int | None = None) -> None:
        self.model: Llama = tiny_model(hidden_size=64, intermediate_size=96)
        if lora_rank is not None:
            add_lora(
                self.model, rank=lora_rank, alpha=16, dropout=0.0, targets=LORA_TARGETS, seed=1
            )
        section = OptimizerSection(name=name, learning_rate=1e-3)  # type: ignore[arg-type]
        self.optimizer = build_optimizer(self.model, config=section)
        self.step = 0

    def update(self, *, to: int) -> None:
        while self.step < to:
            set_learning_rate(self.optimizer, 1e-3 / (1 + self.step))
            generator = torch.Generator().manual_seed(self.step)
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.grad = parameter.detach() + noise
            self.optimizer.step()
            self.step += 1

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        named = self.model.named_parameters()
        return {name: p.detach() for name, p in named if p.requires_grad}

    def moments(self) -> dict[str, torch.Tensor]:
        return moments_by_name(self.model, optimizer=self.optimizer)[0]

    def save(self, layout: RunLayout) -> None:
        """By way of the copy on the host, as a run does."""
        moments, num_updates = moments_by_name(self.model, optimizer=self.optimizer)
        state = TrainState(Progress(step=self.step), self.weights, moments, num_updates)
        num_bytes = sum(w.nbytes for w in self.weights.values())
        num_bytes += moments_bytes(self.model, optimizer=self.optimizer)
        copied = HostCopy(num_bytes, device=torch.device("cpu")).fill(state)
        save_checkpoint(layout, run_id="ab", state=copied, model_files={}, weights_dtype="float32")

    @torch.no_grad()
    def restore(self, layout: RunLayout, step: int) -> None:
        state = load_train_state(layout.checkpoint(step))
        for name, weight in self.weights.items():
            weight.copy_(state.weights[name])
        restore_moments(
            self.model,
            optimizer=self.optimizer,
            moments=state.moments,
            num_updates=state.optimizer_step,
        )
        self.step = state.progress.step


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("lora_rank", [None, 64])
def test_training_that_is_continued_gives_the_same_bits(
    tmp_path: Path, lora_rank: int | None
) -> None:
    whole, first, second = (Training(lora_rank=lora_rank) for _ in range(3))
    whole.update(to=6)
    layout = RunLayout(tmp_path)
    first.update(to=3)
    first.save(layout)
    second.restore(layout, 3)
    assert_equal(second.moments(), first.moments())
    second.update(to=6)
    assert_equal(second.weights, whole.weights)
    assert_equal(second.moments(), whole.moments())


@pytest.mark.parametrize("signed", [True, False])
def test_a_code_is_torchaos_for_every_kind_of_number(signed: bool) -> None:
    from torchao.optim.quant_utils import quantize_8bit_with_qmap
    from torchao.optim.subclass_8bit import OptimState8bit

    qmap = OptimState8bit.zeros((4096,), signed=signed).qmap
    halves = (qmap[1:] + qmap[:-1]) / 2
    above, below = torch.tensor(2.0), torch.tensor(-2.0)
    near = [torch.nextafter(x, way) for x in (qmap, halves) for way in (above, below)]
    drawn = torch.rand(200_000, generator=torch.Generator().manual_seed(1)) * 2 - 1
    small = drawn[:50_000] * 10.0 ** torch.arange(-9, 1).repeat(5000)
    numbers = torch.cat([qmap, halves, *near, drawn, small, torch.tensor([0.0, -0.0])])
    numbers = numbers.clamp(-1, 1) if signed else numbers.abs().clamp(max=1)
    wanted = quantize_8bit_with_qmap(numbers, qmap)
    assert torch.equal(make_table(qmap).look_up(numbers), wanted)
    assert len(wanted.unique()) == 256


@pytest.mark.parametrize("lora_rank", [None, 64])
@pytest.mark.parametrize("at_once", [256, 1024, 1 << 20])  # a block; some; a whole tensor
def test_an_update_is_torchaos_own_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, lora_rank: int | None, at_once: int
) -> None:
    from torchao.optim import AdamW8bit

    monkeypatch.setitem(UPDATE_NUMBERS, "cpu", at_once)
    ours, theirs = (Training(lora_rank=lora_rank) for _ in range(2))
    ours.update(to=5)
    with torch.compiler.set_stance("force_eager"):
        monkeypatch.setattr(type(theirs.optimizer), "step", AdamW8bit.step)
        theirs.update(to=5)
    assert_equal(ours.weights, theirs.weights)
    assert_equal(ours.moments(), theirs.moments())
    assert any(name.startswith("exp_avg_codes.") for name in ours.moments())


def test_an_update_holds_no_more_than_a_piece_of_a_tensor_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training = Training()
    training.update(to=1)  # the tables of codes are made
    largest = max(weight.numel() for weight in training.weights.values())
    monkeypatch.setitem(UPDATE_NUMBERS, "cpu", 512)
    held = {p.grad.untyped_storage().data_ptr() for p in training.model.parameters()}  # type: ignore[union-attr]
    for tensor in (*training.weights.values(), *training.moments().values()):
        held.add(tensor.untyped_storage().data_ptr())
    made = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if type(tensor) is torch.Tensor:
                    storage = tensor.untyped_storage()
                    if storage.data_ptr() not in held:
                        made.append(storage.nbytes())
            return result

    with Watched():
        training.optimizer.step()
    assert largest > 4096 and max(made) <= 8 * 512  # the index into the table of codes is int64


def test_what_is_restored_shares_no_memory_with_what_was_read() -> None:
    training, other = Training(), Training()
    training.update(to=1)
    moments = training.moments()
    before = {name: tensor.clone() for name, tensor in moments.items()}
    restore_moments(other.model, optimizer=other.optimizer, moments=moments, num_updates=1)
    other.step = 1
    other.update(to=2)
    assert_equal(moments, before)


def test_moments_take_a_byte_for_each_number_and_small_ones_stay_float32() -> None:
    training = Training()
    training.update(to=1)
    moments = training.moments()
    name = "model.layers.0.mlp.up_proj.weight"
    assert [(n, t.dtype, tuple(t.shape)) for n, t in moments.items() if n.endswith(name)] == [
        (f"exp_avg_codes.{name}", torch.uint8, (96, 64)),
        (f"exp_avg_scale.{name}", torch.float32, (24,)),
        (f"exp_avg_map.{name}", torch.float32, (256,)),
        (f"exp_avg_sq_codes.{name}", torch.uint8, (96, 64)),
        (f"exp_avg_sq_scale.{name}", torch.float32, (24,)),
        (f"exp_avg_sq_map.{name}", torch.float32, (256,)),
    ]
    assert moments["exp_avg.model.norm.weight"].dtype == torch.float32
    assert moments["exp_avg.model.layers.0.self_attn.k_proj.weight"].shape == (32, 64)
    assert {type(tensor) for tensor in moments.values()} == {torch.Tensor}


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("lora_rank", [None, 64])
def test_the_bytes_of_the_moments_are_known_before_there_are_any(
    name: str, lora_rank: int | None
) -> None:
    training = Training(name, lora_rank=lora_rank)
    known = moments_bytes(training.model, optimizer=training.optimizer)
    training.update(to=1)
    assert known == sum(tensor.nbytes for tensor in training.moments().values())


def test_updates_are_those_of_adamw_but_for_the_rounding_of_moments() -> None:
    exact, coded = Training("adamw"), Training()
    before = {name: tensor.clone() for name, tensor in exact.weights.items()}
    for training in (exact, coded):
        training.update(to=1)
    for name, weight in coded.weights.items():
        # The first update is made from moments that were never stored: float32's own rounding.
        torch.testing.assert_close(weight, exact.weights[name], atol=1e-6, rtol=1e-6)
    for training in (exact, coded):
        training.update(to=6)
    for name, weight in coded.weights.items():
        moved = (exact.weights[name] - before[name]).norm()
        # Seen: 0.6 % at most; float32 moments would give 0, a wrong sign or scale far over 100 %.
        assert (weight - exact.weights[name]).norm() < 0.02 * moved, name


def test_the_update_is_never_compiled() -> None:
    """A compiled block of the loop forbids compiling anew, and shapes here are many."""
    torch._dynamo.reset()
    training = Training()
    with torch._dynamo.config.patch(error_on_recompile=True):
        training.update(to=2)
    assert not torch._dynamo.utils.counters["frames"]


@pytest.mark.parametrize(("saved", "wanted"), [("adamw", "adamw8bit"), ("adamw8bit", "adamw")])
def test_moments_of_the_other_optimizer_are_coded_or_decoded(saved: str, wanted: str) -> None:
    one, other, never = Training(saved), Training(wanted), Training("adamw")
    for training in (one, never):
        training.update(to=6)
    restore_moments(other.model, optimizer=other.optimizer, moments=one.moments(), num_updates=6)
    other.step = 6
    assert {n.partition(".")[0] for n in other.moments()} == {
        n.partition(".")[0] for n in _trained(wanted).moments()
    }
    with torch.no_grad():
        for name, weight in other.weights.items():
            weight.copy_(never.weights[name])
    before = {name: tensor.clone() for name, tensor in never.weights.items()}
    for training in (other, never):
        training.update(to=7)
    for name, weight in other.weights.items():
        moved = (never.weights[name] - before[name]).norm()
        # Seen: 1.9 % at most, the rounding to 8 bits; moments of zero give 76 % at least.
        assert (weight - never.weights[name]).norm() < 0.05 * moved, name


def _trained(name: str) -> Training:
    training = Training(name)
    training.update(to=1)
    return training


def test_coding_is_the_rounding_that_torchao_does_after_an_update() -> None:
    coded, exact = _trained("adamw8bit"), _trained("adamw")
    again = Training("adamw8bit")
    restore_moments(again.model, optimizer=again.optimizer, moments=exact.moments(), num_updates=1)
    found, expected = again.moments(), coded.moments()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # torchao computes the moment itself in another order: last bits of float32.
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(
    ("part", "bad"),
    [
        ("codes", None),
        ("codes", torch.zeros(96, 32, dtype=torch.uint8)),
        ("codes", torch.zeros(96, 64)),
        ("scale", torch.zeros(23)),
        ("map", torch.zeros(256, dtype=torch.float64)),
    ],
)
def test_moments_that_do_not_fit_are_refused(part: str, bad: torch.Tensor | None) -> None:
    training = Training()
    training.update(to=1)
    moments = training.moments()
    name = "model.layers.1.mlp.up_proj.weight"
    del moments[f"exp_avg_sq_{part}.{name}"]
    if bad is not None:
        moments[f"exp_avg_sq_{part}.{name}"] = bad
    with pytest.raises(CheckpointError, match=f"no fitting exp_avg_sq of {name}"):
        restore_moments(
            training.model, optimizer=training.optimizer, moments=moments, num_updates=1
        )


def test_without_torchao_the_line_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def find_others(name: str, *more: Any) -> Any:
        return None if name == "torchao" else find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find_others)
    with pytest.raises(UsageError, match="needs torchao, and torchao is not installed") as caught:
        Training()
    assert "pip install 'milepost[lowbit]'" in str(caught.value.hint)
    Training("adamw")
