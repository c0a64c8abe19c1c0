"""From the logits of one position to one token id."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from milepost.core.errors import DivergedError, UsageError

_USUALLY_ENOUGH = 256
"""Tokens that are looked at first where only top_p bounds them."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: most tokens of a completion.
        temperature: divides the logits; 0: the likeliest token, always.
        top_k: only the k likeliest tokens; None: all.
        top_p: only the likeliest tokens that together have this probability; None: all.
    """

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise _out_of_range("max_new_tokens", self.max_new_tokens, "1 or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise _out_of_range("temperature", self.temperature, "0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise _out_of_range("top_k", self.top_k, "1 or more, or nothing for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise _out_of_range("top_p", self.top_p, "above 0 and at most 1")


def likeliest_tokens(logits_BV: Tensor) -> list[int]:
    """The largest logit of each row, of equals the first; see `next_token`."""
    _refuse_not_finite(logits_BV)
    return logits_BV.argmax(dim=1).tolist()


def next_tokens(
    logits_BV: Tensor, *, decoding: Decoding, generators: Sequence[torch.Generator]
) -> list[int]:
    """Chooses a token for each row; see `next_token`."""
    if decoding.temperature == 0:
        return likeliest_tokens(logits_BV)
    return [
        next_token(logits_V, decoding=decoding, generator=generator)
        for logits_V, generator in zip(logits_BV, generators, strict=True)
    ]


def next_token(logits_V: Tensor, *, decoding: Decoding, generator: torch.Generator) -> int:
    """Chooses one token.

    Args:
        logits_V: float32 on the CPU.
        decoding: how; top_k is applied before top_p, as transformers does.
        generator: on the CPU; one number is drawn, none at temperature 0.

    Raises:
        DivergedError: a logit is NaN or infinite.
    """
    _refuse_not_finite(logits_V)
    if decoding.temperature == 0:
        return int(logits_V.argmax())
    # The maximum is taken off first, so that no temperature overflows.
    scaled = (logits_V.double() - logits_V.max()) / decoding.temperature
    probabilities, ids = _most_likely(torch.softmax(scaled, dim=0), decoding)
    cumulative = probabilities.cumsum(dim=0)
    drawn = torch.rand((), dtype=torch.float64, generator=generator) * cumulative[-1]
    place = int(torch.searchsorted(cumulative, drawn, right=True))
    return int(ids[min(place, len(ids) - 1)])


def _refuse_not_finite(logits: Tensor) -> None:
    if not all(extreme.isfinite() for extreme in logits.aminmax()):  # a NaN is both
        raise DivergedError(
            "the model's logits are not finite",
            hint="its weights are damaged or training has diverged; sample an earlier step",
        )


def _most_likely(probabilities_V: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """What top_k and top_p leave: probabilities (not summing to 1) and their token ids."""
    if decoding.top_k is None and decoding.top_p is None:
        return probabilities_V, torch.arange(len(probabilities_V))
    ids = _that_may_be_left(probabilities_V, decoding)
    kept, order = probabilities_V[ids].sort(descending=True, stable=True)
    ids, total = ids[order], probabilities_V.sum()
    if decoding.top_k is not None:
        kept, ids = kept[: decoding.top_k], ids[: decoding.top_k]
        total = kept.sum()
    if decoding.top_p is not None:
        before = kept.cumsum(dim=0) - kept
        num_kept = max(1, int((before < decoding.top_p * total).sum()))
        kept, ids = kept[:num_kept], ids[:num_kept]
    return kept, ids


def _that_may_be_left(probabilities_V: Tensor, decoding: Decoding) -> Tensor:
    """Ids in ascending order, all that top_k and top_p leave among them.

    To sort them all takes longer than all else that sampling does.
    """
    count = min(_USUALLY_ENOUGH if decoding.top_k is None else decoding.top_k, len(probabilities_V))
    least = probabilities_V.topk(count).values[-1]
    is_in_V = probabilities_V >= least
    if decoding.top_k is None:
        assert decoding.top_p is not None
        inside = probabilities_V[is_in_V].sum()
        if inside <= decoding.top_p * probabilities_V.sum():
            return torch.arange(len(probabilities_V))
    return is_in_V.nonzero()[:, 0]


def _out_of_range(name: str, value: float, allowed: str) -> UsageError:
    return UsageError(f"{name} is {value}", hint=f"give {allowed}")
