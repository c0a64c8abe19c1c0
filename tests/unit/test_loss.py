"""Chunked cross-entropy: accurate, bit-exact, never tokens x V at once."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from milepost.model.loss import token_nats, training_loss


def _case(rows: int = 70, width: int = 16, vocab: int = 131, *, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    return hidden, weight, targets


def _reference(hidden, weight, targets, *, scale: float):
    """In float64, from the values as the products see them."""
    hidden64 = hidden.detach().double().requires_grad_()
    weight64 = weight.detach().to(hidden.dtype).double().requires_grad_()
    nats = F.cross_entropy(
        hidden64 @ weight64.T, targets.clamp(min=-1), ignore_index=-1, reduction="none"
    )
    loss = nats.sum() * scale
    loss.backward()
    return loss.detach(), nats.detach(), hidden64.grad, weight64.grad


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("chunk_rows", [1, 16, 33, 69, 70, 71, 4096])
def test_float32_is_accurate_to_a_millionth(chunk_rows: int) -> None:
    hidden, weight, targets = _case()
    targets[3], targets[40] = -1, -100
    loss, nats = training_loss(hidden, weight, targets, scale=1 / 68, chunk_rows=chunk_rows)
    loss.backward()

    expected = _reference(hidden, weight, targets.clamp(min=-1), scale=1 / 68)
    for found, wanted in zip(
        (loss.detach(), nats, hidden.grad, weight.grad), expected, strict=True
    ):
        assert _relative_error(found, wanted) < 1e-6
    assert nats[3] == 0 and nats[40] == 0
    assert not nats.requires_grad
    assert hidden.grad[3].eq(0).all()


def test_large_logits_neither_overflow_nor_lose_digits() -> None:
    hidden, weight, targets = _case()
    hidden = (hidden.detach() * 100).requires_grad_()
    loss, nats = training_loss(hidden, weight, targets, scale=1.0, chunk_rows=32)
    expected_loss, expected_nats, *_ = _reference(hidden, weight, targets, scale=1.0)
    assert _relative_error(loss.detach(), expected_loss) < 1e-6
    assert _relative_error(nats, expected_nats) < 1e-6


# Sums of exponentials from where nothing is taken out before to where the maximum must be: below
# 2^-100, between and above 2^100 (69 nats), and far outside of float32; all in one block of rows.
@pytest.mark.parametrize("shifts", [(-69, 0, 69), (-75, -60, 60, 75), (-400, 0, 400), (88.5, 104)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_of_the_logits_costs_no_digits(shifts: tuple, dtype: torch.dtype) -> None:
    hidden, weight, targets = _case(rows=8, vocab=50_257, dtype=dtype)
    with torch.no_grad():
        weight[:, 0] = 1.0
        hidden[:, 0] = torch.tensor([shifts[i % len(shifts)] for i in range(8)])
    loss, nats = training_loss(hidden, weight, targets, scale=1 / 8, chunk_rows=8)
    loss.backward()
    logits = (hidden.detach() @ weight.detach().to(dtype).T).double()  # as the products round
    expected = F.cross_entropy(logits, targets, reduction="none")
    # float32 holds logits of this size to 2^-24 of them.
    bound = 2e-6 * (1 + max(abs(shift) for shift in shifts) / 10)
    assert (nats.double() - expected).abs().max() < bound
    slopes = (logits.softmax(1) - F.one_hot(targets, 50_257)) / 8
    wanted = slopes @ weight.detach().to(dtype).double()
    assert _relative_error(hidden.grad, wanted) < (1e-5 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_keeps_its_bits_beside_one_with_huge_logits(dtype: torch.dtype) -> None:
    hidden, weight, targets = _case(rows=8, vocab=50_257, dtype=dtype)
    alone = token_nats(hidden, weight, targets, chunk_rows=8)
    with torch.no_grad():
        hidden[7] *= 1000
    beside = token_nats(hidden, weight, targets, chunk_rows=8)
    assert torch.equal(alone[:7], beside[:7])


def test_no_nats_are_below_zero() -> None:
    hidden = torch.zeros(64, 2)
    hidden[:, 0] = torch.linspace(5, 68, 64)  # the target takes nearly all; 0 to 1e-5 nats
    weight = torch.full((500, 2), 0.1)
    weight[3, 0] = 1.0
    nats = token_nats(hidden, weight, torch.full((64,), 3), chunk_rows=16)
    assert nats.ge(0).all() and nats[-1] < 1e-5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_never_a_finite_loss(dtype: torch.dtype, value: float) -> None:
    hidden, weight, targets = _case(rows=9, dtype=dtype)
    with torch.no_grad():
        hidden[4, 1] = value
    loss, nats = training_loss(hidden, weight, targets, scale=1.0, chunk_rows=4)
    loss.backward()
    assert loss.isnan() and weight.grad.isnan().any()
    assert nats[4].isnan() and nats.isnan().sum() == 1
    assert hidden.grad[4].isnan().all() and not hidden.grad[:4].isnan().any()


# 131 columns are padded to 192: nobody outside may be given one of those.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_in_the_padding_is_refused(dtype: torch.dtype) -> None:
    hidden, weight, targets = _case(dtype=dtype)
    targets[5] = 150
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        training_loss(hidden, weight, targets, scale=1.0, chunk_rows=32)


# One rounding to the dtype's mantissa at each of logits, their gradients and the products.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_16_bit_errs_by_its_products_only(dtype: torch.dtype, bound: float) -> None:
    hidden, weight, targets = _case(dtype=dtype)
    loss, nats = training_loss(hidden, weight, targets, scale=1 / 70, chunk_rows=32)
    loss.backward()
    assert hidden.grad.dtype == dtype and weight.grad.dtype == torch.float32
    expected = _reference(hidden, weight, targets, scale=1 / 70)
    for found, wanted in zip(
        (loss.detach(), nats, hidden.grad, weight.grad), expected, strict=True
    ):
        assert _relative_error(found, wanted) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_nats_are_those_of_the_training_loss(dtype: torch.dtype) -> None:
    hidden, weight, targets = _case(dtype=dtype)
    targets[-1] = -1
    _, nats = training_loss(hidden, weight, targets, scale=0.5, chunk_rows=32)
    assert torch.equal(token_nats(hidden, weight, targets, chunk_rows=32), nats)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_input_gives_the_same_bits(dtype: torch.dtype) -> None:
    results = []
    for _ in range(2):
        hidden, weight, targets = _case(dtype=dtype)
        loss, nats = training_loss(hidden, weight, targets, scale=0.3, chunk_rows=17)
        loss.backward()
        results.append((loss.detach(), nats, hidden.grad, weight.grad))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_head_has_no_gradient_and_changes_no_other_bit(dtype: torch.dtype) -> None:
    (hidden, weight, targets), (other, frozen, _) = _case(dtype=dtype), _case(dtype=dtype)
    frozen.requires_grad_(False)
    loss, nats = training_loss(hidden, weight, targets, scale=0.1, chunk_rows=32)
    same_loss, same_nats = training_loss(other, frozen, targets, scale=0.1, chunk_rows=32)
    loss.backward()
    same_loss.backward()
    assert torch.equal(loss, same_loss) and torch.equal(nats, same_nats)
    assert torch.equal(hidden.grad, other.grad)
    assert frozen.grad is None


def test_all_rows_ignored_cost_nothing() -> None:
    hidden, weight, targets = _case(rows=4)
    loss, _ = training_loss(hidden, weight, targets.fill_(-1), scale=1.0, chunk_rows=4)
    loss.backward()
    assert loss == 0 and hidden.grad.eq(0).all() and weight.grad.eq(0).all()


def test_gradients_add_up_over_calls_and_reach_a_tied_embedding() -> None:
    _, weight, targets = _case()
    # Small, so that no probability is nearly 1, whose gradient has few digits in float32.
    weight = (weight.detach() * 0.3).requires_grad_()
    hidden = F.embedding(targets, weight)
    total = torch.zeros(())
    for half in (slice(0, 35), slice(35, 70)):
        part, _ = training_loss(hidden[half], weight, targets[half], scale=1 / 70, chunk_rows=16)
        total = total + part
    total.backward()
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(F.embedding(targets, exact) @ exact.T, targets).backward()
    assert _relative_error(weight.grad, exact.grad) < 1e-6


class _LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_more_than_one_chunk_never_exist(dtype: torch.dtype) -> None:
    hidden, weight, targets = _case(rows=512, vocab=1000, dtype=dtype)
    with _LargestTensor() as largest:
        loss, _ = training_loss(hidden, weight, targets, scale=1.0, chunk_rows=32)
        loss.backward()
    assert largest.num_elements <= 32 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
def test_on_a_gpu_without_waiting_for_it(dtype: torch.dtype, bound: float) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    hidden, weight, targets = _case(dtype=dtype)
    expected = _reference(hidden, weight, targets, scale=1 / 70)
    hidden = hidden.detach().cuda().requires_grad_()
    weight, targets = weight.detach().cuda().requires_grad_(), targets.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, nats = training_loss(hidden, weight, targets, scale=1 / 70, chunk_rows=32)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for found, wanted in zip(
        (loss.detach(), nats, hidden.grad, weight.grad), expected, strict=True
    ):
        assert _relative_error(found.cpu(), wanted) < bound
