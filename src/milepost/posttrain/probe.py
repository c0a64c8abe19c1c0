"""How much a model's next token, and what it writes, depends on how a prompt is put.

Distributions are compared after the last token of each prompt. They are over tokens, not over
texts: after a lone space a model that would have written `·Paris` has to write `Paris`, which is
another token. So they are compared a second time with such tokens taken as one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from milepost.core.errors import DivergedError, UsageError
from milepost.inference.load import LoadedModel
from milepost.inference.sampling import Decoding
from milepost.inference.stream import END_OF_TEXT, stream_tokens
from milepost.posttrain.variants import Variant
from milepost.posttrain.visible_tokens import VisibleTokens
from milepost.runs.probes import LikelyToken, ProbeRecord

_ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class ProbeSettings:
    """What is asked of each model.

    Attributes:
        num_likeliest: next tokens to name, 1 or more.
        max_new_tokens: most tokens of a completion; 0: none is written.
        has_beginning: whether the token that begins a text stands before each prompt: end-of-text
            where Milepost pretrained. Tuned models have not seen it before a conversation.
    """

    num_likeliest: int = 5
    max_new_tokens: int = 24
    has_beginning: bool = True

    def __post_init__(self) -> None:
        if self.num_likeliest < 1:
            raise UsageError(f"top is {self.num_likeliest}", hint="give 1 or more tokens to show")
        if self.max_new_tokens < 0:
            raise UsageError(
                f"max_new_tokens is {self.max_new_tokens}", hint="give 0 (none is written) or more"
            )


@dataclass(frozen=True)
class Provenance:
    """What a record says of how it was made; see `ProbeRecord`."""

    checkpoint_sha256: str
    adapter: str | None
    device: str
    milepost: str
    time: str


@torch.no_grad()
def probe(
    loaded: LoadedModel,
    variants: Sequence[Variant],
    *,
    settings: ProbeSettings,
    provenance: Provenance,
) -> list[ProbeRecord]:
    """Puts every variant to one model, in float32.

    Args:
        loaded: the model; its weights are only read.
        variants: the first is the base that the others are compared with.
        settings: what is asked.
        provenance: goes into the records.

    Returns:
        One record a variant, in order.

    Raises:
        UsageError: a prompt is empty, or leaves no room in the context.
        DivergedError: the logits are not finite.
        DataError: a prompt has no UTF-8 form.
    """
    tokenizer = loaded.tokenizer
    shown = VisibleTokens(tokenizer)
    prompts_ids = [tokenizer.encode(variant.prompt) for variant in variants]
    beginning = [tokenizer.beginning_id] if settings.has_beginning else []
    rows = [[*beginning, *ids] for ids in prompts_ids]
    _check_room(variants, rows, context=loaded.model.config.max_position_embeddings)
    log_p_RV = next_token_log_probabilities(loaded, rows)
    written = _written(loaded, rows, max_new_tokens=settings.max_new_tokens)
    measured = _measured(log_p_RV, shown, num_likeliest=settings.num_likeliest)
    return [
        ProbeRecord(
            step=loaded.step,
            variant=variant.name,
            base=variants[0].prompt,
            prompt=variant.prompt,
            token_ids=ids,
            tokens=[shown.show(token_id) for token_id in ids],
            completion=tokenizer.decode(new_ids),
            completion_ids=new_ids,
            decoding=_decoding(settings) | {"stopped": stopped},
            **numbers,
            **asdict(provenance),
        )
        for variant, ids, numbers, (new_ids, stopped) in zip(
            variants, prompts_ids, measured, written, strict=True
        )
    ]


def _measured(
    log_p_RV: Tensor, shown: VisibleTokens, *, num_likeliest: int
) -> list[dict[str, Any]]:
    """The fields of each record that come from its distribution; row 0 is the base's."""
    log_p_RK = sum_of_classes(log_p_RV, torch.tensor(shown.classes_aside_from_blanks()))
    return [
        {
            "kl_nats": divergence_nats(log_p_RV[0], log_p_V),
            "reverse_kl_nats": divergence_nats(log_p_V, log_p_RV[0]),
            "kl_nats_aside_from_blanks": divergence_nats(log_p_RK[0], log_p_K),
            "entropy_nats": float(-(log_p_V.exp() * log_p_V).sum()),
            "likeliest": _likeliest(log_p_V, shown, count=num_likeliest),
        }
        for log_p_V, log_p_K in zip(log_p_RV, log_p_RK, strict=True)
    ]


def divergence_nats(log_p_V: Tensor, log_q_V: Tensor) -> float:
    """KL(p || q) in nats: what it costs to expect q where p holds; 0 where they are equal.

    It is never negative; what rounding leaves below 0 is 0.

    Args:
        log_p_V: float64 [V], logarithms of probabilities.
        log_q_V: as `log_p_V`.
    """
    return max(0.0, float((log_p_V.exp() * (log_p_V - log_q_V)).sum()))


