"""BoolQ with reasons: the prompt, the line the model writes, and the answer after it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from milepost.core.errors import DivergedError, UsageError
from milepost.distributed.world import World
from milepost.evaluation.items import ItemResult
from milepost.evaluation.reasoned import (
    MAX_REASON_TOKENS,
    PROTOCOL,
    ReasonedBoolq,
    open_reasoned,
)
from milepost.inference.engine import continue_likeliest
from milepost.inference.load import load_model
from milepost.model.llama import Llama
from milepost.text.tokenizer import Tokenizer
from tests.evaluations import ALONE
from tests.tiny_models import tiny_model, tiny_tokenizer, write_model_folder

CONTEXT = 256
PASSAGES = [
    ("The union is strong", "is the union strong", True),
    ("The people are many. " * 3, "are the people few", False),
    ("The state of the states " * 40, "is this passage longer than the context", True),
    ("", "is there nothing to read", False),
    *((f"Number {n} is a number.", f"is {n} a number", n % 3 == 0) for n in range(15)),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    lines = [json.dumps({"passage": p, "question": q, "answer": a}) for p, q, a in PASSAGES]
    (folder / "boolq_val.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model() -> Llama:
    return tiny_model(max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def task(rows: Path, tokenizer: Tokenizer) -> ReasonedBoolq:
    return open_reasoned(tokenizer=tokenizer, context_length=CONTEXT, data_dir=rows, limit=None)


def scored(task: ReasonedBoolq, model: Llama, tokenizer: Tokenizer) -> list[ItemResult]:
    results = task.score(model, tokenizer=tokenizer, compute_dtype=torch.float32, world=ALONE)
    assert results is not None
    return results


@torch.no_grad()
def reason_alone(task: ReasonedBoolq, model: Llama, tokenizer: Tokenizer, number: int) -> list[int]:
    """The line of one prompt alone, held against a plain forward pass over all of it."""
    prompt = task.prompts_ids[number]
    [ids] = continue_likeliest(
        model,
        tokenizer,
        [prompt],
        max_new_tokens=MAX_REASON_TOKENS,
        stop_ids=task.newline_ids,
    )
    hidden = model(torch.tensor([[*prompt, *ids]]))[0, len(prompt) - 1 :]
    best = (hidden @ model.head_weight[: tokenizer.vocab_size].T).argmax(dim=-1).tolist()
    assert best[: len(ids)] == ids
    assert len(ids) == MAX_REASON_TOKENS or best[-1] in task.newline_ids
    return ids


@torch.no_grad()
def plain_nats(model: Llama, context_ids: tuple[int, ...], target_ids: tuple[int, ...]) -> float:
    hidden = model(torch.tensor([[*context_ids, *target_ids[:-1]]]))[0]
    logs = torch.log_softmax((hidden @ model.head_weight.T).double(), dim=-1)
    first = len(context_ids) - 1
    return sum(float(logs[first + n, token]) for n, token in enumerate(target_ids))


def test_prompts_end_where_the_reason_begins(task: ReasonedBoolq, tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(task.prompts_ids[0][1:]) == (
        "The union is strong\nQuestion: is the union strong?\nReasoning: The passage says that"
    )
    assert task.prompts_ids[0][0] == tokenizer.end_of_text_id
    assert tokenizer.decode(task.answer_ids) == "\nAnswer:"
    assert [tokenizer.decode(ids) for ids in task.choices_ids] == [" no", " yes"]
    assert task.golds[:4] == (1, 0, 1, 0)
    assert (task.benchmark, task.protocol, task.num_items) == ("boolq_reasoned", PROTOCOL, 19)
    assert (task.chance, task.majority) == (0.5, 12 / 19)


def test_a_long_prompt_loses_its_beginning_and_is_counted(
    task: ReasonedBoolq, tokenizer: Tokenizer
) -> None:
    room = CONTEXT - MAX_REASON_TOKENS - len(task.answer_ids) - len(task.choices_ids[1]) + 1
    assert [len(ids) for ids in task.prompts_ids].count(room) == 1
    assert len(task.prompts_ids[2]) == room
    assert task.num_truncated == 2  # both choices of one item
    assert task.prompts_ids[2][0] == tokenizer.end_of_text_id
    assert tokenizer.decode(task.prompts_ids[2][1:]).endswith(
        "longer than the context?\nReasoning: The passage says that"
    )


def test_reasons_and_answers_are_those_of_one_prompt_at_a_time(
    task: ReasonedBoolq, model: Llama, tokenizer: Tokenizer
) -> None:
    # A token that the model writes often ends a line too, so that some reasons are short.
    often = reason_alone(task, model, tokenizer, 0)[3]
    task = replace(task, newline_ids=task.newline_ids | {often})
    lengths = set()
    results = scored(task, model, tokenizer)
    for number in (0, 2, 3, 18):  # the first, the longest, the shortest, one of another batch
        result = results[number]
        reason = reason_alone(task, model, tokenizer, number)
        lengths.add(len(reason))
        assert result.extra == {"rationale": tokenizer.decode(reason)}
        context_ids = (*task.prompts_ids[number], *reason, *task.answer_ids)
        expected = [plain_nats(model, context_ids, ids) for ids in task.choices_ids]
        # float32 sums in another order, over up to 256 positions.
        assert result.loglikelihoods == pytest.approx(expected, abs=1e-4)
        assert result.chosen == max((0, 1), key=expected.__getitem__)
        assert (result.item_id, result.gold) == (str(number), task.golds[number])
    assert min(lengths) < MAX_REASON_TOKENS == max(lengths)


def test_a_limit_takes_the_first_items(
    rows: Path, task: ReasonedBoolq, model: Llama, tokenizer: Tokenizer
) -> None:
    part = open_reasoned(tokenizer=tokenizer, context_length=CONTEXT, data_dir=rows, limit=2)
    assert part.prompts_ids == task.prompts_ids[:2]
    assert (part.limit, part.data_sha256) == (2, task.data_sha256)
    assert [result.item_id for result in scored(part, model, tokenizer)] == ["0", "1"]


@pytest.mark.parametrize("num_batches", [0, 1])
def test_a_stop_gives_the_scoring_up(
    task: ReasonedBoolq, model: Llama, tokenizer: Tokenizer, num_batches: int
) -> None:
    heard: list[float] = []
    results = task.score(
        model,
        tokenizer=tokenizer,
        compute_dtype=torch.float32,
        world=ALONE,
        stop_requested=lambda: len(heard) == num_batches,
        tell=heard.append,
    )
    assert results is None
    assert len(heard) == num_batches and all(0 < done < 1 for done in heard)


def test_a_context_without_room_is_refused(rows: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match=r"needs a context of at least \d+ tokens") as caught:
        open_reasoned(tokenizer=tokenizer, context_length=100, data_dir=rows, limit=None)
    fewest = int(caught.value.message.split("at least ")[1].split()[0])
    open_reasoned(tokenizer=tokenizer, context_length=fewest, data_dir=rows, limit=None)
    with pytest.raises(UsageError):
        open_reasoned(tokenizer=tokenizer, context_length=fewest - 1, data_dir=rows, limit=None)


def as_threads(monkeypatch: pytest.MonkeyPatch, *, size: int, score: Any) -> list[Any]:
    """What `score(world)` gives on each of `size` ranks that are threads of this process."""
    barrier = threading.Barrier(size)
    given: dict[int, torch.Tensor] = {}
    rank_of_thread: dict[int, int] = {}

    def all_gather(gathered: list[torch.Tensor], values: torch.Tensor, **group: Any) -> None:
        given[rank_of_thread[threading.get_ident()]] = values
        barrier.wait(timeout=60)
        for rank in range(size):
            gathered[rank].copy_(given[rank])
        barrier.wait(timeout=60)

    def run(rank: int) -> Any:
        rank_of_thread[threading.get_ident()] = rank
        return score(World(rank=rank, size=size, device=torch.device("cpu")))

    monkeypatch.setattr("torch.distributed.all_gather", all_gather)
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run, range(size)))


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_gets_the_bits_of_one(
    task: ReasonedBoolq,
    model: Llama,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
) -> None:
    alone = scored(task, model, tokenizer)

    def score(world: World) -> list[ItemResult] | None:
        return task.score(model, tokenizer=tokenizer, compute_dtype=torch.float32, world=world)

    assert as_threads(monkeypatch, size=size, score=score) == [alone] * size


def test_a_stop_asked_of_one_rank_gives_it_up_on_all(
    task: ReasonedBoolq,
    model: Llama,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def score(world: World) -> list[ItemResult] | None:
        return task.score(
            model,
            tokenizer=tokenizer,
            compute_dtype=torch.float32,
            world=world,
            stop_requested=lambda: world.rank == 1,
        )

    assert as_threads(monkeypatch, size=2, score=score) == [None, None]


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_logits_that_are_not_finite_on_one_rank_are_told_by_all(
    task: ReasonedBoolq,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    bad_rank: int,
) -> None:
    # Any token ends a reason, so that no rank writes the bad one.
    task = replace(task, newline_ids=frozenset(range(tokenizer.vocab_size)))
    batches = [{i for n in batch for i in task.prompts_ids[n]} for batch in task._batches()]
    assert len(batches) == 2  # one a rank
    only_there = min(batches[bad_rank] - batches[1 - bad_rank])
    model = tiny_model(max_position_embeddings=CONTEXT)
    with torch.no_grad():
        model.model.embed_tokens.weight[only_there] = math.inf

    def score(world: World) -> str:
        with pytest.raises(DivergedError) as caught:
            task.score(model, tokenizer=tokenizer, compute_dtype=torch.float32, world=world)
        return caught.value.message

    told = as_threads(monkeypatch, size=2, score=score)
    assert told[bad_rank] == "the model's logits are not finite"
    assert told[1 - bad_rank] == "the model's logits are not finite on another rank"


_AS_RANK = """
import json, sys
from pathlib import Path
import torch
from milepost.distributed.world import World
from milepost.evaluation.reasoned import open_reasoned
from milepost.inference.load import load_model

