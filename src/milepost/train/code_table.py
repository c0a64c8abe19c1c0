"""The 8-bit code of a number by two looks into a table, in place of torchao's eight.

torchao finds a code by binary search, eight passes over a tensor with an index of 8 bytes for
each number: on a CPU that took nine tenths of an update. Codes grow with the number, and so few
numbers share their upper 16 bits that one border at most lies between them, so a code is the
first one of those bits, or the next. The tables are made by torchao's own search, and the codes
are equal to the last one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

_NUM_UPPER = 1 << 16


@dataclass(frozen=True)
class CodeTable:
    """What the upper 16 bits of a float32 say about its code.

    Attributes:
        codes: uint8 [65536], the lowest code of numbers with these bits.
        borders: float32 [65536], the least of them that has the next code; infinite where all
            have the same.
    """

    codes: torch.Tensor
    borders: torch.Tensor

    def look_up(self, numbers: torch.Tensor) -> torch.Tensor:
        """The codes of numbers, uint8 in their shape.

        Args:
            numbers: float32, each -1 to 1, on the device of the table.
        """
        flat = numbers.reshape(-1)
        upper = flat.view(torch.int32).bitwise_right_shift(16).bitwise_and_(_NUM_UPPER - 1)
        is_next = flat >= self.borders.index_select(0, upper)
        return (self.codes.index_select(0, upper) + is_next).view(numbers.shape)


def make_table(qmap: torch.Tensor) -> CodeTable:
    """The table of a map, on its device; made once for each.

    Args:
        qmap: float32 [256], the number of each code, ascending.
    """
    return _make_table(qmap.cpu().numpy().tobytes(), qmap.device)


@functools.lru_cache(maxsize=8)
def _make_table(map_bytes: bytes, device: torch.device) -> CodeTable:
    from torchao.optim.quant_utils import quantize_8bit_with_qmap

    qmap = torch.from_numpy(np.frombuffer(map_bytes, dtype=np.float32).copy())

    def codes_of(bits: np.ndarray) -> np.ndarray:
        numbers = torch.from_numpy(bits.astype(np.uint32).view(np.float32))
        codes: np.ndarray = quantize_8bit_with_qmap(numbers, qmap).numpy()
        return codes.astype(np.int64)

    # The two ends of all numbers with the same upper bits; they meet where the code changes.
    first = np.arange(_NUM_UPPER, dtype=np.int64) << 16
    last = first + _NUM_UPPER - 1
    at_first, at_last = codes_of(first), codes_of(last)
    (changing,) = (np.isfinite(_floats(first)) & (at_first != at_last)).nonzero()
    assert (np.abs(at_first - at_last)[changing] == 1).all(), "two borders between neighbors"
    left, right = first[changing], last[changing]
    while (right - left > 1).any():
        middle = (left + right) // 2
        is_left = codes_of(middle) == at_first[changing]
        left, right = np.where(is_left, middle, left), np.where(is_left, right, middle)
    borders = np.full(_NUM_UPPER, np.inf, dtype=np.float32)
    # Of a negative number larger bits mean a smaller one.
    borders[changing] = np.maximum(_floats(left), _floats(right))
    codes = np.minimum(at_first, at_last).astype(np.uint8)
    return CodeTable(torch.from_numpy(codes).to(device), torch.from_numpy(borders).to(device))


def _floats(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint32).view(np.float32)
