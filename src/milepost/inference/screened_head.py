"""The likeliest token without the whole head: an 8-bit copy says where it can be.

Reading the head is most of what a small model does for a token. The copy is a quarter of it
(half in 16 bits), its error has a bound, and only blocks of rows that can hold the largest
logit by that bound are computed with the weights themselves. So the token is the model's own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from milepost.core.errors import DivergedError
from milepost.inference.sampling import likeliest_tokens

_BLOCK = 32
"""Rows of the head that are computed together; comparing each alone would take longer than the
product. They are as far apart as can be, since a maximum over columns is the fast one."""

_ROUNDING = 2.0**-8
"""Half a unit in the last place of bfloat16, relative, and as much again for the sums."""

_LARGEST_SHARE = 0.5
"""Of all blocks: where more can hold the largest logit, the head is computed as a whole."""


class ScreenedHead:
    """Finds the largest logit of each row; on the CPU."""

    def __init__(self, weight_VD: Tensor) -> None:
        """Makes the 8-bit copy.

        Args:
            weight_VD: of the head, finite, in the compute dtype.
        """
        wide_VD = weight_VD.float()
        scales_V = (wide_VD.abs().amax(dim=1) / 127).clamp(min=1e-30).bfloat16()
        rounded_VD = (wide_VD / scales_V.float()[:, None]).round().clamp(-127, 127)
        copied_VD = rounded_VD * scales_V.float()[:, None]
        self._weight_VD = weight_VD
        self._error = float((wide_VD - copied_VD).norm(dim=1).max())
        self._largest_norm = float(copied_VD.norm(dim=1).max())
        self._num_blocks = -(-len(weight_VD) // _BLOCK)
        padding = self._num_blocks * _BLOCK - len(weight_VD)
        self._copy_VD = F.pad(rounded_VD.to(torch.int8), (0, 0, 0, padding))
        self._scales_V = F.pad(scales_V, (0, padding))
        self._starts = torch.arange(0, _BLOCK * self._num_blocks, self._num_blocks)[:, None]

    @classmethod
    def of(cls, weight_VD: Tensor) -> ScreenedHead | None:
        """A screened head, None where this machine's torch cannot do it or not within the bound.

        Args:
            weight_VD: of the head in the compute dtype.
        """
        if weight_VD.device.type != "cpu" or not bool(weight_VD.isfinite().all()):
            return None
        head = cls(weight_VD)
        generator = torch.Generator().manual_seed(0)
        hidden_BD = torch.randn(4, weight_VD.shape[1], generator=generator).to(weight_VD.dtype)
        try:
            about_BV = head._about(hidden_BD)[:, : len(weight_VD)]
        except (RuntimeError, AttributeError, NotImplementedError):
            return None
        off_BV = (about_BV - F.linear(hidden_BD.float(), weight_VD.float())).abs()
        bound_BV = head._error_of(hidden_BD)[:, None] + _ROUNDING * about_BV.float().abs()
        return head if bool((off_BV <= bound_BV).all()) else None

    def likeliest(self, hidden_BD: Tensor) -> list[int]:
        """The id of the largest logit of each row, of equals the first.

        Args:
            hidden_BD: after the final norm, in the dtype of the weights.

        Raises:
            DivergedError: the logits are not finite.
        """
        about_BV = self._about(hidden_BD)
        largest_BK = about_BV.view(-1, _BLOCK, self._num_blocks).amax(dim=1).float()
        largest_B = largest_BK.amax(dim=1)
        if not bool(largest_B.isfinite().all()):
            raise DivergedError(
                "the model's logits are not finite",
                hint="its weights are damaged or training has diverged; take an earlier step",
            )
        # The largest logit is `least` or more, and no other is above its copy plus the error.
        error_B = self._error_of(hidden_BD)
        least_B = largest_B - _ROUNDING * largest_B.abs() - 2 * error_B
        least_B -= 2 * _ROUNDING * least_B.abs()
        blocks = (largest_BK >= least_B[:, None]).any(dim=0).nonzero()[:, 0]
        if len(blocks) > _LARGEST_SHARE * self._num_blocks:
            return likeliest_tokens(F.linear(hidden_BD, self._weight_VD).float())
        ids = (blocks + self._starts).flatten()  # in ascending order, so that the first wins
        ids = ids[: int(torch.searchsorted(ids, len(self._weight_VD)))]
        logits_BC = F.linear(hidden_BD, self._weight_VD[ids])
        return ids[logits_BC.float().argmax(dim=1)].tolist()

    def _about(self, hidden_BD: Tensor) -> Tensor:
        """Logits [B, V and padding] bfloat16 of the copy."""
        return torch._weight_int8pack_mm(hidden_BD.bfloat16(), self._copy_VD, self._scales_V)

    def _error_of(self, hidden_BD: Tensor) -> Tensor:
        """How far the copy's logits of each row are off at most, before they are rounded.

        w x - c b = (w - c) x + c (x - b) for a row w, its copy c, and x rounded to b; by Cauchy and
        Schwarz neither part is above the product of its norms.
        """
        wide_BD = hidden_BD.float()
        rounded_BD = hidden_BD.bfloat16().float()
        return self._error * wide_BD.norm(dim=1) + self._largest_norm * (wide_BD - rounded_BD).norm(
            dim=1
        )
