"""`milepost probe`: what it shows, what it records, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from milepost.cli.main import run
from milepost.core.files import sha256_of_file
from milepost.inference.load import load_model
from milepost.model.lora import add_lora, base_sha256, lora_layers
from milepost.posttrain.probe import next_token_log_probabilities
from milepost.runs.layout import RunLayout
from milepost.runs.probes import read_probes
from milepost.text.chat_template import load_template
from milepost.text.tokenizer import Tokenizer
from tests.adapters import save_adapter
from tests.tiny_models import tiny_model, write_model_folder, write_tiny_run


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> RunLayout:
    return write_tiny_run(tmp_path_factory.mktemp("runs") / "run", 100, 200, 300)


def test_one_checkpoint_is_shown_with_tokens_and_completions(layout, capsys) -> None:
    words = ["probe", str(layout.root), "--prompt", "The state", "--max-new-tokens", "3"]
    assert run(words) == 0
    shown = capsys.readouterr()
    assert shown.err == f"recorded in {layout.probes}\n"
    numbers, tokens, written = shown.out.rstrip("\n").split("\n\n")
    head, columns, base, space, *_ = numbers.splitlines()
    assert head == "step 300, the next token after each prompt (nats)"
    named = ["tokens", "KL(base‖it)", "KL(it‖base)", "blanks", "aside", "entropy", "likeliest"]
    assert columns.split() == named
    assert base.split()[:5] == ["base", "2", "-", "-", "-"]
    assert space.split()[:2] == ["space", "3"] and float(space.split()[2]) > 0
    rows = {line[:12].strip(): line[12:].strip() for line in tokens.splitlines()[1:]}
    assert rows["base"] == "The ·state"
    assert rows["space"] == "The ·state ·"
    assert rows["newline"] == "The ·state ⏎"
    assert rows["lower case"] == "the ·state"
    assert [line.split()[0] for line in written.splitlines()[1:3]] == ["base", "space"]
    records, _ = read_probes(layout.probes)
    assert [(r["step"], r["variant"]) for r in records][:2] == [(300, "base"), (300, "space")]


def test_of_a_long_prompt_only_the_change_is_shown(layout, capsys) -> None:
    prompt = "the people of the states are the union"
    words = ["probe", str(layout.root), "--prompt", prompt, "--max-new-tokens", "0"]
    assert run(words) == 0
    out = capsys.readouterr().out
    assert "  space       … ·the ·union ·\n" in out
    assert "what the model writes" not in out


def test_of_several_checkpoints_there_is_a_line_a_step(layout, tmp_path, capsys) -> None:
    file = tmp_path / "v.jsonl"
    file.write_text('{"name": "and", "prompt": "The and"}\n{"prompt": "A\\u001b[31m"}')
    words = ["probe", str(layout.root), "--steps", "100,300", "--prompt", "The"]
    assert run([*words, "--variants", str(file), "--max-new-tokens", "1"]) == 0
    head, columns, *rows = capsys.readouterr().out.splitlines()
    assert head == "KL(base‖variant) of the next token, nats, by step"
    assert columns.split()[:4] == ["step", "and", "line", "2"]
    assert [row.split()[0] for row in rows] == ["100", "300"]
    by_step = {
        (line["step"], line["variant"]): line["kl_nats"] for line in read_probes(layout.probes)[0]
    }
    for row in rows:
        step, *divergences = row.split()[:3]
        expected = [by_step[int(step), name] for name in ("and", "line 2")]
        assert [float(value) for value in divergences] == pytest.approx(expected, abs=5e-5)


def test_a_file_alone_brings_its_own_base(layout, tmp_path, capsys) -> None:
    file = tmp_path / "v.txt"
    file.write_text("The\nThe \n")
    words = ["probe", str(layout.checkpoint(100)), "--variants", str(file), "--json"]
    assert run([*words, "--max-new-tokens", "1"]) == 0
    lines = json.loads(capsys.readouterr().out)["probes"]
    assert [(line["base"], line["prompt"]) for line in lines] == [("The", "The"), ("The", "The ")]
    assert [line["tokens"] for line in lines] == [["The"], ["The", "·"]]
    assert [line["step"] for line in lines] == [100, 100]
    assert lines[0]["kl_nats"] == 0 and lines[0]["decoding"]["bos"] is True


def test_a_foreign_model_is_probed_with_the_papers_question(tmp_path, gpt2: Tokenizer, capsys):
    model = tiny_model(vocab_size=gpt2.vocab_size, max_position_embeddings=64)
    write_model_folder(tmp_path, model, tokenizer=gpt2)
    assert run(["probe", str(tmp_path), "--max-new-tokens", "2"]) == 0
    shown = capsys.readouterr()
    assert f"{tmp_path}, the next token" in shown.out and shown.err == ""
    tokens = shown.out.split("\n\n")[1]
    assert "bulb ? ·ASS IST ANT :\n" in tokens
    assert "  space         … ANT : ·\n" in tokens
    assert not (tmp_path / "probes.jsonl").exists()


def test_before_a_tuned_model_s_prompt_stands_nothing_as_in_its_training(tmp_path, capsys) -> None:
    write_model_folder(tmp_path, tiny_model())
    words = ["probe", str(tmp_path), "--prompt", "The", "--max-new-tokens", "1", "--json"]
    entropies = {}
    for template in (None, load_template("vicuna-1.1").source):
        if template is not None:
            (tmp_path / "chat_template.jinja").write_text(template)
        assert run(words) == 0
        base, *_ = json.loads(capsys.readouterr().out)["probes"]
        entropies[base["decoding"]["bos"]] = base["entropy_nats"]
    loaded = load_model(tmp_path)
    for has_beginning, entropy in entropies.items():
        ids = [loaded.tokenizer.beginning_id] * has_beginning + loaded.tokenizer.encode("The")
        log_p = next_token_log_probabilities(loaded, [ids])[0]
        assert entropy == pytest.approx(-(log_p.exp() * log_p).sum().item(), abs=1e-6)
    assert set(entropies) == {True, False} and abs(entropies[True] - entropies[False]) > 1e-4


def test_an_adapter_is_put_on_the_model_and_its_hash_recorded(tmp_path, capsys) -> None:
    model = tiny_model()
    write_model_folder(tmp_path / "base", model)
    base = base_sha256(model)
    add_lora(model, rank=2, alpha=8, dropout=0, targets=["q_proj", "down_proj"], seed=1)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B.weight, generator=torch.Generator().manual_seed(2))
    save_adapter(tmp_path / "adapter", model, base="base", base_sha256=base)
    words = ["probe", str(tmp_path / "base"), "--prompt", "The", "--max-new-tokens", "0"]
    entropies = []
    for more in ([], ["--adapter", str(tmp_path / "adapter")]):
        assert run([*words, "--json", *more]) == 0
        line = json.loads(capsys.readouterr().out)["probes"][0]
        entropies.append(line["entropy_nats"])
    assert line["adapter"] == sha256_of_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert abs(entropies[0] - entropies[1]) > 0.01
    assert run([*words, *more]) == 0
    head = capsys.readouterr().out.splitlines()[0]
    assert f"{tmp_path}/base with {tmp_path}/adapter, the next token" in head
    write_model_folder(tmp_path / "base", tiny_model(seed=9))
    assert run([*words, *more]) == 4
    assert "was trained on another base" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--steps", "7"], 4, "has no checkpoint of step 7"),
        (["--steps", "some"], 2, "--steps 'some' cannot be read"),
        (["--question", "b"], 2, "a question or a prompt, not both"),
        (["--top", "0"], 2, "top is 0"),
        (["--max-new-tokens", "-1"], 2, "max_new_tokens is -1"),
        (["--variants", "none.txt"], 2, "there is no file none.txt"),
        (["--variants", "pyproject.toml"], 2, "not from pyproject.toml"),
    ],
)
def test_probe_refuses_with_one_line_and_a_hint(layout, capsys, words, code, message) -> None:
    assert run(["probe", str(layout.root), "--prompt", "a", *words]) == code
    talk = capsys.readouterr().err
    assert message in talk and "\nhint: " in talk and "Traceback" not in talk


def test_a_prompt_longer_than_the_context_is_said_with_both_numbers(layout, capsys) -> None:
    assert run(["probe", str(layout.root), "--prompt", "z" * 60]) == 2
    talk = capsys.readouterr().err
    assert "the variant 'base' has 61 tokens" in talk and "the model's context is 48" in talk


def test_steps_need_a_run(layout: RunLayout, capsys) -> None:
    folder: Path = layout.checkpoint(100)
    assert run(["probe", str(folder), "--steps", "all"]) == 2
    assert "--steps needs a run" in capsys.readouterr().err
