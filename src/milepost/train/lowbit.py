"""8-bit AdamW (Dettmers et al. 2022) of torchao, and its moments as tensors a file can hold.

A moment of 4096 or more numbers, a multiple of 256 of them, is a code of 8 bits for each, a
float32 scale for every 256, and the map of the 256 codes; smaller ones stay float32. torchao
keeps the three in a subclass of a tensor, which no file holds: they are saved one by one and put
together again, to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from milepost.config.schema import OptimizerSection
from milepost.train.code_table import CodeTable, make_table
from milepost.train.installed import check_optimizer, quiet_torchao

_BLOCK_SIZE = 256
_FEWEST_CODED = 4096
_NUM_CODES = 256
_PARTS = ("codes", "scale", "map")

UPDATE_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Of a tensor, what is updated at once, by kind of device; multiples of a block. On a CPU a
larger piece is no faster; on a GPU each takes the launches of thirty kernels."""


def build_adamw8bit(
    groups: list[dict[str, Any]], *, config: OptimizerSection
) -> torch.optim.Optimizer:
    """torchao's optimizer with an update of ours, which has the bits of torchao's.

    torchao compiles its own for every shape anew, which takes minutes at each start on a CPU and
    a compiler that may not be there; and where the loop's block is compiled, compiling anything
    for a second shape is refused. As it stands, not compiled, it is several times slower than
    this one (see `code_table`).

    Args:
        groups: of parameters, with their weight decay.
        config: the optimizer's own section.

    Raises:
        UsageError: torchao is not installed.
    """
    check_optimizer(config)
    with quiet_torchao():
        from torchao.optim import AdamW8bit

    class Uncompiled(AdamW8bit):
        """torchao's states, updated below."""

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            assert closure is None
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    state = self.state[parameter]
                    if not state:
                        state["step"] = torch.tensor(0.0)
                        state["exp_avg"] = self._new_buffer(parameter, True)
                        state["exp_avg_sq"] = self._new_buffer(parameter, False)
                    _update(parameter, state=state, group=group)
            return None

    return Uncompiled(
        groups,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        block_size=_BLOCK_SIZE,
    )


def _update(parameter: torch.Tensor, *, state: dict[str, Any], group: dict[str, Any]) -> None:
    """AdamW in float32, in place; each operation is torchao's, so that its bits are.

    A piece at a time: each number has an update of its own and every 256 a scale of their own, so
    pieces move no bit, and what is float32 for a moment stays small beside a table of 10^8.
    """
    gradient = parameter.grad
    assert gradient is not None
    state["step"] += 1
    moments = [state[name] for name in ("exp_avg", "exp_avg_sq")]
    if is_of_codes(moments[0]) and "tables" not in state:  # a look at the map waits for the GPU
        state["tables"] = [make_table(moment.qmap) for moment in moments]
    tables = state.get("tables", (None, None))
    weights, gradient = parameter.view(-1), gradient.reshape(-1)
    num_at_once = UPDATE_NUMBERS[weights.device.type]
    for start in range(0, weights.numel(), num_at_once):
        piece = slice(start, start + num_at_once)
        parts = [_piece_of(moment, piece) for moment in moments]
        values = _update_piece(
            weights[piece], gradient[piece], moments=parts, state=state, group=group
        )
        for part, value, table in zip(parts, values, tables, strict=True):
            _keep(value, held=part, table=table)


