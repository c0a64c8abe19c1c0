"""Scoring: packed trees against one answer at a time, ranks, what may go wrong."""

from __future__ import annotations

import math
import random
import threading

import numpy as np
import pytest
import torch

from milepost.core.errors import DivergedError
from milepost.distributed.world import World
from milepost.evaluation import packing, scoring
from milepost.evaluation.items import Choice, Item
from milepost.evaluation.packing import Pair, count_shared, pack_row, plan_batches, plan_rows
from milepost.evaluation.scoring import score_items, score_pairs
from milepost.model import packed_weight
from milepost.model.head import Head
from milepost.model.llama import Llama
from tests.adapters import adapted
from tests.evaluations import ALONE
from tests.tiny_models import VOCAB_SIZE, random_ids, tiny_model

# Sums of up to 48 tokens in another order of float32 additions.
ATOL = 1e-4


def made_up_ids(source: random.Random, length: int) -> tuple[int, ...]:
    return tuple(source.randrange(VOCAB_SIZE) for _ in range(length))


def made_up_items(*, seed: int = 1, num_items: int = 24, context: int = 48) -> list[Item]:
    """2 to 8 choices; contexts shared, alike or of one token; lengths up to the context."""
    source = random.Random(seed)
    items = []
    for number in range(num_items):
        shared = made_up_ids(source, source.choice([1, 2, 9, 20]))
        choices = []
        for place in range(source.randint(2, 8)):
            ending = made_up_ids(source, source.choice([1, 1, 3, context - len(shared) + 1]))
            # As in WinoGrande, contexts may differ in their midst.
            own = (place, 7, 7) if number % 3 == 0 and len(shared) + 3 < context else ()
            own = own[: context + 1 - len(shared) - len(ending)]
            choices.append(Choice(shared + own, ending, 1))
        items.append(Item(str(number), 0, tuple(choices)))
    same = Choice((3, 4), (5, 6), 1)
    return [*items, Item("same", 0, (same, same, same)), items[1]]


def one_at_a_time(model: Llama, items: list[Item]) -> list[list[float]]:
    found = []
    for item in items:
        found.append([])
        for choice in item.choices:
            ids = torch.tensor([choice.context_ids + choice.target_ids])
            with torch.no_grad():
                logits = (model(ids[:, :-1])[0] @ model.head_weight.t()).double()
            logs = logits.log_softmax(dim=1)[len(choice.context_ids) - 1 :]
            found[-1].append(
                sum(logs[place, i].item() for place, i in enumerate(choice.target_ids))
            )
    return found


def scored(model: Llama, items: list[Item], **changes) -> list[list[float]]:
    settings = {"compute_dtype": torch.float32, "world": ALONE} | changes
    found = score_items(model, items, **settings)
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loras_additions_take_part_and_stay_as_they_are(dtype) -> None:
    model, items = adapted(), made_up_items()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = one_at_a_time(model, items)
    assert expected != one_at_a_time(tiny_model(), items)
    # bfloat16 rounds each of up to 48 tokens' hidden states to 8 bits.
    atol = ATOL if dtype == torch.float32 else 0.5
    for found, wanted in zip(scored(model, items, compute_dtype=dtype), expected, strict=True):
        assert found == pytest.approx(wanted, abs=atol)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_where_no_weight_can_be_packed_the_scores_are_the_same(monkeypatch) -> None:
    def refuse(*_operands: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("this build of torch has no oneDNN")

    model, items = tiny_model(), made_up_items()
    by_packed = scored(model, items)
    monkeypatch.setattr(packed_weight, "_multiplied", refuse)
    for found, expected in zip(scored(model, items), by_packed, strict=True):
        assert found == pytest.approx(expected, abs=ATOL)


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 1}, {"tie_word_embeddings": True}])
def test_packed_scores_equal_those_of_one_answer_at_a_time(changes) -> None:
    model, items = tiny_model(**changes), made_up_items()
    for found, expected in zip(scored(model, items), one_at_a_time(model, items), strict=True):
        np.testing.assert_allclose(found, expected, atol=ATOL, rtol=0)


