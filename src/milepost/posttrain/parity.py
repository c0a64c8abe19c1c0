"""Whether an exported model says what the run's own model says: their logits on fixed tokens."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from milepost.config.schema import ModelSection
from milepost.core.errors import CheckpointError
from milepost.model.llama import Llama
from milepost.text.tokenizer import Tokenizer

PASSAGE = (
    "In the year 1842 the road from the harbor to the mill was 17 miles long, and a stone stood "
    'at each of them. "How far is it?" asked the carter; nobody knew, for the numbers had been '
    "cut by three masons who counted from different ends. They were set right (all but two) "
    "after the flood: the county paid $340.50 for it, half of what had been asked."
)
TOKENS_OF_A_ROW = 64
_STRIDE = 7919
"""A prime, so that multiples of it visit a vocabulary from end to end."""

ALLOWED_FRACTION = {"float32": 1e-4, "float16": 0.04, "bfloat16": 0.25}
"""Of the logits' standard deviation, what rounding the weights may cost. Measured: bfloat16
0.004 to 0.006 on models of 29 M parameters, 0.06 on tiny ones with wide weights; float16 a
sixth of that."""

SAME_FRACTION = 1e-4
"""Of the logits' standard deviation, what float32 sums in another order may differ by."""


@dataclass(frozen=True)
class Parity:
    """How far the logits of an export lie from the run's own.

    Attributes:
        largest_difference: of any logit.
        allowed: the most that the dtype may cost.
        spread: standard deviation of the own logits.
        num_tokens: that were compared, each with a logit for every entry of the vocabulary.
        dtype: of the exported weights.
    """

    largest_difference: float
    allowed: float
    spread: float
    num_tokens: int
    dtype: str

    def in_words(self) -> str:
        """The parity line."""
        if self.largest_difference == 0:
            return (
                f"parity: the logits are the model's own, bit for bit, on {self.num_tokens} tokens"
            )
        return (
            f"parity: the logits differ from the model's own by at most "
            f"{self.largest_difference:.3g} on {self.num_tokens} tokens "
            f"({self.dtype} may cost {self.allowed:.3g}; they spread by {self.spread:.3g})"
        )


def fixed_ids(tokenizer: Tokenizer, *, model: ModelSection) -> Tensor:
    """Two rows of token ids [2, T]: a passage of English, and ids from all of the vocabulary."""
    length = min(TOKENS_OF_A_ROW, model.max_position_embeddings)
    text = itertools.cycle([tokenizer.end_of_text_id, *tokenizer.encode(PASSAGE)])
    spread = (number * _STRIDE % model.vocab_size for number in itertools.count(1))
    return torch.tensor([list(itertools.islice(ids, length)) for ids in (text, spread)])


@torch.inference_mode()
def logits_of(model: Llama, ids_BT: Tensor) -> Tensor:
    """The logits [B, T, V] of a model, float32."""
    return F.linear(model(ids_BT), model.head_weight)


def refuse_other_weights(read: Llama, *, expected: Llama) -> None:
    """Holds every weight that was read back to what was to be written, to the last bit.

    The logits of a few tokens say nothing of the rows of other tokens.

    Args:
        read: from the export.
        expected: the model with each weight rounded to its type in the export.

    Raises:
        CheckpointError: names the first weight that is another.
    """
    found = dict(read.named_parameters())
    for name, parameter in expected.named_parameters():
        if not torch.equal(found[name], parameter):
            raise CheckpointError(
                f"the export does not hold what the model holds: {name} was read back with "
                "other values",
                hint="nothing was left behind; check the disk and export once more. If it "
                "happens again, it is a fault of the program: report it",
            )


def judge_parity(own: Tensor, *, rounded: Tensor, exported: Tensor, dtype: str) -> Parity:
    """Holds the logits of an export against the run's own.

    Args:
        own: of the model as it was trained, [B, T, V] float32.
        rounded: of the same model with each weight rounded to its type in the export.
        exported: of what was read back from the export.
        dtype: of the exported weights.

    Raises:
        CheckpointError: the own logits are not finite; what was read back is not the model with
            its weights rounded; or the rounding changes what the model says.
    """
    if not own.isfinite().all():
        raise CheckpointError(
            "the model's own logits are not finite, so nothing can be held to them",
            hint="export another step",
        )
    spread = float(own.std())
    differ = _largest(exported, rounded)
    if not differ <= SAME_FRACTION * spread:
        raise CheckpointError(
            f"the export does not say what the model says: with the same weights its logits "
            f"differ by {differ:.3g}, they spread by {spread:.3g}",
            hint="nothing was left behind; this is a fault of the program, report it",
        )
    parity = Parity(
        largest_difference=_largest(exported, own),
        allowed=ALLOWED_FRACTION[dtype] * spread,
        spread=spread,
        num_tokens=own.shape[0] * own.shape[1],
        dtype=dtype,
    )
    if not parity.largest_difference <= parity.allowed:
        raise CheckpointError(
            f"{dtype} is too coarse for this model: its logits would differ by "
            f"{parity.largest_difference:.3g}, {parity.allowed:.3g} is allowed",
            hint="nothing was left behind; export it with --dtype float32",
        )
    return parity


def _largest(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())
