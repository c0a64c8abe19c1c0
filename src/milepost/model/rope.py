"""Rotary positions (Su et al. 2021) in Hugging Face's layout: dimension i turns with i + H/2.

Tables and rotation are float32 whatever the compute dtype: bfloat16 has 8 bits of mantissa,
too few for an angle at position 2000.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(*, head_dim: int, num_positions: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position.

    Args:
        head_dim: head size H, even.
        num_positions: positions 0 to num_positions - 1.
        theta: base of the frequencies.

    Returns:
        (cos, sin), each [num_positions, H/2] float32.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (theta**exponents)
    angles = torch.outer(torch.arange(num_positions).float(), frequencies)
    return angles.cos(), angles.sin()


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (i, i + H/2) of a head by its position's angles.

    Args:
        heads: queries or keys [B, heads, T, H], compute dtype.
        cos: [T, H/2] or [B, 1, T, H/2] float32.
        sin: as `cos`.

    Returns:
        [B, heads, T, H] in the dtype of `heads`.
    """
    first, second = heads.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(heads.dtype)