def _update_piece(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    *,
    moments: list[torch.Tensor],
    state: dict[str, Any],
    group: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Changes the weights; returns both new moments, in float32."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    mean_correction, square_correction = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
    mean = moments[0].float().lerp(gradient, 1 - beta1)
    square = moments[1].float().lerp(gradient.square(), 1 - beta2)
    decayed = weights - lr * group["weight_decay"] * weights
    root = (square.sqrt() / square_correction.sqrt()) + group["eps"]
    weights.copy_(decayed - lr * (mean / mean_correction) / root)
    return mean, square


def _piece_of(held: Any, piece: slice) -> Any:
    """Some numbers of a moment, of codes whole blocks, in the same memory."""
    if not is_of_codes(held):
        return held.view(-1)[piece]
    blocks = slice(piece.start // _BLOCK_SIZE, piece.stop // _BLOCK_SIZE)
    codes, scale = held.codes.view(-1)[piece], held.scale[blocks]
    return type(held)(codes, scale, held.qmap, held.signed, dtype=held.dtype)


def _keep(value: torch.Tensor, *, held: Any, table: CodeTable | None) -> None:
    """Puts a moment back as it is held: in codes, each a part of its block's largest, or whole."""
    if table is None:
        held.copy_(value)
        return
    blocks = value.view(-1, _BLOCK_SIZE)
    scale = blocks.abs().amax(-1).clip(1e-12)  # torchao's, so that no block is divided by 0
    held.codes.copy_(table.look_up(blocks / scale.view(-1, 1)).view(-1))
    held.scale.copy_(scale)


def is_coded(num_elements: int) -> bool:
    """Whether a moment of so many numbers is held in 8 bits; torchao's own rule."""
    return num_elements >= _FEWEST_CODED and num_elements % _BLOCK_SIZE == 0


def code_bytes(num_elements: int) -> int:
    """Bytes of a moment of so many numbers that is held in 8 bits."""
    return num_elements + 4 * (num_elements // _BLOCK_SIZE) + 4 * _NUM_CODES


def code_tensors(tensor: torch.Tensor, *, moment: str, name: str) -> dict[str, torch.Tensor]:
    """What a moment of 8 bits consists of, by the names it is saved under; nothing is copied.

    Args:
        tensor: torchao's.
        moment: "exp_avg" or "exp_avg_sq".
        name: of the parameter.

    Returns:
        "MOMENT_codes.NAME" uint8 in the parameter's shape, "MOMENT_scale.NAME" float32
        [elements / 256] and "MOMENT_map.NAME" float32 [256].
    """
    parts = (tensor.codes, tensor.scale, tensor.qmap)  # type: ignore[attr-defined]
    names = (f"{moment}_{part}.{name}" for part in _PARTS)
    return dict(zip(names, parts, strict=True))


def is_of_codes(tensor: torch.Tensor) -> bool:
    """Whether a moment is torchao's tensor of codes."""
    return type(tensor) is not torch.Tensor


def encode(tensor: torch.Tensor, *, moment: str) -> torch.Tensor:
    """A float32 moment in codes of 8 bits, rounded as torchao rounds it after an update."""
    from torchao.optim.subclass_8bit import OptimState8bit

    coded = OptimState8bit.zeros(
        tensor.shape, moment == "exp_avg", _BLOCK_SIZE, tensor.device, dtype=torch.float32
    )
    coded.copy_(tensor)
    return coded


def decode(tensor: torch.Tensor) -> torch.Tensor:
    """A moment of codes as float32."""
    return tensor.dequantize().view(tensor.shape)


def take_codes(
    left: dict[str, torch.Tensor], *, moment: str, name: str, parameter: torch.Tensor
) -> torch.Tensor | None:
    """Takes what `code_tensors` gave out of `left` and puts it together again.

    Returns:
        A copy on the parameter's device, as torchao has it; None where a tensor is missing, or
        not of its shape or type.
    """
    shapes = (parameter.shape, (parameter.numel() // _BLOCK_SIZE,), (_NUM_CODES,))
    dtypes = (torch.uint8, torch.float32, torch.float32)
    parts = []
    for part, shape, dtype in zip(_PARTS, shapes, dtypes, strict=True):
        found = left.pop(f"{moment}_{part}.{name}", None)
        if found is None or found.shape != shape or found.dtype != dtype:
            return None
        parts.append(found.to(parameter.device, copy=True))
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit(*parts, moment == "exp_avg", dtype=torch.float32)
