"""Fine-tuning: what is trained, that it can be continued, and what it shows in the end."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from milepost.cli.finetune import load_config
from milepost.core.errors import DataError, UsageError
from milepost.inference.load import load_model
from milepost.posttrain.instructions import read_conversations, split_held_out
from milepost.posttrain.sft_rows import build_rows
from milepost.text.chat_template import ChatTemplate, Message
from milepost.trajectory.collect import collect
from milepost.trajectory.finetuning import finetuning_of
from tests.finetuning import (
    CONTEXT,
    LORA,
    QUESTIONS_AND_ANSWERS,
    TEMPLATE,
    Tuning,
    write_base,
    write_conversations,
)
from tests.tiny_models import random_ids
from tests.training import events, logged_steps, trained_sha256

LEARNS = ("--train.total_steps", "80", "--optimizer.learning_rate", "1e-2")
LEARNS_SETTINGS = (*LEARNS, "--checkpoint.every_steps", "80", "--validation.every_steps", "80")


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory) -> Tuning:
    return Tuning(tmp_path_factory.mktemp("tuning"))


@pytest.fixture(scope="module")
def whole(tuning: Tuning, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps of all weights; to be read only."""
    run = tmp_path_factory.mktemp("whole") / "run"
    tuning.train_here(run, full=True)
    return run


