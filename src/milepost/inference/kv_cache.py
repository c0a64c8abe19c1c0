"""Keys and values of all layers, for rows of different length that grow side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from milepost.config.schema import ModelSection


class KVCache:
    """What attention needs of earlier positions, so that each token is computed once.

    Row b holds `lengths_B[b]` tokens at positions 0 to lengths_B[b] - 1. What lies beyond (the
    padding of a prefill) is masked and later overwritten, so prompts are padded on the right.

    Attributes:
        lengths_B: int64, tokens of each row so far.
        capacity: most tokens of a row.
    """

    def __init__(
        self,
        config: ModelSection,
        *,
        num_rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_rows, config.num_key_value_heads, capacity, config.head_dim)
        self.capacity = capacity
        self.lengths_B = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._layers = [
            _LayerKVCache(self, shape, dtype=dtype, device=device)
            for _ in range(config.num_hidden_layers)
        ]
        self._lengths = [
            0
        ] * num_rows  # lengths_B on the host, so that nothing waits for the device
        self._num_new = 0
        self.positions_BT = torch.zeros(num_rows, 0, dtype=torch.int64, device=device)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was stored before the forward pass that runs now."""
        return max(self._lengths) == 0

    @property
    def is_even(self) -> bool:
        """Whether all rows have one length."""
        return min(self._lengths) == max(self._lengths)

    @property
    def num_attended(self) -> int:
        """Positions S that the forward pass that runs now may look at."""
        return max(self._lengths) + self._num_new

    def begin(self, num_new: int) -> tuple[Tensor, Tensor | None]:
        """Opens a forward pass of `num_new` tokens a row.

        Returns:
            (positions_BT int64, mask bool [B, 1, T, S]); the mask is None where plain causal
            attention among the new tokens is all there is.
        """
        self._num_new = num_new
        assert self.num_attended <= self.capacity, "the caller bounds the context"
        device = self.lengths_B.device
        self.positions_BT = self.lengths_B[:, None] + torch.arange(num_new, device=device)
        if self.is_empty:
            return self.positions_BT, None
        stored_S = torch.arange(self.num_attended, device=device)
        return self.positions_BT, stored_S <= self.positions_BT[:, None, :, None]

    def begin_step(self) -> tuple[Tensor, Tensor | None]:
        """Opens a forward pass of one token a row, which the layers take with `extend_step`.

        Returns:
            (positions_B int64, mask bool [B, 1, 1, S]); the mask is None where all rows have one
            length, so that all there is may be attended to.
        """
        self._num_new = 1
        assert self.num_attended <= self.capacity, "the caller bounds the context"
        self.positions_BT = self.lengths_B[:, None]
        if self.is_even:
            return self.lengths_B, None
        stored_S = torch.arange(self.num_attended, device=self.lengths_B.device)
        return self.lengths_B, (stored_S <= self.positions_BT)[:, None, None]

    def layer(self, index: int) -> _LayerKVCache:
        """The part of one layer."""
        return self._layers[index]

    def finish(self) -> None:
        """Closes a forward pass: every layer holds its new tokens."""
        self.lengths_B += self._num_new
        self._lengths = [length + self._num_new for length in self._lengths]

    def cut(self, lengths: list[int]) -> None:
        """Forgets what lies beyond each row's length, such as the padding of a prefill."""
        self.lengths_B = torch.tensor(lengths, dtype=torch.int64, device=self.lengths_B.device)
        self._lengths = list(lengths)

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these, in this order."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.lengths_B.device)
        self.lengths_B = self.lengths_B[index]
        self._lengths = [self._lengths[row] for row in rows]
        for layer in self._layers:
            layer.keep(index)


class _LayerKVCache:
    """Keys and values [B, G, capacity, H] of one layer, keys already rotated."""

    def __init__(
        self,
        owner: KVCache,
        shape: tuple[int, int, int, int],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self._owner = owner
        # Zeros, not empty: what is masked still takes part as 0 x value, and 0 x NaN is NaN.
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new [B, G, T, H]; returns all there are to attend to, [B, G, S, H]."""
        end = self._owner.num_attended
        if self._owner.is_empty:
            self._keys[:, :, :end] = keys
            self._values[:, :, :end] = values
            return keys, values
        positions_BT = self._owner.positions_BT
        rows_B1 = torch.arange(positions_BT.shape[0], device=positions_BT.device)[:, None]
        self._keys[rows_B1, :, positions_BT] = keys.transpose(1, 2)
        self._values[rows_B1, :, positions_BT] = values.transpose(1, 2)
        return self._keys[:, :, :end], self._values[:, :, :end]

    def extend_step(self, keys_BGH: Tensor, values_BGH: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one new token a row; returns all there are to attend to, [B, G, S, H]."""
        end = self._owner.num_attended
        if self._owner.is_even:
            self._keys[:, :, end - 1] = keys_BGH
            self._values[:, :, end - 1] = values_BGH
        else:
            rows_B = torch.arange(len(keys_BGH), device=keys_BGH.device)
            self._keys[rows_B, :, self._owner.lengths_B] = keys_BGH
            self._values[rows_B, :, self._owner.lengths_B] = values_BGH
        return self._keys[:, :, :end], self._values[:, :, :end]

    def keep(self, index: Tensor) -> None:
        self._keys = self._keys[index]
        self._values = self._values[index]
