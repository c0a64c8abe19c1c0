"""Gradient sums in lanes: the same bits on any number of ranks (docs/architecture.md, D6).

All gradients of a rank lie in one flat float32 buffer, of which every `parameter.grad` is a
view. The microbatches of a lane are added in order by autograd; lanes are added in a binary
tree, whose upper levels run across ranks.
"""

from __future__ import annotations

import torch
from torch import nn

from milepost.distributed.reduce import sum_over_ranks
from milepost.distributed.world import World


class LaneGradients:
    """The flat gradient buffers of one rank.

    With L lanes on W ranks a rank holds L / W lanes and at most log2(L / W) + 1 buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._num_elements = sum(p.numel() for p in self._parameters)
        self._device = self._parameters[0].device
        self._free: list[torch.Tensor] = []
        self._summed: list[tuple[int, torch.Tensor]] = []
        self._current: torch.Tensor | None = None

    def begin_lane(self) -> None:
        """Points every gradient into a zeroed buffer; the next backward passes add to it."""
        buffer = self._free.pop() if self._free else self._new_buffer()
        buffer.zero_()
        self._current = buffer
        offset = 0
        for parameter in self._parameters:
            view = buffer[offset : offset + parameter.numel()]
            parameter.grad = view.view_as(parameter)
            offset += parameter.numel()

    def end_lane(self) -> None:
        """Adds the finished lane into the tree: two sums of one level make one of the next."""
        if self._current is None:
            raise AssertionError("end_lane without begin_lane")
        level, buffer = 0, self._current
        self._current = None
        while self._summed and self._summed[-1][0] == level:
            _, left = self._summed.pop()
            left.add_(buffer)
            self._free.append(buffer)
            level, buffer = level + 1, left
        self._summed.append((level, buffer))

    def sum_all(self, *, world: World) -> torch.Tensor:
        """Sums over all lanes of all ranks; gradients then point into the result.

        Every rank must call. Returns the flat buffer [elements], float32, to be clipped in place.
        """
        if len(self._summed) != 1:
            raise AssertionError("the lanes of a rank are a power of two")
        _, buffer = self._summed.pop()
        sum_over_ranks(buffer, world=world)
        offset = 0
        for parameter in self._parameters:
            view = buffer[offset : offset + parameter.numel()]
            parameter.grad = view.view_as(parameter)
            offset += parameter.numel()
        self._free.append(buffer)
        return buffer

    def _new_buffer(self) -> torch.Tensor:
        return torch.empty(self._num_elements, dtype=torch.float32, device=self._device)