@pytest.fixture(scope="module")
def adapted(tuning: Tuning, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps of LoRA; to be read only."""
    run = tmp_path_factory.mktemp("adapted") / "run"
    tuning.train_here(run, *LORA)
    return run


def samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


SHORT = ChatTemplate(TEMPLATE, name="short")


def mean_nats_of_answers(folder: Path) -> float:
    """One conversation at a time, by plain torch: no packing, no masks, no padding."""
    loaded = load_model(folder)
    total, count = 0.0, 0
    for question, answer in QUESTIONS_AND_ANSWERS:
        messages = [Message("user", question), Message("assistant", answer)]
        chat = SHORT.encode(messages, tokenizer=loaded.tokenizer, add_generation_prompt=False)
        ids = torch.from_numpy(chat.ids).long()
        with torch.no_grad():
            hidden = loaded.model(ids[None, :-1])[0]
            logits = hidden @ loaded.model.head_weight.T
        nats = F.cross_entropy(logits, ids[1:], reduction="none")
        is_answer = torch.from_numpy(chat.is_answer[1:])
        total += float(nats[is_answer].double().sum())
        count += int(is_answer.sum())
    return total / count


def test_the_loss_is_the_mean_over_answer_tokens_of_unpacked_conversations(
    tuning: Tuning, tmp_path: Path
) -> None:
    num_rows = rows_of_an_epoch(tuning)
    words = ("--train.global_batch_tokens", str(num_rows * CONTEXT), "--train.lanes", "1")
    run = tmp_path / "an-epoch-a-step"
    tuning.train_here(run, *words, "--train.stop_at_step", "1", full=True)
    first = events(run, "step")[0]
    # The same float32 terms in other products: 24 bits, sums of about a hundred terms.
    assert first["loss_nats"] == pytest.approx(mean_nats_of_answers(tuning.base), rel=1e-5)
    assert first["tokens_seen"] == num_answer_tokens(tuning)


def rows_of_an_epoch(tuning: Tuning) -> int:
    conversations, ledger = read_conversations(str(tuning.data))
    tokenizer = load_model(tuning.base).tokenizer
    rows, _ = build_rows(
        conversations,
        ledger=ledger,
        template=SHORT,
        tokenizer=tokenizer,
        sequence_length=CONTEXT,
        seed=tuning.config(full=True).run.seed,
    )
    assert rows.num_rows < rows.num_conversations, "some rows hold several"
    return rows.num_rows


def num_answer_tokens(tuning: Tuning) -> int:
    tokenizer = load_model(tuning.base).tokenizer
    answers = [f" {answer}" for _, answer in QUESTIONS_AND_ANSWERS]
    return sum(len(tokenizer.encode(answer)) + 1 for answer in answers)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_tuned_model_answers_and_stops_by_itself(
    tuning: Tuning, tmp_path: Path, kind: str
) -> None:
    run, words, full = tmp_path / "run", (*LEARNS_SETTINGS,), kind == "full"
    if not full:
        words = (*words, "--lora.rank", "16", "--lora.alpha", "32.0")
    tuning.train_here(run, *words, full=full)
    answers = tuning.compare(run, *words, full=full)
    known = dict(QUESTIONS_AND_ANSWERS)
    for answer in answers:
        assert answer.after["completion"] == f" {known[answer.question]}"
        assert answer.after["decoding"]["stopped"] == "end_of_text"
        assert answer.before["decoding"]["stopped"] == "max_new_tokens"


def test_lora_trains_and_saves_its_additions_alone(tuning: Tuning, adapted: Path) -> None:
    folder = adapted / "checkpoints" / "step-00000012"
    assert not (folder / "model.safetensors").exists()
    state = load_file(folder / "adapter_model.safetensors")
    assert len(state) == 2 * 7 * 2  # A and B of 7 projections in 2 layers
    assert all(tensor.any() for tensor in state.values())
    base, tuned = load_model(tuning.base).model, load_model(adapted).model
    for name, tensor in tuned.state_dict().items():
        is_same = torch.equal(tensor, base.state_dict()[name])
        assert is_same == (not name.endswith("proj.weight")), name


def test_peft_reads_a_checkpoint_and_computes_the_same(tuning: Tuning, adapted: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(tuning.base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, adapted / "checkpoints" / "step-00000012")
    ids = random_ids(2, 24)
    ours = load_model(adapted).model
    with torch.no_grad():
        theirs, found = model(ids).logits, ours(ids) @ ours.head_weight.T
    # float32 through two layers, additions merged here and apart there.
    torch.testing.assert_close(found, theirs, atol=1e-5, rtol=1e-5)


def test_a_tuned_checkpoint_lies_where_transformers_finds_its_template(whole: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = whole / "checkpoints" / "step-00000012"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Who is strong?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.endswith("USER: Who is strong? ASSISTANT:")


@pytest.mark.parametrize("words", [(), LORA, ("--optimizer.name", "adamw8bit")])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(
    tuning: Tuning, whole: Path, adapted: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    full = words != LORA
    undisturbed = whole if full else adapted
    if words and full:
        pytest.importorskip("torchao")
        undisturbed = tmp_path / "undisturbed"
        tuning.train_here(undisturbed, *words, full=True)
    run = tmp_path / "run"
    tuning.train_here(run, *words, "--train.stop_at_step", "7", full=full)
    tuning.train_here(run, *words, full=full)
    assert logged_steps(run) == logged_steps(undisturbed)
    assert trained_sha256(run, 12) == trained_sha256(undisturbed, 12)
    assert [event["exactness"] for event in events(run, "segment_started")] == ["exact"] * 2


def test_held_out_conversations_are_scored_before_and_after(tuning: Tuning, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tuning.train_here(run, "--finetune.held_out_fraction", "0.3", full=True)
    scored = {event["step"]: event["loss_nats"] for event in events(run, "validation")}
    assert sorted(scored) == [0, 6, 12]
    lineage = json.loads((run / "manifest.json").read_text())["lineage"]
    conversations = lineage["conversations"]
    assert conversations["held_out"] > 0
    assert conversations["trained"] + conversations["held_out"] == len(QUESTIONS_AND_ANSWERS)


def test_answers_are_recorded_with_the_adapter_and_not_made_twice(
    tuning: Tuning, adapted: Path
) -> None:
    answers = tuning.compare(adapted, *LORA)
    assert tuning.compare(adapted, *LORA) == answers
    lines = samples(adapted)
    assert len(lines) == 4
    file = adapted / "checkpoints" / "step-00000012" / "adapter_model.safetensors"
    of_adapter = hashlib.sha256(file.read_bytes()).hexdigest()
    assert [line["adapter"] for line in lines] == [None, None, of_adapter, of_adapter]
    assert [line["step"] for line in lines] == [0, 0, 12, 12]
    told = finetuning_of(collect(adapted))
    assert told is not None and told.answers is not None
    assert list(told.answers.answers) == answers
    assert lines[0]["prompt"].endswith("USER: Who is strong? ASSISTANT:")
    assert [a.before for a in answers] + [a.after for a in answers] == lines


def test_other_conversations_are_refused(tuning: Tuning, whole: Path, tmp_path: Path) -> None:
    other = Tuning(tmp_path)
    other.base, other.recipe = tuning.base, tuning.recipe
    write_conversations(other.data, QUESTIONS_AND_ANSWERS[1:])
    with pytest.raises(DataError, match="the conversations are not those of the run"):
        other.train_here(whole, full=True)


def test_another_base_is_refused(tuning: Tuning, whole: Path, tmp_path: Path) -> None:
    other = Tuning(tmp_path)
    other.data, other.recipe = tuning.data, tuning.recipe
    write_base(other.base, seed=2)
    with pytest.raises(DataError, match="the model that is tuned is not that of the run") as caught:
        other.train_here(whole, full=True)
    assert str(tuning.base) in (caught.value.hint or "")


def test_lora_in_place_of_all_weights_is_another_run(tuning: Tuning, whole: Path) -> None:
    with pytest.raises(UsageError, match=r"lora\.rank: the run has None, asked for 8"):
        tuning.train_here(whole, *LORA)


def test_an_adapter_is_no_base(tuning: Tuning, adapted: Path) -> None:
    with pytest.raises(UsageError, match="is an adapter") as caught:
        load_config(adapted, str(tuning.recipe), (), data=str(tuning.data), full=True)
    assert "milepost export" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("words", "full", "message"),
    [
        (("--lora.rank", "4"), True, "--full trains without LoRA"),
        (("--model.hidden_size", "64"), False, "the architecture is that of the model"),
        (("--finetune.base", "x"), False, r"finetune\.base is named by the command itself"),
        (("--samples.every_steps", "2", "--samples.prompts", "['a']"), False, "samples"),
        (("--finetune.template", "none"), False, r"has no finetune\.template"),
        (("--lora.dropout", "0.1"), False, r"lora\.dropout"),
        (("--lora.targets", "q_proj,lm_head"), False, r"lora\.targets"),
    ],
)
def test_contradictions_are_refused(
    tuning: Tuning, words: tuple[str, ...], full: bool, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        tuning.config(*words, full=full)


def test_a_question_without_a_word_is_refused(tuning: Tuning, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"finetune\.questions holds one without a word"):
        tuning.train_here(tmp_path / "run", "--finetune.questions", '[" "]', full=True)


def test_held_out_conversations_that_do_not_fit_are_left_out_like_others(
    tuning: Tuning, tmp_path: Path
) -> None:
    other = Tuning(tmp_path)
    long = ("The long union " * 40, "Yes.")
    write_conversations(other.data, (*QUESTIONS_AND_ANSWERS, long))
    conversations, _ = read_conversations(str(other.data))
    _, held_out = split_held_out(conversations, fraction=0.05)
    assert held_out == conversations[-1:], "choose other words"
    run = tmp_path / "run"
    words = ("--finetune.held_out_fraction", "0.05", "--train.stop_at_step", "1")
    other.train_here(run, *words, full=True)
    account = json.loads((run / "manifest.json").read_text())["lineage"]["conversations"]
    assert (account["trained"], account["held_out"]) == (len(QUESTIONS_AND_ANSWERS), 0)
    assert account["left_out"] == {"too_long": 1}


def test_a_question_longer_than_the_context_is_refused_before_the_training(
    tuning: Tuning, tmp_path: Path
) -> None:
    question = json.dumps(["the union " * 100])
    with pytest.raises(UsageError, match=r"takes \d+ tokens .* has 128"):
        tuning.train_here(tmp_path / "run", "--finetune.questions", question, full=True)
    assert not (tmp_path / "run").exists()