def test_equal_choices_have_equal_bits_and_no_items_no_scores() -> None:
    model = tiny_model()
    assert len(set(scored(model, made_up_items())[-2])) == 1
    assert scored(model, []) == []
    assert len(scored(model, made_up_items()[:1])) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_scores_are_near_those_of_float32(dtype: torch.dtype) -> None:
    model = tiny_model(initializer_range=0.02)
    items = made_up_items()
    for found, expected in zip(
        scored(model, items, compute_dtype=dtype), scored(model, items), strict=True
    ):
        # 8 bits of mantissa on logits below 1, up to 48 tokens a sum.
        np.testing.assert_allclose(found, expected, atol=0.2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_answer_is_surer_than_sure_in_16_bits(dtype: torch.dtype) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.head_weight.mul_(40)  # the likeliest token has all of the probability
    contexts = [tuple(random_ids(4, seed=seed).tolist()) for seed in range(8)]
    pairs = [Pair(ids, (target,)) for ids in contexts for target in range(VOCAB_SIZE)]
    found = score_pairs(model, pairs, compute_dtype=dtype, world=ALONE)
    sure = [score.loglikelihood for score in found if score.is_greedy]
    assert len(sure) == 8 and max(sure) == 0.0


def test_logits_beyond_float16_are_refused_and_never_sure() -> None:
    model, context = tiny_model(), (1, 2, 3)
    with torch.no_grad():
        hidden = model(torch.tensor([context]))[0, -1]
        model.head_weight[:] = -60_000 * hidden.sign()  # every product is -inf in float16
    with pytest.raises(DivergedError, match="request 1 has no score"):
        score_pairs(model, [Pair(context, (4,))], compute_dtype=torch.float16, world=ALONE)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_ranks_gives_the_same_bits(size: int, monkeypatch) -> None:
    monkeypatch.setitem(packing.BATCH_TOKENS, "cpu", 64)
    model, items = tiny_model(), made_up_items(num_items=40)
    alone = scored(model, items)
    by_rank: list[torch.Tensor] = [torch.empty(0)] * size
    met = threading.Barrier(size)

    def gather(values: torch.Tensor, *, world: World) -> torch.Tensor:
        by_rank[world.rank] = values
        met.wait()
        return torch.stack(by_rank)

    monkeypatch.setattr(scoring, "gather_in_rank_order", gather)
    found: dict[int, list[list[float]]] = {}

    def be(rank: int) -> None:
        world = World(rank=rank, size=size, device=torch.device("cpu"))
        found[rank] = scored(model, items, world=world)

    threads = [threading.Thread(target=be, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[rank] for rank in range(size)] == [alone] * size


def test_pairs_say_whether_they_are_greedy() -> None:
    model = tiny_model()
    context = tuple(random_ids(9).tolist())
    likeliest = context
    for _ in range(3):
        with torch.no_grad():
            logits = model(torch.tensor([likeliest]))[0, -1] @ model.head_weight.t()
        likeliest += (int(logits.argmax()),)
    greedy = likeliest[9:]
    other = (*greedy[:2], (greedy[2] + 1) % VOCAB_SIZE)
    pairs = [Pair(context, greedy), Pair(context, other), Pair(context, greedy[:1])]
    found = score_pairs(model, pairs, compute_dtype=torch.float32, world=ALONE)
    assert [score.is_greedy for score in found] == [True, False, True]
    assert found[0].loglikelihood > found[1].loglikelihood


def test_weights_that_are_not_finite_never_make_a_score() -> None:
    model, items = tiny_model(), made_up_items()
    with torch.no_grad():
        model.head_weight[5] = math.nan
    with pytest.raises(DivergedError, match="item 0 has no score"):
        scored(model, items)


def test_one_bad_item_is_named() -> None:
    model = tiny_model()
    items = [
        Item(name, 0, (Choice((1, i), (2, 3), 1), Choice((1, i), (4,), 1)))
        for name, i in (("first", 10), ("bad one", 11), ("last", 12))
    ]
    with torch.no_grad():
        model.model.embed_tokens.weight[11] = math.inf
    with pytest.raises(DivergedError, match="item bad one has no score"):
        scored(model, items)


def test_a_stop_gives_the_scoring_up() -> None:
    asked, told = [], []
    stop = lambda: len(asked) == 2 or asked.append(1)  # noqa: E731
    settings = {"compute_dtype": torch.float32, "world": ALONE, "tell": told.append}
    items = made_up_items(num_items=60)
    assert score_items(tiny_model(), items, stop_requested=stop, **settings) is None
    assert len(told) == 2
    told.clear()
    assert score_items(tiny_model(), items, **settings) is not None
    assert told == sorted(told) and told[-1] == 1.0


def test_scoring_leaves_torch_and_the_model_as_they_were() -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    torch.use_deterministic_algorithms(True)
    try:
        scored(model, made_up_items(), compute_dtype=torch.bfloat16)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("shift", [0.0, 60.0, -60.0, 500.0, -500.0])
def test_log_sum_exp_of_any_range_and_the_first_of_equals(shift: float) -> None:
    hidden, weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)), torch.ones(9, 8)
    weight[3:] = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))
    hidden, weight = (
        torch.cat([hidden, torch.ones(5, 1)], 1),
        torch.cat([weight, torch.full((9, 1), shift)], 1),
    )
    logits = (hidden @ weight.t()).double()
    found = Head(weight).log_sum_exp(hidden).double()
    # Relative to the size of the logits: float32 holds 24 bits.
    torch.testing.assert_close(found, logits.logsumexp(dim=1), atol=1e-4, rtol=0)
    assert Head(weight).greedy_ids(hidden).tolist() == (hidden @ weight.t()).argmax(dim=1).tolist()


