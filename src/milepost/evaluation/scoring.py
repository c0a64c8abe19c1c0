"""Log-likelihoods of answers: the same bits on any number of ranks.

Tokens that several answers begin with are computed once (`packing`), the last block and the
head only where a token of an answer is predicted, and once where several are predicted from the
same place. What is computed together depends on the answers alone; it is dealt to ranks.

Nothing is compiled, no global state of torch is changed and no random number is drawn, so this
may run in the middle of a training.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from milepost.core.errors import DivergedError
from milepost.distributed.reduce import gather_in_rank_order
from milepost.distributed.world import World
from milepost.evaluation.items import Item
from milepost.evaluation.packing import Batch, Pair, make_batch, plan_parts
from milepost.evaluation.tasks import never_stop, tell_nobody
from milepost.model.frozen_copy import frozen_copy
from milepost.model.head import Head
from milepost.model.llama import Llama
from milepost.model.packed_weight import pack_linears


@dataclass(frozen=True)
class PairScore:
    """What a model says about a target after its context.

    Attributes:
        loglikelihood: of the target's tokens, nats.
        is_greedy: whether each of them is the likeliest where it stands.
    """

    loglikelihood: float
    is_greedy: bool


def score_items(
    model: Llama,
    items: Sequence[Item],
    *,
    compute_dtype: torch.dtype,
    world: World,
    stop_requested: Callable[[], bool] = never_stop,
    tell: Callable[[float], None] = tell_nobody,
) -> list[list[float]] | None:
    """Log-likelihood of each choice's target given its context, in nats.

    Every rank must call, every rank gets all. Beside the model it takes its weights once more in
    `compute_dtype` (on a GPU not in float32; on a CPU in 16 bits the head's twice), and the
    activations of one batch of `packing.BATCH_TOKENS`.

    Args:
        model: on any device; its weights are only read.
        items: in any order, of any lengths that fit the model's context.
        compute_dtype: of the forward pass; softmax and sums are float32, sums of tokens float64.
        world: of this process.
        stop_requested: asked before each batch; if any rank says yes, every rank gets None.
        tell: given the fraction of this rank's batches that is done.

    Raises:
        DivergedError: what an item's tokens are predicted with is not finite.
    """
    scored = _score(
        model,
        [pair for item in items for pair in _pairs(item)],
        compute_dtype=compute_dtype,
        world=world,
        stop_requested=stop_requested,
        tell=tell,
        wants_greedy=False,
    )
    if scored is None:
        return None
    values = iter(scored.loglikelihoods)
    by_item = [list(itertools.islice(values, len(item.choices))) for item in items]
    for number, (item, found) in enumerate(zip(items, by_item, strict=True)):
        if not all(map(math.isfinite, found)):
            by_item[number] = _score_alone(model, item, compute_dtype=compute_dtype)
    return by_item


def _pairs(item: Item) -> list[Pair]:
    return [Pair(choice.context_ids, choice.target_ids) for choice in item.choices]


def _score_alone(model: Llama, item: Item, *, compute_dtype: torch.dtype) -> list[float]:
    """An item without neighbors: what is not finite in a row spoils all of it.

    Raises:
        DivergedError: it is this item.
    """
    scored = _score(
        model,
        _pairs(item),
        compute_dtype=compute_dtype,
        world=World(rank=0, size=1, device=model.head_weight.device),
        stop_requested=never_stop,
        tell=tell_nobody,
        wants_greedy=False,
    )
    assert scored is not None, "nobody asked for a stop"
    if not all(map(math.isfinite, scored.loglikelihoods)):
        raise _diverged(f"item {item.item_id}")
    return scored.loglikelihoods


def score_pairs(
    model: Llama, pairs: Sequence[Pair], *, compute_dtype: torch.dtype, world: World
) -> list[PairScore]:
    """As `score_items` for single answers, with whether each is the greedy one.

    Raises:
        DivergedError: what a pair's tokens are predicted with is not finite.
    """
    scored = _score(
        model,
        pairs,
        compute_dtype=compute_dtype,
        world=world,
        stop_requested=never_stop,
        tell=tell_nobody,
        wants_greedy=True,
    )
    assert scored is not None, "nobody asked for a stop"
    for number, value in enumerate(scored.loglikelihoods):
        if not math.isfinite(value):
            raise _diverged(f"request {number + 1}")
    return [
        PairScore(value, num_others == 0)
        for value, num_others in zip(scored.loglikelihoods, scored.num_not_greedy, strict=True)
    ]


def _diverged(what: str) -> DivergedError:
    return DivergedError(
        f"{what} has no score: the model's logits are not finite",
        hint="its weights are damaged or beyond what the dtype holds: take an earlier checkpoint, "
        "or score it in float32",
    )


@dataclass(frozen=True)
class _Scored:
    """By pair: nats, and how many of its tokens are not the likeliest (0 where not asked)."""

    loglikelihoods: list[float]
    num_not_greedy: list[float]


@torch.no_grad()
def _score(
    model: Llama,
    pairs: Sequence[Pair],
    *,
    compute_dtype: torch.dtype,
    world: World,
    stop_requested: Callable[[], bool],
    tell: Callable[[float], None],
    wants_greedy: bool,
) -> _Scored | None:
    device = model.head_weight.device
    model = _laid_out(model, compute_dtype)
    head = Head(model.head_weight.data)
    inputs = [pair.input_ids for pair in pairs]
    parts = plan_parts(inputs, pairs, device_type=device.type)
    owners = np.zeros(len(pairs), dtype=np.int64)
    found: list[tuple[np.ndarray, Tensor, Tensor]] = []
    mine = []
    for number, part in enumerate(parts):
        owner = _owner(number, size=world.size)
        owners[[segment.sequence for rows in part for row in rows for segment in row]] = owner
        if owner == world.rank:
            mine.append(part)
    num_batches, num_done, is_stopping = sum(map(len, mine)), 0, False
    for part in mine:
        batches, hidden = [], []
        for rows in part:
            if is_stopping := stop_requested():
                break
            batch = make_batch(rows, pairs, inputs, device=device)
            hidden.append(_hidden_states(model, batch, compute_dtype=compute_dtype))
            batches.append(batch)
            num_done += 1
            tell(num_done / num_batches)
        if is_stopping:
            break
        found.append(_read(head, batches, hidden, wants_greedy=wants_greedy))
    return _gather(found, owners, is_stopping=is_stopping, world=world, device=device)


def _owner(number: int, *, size: int) -> int:
    """The rank of a part: there and back, since parts are sorted by what they cost."""
    turn, place = divmod(number, size)
    return place if turn % 2 == 0 else size - 1 - place


def _hidden_states(model: Llama, batch: Batch, *, compute_dtype: torch.dtype) -> Tensor:
    """[B x Q, D] where tokens of answers are predicted."""
    hidden_BQD = model.forward_packed(
        batch.input_ids_BT,
        positions_BT=batch.positions_BT,
        mask=batch.mask,
        places_BQ=batch.places_BQ,
        compute_dtype=compute_dtype,
    )
    return hidden_BQD.flatten(0, 1)


def _read(
    head: Head, batches: Sequence[Batch], hidden: Sequence[Tensor], *, wants_greedy: bool
) -> tuple[np.ndarray, Tensor, Tensor]:
    """Of each answer's token: whose it is, log-likelihood, 1 where it is not the likeliest."""
    starts = itertools.accumulate((len(part) for part in hidden), initial=0)
    read_K = torch.cat([b.read_K + start for b, start in zip(batches, starts, strict=False)])
    target_K = torch.cat([batch.target_K for batch in batches])
    hidden_RD = torch.cat(list(hidden))
    logits_K = head.logits_of(target_K, hidden_RD[read_K])
    loglikelihoods_K = logits_K - head.log_sum_exp(hidden_RD)[read_K]
    if hidden_RD.dtype != torch.float32:
        # It can so be above the sum of the rounded ones. What is not finite stays to be refused.
        is_above_K = (loglikelihoods_K > 0) & loglikelihoods_K.isfinite()
        loglikelihoods_K = loglikelihoods_K.masked_fill(is_above_K, 0.0)
    others_K = torch.zeros_like(loglikelihoods_K)
    if wants_greedy:
        others_K = (head.greedy_ids(hidden_RD)[read_K] != target_K).float()
    return np.concatenate([batch.pair_K for batch in batches]), loglikelihoods_K, others_K


def _gather(
    found: Sequence[tuple[np.ndarray, Tensor, Tensor]],
    owners: np.ndarray,
    *,
    is_stopping: bool,
    world: World,
    device: torch.device,
) -> _Scored | None:
    """Adds up tokens on the host, in order, and takes each pair from the rank that has it."""
    num_pairs = len(owners)
    sums = np.zeros((2, num_pairs))
    for pair_K, *values in found:
        for total, value_K in zip(sums, values, strict=True):
            numbers = value_K.double().cpu().numpy()
            total += np.bincount(pair_K, weights=numbers, minlength=num_pairs)
    flat = torch.from_numpy(np.append(sums, float(is_stopping))).to(device)
    gathered = gather_in_rank_order(flat, world=world).cpu().numpy()
    if gathered[:, -1].any():
        return None
    by_rank = gathered[:, :-1].reshape(world.size, 2, num_pairs)
    chosen = by_rank[owners, :, np.arange(num_pairs)]
    return _Scored(chosen[:, 0].tolist(), chosen[:, 1].tolist())


def _laid_out(model: Llama, dtype: torch.dtype) -> Llama:
    """The model with its matrices cast once and, on the CPU, those of its blocks packed."""
    on_cpu = model.head_weight.device.type == "cpu"
    if dtype == torch.float32 and not on_cpu:
        return model
    laid_out = frozen_copy(model, dtype)
    if on_cpu:
        pack_linears(laid_out.model.layers)
    return laid_out
