"""Instruction rows: only answers are trained, each ends, and conversations do not touch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost.core.errors import DataError, UsageError
from milepost.model.loss import token_nats
from milepost.posttrain.first_fit import first_fit
from milepost.posttrain.instructions import Conversation
from milepost.posttrain.ledger import Ledger
from milepost.posttrain.sft_rows import NOT_TRAINED, PADDING, SftRows, build_rows, check_rows
from milepost.text.chat_template import ChatTemplate, Message, vicuna
from milepost.text.tokenizer import Tokenizer
from tests.tiny_models import tiny_model, tiny_tokenizer

SHORT = ChatTemplate(
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}A:{% generation %} {{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }} {% endif %}{% endfor %}",
    name="short.jinja",
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def conversation(*turns: str, line: int = 1) -> Conversation:
    """Questions and answers in turn."""
    messages = [
        Message("assistant" if number % 2 else "user", text) for number, text in enumerate(turns)
    ]
    return Conversation(tuple(messages), "a.jsonl", line)


def several(count: int) -> list[Conversation]:
    """Conversations of different lengths, each with text of its own."""
    return [
        conversation(f"q{number}", "the union " * (number % 5 + 1) + str(number), line=number + 1)
        for number in range(count)
    ]


def build(
    conversations: list[Conversation],
    tokenizer: Tokenizer,
    *,
    sequence_length: int = 40,
    seed: int = 1,
    template: ChatTemplate = SHORT,
) -> tuple[SftRows, Ledger]:
    return build_rows(
        conversations,
        ledger=Ledger(len(conversations)),
        template=template,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        seed=seed,
    )


def check(
    conversations: list[Conversation],
    tokenizer: Tokenizer,
    *,
    sequence_length: int = 40,
    template: ChatTemplate = SHORT,
) -> None:
    check_rows(
        conversations, template=template, tokenizer=tokenizer, sequence_length=sequence_length
    )


def test_a_row_predicts_the_answer_and_its_end_and_nothing_else(tokenizer: Tokenizer) -> None:
    rows, _ = build([conversation("the", "of the")], tokenizer, sequence_length=16)
    prompt = tokenizer.encode("the A:")
    answer = [*tokenizer.encode(" of the"), tokenizer.end_of_text_id]
    ids = prompt + answer
    assert rows.input_ids[0, : len(ids) - 1].tolist() == ids[:-1]
    trained = rows.target_ids[0] != NOT_TRAINED
    assert rows.target_ids[0][trained].tolist() == answer
    assert trained.nonzero()[0].tolist() == list(range(len(prompt) - 1, len(ids) - 1))


def test_padding_is_the_end_of_text_token_and_never_trained(tokenizer: Tokenizer) -> None:
    rows, _ = build([conversation("the", "of the")], tokenizer, sequence_length=16)
    end = tokenizer.end_of_text_id
    padding = rows.segment_ids[0] == PADDING
    assert padding.any()
    assert (rows.input_ids[0][padding] == end).all()
    assert (rows.target_ids[0][padding] == NOT_TRAINED).all()
    # ... and yet the end-of-text token is trained: once, behind the answer.
    assert (rows.target_ids[0] == end).sum() == 1


@pytest.mark.parametrize("num_turns", [1, 2, 3])
def test_each_answer_of_a_conversation_trains_its_end(tokenizer: Tokenizer, num_turns: int) -> None:
    rows, _ = build([conversation(*["of", "the"] * num_turns)], tokenizer)
    end = tokenizer.end_of_text_id
    assert (rows.target_ids == end).sum() == num_turns
    assert (rows.input_ids[rows.segment_ids == 1] == end).sum() == num_turns - 1
    assert rows.segment_ids.max() == 1


@pytest.mark.parametrize(("room", "num_rows"), [(-1, None), (0, 1), (1, 1)])
def test_a_conversation_may_fill_a_row_to_the_last_position(
    tokenizer: Tokenizer, room: int, num_rows: int | None
) -> None:
    ids = [*tokenizer.encode("the A:"), *tokenizer.encode(" of the")]  # the end is only predicted
    one = [conversation("the", "of the")]
    if num_rows is None:
        with pytest.raises(DataError, match="none of 1 conversations fits a row of") as caught:
            check(one, tokenizer, sequence_length=len(ids) + room)
        assert f"{len(ids)} tokens in a row of {len(ids) - 1}" in str(caught.value.hint)
        return
    rows, ledger = build(one, tokenizer, sequence_length=len(ids) + room)
    assert (rows.num_rows, ledger.num_used) == (num_rows, 1)
    assert (rows.target_ids == tokenizer.end_of_text_id).sum() == 1


def test_what_is_too_long_is_left_out_and_counted(tokenizer: Tokenizer) -> None:
    long = conversation("q", "the union " * 50, line=7)
    rows, ledger = build([*several(4), long], tokenizer)
    assert rows.num_conversations == 4
    assert ledger.counts == {"too_long": 1}
    assert (ledger.drops[0].source, ledger.drops[0].line) == ("a.jsonl", 7)
    assert ledger.drops[0].what.endswith(" tokens in a row of 40")
    assert ledger.summary() == "4 of 5 rows used; left out: 1 longer than a row"


def texts_in(rows: SftRows, tokenizer: Tokenizer) -> list[str]:
    """What each segment of each row says, its last target included."""
    texts = []
    for inputs, targets, segments in zip(
        rows.input_ids, rows.target_ids, rows.segment_ids, strict=True
    ):
        for segment in range(1, segments.max() + 1):
            (places,) = (segments == segment).nonzero()
            assert (np.diff(places) == 1).all()
            assert targets[places[-1]] == tokenizer.end_of_text_id
            texts.append(tokenizer.decode([*inputs[places], targets[places[-1]]]))
    return texts


@pytest.mark.parametrize("seed", [1, 2])
def test_every_conversation_is_in_one_place_and_whole(tokenizer: Tokenizer, seed: int) -> None:
    conversations = several(60)
    rows, _ = build(conversations, tokenizer, seed=seed)
    wanted = [
        SHORT.render(one.messages, add_generation_prompt=False, eos="<|endoftext|>")
        for one in conversations
    ]
    found = texts_in(rows, tokenizer)
    assert sorted(found) == sorted(wanted)
    assert found != wanted
    assert rows.num_rows < 60
    assert rows.num_conversations == 60
    assert 0.8 < rows.filled_fraction < 1


def test_the_rows_are_a_function_of_the_seed(tokenizer: Tokenizer) -> None:
    first, second, other = (build(several(60), tokenizer, seed=seed)[0] for seed in (1, 1, 2))
    assert first.fingerprint == second.fingerprint != other.fingerprint
    assert (first.input_ids == second.input_ids).all()


def test_a_conversation_in_a_row_is_as_if_it_were_alone(tokenizer: Tokenizer) -> None:
    conversations = [*several(6), conversation("q", "the state", "and", "the union")]
    rows, _ = build(conversations, tokenizer)
    assert rows.segment_ids.max() > 1
    packed = sorted(answer_nats(rows))
    alone = sorted(
        nats for one in conversations for nats in answer_nats(build([one], tokenizer)[0])
    )
    # Only the places in the row differ, and rotary positions are relative; float32 rounding.
    assert packed == pytest.approx(alone, rel=1e-4)


def answer_nats(rows: SftRows) -> list[float]:
    """Of each conversation: the nats of its answers."""
    model = tiny_model()
    inputs, targets, segments = (
        torch.from_numpy(array).long()
        for array in (rows.input_ids, rows.target_ids, rows.segment_ids)
    )
    same = segments[:, :, None] == segments[:, None, :]
    with torch.no_grad():
        hidden = model(inputs, mask=same.tril()[:, None])
    nats = token_nats(hidden.flatten(0, 1), model.head_weight, targets.flatten(), chunk_rows=64)
    nats_BT = nats.view_as(targets).double()
    return [
        nats_BT[row][segments[row] == segment].sum().item()
        for row in range(rows.num_rows)
        for segment in range(1, int(segments[row].max()) + 1)
    ]


def test_a_batch_is_a_function_of_the_step_and_each_row_comes_once_an_epoch(
    tokenizer: Tokenizer,
) -> None:
    rows, _ = build(several(100), tokenizer)
    per_step = 3
    steps = [rows.batch(step, seed=5, rows_per_step=per_step) for step in range(rows.num_rows)]
    seen = np.concatenate([step.inputs for step in steps])  # three epochs
    for epoch in np.split(seen, per_step):
        assert sorted(map(bytes, epoch)) == sorted(map(bytes, rows.input_ids))
    assert (seen[: rows.num_rows] != seen[rows.num_rows : 2 * rows.num_rows]).any()
    again = rows.batch(7, seed=5, rows_per_step=per_step)
    assert again.sha256 == steps[7].sha256
    assert again.sha256 != rows.batch(7, seed=6, rows_per_step=per_step).sha256
    assert again.num_targets == (again.targets != NOT_TRAINED).sum() > 0


def test_a_batch_may_be_larger_than_all_rows(tokenizer: Tokenizer) -> None:
    rows, _ = build(several(3), tokenizer, sequence_length=200)
    assert rows.num_rows == 1
    batch = rows.batch(0, seed=1, rows_per_step=4)
    assert (batch.inputs == rows.input_ids[0]).all()
    assert batch.num_targets == 4 * rows.num_targets


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{{ eos_token }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ eos_token }}{{ m.content }}{% endgeneration %}"
        "{% endfor %}",
        "{% for m in messages %}{{ m.role }}{% generation %}{{ eos_token }}{{ m.content }}"
        "{% endgeneration %}{% endfor %}",
    ],
    ids=["no-marks", "end-outside", "end-before-all", "end-before"],
)
def test_a_template_that_does_not_train_the_end_is_refused(
    tokenizer: Tokenizer, source: str
) -> None:
    template = ChatTemplate(source, name="mine.jinja")
    with pytest.raises(UsageError, match=r"template mine.jinja .* would never learn to stop"):
        check(several(2), tokenizer, template=template)


ENDS_THE_LAST = ChatTemplate(
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% if loop.last %}{{ eos_token }}{% endif %}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    name="last.jinja",
)
REFUSES_THE_STATE = ChatTemplate(
    "{% if messages[0].content == 'the state' %}{{ raise_exception('no politics') }}{% endif %}"
    + SHORT.source,
    name="careful.jinja",
)


@pytest.mark.parametrize(
    ("template", "odd", "reason", "what"),
    [
        (
            ENDS_THE_LAST,
            conversation("a", "b", "c", "d", line=2),
            "never_ends",
            "1 of 2 answers have an end-of-text token",
        ),
        (
            REFUSES_THE_STATE,
            conversation("the state", "b", line=2),
            "refused",
            "the chat template careful.jinja refuses this conversation: no politics",
        ),
    ],
)
def test_what_a_template_cannot_put_is_left_out_and_counted(
    tokenizer: Tokenizer, template: ChatTemplate, odd: Conversation, reason: str, what: str
) -> None:
    one = conversation("a", "b")
    check([odd, one], tokenizer, template=template)
    rows, ledger = build([odd, one], tokenizer, template=template)
    assert rows.num_conversations == 1
    assert ledger.counts == {reason: 1}
    assert (ledger.drops[0].line, ledger.drops[0].what) == (2, what)
    with pytest.raises(DataError, match="none of 1 conversations can be used: 1 ") as caught:
        check([odd], tokenizer, template=template)
    assert caught.value.hint == f"the first one, a.jsonl:2: {what}"


def test_rows_of_nothing_are_none(tokenizer: Tokenizer) -> None:
    rows, ledger = build([conversation("q", "the union " * 50)], tokenizer)
    assert (rows.num_rows, rows.num_conversations, ledger.num_used) == (0, 0, 0)


def test_vicunas_rows_decode_to_its_text(tokenizer: Tokenizer) -> None:
    one = conversation("of", "the union")
    rows, _ = build([one], tokenizer, sequence_length=300, template=vicuna())
    assert texts_in(rows, tokenizer) == [
        vicuna().render(one.messages, add_generation_prompt=False, eos="<|endoftext|>")
    ]


@given(st.lists(st.integers(1, 10), max_size=50))
@settings(max_examples=200, deadline=None)
def test_first_fit_is_the_first_row_with_room(lengths: list[int]) -> None:
    rows: list[list[int]] = []
    for number, length in enumerate(lengths):
        for row in rows:
            if sum(lengths[other] for other in row) + length <= 10:
                row.append(number)
                break
        else:
            rows.append([number])
    assert first_fit(lengths, capacity=10) == rows


def test_rows_of_the_developers_instruction_data_are_full(shared_data: Path) -> None:
    from milepost.posttrain.instructions import read_conversations
    from milepost.text.tokenizer import load_tokenizer

    conversations, ledger = read_conversations(str(shared_data / "instruct" / "alpaca.jsonl.gz"))
    rows, _ = build_rows(
        conversations[:1000],
        ledger=ledger,
        template=vicuna(),
        tokenizer=load_tokenizer("gpt2"),
        sequence_length=512,
        seed=1,
    )
    assert rows.filled_fraction > 0.95
    ends = (rows.target_ids == 50256).sum()
    assert ends == rows.num_conversations