torch.set_num_threads(1)
rank, rows, folder = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2
)
world = World(rank=rank, size=2, device=torch.device("cpu"))
loaded = load_model(folder)
tokenizer = loaded.tokenizer
task = open_reasoned(tokenizer=tokenizer, context_length=256, data_dir=rows, limit=None)
results = task.score(
    loaded.model, tokenizer=tokenizer, compute_dtype=torch.bfloat16, world=world
)
torch.distributed.destroy_process_group()
print(json.dumps([[r.item_id, [v.hex() for v in r.loglikelihoods], r.extra] for r in results]))
"""


@pytest.mark.long
def test_two_processes_give_the_bits_of_one(
    rows: Path, tmp_path: Path, task: ReasonedBoolq, model: Llama
) -> None:
    write_model_folder(tmp_path, model)
    words = [sys.executable, "-c", _AS_RANK]
    ranks = [
        subprocess.Popen(
            [*words, str(rank), str(rows), str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    told = [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]
    loaded = load_model(tmp_path)
    alone = task.score(
        loaded.model, tokenizer=loaded.tokenizer, compute_dtype=torch.bfloat16, world=ALONE
    )
    assert alone is not None
    expected = [[r.item_id, [v.hex() for v in r.loglikelihoods], r.extra] for r in alone]
    assert told == [expected, expected]
