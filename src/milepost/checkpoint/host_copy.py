"""The copy of a train state in the host's memory that is written while training goes on."""

from __future__ import annotations

from dataclasses import replace

import torch

from milepost.checkpoint.state import TrainState
from milepost.core.errors import MilepostError
from milepost.core.units import format_bytes

_ALIGNMENT = torch.float32.itemsize
"""Each tensor begins at a multiple of it, in bytes: codes of 8 bits come by the 256."""


class HostCopy:
    """One buffer on the host, taken once and filled anew by every save.

    Of a GPU's state the buffer is page-locked, so that the copy runs at the speed of the bus. It
    is registered as a whole: memory that torch hands out page-locked is rounded up to powers of
    two for each tensor, 27.5 in place of 19.2 GiB for a model of 1.7 B parameters.

    Args:
        num_bytes: of the largest state that will be copied.
        device: where the states lie.

    Raises:
        MilepostError: the host has no room for it.
    """

    def __init__(self, num_bytes: int, *, device: torch.device) -> None:
        self._device = device
        self._is_locked = device.type == "cuda"
        try:
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8)
            if self._is_locked:
                address = self._buffer.data_ptr()
                status = torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0)
                torch.cuda.check_error(status)
        except RuntimeError as error:
            raise MilepostError(
                "no room in the host's memory for a copy of the train state, "
                f"{format_bytes(num_bytes)}",
                hint="milepost plan says what a run needs; end what else runs on the machine",
            ) from error

    def fill(self, state: TrainState) -> TrainState:
        """Copies every tensor of `state`; waits until all are there.

        Returns:
            The same state in the buffer, which shares no memory with `state`. The next call
            writes over it.
        """
        free = self._buffer
        copies: list[dict[str, torch.Tensor]] = []
        for tensors in (state.weights, state.moments):
            copied = {}
            for name, tensor in tensors.items():
                assert tensor.nbytes % _ALIGNMENT == 0 and tensor.nbytes <= free.nbytes, name
                copied[name] = free[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                copied[name].copy_(tensor, non_blocking=self._is_locked)
                free = free[tensor.nbytes :]
            copies.append(copied)
        if self._is_locked:
            torch.cuda.synchronize(self._device)
        weights, moments = copies
        return replace(state, weights=weights, moments=moments)

    def unlock(self) -> None:
        """Gives back the page-locking, before the buffer's memory may go; no `fill` after it."""
        if self._is_locked:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr()))
            self._is_locked = False
