"""8-bit AdamW (Dettmers et al. 2022) of torchao, and its moments as tensors a file can hold.

A moment of 4096 or more numbers, a multiple of 256 of them, is a code of 8 bits for each, a
float32 scale for every 256, and the map of the 256 codes; smaller ones stay float32. torchao
keeps the three in a subclass of a tensor, which no file holds: they are saved one by one and put
together again, to the same bits.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from milepost.config.schema import OptimizerSection
from milepost.train.installed import check_optimizer

_BLOCK_SIZE = 256
_FEWEST_CODED = 4096
_NUM_CODES = 256
_PARTS = ("codes", "scale", "map")


def build_adamw8bit(
    groups: list[dict[str, Any]], *, config: OptimizerSection
) -> torch.optim.Optimizer:
    """torchao's optimizer; its update runs as it stands, not compiled.

    Args:
        groups: of parameters, with their weight decay.
        config: the optimizer's own section.

    Raises:
        UsageError: torchao is not installed.
    """
    check_optimizer(config)
    with _quiet():
        from torchao.optim import AdamW8bit

    class Uncompiled(AdamW8bit):
        """The update as it stands.

        torchao compiles it for every shape anew, which takes minutes at each start on a CPU and
        a compiler that may not be there; and where the loop's block is compiled, compiling
        anything for a second shape is refused.
        """

        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    return Uncompiled(
        groups,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        block_size=_BLOCK_SIZE,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torchao's talk of kernels that it does not find, and does not need here, to itself."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


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
