"""Variants of a prompt, tokens as a reader sees them, and what a model makes of each."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from milepost.core.errors import DataError, DivergedError, MilepostError, UsageError
from milepost.inference.engine import complete
from milepost.inference.load import LoadedModel
from milepost.posttrain.probe import (
    ProbeSettings,
    Provenance,
    next_token_log_probabilities,
    probe,
    sum_of_classes,
)
from milepost.posttrain.variants import (
    OTHER_SYSTEM,
    Variant,
    read_variants,
    variants_of_prompt,
    variants_of_question,
)
from milepost.posttrain.visible_tokens import VisibleTokens, on_one_line, visible
from milepost.runs.probes import append_probe, read_probes
from milepost.text.chat_template import DEFAULT_SYSTEM
from milepost.text.tokenizer import Tokenizer
from tests.tiny_models import tiny_model, tiny_tokenizer

PROVENANCE = Provenance("ab" * 32, None, "a plain processor", "0.1.0", "2026-01-05T09:00:00.000Z")


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedModel:
    """With eight rows of vocabulary that the tokenizer does not have."""
    return LoadedModel(tiny_model(vocab_size=288), tiny_tokenizer(tmp_path), 7, tmp_path)


def probed(loaded: LoadedModel, *prompts: str, **settings: int):
    variants = [Variant(f"v{number}", prompt) for number, prompt in enumerate(prompts)]
    return probe(loaded, variants, settings=ProbeSettings(**settings), provenance=PROVENANCE)


def test_the_papers_example_is_cut_as_the_paper_prints_it(gpt2: Tokenizer) -> None:
    # Section IV.E; it prints a space as G.
    printed = "ASS IST ANT : GBerlin Gwas Gfounded Gin Gthe G13 th Gcentury .".replace("G", "·")
    shown = VisibleTokens(gpt2)
    answer = gpt2.encode("ASSISTANT: Berlin was founded in the 13th century.")
    assert [shown.show(token_id) for token_id in answer] == printed.split()
    prompt = gpt2.encode("ASSISTANT: ")
    assert [shown.show(token_id) for token_id in prompt] == ["ASS", "IST", "ANT", ":", "·"]


def test_tokens_are_shown_to_the_last_byte(gpt2: Tokenizer) -> None:
    shown = VisibleTokens(gpt2)
    ids = gpt2.encode(" 😀\n\t\x1b·")
    assert [shown.show(token_id) for token_id in ids] == [
        r"·\xf0\x9f\x98",
        r"\x80",
        "⏎",
        "⇥",
        r"\x1b",
        r"\xb7",
    ]
    assert shown.show(gpt2.end_of_text_id) == "<|endoftext|>"
    assert len(gpt2.encode("<|endoftext|>")) > 1
    assert shown.show(gpt2.vocab_size) == f"?{gpt2.vocab_size}"


def test_tokens_of_sentencepiece_are_shown_by_the_same_signs() -> None:
    vocab = {"</s>": 0, "<0xE2>": 1, "▁Berlin": 2, "a": 3, "<0x0A>": 4}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True}
    tokenizer = Tokenizer(name="tiny", content={"model": model}, end_of_text="</s>")
    shown = VisibleTokens(tokenizer)
    assert [shown.show(n) for n in range(5)] == ["</s>", r"\xe2", "·Berlin", "a", "⏎"]


def test_a_text_is_shown_without_what_steers_a_terminal() -> None:
    assert visible("a b\n\x1b[31m\u2028·") == "a·b⏎\\x1b[31m\\u2028\\xb7"
    assert on_one_line("a b\n·") == "a b⏎\\xb7"


def test_a_question_is_varied_by_one_thing_at_a_time() -> None:
    question = "Who was Ada?"
    varied = {v.name: v.prompt for v in variants_of_question(question)}
    chat = DEFAULT_SYSTEM + " USER: {} ASSISTANT:"
    assert varied == {
        "base": chat.format("Who was Ada?"),
        "space": chat.format("Who was Ada?") + " ",
        "newline": chat.format("Who was Ada?") + "\n",
        "no system": "USER: Who was Ada? ASSISTANT:",
        "other system": f"{OTHER_SYSTEM} USER: Who was Ada? ASSISTANT:",
        "line breaks": f"{DEFAULT_SYSTEM}\n\nUSER: Who was Ada?\n\nASSISTANT:",
        "lower case": chat.format("who was ada?"),
        "upper case": chat.format("WHO WAS ADA?"),
        "no mark": chat.format("Who was Ada"),
    }
    assert next(iter(varied)) == "base"
    assert variants_of_question("  Who was Ada? ") == variants_of_question(question)


def test_a_text_is_varied_and_equal_variants_are_left_out() -> None:
    assert [(v.name, v.prompt) for v in variants_of_prompt(" ab. ")] == [
        ("base", " ab. "),
        ("space", " ab.  "),
        ("newline", " ab. \n"),
        ("trimmed", "ab."),
        ("upper case", " AB. "),
        ("end mark", " ab. ."),
    ]
    assert [v.name for v in variants_of_prompt("7")] == ["base", "space", "newline", "end mark"]
    assert variants_of_prompt("a.")[-1] == Variant("no mark", "a")


def test_a_text_file_has_a_prompt_a_line_with_its_blanks(tmp_path: Path) -> None:
    file = tmp_path / "v.txt"
    file.write_bytes("ASSISTANT: \r\n\n  é\u2028b\nlast".encode())
    assert read_variants(file) == [
        Variant("line 1", "ASSISTANT: "),
        Variant("line 3", "  é\u2028b"),
        Variant("line 4", "last"),
    ]


def test_a_json_file_has_prompts_and_questions(tmp_path: Path) -> None:
    file = tmp_path / "v.jsonl"
    rows = [
        {"prompt": "a\n"},
        {"name": "empty", "prompt": ""},
        {"question": "b?"},
        {"name": "terse", "question": "b?", "system": "Yes or no."},
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    assert read_variants(file) == [
        Variant("line 1", "a\n"),
        Variant("empty", ""),
        Variant("line 3", f"{DEFAULT_SYSTEM} USER: b? ASSISTANT:"),
        Variant("terse", "Yes or no. USER: b? ASSISTANT:"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("v.txt", b"", "has 0 variants"),
        ("v.txt", b"a\n" * 257, "has 257 variants"),
        ("v.txt", b"a\n\xff\n", "v.txt:2 is not UTF-8"),
        ("v.txt", b"a" * ((16 << 20) + 1), "is larger than"),
        ("v.jsonl", b'{"prompt": "a"}\nb', "v.jsonl:2 is not JSON"),
        ("v.jsonl", b"[" * 100_000, "v.jsonl:1 is not JSON"),
        ("v.jsonl", b"[]", "v.jsonl:1 is not an object of texts"),
        ("v.jsonl", b'{"prompt": 7}', "v.jsonl:1 is not an object of texts"),
        ("v.jsonl", b'{"promt": "a", "prompt": "a"}', "unknown key 'promt'"),
        ("v.jsonl", b'{"name": "a"}', "has not one of prompt and question"),
        ("v.jsonl", b'{"prompt": "a", "question": "a"}', "has not one of prompt and question"),
        ("v.jsonl", b'{"prompt": "a", "system": "b"}', "has a system sentence beside a prompt"),
        ("v.jsonl", b'{"prompt": "a", "name": "line 2"}\n{"prompt": "b"}', "two variants named"),
        ("v.jsonl", b'{"prompt": "a", "name": " "}', "v.jsonl:1 has an empty name"),
        ("v.jsonl", b'{"prompt": "a \\ud83d"}', "v.jsonl:1 holds a lone surrogate"),
        ("v.jsonl", b'{"question": "a\\u0000"}', "v.jsonl:1: a message of the user holds a NUL"),
        ("v.txt", b"a\nb\na\n", "the variants 'line 1' and 'line 3' are the same prompt"),
        ("v.csv", b"a", "not from v.csv"),
    ],
)
def test_a_file_out_of_form_is_refused(tmp_path: Path, name, content, message) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MilepostError, match=message) as caught:
        read_variants(tmp_path / name)
    assert caught.value.exit_code == (2 if name == "v.csv" else 3)


@pytest.mark.parametrize(("name", "line"), [("v.txt", "The "), ("v.jsonl", '{"prompt": "The "}')])
def test_the_mark_that_some_editors_put_before_a_text_is_no_part_of_it(
    tmp_path: Path, name: str, line: str
) -> None:
    (tmp_path / name).write_text(line, encoding="utf-8-sig")
    assert read_variants(tmp_path / name) == [Variant("line 1", "The ")]


def test_divergences_are_those_of_each_prompt_alone(loaded: LoadedModel) -> None:
    prompts = ["The state", "The state ", "T", "The state of the union and the people"]
    records = probed(loaded, *prompts, num_likeliest=3)
    model, tokenizer = loaded.model, loaded.tokenizer

    def alone(prompt: str) -> torch.Tensor:
        ids = [tokenizer.end_of_text_id, *tokenizer.encode(prompt)]
        logits_V = F.linear(model(torch.tensor([ids]))[0, -1], model.head_weight[:280])
        return logits_V.detach().log_softmax(dim=0)

    base = alone(prompts[0])
    for prompt, record in zip(prompts, records, strict=True):
        mine = alone(prompt)
        # Float32 logits of 7 digits, of another batch: 1e-5 is the bound for the logits.
        near = {"abs": 1e-5, "rel": 0}
        forward = F.kl_div(mine, base, log_target=True, reduction="sum")  # KL(base || mine)
        reverse = F.kl_div(base, mine, log_target=True, reduction="sum")
        assert record.kl_nats == pytest.approx(float(forward), **near)
        assert record.reverse_kl_nats == pytest.approx(float(reverse), **near)
        entropy = torch.distributions.Categorical(logits=mine).entropy()
        assert record.entropy_nats == pytest.approx(float(entropy), **near)
        probabilities, ids = mine.exp().topk(3)
        assert [likely.token_id for likely in record.likeliest] == ids.tolist()
        found = [likely.probability for likely in record.likeliest]
        assert found == pytest.approx(probabilities.tolist(), **near)
    assert records[0].kl_nats == records[0].reverse_kl_nats == 0
    assert records[1].kl_nats > 0.01 and records[1].kl_nats != records[1].reverse_kl_nats


def test_tokens_that_differ_in_blanks_before_them_are_one_class(gpt2: Tokenizer) -> None:
    classes = VisibleTokens(gpt2).classes_aside_from_blanks()
    assert len(classes) == gpt2.vocab_size and set(classes) == set(range(max(classes) + 1))

    def class_of(text: str) -> int:
        [token_id] = gpt2.encode(text)
        return classes[token_id]

    assert class_of("Paris") == class_of(" Paris") != class_of(" London")
    assert class_of(" ") == class_of("\n") != class_of("-")
    assert class_of(" the") != class_of(" The")


def test_blanks_aside_the_divergence_is_that_of_the_summed_probabilities(
    loaded: LoadedModel,
) -> None:
    prompts = ["The state", "The state ", "The state\n"]
    rows = [[0, *loaded.tokenizer.encode(prompt)] for prompt in prompts]
    log_p_RV = next_token_log_probabilities(loaded, rows).detach()
    classes = VisibleTokens(loaded.tokenizer).classes_aside_from_blanks()
    assert len(set(classes)) < len(classes)
    summed = [[0.0] * (max(classes) + 1) for _ in prompts]
    for row, log_p_V in zip(summed, log_p_RV.tolist(), strict=True):
        for number, log_p in zip(classes, log_p_V, strict=True):
            row[number] += math.exp(log_p)
    for row, record in zip(summed, probed(loaded, *prompts), strict=True):
        expected = sum(p * math.log(p / q) for p, q in zip(summed[0], row, strict=True))
        # Sums of 280 float64 in another order.
        assert record.kl_nats_aside_from_blanks == pytest.approx(expected, abs=1e-12)
        assert record.kl_nats_aside_from_blanks <= record.kl_nats


def test_a_class_of_tokens_that_never_come_is_not_rounded_to_nothing() -> None:
    log_p_RV = torch.tensor([[-2000.0, -2001.0, 0.0]], dtype=torch.float64)
    found = sum_of_classes(log_p_RV, torch.tensor([0, 0, 1]))
    expected = log_p_RV[0, :2].logsumexp(dim=0)
    torch.testing.assert_close(found, torch.stack([expected, expected * 0])[None])


def test_completions_are_the_engines_and_end_for_its_reasons(loaded: LoadedModel) -> None:
    prompts = ["The state", "and ", "z" * 40]
    expected = complete(loaded.model, loaded.tokenizer, prompts, max_new_tokens=20)
    records = probed(loaded, *prompts, max_new_tokens=20)
    assert [r.completion for r in records] == [c.text for c in expected]
    assert [r.completion_ids for r in records] == [c.token_ids for c in expected]
    assert [r.decoding["stopped"] for r in records] == [c.stopped for c in expected]
    assert {c.stopped for c in expected} == {"max_new_tokens", "context"}


def test_a_model_that_ends_the_text_says_so(loaded: LoadedModel) -> None:
    model, end = loaded.model, loaded.tokenizer.end_of_text_id
    ids = torch.tensor([[end, *loaded.tokenizer.encode("The")]])
    with torch.no_grad():
        model.head_weight[end] = 10 * model(ids)[0, -1]
    [record] = probed(loaded, "The")
    assert (record.completion, record.completion_ids) == ("", [])
    assert record.decoding["stopped"] == "end_of_text"
    assert record.likeliest[0].token == "<|endoftext|>"


def test_no_completion_is_written_where_none_is_asked_for(loaded: LoadedModel) -> None:
    [record] = probed(loaded, "The", max_new_tokens=0)
    assert (record.completion, record.decoding["stopped"]) == ("", None)


def test_more_variants_than_a_batch_are_the_same_as_few(loaded: LoadedModel) -> None:
    prompts = ["The " + "a" * number for number in range(18)]
    many = probed(loaded, *prompts, max_new_tokens=2)
    for number in (15, 16, 17):
        [_, alone] = probed(loaded, prompts[0], prompts[number], max_new_tokens=2)
        assert many[number].token_ids == alone.token_ids
        # As above: the logits may differ by 1e-5 in another batch.
        assert many[number].kl_nats == pytest.approx(alone.kl_nats, abs=1e-5)


@pytest.mark.parametrize(("length", "is_refused"), [(46, False), (47, True), (48, True)])
def test_a_prompt_that_leaves_no_room_is_refused(loaded: LoadedModel, length, is_refused) -> None:
    prompt = "z" * length  # a token each
    if not is_refused:
        assert len(probed(loaded, prompt)[0].token_ids) == length
        return
    with pytest.raises(UsageError) as caught:
        probed(loaded, "a", prompt)
    assert f"'v1' has {length + 1} tokens" in caught.value.message
    assert "the model's context is 48" in caught.value.message


def test_a_diverged_model_is_refused(loaded: LoadedModel) -> None:
    with torch.no_grad():
        loaded.model.head_weight[3] = torch.nan
    with pytest.raises(DivergedError, match="not finite"):
        probed(loaded, "The")


def test_half_a_character_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(DataError, match="lone surrogate"):
        probed(loaded, "\ud83d")


def test_of_two_lines_that_asked_the_same_the_later_counts(tmp_path, loaded) -> None:
    log = tmp_path / "probes.jsonl"
    first, second = probed(loaded, "The", "A")
    for record in (first, second, first):
        append_probe(log, record)
    log.write_text(log.read_text() + '{"v":1}\n{"v":1,"pro')
    assert read_probes(log) == ([second.as_line(), first.as_line()], 2)
    assert first.probe_id != second.probe_id != probed(loaded, "A")[0].probe_id
