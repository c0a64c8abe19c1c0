"""What a model says about the tokens of prompts: the scores that harnesses ask for with `echo`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from milepost.core.errors import DivergedError
from milepost.model.llama import Llama

_POSITIONS_AT_ONCE = 256
"""Rows of logits that exist at once: 50 MB of a vocabulary of 50,000."""


@dataclass(frozen=True)
class ScoredToken:
    """A token where it stands.

    Attributes:
        token_id: the token.
        log_probability: natural logarithm; None for the first, before which nothing stands.
        likeliest: (token id, log probability) of the likeliest there, the likeliest first.
    """

    token_id: int
    log_probability: float | None
    likeliest: tuple[tuple[int, float], ...]


@torch.no_grad()
def score_prompts(
    model: Llama,
    prompts_ids: Sequence[Sequence[int]],
    *,
    num_likeliest: int,
    vocab_size: int,
    compute_dtype: torch.dtype,
) -> list[list[ScoredToken]]:
    """The log probability of each token of each prompt, given those before it.

    Args:
        model: on any device.
        prompts_ids: not empty, no longer than the model's context; one batch.
        num_likeliest: how many of the likeliest tokens are named at each place.
        vocab_size: of the tokenizer; ids beyond it pad the model's vocabulary.
        compute_dtype: of the forward pass; logits and softmax are float32.

    Raises:
        DivergedError: the logits are not finite.
    """
    device = model.head_weight.device
    longest = max(len(ids) for ids in prompts_ids)
    padded = [[*ids, *[0] * (longest - len(ids))] for ids in prompts_ids]
    hidden_BTD = model(torch.tensor(padded, device=device), compute_dtype=compute_dtype)
    weight_VD = model.head_weight[:vocab_size].to(compute_dtype)
    scored = []
    for ids, hidden_TD in zip(prompts_ids, hidden_BTD, strict=True):
        tokens = [ScoredToken(ids[0], None, ())]
        for start in range(0, len(ids) - 1, _POSITIONS_AT_ONCE):
            targets = ids[start + 1 : start + 1 + _POSITIONS_AT_ONCE]
            logits_CV = F.linear(hidden_TD[start : start + len(targets)], weight_VD).float()
            tokens += _score(logits_CV, targets, num_likeliest=num_likeliest)
        scored.append(tokens)
    return scored


def _score(
    logits_CV: torch.Tensor, targets: Sequence[int], *, num_likeliest: int
) -> list[ScoredToken]:
    log_probabilities_CV = torch.log_softmax(logits_CV, dim=1)
    targets_C1 = torch.tensor([targets], device=logits_CV.device).T
    own_C = log_probabilities_CV.gather(1, targets_C1)[:, 0]
    if not torch.isfinite(own_C).all():
        raise DivergedError("the model's logits are not finite")
    values_CK, ids_CK = log_probabilities_CV.topk(min(num_likeliest, logits_CV.shape[1]), dim=1)
    return [
        ScoredToken(token_id, own, tuple(zip(ids, values, strict=True)))
        for token_id, own, ids, values in zip(
            targets, own_C.tolist(), ids_CK.tolist(), values_CK.tolist(), strict=True
        )
    ]
