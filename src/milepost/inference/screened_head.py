"""The likeliest token without the whole head: an 8-bit copy says where it can be.

Reading the head is most of what a small model does for a token. The copy is a quarter of it
(half in 16 bits) and is multiplied in integers, hidden states rounded to 8 bits as well; the
error has a bound, and only rows that can have the largest logit by that bound are multiplied with
the weights themselves. So the token is the model's own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from milepost.inference.sampling import likeliest_tokens

_BLOCK = 32
"""Rows of the head that are looked at together before each alone, which would take long. They
are as far apart as can be, since a maximum over columns is the fast one."""

_FEWEST_ROWS = 4
"""Fewer hidden states are padded: with 50,257 rows the product takes 1.4 ms for 4, 1.9 for 1."""

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
        scales_V = (wide_VD.abs().amax(dim=1) / 127).clamp(min=1e-30)
        rounded_VD = (wide_VD / scales_V[:, None]).round()
        copied_VD = rounded_VD * scales_V[:, None]
        self._weight_VD = weight_VD
        self._error = float((wide_VD - copied_VD).norm(dim=1).max())
        self._largest_norm = float(copied_VD.norm(dim=1).max())
        self._num_blocks = -(-len(weight_VD) // _BLOCK)
        padding = self._num_blocks * _BLOCK - len(weight_VD)
        copy_VD = F.pad(rounded_VD.to(torch.int8), (0, 0, 0, padding))
        self._copy = torch.ops.onednn.qlinear_prepack(copy_VD, None)
        self._scales_V = F.pad(scales_V, (0, padding))
        self._zeros_V = torch.zeros(len(copy_VD), dtype=torch.int64)

    @classmethod
    def of(cls, weight_VD: Tensor) -> ScreenedHead | None:
        """A screened head, None where this machine's torch cannot do it or not within the bound.

        Args:
            weight_VD: of the head in the compute dtype.
        """
        if weight_VD.device.type != "cpu" or not bool(weight_VD.isfinite().all()):
            return None
        hidden_BD = _trial(weight_VD)
        try:
            if not torch.cpu._is_vnni_supported():
                return None  # sums of 16 bits that overflow, or slow ones
            head = cls(weight_VD)
            about_BV, error_B = head._about(hidden_BD)
        except (RuntimeError, AttributeError, NotImplementedError):
            return None
        about_BV = about_BV[:, : len(weight_VD)]
        off_BV = (about_BV - F.linear(hidden_BD.float(), weight_VD.float())).abs()
        bound_BV = error_B[:, None] + _ROUNDING * about_BV.abs()
        return head if bool((off_BV <= bound_BV).all()) else None

    def likeliest(self, hidden_BD: Tensor) -> list[int]:
        """The id of the largest logit of each row, of equals the first.

        Args:
            hidden_BD: after the final norm, in the dtype of the weights.

        Raises:
            DivergedError: the logits are not finite.
        """
        about_BV, error_B = self._about(hidden_BD)
        largest_BK = about_BV.view(-1, _BLOCK, self._num_blocks).amax(dim=1)
        largest_B = largest_BK.amax(dim=1)
        # The largest logit is `least` or more, and no other is above its copy plus the error.
        least_B = largest_B - _ROUNDING * largest_B.abs() - 2 * error_B
        least_B -= 2 * _ROUNDING * least_B.abs()
        blocks = (largest_BK >= least_B[:, None]).any(dim=0).nonzero()[:, 0]
        is_bounded = bool(error_B.isfinite().all())
        if not is_bounded or len(blocks) > _LARGEST_SHARE * self._num_blocks:
            return likeliest_tokens(F.linear(hidden_BD, self._weight_VD).float())
        ids = self._ids_from(least_B, about_BV, blocks)
        logits_BC = F.linear(hidden_BD, self._weight_VD[ids]).float()
        return ids[likeliest_tokens(logits_BC)].tolist()

    def _ids_from(self, least_B: Tensor, about_BV: Tensor, blocks: Tensor) -> Tensor:
        """Ids in these blocks that are `least_B` or more in any row, ascending: the first wins."""
        about_BRC = about_BV.view(-1, _BLOCK, self._num_blocks)[:, :, blocks]
        is_enough_RC = (about_BRC >= least_B[:, None, None]).any(dim=0)
        places, columns = is_enough_RC.nonzero().unbind(dim=1)
        return places * self._num_blocks + blocks[columns]

    def _about(self, hidden_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, V and padding] float32 of the copy, and how far each row's are off at most.

        w x - c b = (w - c) x + c (x - b) for a row w, its copy c, and x rounded to b; by Cauchy and
        Schwarz neither part is above the product of its norms.
        """
        wide_BD = hidden_BD.float()
        scales_B1 = (wide_BD.abs().amax(dim=1, keepdim=True) / 127).clamp_(min=1e-30)
        rounded_BD = (wide_BD / scales_B1).round_()
        off_BD = wide_BD - rounded_BD * scales_B1
        error_B = self._error * wide_BD.norm(dim=1) + self._largest_norm * off_BD.norm(dim=1)
        # Bytes without a sign, 128 for zero: the product that every machine with it has.
        bytes_BD = rounded_BD.add_(128).to(torch.uint8)
        padding = max(_FEWEST_ROWS - len(bytes_BD), 0)
        about_BV = torch.ops.onednn.qlinear_pointwise(
            F.pad(bytes_BD, (0, 0, 0, padding)), 1.0, 128, self._copy, self._scales_V,
            self._zeros_V, None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        about_BV = about_BV[: len(hidden_BD)].mul_(scales_B1)
        about_BV[:, len(self._weight_VD) :] = -torch.inf  # what pads the copy is never the largest
        return about_BV, error_B


def _trial(weight_VD: Tensor) -> Tensor:
    """Hidden states [B, D] at random, and such that make the largest sums of all."""
    generator = torch.Generator().manual_seed(0)
    random_BD = torch.randn(4, weight_VD.shape[1], generator=generator)
    largest_BD = torch.ones(2, weight_VD.shape[1])
    largest_BD[1] = weight_VD[weight_VD.float().norm(dim=1).argmax()].sign()
    return torch.cat([random_BD, largest_BD, -largest_BD]).to(weight_VD.dtype)
