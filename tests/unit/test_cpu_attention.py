"""The CPU's backward pass of attention: as accurate as torch's, the same bits each time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from milepost.model import cpu_attention
from milepost.model.cpu_attention import attend_causally


def _case(
    *,
    rows: int = 2,
    length: int = 40,
    heads: int = 4,
    groups: int = 2,
    width: int = 16,
    spread: float = 1.0,
) -> list[Tensor]:
    """Queries, keys, values, as projections lay them, and a gradient of what is attended."""
    source = torch.Generator().manual_seed(3)
    query, keys, values, grad = (
        torch.randn(rows, length, n, width, generator=source)
        for n in (heads, groups, groups, heads)
    )
    tensors = (query * spread, keys, values)
    own = [t.bfloat16().transpose(1, 2).requires_grad_() for t in tensors]
    return [*own, grad.bfloat16()]


def _torchs(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        query, keys, values, is_causal=True, enable_gqa=True
    ).transpose(1, 2)


def _gradients(attend, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(attend(*tensors), tensors, grad))


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("length", "heads", "groups", "spread"),
    [
        (2, 4, 2, 1.0),
        (127, 4, 2, 1.0),
        (128, 4, 2, 1.0),
        (129, 4, 2, 1.0),
        (300, 3, 3, 1.0),
        (300, 4, 1, 1.0),
        (300, 4, 2, 20.0),  # scores of +-200: one position takes nearly all
    ],
)
def test_gradients_err_no_more_than_those_of_torch(
    length: int, heads: int, groups: int, spread: float
) -> None:
    *tensors, grad = _case(length=length, heads=heads, groups=groups, spread=spread)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = _gradients(_torchs, exact, grad.double())
    torchs = _gradients(_torchs, tensors, grad)
    for found, other, wanted in zip(
        _gradients(attend_causally, tensors, grad), torchs, expected, strict=True
    ):
        assert found.shape == wanted.shape and found.dtype == torch.bfloat16
        # The same roundings to 8 bits, other draws of them.
        assert _relative_error(found, wanted) < 1.1 * _relative_error(other, wanted)


@pytest.mark.parametrize(("width", "heads", "groups"), [(7, 8, 1), (33, 6, 2), (256, 7, 7)])
def test_heads_of_any_size_and_sharing_err_no_more_either(
    width: int, heads: int, groups: int
) -> None:
    *tensors, grad = _case(length=129, heads=heads, groups=groups, width=width)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = _gradients(_torchs, exact, grad.double())
    torchs = _gradients(_torchs, tensors, grad)
    for found, other, wanted in zip(
        _gradients(attend_causally, tensors, grad), torchs, expected, strict=True
    ):
        assert _relative_error(found, wanted) < 1.1 * _relative_error(other, wanted)


def test_one_position_alone_moves_its_value_only() -> None:
    *tensors, grad = _case(length=1)
    of_query, of_keys, of_values = _gradients(attend_causally, tensors, grad)
    # The probability is 1 whatever the score: rounding of the float32 scores is what is left.
    assert of_query.abs().max() < 1e-5 and of_keys.abs().max() < 1e-5
    pairs = grad.transpose(1, 2).float().unflatten(1, (2, 2)).sum(2)
    torch.testing.assert_close(of_values.float(), pairs, atol=0, rtol=2**-8)


def test_what_is_attended_is_that_of_torch_to_the_bit() -> None:
    *tensors, _ = _case(length=150)
    assert torch.equal(attend_causally(*tensors), _torchs(*tensors))


def test_the_same_input_gives_the_same_bits() -> None:
    *tensors, grad = _case(length=150)
    first, second = (_gradients(attend_causally, tensors, grad) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_row_does_not_depend_on_the_others() -> None:
    *tensors, grad = _case(length=150)
    whole = _gradients(attend_causally, tensors, grad)
    alone = [t.detach()[1:].requires_grad_() for t in tensors]
    for found, of_whole in zip(_gradients(attend_causally, alone, grad[1:]), whole, strict=True):
        assert torch.equal(found, of_whole[1:])


def test_the_operators_keep_what_they_promise_the_compiler() -> None:
    *tensors, grad = _case()
    torch.library.opcheck(cpu_attention._forward, tuple(tensors))
    outputs = cpu_attention._forward(*(t.detach() for t in tensors))
    inputs = tuple(t.detach() for t in tensors)
    torch.library.opcheck(cpu_attention._backward, (grad, *inputs, *outputs))


@pytest.mark.parametrize("needed", [(True, False, False), (False, False, True)])
def test_inputs_that_need_no_gradient_change_no_bit_of_the_others(needed: tuple) -> None:
    *tensors, grad = _case(length=150)  # as beside LoRA on some of the projections
    whole = _gradients(attend_causally, tensors, grad)
    own = [t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
    attend_causally(*own).backward(grad)
    for tensor, of_whole in zip(own, whole, strict=True):
        assert tensor.grad is None or torch.equal(tensor.grad, of_whole)
    assert [tensor.grad is not None for tensor in own] == list(needed)


def test_recomputing_in_the_backward_pass_changes_no_bit() -> None:
    *tensors, grad = _case(length=150)

    def recomputed(*inputs: Tensor) -> Tensor:
        return checkpoint(attend_causally, *inputs, use_reentrant=False)

    first, second = (_gradients(run, tensors, grad) for run in (attend_causally, recomputed))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_gradient_of_the_gradient_is_refused() -> None:
    *tensors, grad = _case()
    slopes = torch.autograd.grad(attend_causally(*tensors), tensors, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        slopes[0].float().sum().backward()


@pytest.mark.long
def test_a_compiled_function_takes_the_operators_whole_with_the_same_bits() -> None:
    *tensors, grad = _case(length=150)
    compiled = torch.compile(attend_causally, fullgraph=True, dynamic=False)
    first, second = (_gradients(run, tensors, grad) for run in (attend_causally, compiled))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