def sum_of_classes(log_p_RV: Tensor, classes_V: Tensor) -> Tensor:
    """ln of the probability of each class of tokens.

    Args:
        log_p_RV: float64 [R, V], logarithms of probabilities.
        classes_V: int64 [V], the class of each token: 0, 1, ... without a gap.

    Returns:
        float64 [R, K], K classes.
    """
    shape = (len(log_p_RV), int(classes_V.max()) + 1)
    # The largest of a class is taken out first, so that nothing small is rounded to 0.
    largest_RK = log_p_RV.new_full(shape, -torch.inf)
    largest_RK.scatter_reduce_(1, classes_V.expand_as(log_p_RV), log_p_RV, reduce="amax")
    sums_RK = log_p_RV.new_zeros(shape)
    sums_RK.index_add_(1, classes_V, (log_p_RV - largest_RK[:, classes_V]).exp())
    return sums_RK.log() + largest_RK


def next_token_log_probabilities(loaded: LoadedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """ln of the probability of each token after each row, float64 [R, V] on the CPU.

    Float32 logits, then float64: in float32 the divergence of two nearly equal distributions
    comes out below 0. Rows that pad the vocabulary beyond the tokenizer's are left out.

    Args:
        loaded: the model.
        rows: token ids, none empty.

    Raises:
        DivergedError: the logits are not finite.
    """
    model, size = loaded.model, loaded.tokenizer.vocab_size
    parts = []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        batch = rows[start : start + _ROWS_AT_ONCE]
        lengths = [len(row) for row in batch]
        # Padding lies behind the last token, where causal attention never looks.
        padded = [[*row, *[0] * (max(lengths) - len(row))] for row in batch]
        hidden_BTD = model(torch.tensor(padded, device=model.head_weight.device))
        last_BD = hidden_BTD[range(len(batch)), [length - 1 for length in lengths]]
        parts.append(F.linear(last_BD, model.head_weight[:size]).float().cpu())
    logits_RV = torch.cat(parts)
    if not torch.isfinite(logits_RV).all():
        raise DivergedError(
            "the model's logits are not finite",
            hint="its weights are damaged or training has diverged; probe an earlier step",
        )
    return logits_RV.double().log_softmax(dim=1)


def _check_room(
    variants: Sequence[Variant], rows: Sequence[Sequence[int]], *, context: int
) -> None:
    for variant, row in zip(variants, rows, strict=True):
        if not row:
            raise UsageError(
                f"the variant {variant.name!r} has no token to go on from",
                hint="a model with a chat template is given the prompt alone",
            )
        if len(row) >= context:
            raise UsageError(
                f"the variant {variant.name!r} has {len(row)} tokens, the one that begins a text "
                f"included; the model's context is {context}",
                hint=f"shorten it to at most {context - 2} tokens",
            )


def _written(
    loaded: LoadedModel, rows: Sequence[Sequence[int]], *, max_new_tokens: int
) -> list[tuple[list[int], str | None]]:
    """The greedy continuation of each row and why it stopped; None where none was asked for."""
    written: list[tuple[list[int], str | None]] = [([], None) for _ in rows]
    if max_new_tokens == 0:
        return written
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        steps = stream_tokens(
            loaded.model,
            rows[start : start + _ROWS_AT_ONCE],
            Decoding(max_new_tokens, temperature=0.0, top_k=None, top_p=None),
            end_ids=frozenset({loaded.tokenizer.end_of_text_id}),
            vocab_size=loaded.tokenizer.vocab_size,
        )
        for token in itertools.chain.from_iterable(steps):
            ids, _ = written[start + token.row]
            new_ids = [] if token.stopped == END_OF_TEXT else [token.token_id]
            written[start + token.row] = (ids + new_ids, token.stopped)
    return written


def _likeliest(log_p_V: Tensor, shown: VisibleTokens, *, count: int) -> list[LikelyToken]:
    """Of equals the first, so that a machine does not decide which is shown."""
    logs, ids = log_p_V.sort(descending=True, stable=True)
    return [
        LikelyToken(token_id, shown.show(token_id), probability)
        for token_id, probability in zip(
            ids[:count].tolist(), logs[:count].exp().tolist(), strict=True
        )
    ]


def _decoding(settings: ProbeSettings) -> dict[str, Any]:
    return {
        "max_new_tokens": settings.max_new_tokens,
        "temperature": 0.0,
        "top_k": None,
        "top_p": None,
        "bos": settings.has_beginning,
        "dtype": "float32",
    }
