"""`milepost chat`: what is asked, what is remembered, what the commands do."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest

from milepost.cli.main import run
from milepost.core import console
from milepost.core.errors import UsageError
from milepost.inference.conversation import Conversation, Turn
from milepost.model.lora import LORA_TARGETS, add_lora, base_sha256, lora_layers
from milepost.text.chat_template import VICUNA_JINJA, vicuna
from tests.adapters import save_adapter
from tests.tiny_models import tiny_model, tiny_tokenizer, write_model_folder, write_tiny_run

CONTEXT = 400


@pytest.fixture
def model_folder(tmp_path) -> Path:
    folder = tmp_path / "model"
    write_model_folder(folder, tiny_model(max_position_embeddings=CONTEXT))
    return folder


def _chat(monkeypatch, capsys, lines: list[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a chat with these lines from a pipe."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    code = run(["chat", *words])
    return code, *capsys.readouterr()


def _exchanges(monkeypatch, capsys, lines: list[str], *words: str) -> list[dict]:
    code, out, _ = _chat(monkeypatch, capsys, lines, *words, "--json", "--max-new-tokens", "8")
    assert code == 0
    return json.loads(out)["exchanges"]


def test_questions_from_a_pipe_are_answered(model_folder, monkeypatch, capsys) -> None:
    greedy = (str(model_folder), "--temperature", "0")
    lines = ["The state", "", "of the union"]
    code, out, talk = _chat(monkeypatch, capsys, lines, *greedy, "--max-new-tokens", "8")
    said = _exchanges(monkeypatch, capsys, lines, *greedy)
    assert code == 0 and [exchange["question"] for exchange in said] == [lines[0], lines[2]]
    printable = re.sub(r"[^\n -~]", "\ufffd", "\n".join(e["answer"] for e in said) + "\n")
    assert re.sub(r"[^\n -~]", "\ufffd", out) == printable and out.strip()
    assert "hold no chat template" in talk and "--raw" in talk


def test_a_tuned_model_is_asked_in_its_own_template(model_folder, monkeypatch, capsys) -> None:
    (model_folder / "chat_template.jinja").write_text(VICUNA_JINJA)
    _, _, talk = _chat(monkeypatch, capsys, [], str(model_folder))
    assert "template" not in talk


def test_the_history_is_part_of_the_next_question_until_reset(
    model_folder, monkeypatch, capsys
) -> None:
    lines = ["The state", "of the union", "/reset", "of the union", "/reset", "The state"]
    said = _exchanges(monkeypatch, capsys, lines, str(model_folder), "--temperature", "0")
    assert said[0]["answer"] == said[3]["answer"]
    assert said[1]["answer"] != said[2]["answer"]


def test_raw_continues_each_line_by_itself(model_folder, monkeypatch, capsys) -> None:
    lines = ["The state", "of the union", "The state"]
    words = (str(model_folder), "--raw", "--temperature", "0")
    said = _exchanges(monkeypatch, capsys, lines, *words)
    assert said[0]["answer"] == said[2]["answer"] != said[1]["answer"]


def test_a_step_is_changed_in_mid_conversation(tmp_path, monkeypatch, capsys) -> None:
    layout = write_tiny_run(tmp_path / "run", 10, 20)
    words = (str(layout.root), "--raw", "--temperature", "0")
    lines = ["the", "/step 10", "/step", "the", "/step 30"]
    code, out, talk = _chat(monkeypatch, capsys, lines, *words, "--max-new-tokens", "8")
    assert code == 4 and len(set(out.splitlines())) > 1
    assert "now step 10\nstep 10; " in talk
    assert "has no checkpoint of step 30" in talk


def test_an_adapter_is_put_on_its_base(model_folder, tmp_path, monkeypatch, capsys) -> None:
    model = tiny_model(max_position_embeddings=CONTEXT)
    base = base_sha256(model)
    add_lora(model, rank=2, alpha=4.0, dropout=0.0, targets=LORA_TARGETS, seed=1)
    for _, layer in lora_layers(model):
        layer.lora_B.weight.data.normal_(0.0, 0.3)
    save_adapter(tmp_path / "adapter", model, base=str(model_folder), base_sha256=base)
    lines, greedy = ["the state"], ("--raw", "--temperature", "0")
    adapter = str(tmp_path / "adapter")
    alone = _exchanges(monkeypatch, capsys, lines, str(model_folder), *greedy)
    named = _exchanges(monkeypatch, capsys, lines, str(model_folder), "--adapter", adapter, *greedy)
    found = _exchanges(monkeypatch, capsys, lines, adapter, *greedy)
    assert found[0]["answer"] == named[0]["answer"] != alone[0]["answer"]


def test_the_seed_decides_the_draws(model_folder, monkeypatch, capsys) -> None:
    lines = ["the", "/seed 1", "the", "/seed 0", "the"]
    said = _exchanges(monkeypatch, capsys, lines, str(model_folder), "--raw", "--temperature", "1")
    assert said[0]["answer"] == said[2]["answer"] != said[1]["answer"]


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("/stpe 4", "there is no command /stpe", "did you mean /step?"),
        ("/blue", "there is no command /blue", "/help shows all"),
        ("/temperature warm", "/temperature is given 'warm'", "give a number"),
        ("/top-k 0", "top_k is 0", "give 1 or more"),
        ("/top-k x", "/top-k is given 'x'", "give a whole number or off"),
        ("/step 4", "is one model, it has no steps", "start with a run"),
        ("z" * 500, "the question takes", "ask a shorter one"),
    ],
)
def test_a_line_that_cannot_be_done_is_refused(
    model_folder, monkeypatch, capsys, line: str, message: str, hint: str
) -> None:
    code, _, talk = _chat(monkeypatch, capsys, [line], str(model_folder))
    assert code == 2 and message in talk and f"hint: {hint}" in talk


def test_at_a_terminal_an_error_is_said_and_the_conversation_goes_on(
    model_folder, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(console, "is_terminal", lambda: True)
    lines = iter(["/blue", "/top-p off", "/settings", None])
    monkeypatch.setattr(console, "ask", lambda prompt: next(lines))
    code, _, talk = _chat(monkeypatch, capsys, [], str(model_folder))
    assert code == 0 and "there is no command /blue" in talk
    assert "temperature 0.7, top-k off, top-p off, seed 0, max-new-tokens 256" in talk


def _interrupt_the_third_piece(monkeypatch) -> list[str]:
    """Ctrl-C when the third piece of an answer was shown; what is shown until then."""
    shown: list[str] = []
    show_piece = console.show_piece

    def interrupted(text: str) -> None:
        show_piece(text)
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(console, "show_piece", interrupted)
    return shown


def test_at_a_terminal_an_interrupt_stops_the_answer_and_not_the_program(
    model_folder, monkeypatch, capsys
) -> None:
    shown = _interrupt_the_third_piece(monkeypatch)
    monkeypatch.setattr(console, "is_terminal", lambda: True)
    lines = iter(["The state", "of the union", None])
    monkeypatch.setattr(console, "ask", lambda prompt: next(lines))
    words = (str(model_folder), "--raw", "--max-new-tokens", "8", "--temperature", "0")
    code, out, talk = _chat(monkeypatch, capsys, [], *words)
    first, second = talk.index("(stopped after "), talk.index("(cut off after 8 tokens")
    assert code == 0 and first < second and out.startswith("".join(shown[:3]) + "\n")


def test_through_a_pipe_an_interrupt_ends_the_program(model_folder, monkeypatch, capsys) -> None:
    shown = _interrupt_the_third_piece(monkeypatch)
    words = (str(model_folder), "--raw", "--max-new-tokens", "8", "--temperature", "0")
    code, out, _ = _chat(monkeypatch, capsys, ["The state", "of the union"], *words)
    assert code == 130 and out == "".join(shown) and len(shown) == 3


def test_a_line_that_is_no_text_is_refused(model_folder, monkeypatch, capsys) -> None:
    for errors in ("strict", "surrogateescape"):
        lines = io.TextIOWrapper(io.BytesIO(b"caf\xff\n"), encoding="utf-8", errors=errors)
        monkeypatch.setattr(sys, "stdin", lines)
        assert run(["chat", str(model_folder)]) == 3
        assert "error: standard input is not utf-8\nhint: " in capsys.readouterr().err


def test_a_template_among_the_tokenizers_settings_is_used(
    model_folder, monkeypatch, capsys
) -> None:
    file = model_folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"chat_template": VICUNA_JINJA}
    file.write_text(json.dumps(settings))
    _, _, talk = _chat(monkeypatch, capsys, [], str(model_folder))
    assert "chat template" not in talk


def test_a_model_cannot_steer_the_terminal(model_folder, monkeypatch, capsys) -> None:
    from milepost.text.tokenizer import Tokenizer

    decode = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: "\x1b[2J" + decode(self, ids))
    _, out, _ = _chat(monkeypatch, capsys, ["the"], str(model_folder), "--raw")
    assert "\x1b" not in out and "\ufffd[2J" in out


def test_whole_turns_leave_a_full_context_the_first_ones_first(tmp_path) -> None:
    tokenizer, conversation = tiny_tokenizer(tmp_path), Conversation(vicuna())
    conversation.system = "Be"
    conversation.turns = [Turn(letter * 20, letter * 20) for letter in "abc"]

    def ids(context: int) -> tuple[list[int], int]:
        return conversation.prompt_ids(
            "why", tokenizer=tokenizer, context=context, max_new_tokens=10
        )

    whole, forgotten = ids(1000)
    assert forgotten == 0 and len(conversation.turns) == 3
    assert ids(len(whole) + 10) == (whole, 0)
    shorter, forgotten = ids(len(whole) + 9)
    assert forgotten == 1 and [turn.question[0] for turn in conversation.turns] == ["b", "c"]
    text = tokenizer.decode(shorter)
    assert text.startswith("Be USER: b") and text.endswith("USER: why ASSISTANT:")

    with pytest.raises(UsageError, match="of the model's context of 20, 15 are for questions"):
        ids(20)
    assert len(conversation.turns) == 2


def test_what_is_cut_from_the_history_is_said(model_folder, monkeypatch, capsys) -> None:
    lines = ["q" * 60] * 4
    _, _, talk = _chat(monkeypatch, capsys, lines, str(model_folder), "--max-new-tokens", "30")
    assert "(the context is full: the first turn of the conversation left it)" in talk


def test_a_system_text_and_raw_exclude_each_other(model_folder, monkeypatch, capsys) -> None:
    words = (str(model_folder), "--raw", "--system", "Be brief.")
    code, _, talk = _chat(monkeypatch, capsys, [], *words)
    assert code == 2 and "--system needs a template" in talk