def test_a_row_is_a_tree_by_hand() -> None:
    sequences = [(1, 2, 3), (1, 2, 4, 5), (1, 2, 3), (9,)]
    # The first three share a row; so short a fourth costs no less alone.
    row = plan_rows(sequences[:3], max_tokens=64)
    assert len(row) == 1
    packed = pack_row(row[0], sequences)
    assert packed.token_ids.tolist() == [1, 2, 3, 4, 5]
    assert packed.positions.tolist() == [0, 1, 2, 2, 3]
    assert packed.sees.astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    assert {number: path.tolist() for number, path in packed.paths.items()} == {
        0: [0, 1, 2],
        2: [0, 1, 2],
        1: [0, 1, 3, 4],
    }


def test_sequences_that_share_nothing_stay_apart_and_rows_bounded() -> None:
    source = random.Random(3)
    apart = [made_up_ids(source, 40) for _ in range(6)]
    assert len(plan_rows(apart, max_tokens=1024)) == 6
    shared = made_up_ids(source, 30)
    together = [shared + made_up_ids(source, 6) for _ in range(100)]
    rows = plan_rows(together, max_tokens=100)
    assert all(row[-1].stop <= 100 for row in rows)
    assert sorted(s.sequence for row in rows for s in row) == list(range(100))
    batches = plan_batches(rows, max_tokens=200)
    assert [row for batch in batches for row in batch] == sorted(rows, key=lambda r: -r[-1].stop)
    assert all(len(batch) * batch[0][-1].stop <= 200 for batch in batches)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [((), (1,), 0), ((1,), (1,), 1), ((1, 2), (1, 3), 1), ((1, 2, 3), (1, 2), 2), ((5,), (6,), 0)],
)
def test_shared_beginnings_are_counted(first, second, expected: int) -> None:
    assert count_shared(first, second) == expected
