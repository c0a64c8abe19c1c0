"""`milepost export`: what is refused, what is left behind, what the card says."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from milepost.checkpoint.tensor_files import write_tensors
from milepost.cli.main import run
from milepost.core.errors import UsageError
from milepost.inference.load import load_model
from milepost.model.gguf import from_gguf_rows, to_gguf_rows
from milepost.model.lora import add_lora, base_sha256
from milepost.model.rope import rope_tables, rotate
from milepost.posttrain.gguf_tokenizer import gguf_tokenizer, plain_template
from milepost.posttrain.modelfile import modelfile
from milepost.posttrain.parity import fixed_ids
from milepost.posttrain.weight_shards import plan_shards
from milepost.text.chat_template import DEFAULT_SYSTEM, VICUNA_JINJA, ChatTemplate, Message
from milepost.text.tokenizer import load_tokenizer
from tests.adapters import save_adapter
from tests.tiny_models import tiny_model, tiny_section, write_model_folder


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    write_model_folder(tmp_path / "model", tiny_model())
    return tmp_path / "model"


def export(model: Path, *words: str, to: Path | None = None) -> int:
    return run(["export", str(model), "--to", str(to or model.parent / "out"), *words])


def left_beside(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_rows_in_ggufs_order_turn_as_neighbors_where_ours_turn_as_halves() -> None:
    model = tiny_section()
    name, heads, size = "model.layers.0.self_attn.k_proj.weight", 2, model.head_dim
    weight = torch.randn(heads * size, 32, generator=torch.Generator().manual_seed(1))
    hidden_TD = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    cos, sin = rope_tables(head_dim=size, num_positions=5, theta=500.0)

    def heads_of(rows: Tensor) -> Tensor:
        return (hidden_TD @ rows.T).view(1, 5, heads, size).transpose(1, 2)

    ours = rotate(heads_of(weight), cos, sin)
    pairs = torch.view_as_complex(
        heads_of(to_gguf_rows(name, weight, model=model)).unflatten(-1, (-1, 2)).contiguous()
    )
    theirs = torch.view_as_real(pairs * torch.complex(cos, sin)).transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)  # two float32 products
    assert torch.equal(
        from_gguf_rows(name, to_gguf_rows(name, weight, model=model), model=model), weight
    )


@pytest.mark.parametrize(
    ("max_bytes", "expected"),
    [
        (1, [["a"], ["b"], ["c"]]),
        (5, [["a"], ["b"], ["c"]]),
        (6, [["a", "b"], ["c"]]),
        (9, [["a", "b"], ["c"]]),
        (10, [["a", "b", "c"]]),
    ],
)
def test_shards_hold_at_most_their_size_or_one_tensor(
    max_bytes: int, expected: list[list[str]]
) -> None:
    assert plan_shards({"a": 4, "b": 2, "c": 4}, max_bytes=max_bytes) == expected


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_float32_says_what_the_model_says_bit_for_bit(
    model_folder: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(model_folder, "--format", form, "--dtype", "float32", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parity"]["largest_difference"] == 0
    assert told["parity"]["num_tokens"] == 2 * 48
    assert sorted(told["files"]) == left_beside(model_folder.parent / "out")


def test_the_parity_line_says_how_far_and_how_much_is_allowed(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(model_folder, "--dtype", "float16") == 0
    assert (
        "parity: the logits differ from the model's own by at most 0.0" in capsys.readouterr().out
    )
    record = json.loads((model_folder.parent / "out" / "milepost-export.json").read_text())
    assert 0 < record["parity"]["largest_difference"] < record["parity"]["allowed"]


def test_a_fault_in_what_was_written_is_seen_and_leaves_nothing(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unturned(name: str, weight: Tensor, **more: Any) -> Tensor:
        return weight

    monkeypatch.setattr("milepost.posttrain.gguf_file.to_gguf_rows", unturned)
    assert export(model_folder, "--format", "gguf") == 4
    said = capsys.readouterr().err
    assert "the export does not hold what the model holds: model.layers.0.self_attn.q_proj" in said
    assert left_beside(model_folder.parent) == ["model"]


def test_one_row_that_was_written_wrong_is_seen_though_no_fixed_token_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = write_model_folder(tmp_path / "model", tiny_model(tie_word_embeddings=False))
    used = fixed_ids(tokenizer, model=tiny_section()).unique().tolist()
    unused = next(number for number in range(280) if number not in used)

    def with_a_fault(path: Path, tensors: dict[str, Tensor], **more: Any) -> None:
        tensors["model.embed_tokens.weight"][unused, 0] += 1
        write_tensors(path, tensors, **more)

    monkeypatch.setattr("milepost.posttrain.weight_shards.write_tensors", with_a_fault)
    assert export(tmp_path / "model") == 4
    assert "embed_tokens.weight was read back with other values" in capsys.readouterr().err
    assert left_beside(tmp_path) == ["model"]


def too_coarse() -> torch.nn.Module:
    """A model whose tokens differ by less than bfloat16's steps."""
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:1].clone())
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.zero_()
        model.lm_head.weight.mul_(0.001).add_(10)
    return model


def too_large() -> torch.nn.Module:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = 7e4
    return model


@pytest.mark.parametrize(
    ("make", "dtype", "said"),
    [
        (too_coarse, "bfloat16", "bfloat16 is too coarse for this model"),
        (too_large, "float16", "up_proj.weight has a weight of 70000, float16 cannot hold it"),
    ],
)
def test_a_dtype_that_does_not_suit_the_model_is_refused_and_leaves_nothing(
    tmp_path: Path,
    make: Callable[[], Any],
    dtype: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_model_folder(tmp_path / "model", make())
    assert export(tmp_path / "model", "--dtype", dtype) == 4
    assert said in capsys.readouterr().err
    assert left_beside(tmp_path) == ["model"]
    assert export(tmp_path / "model", "--dtype", "float32") == 0


def test_only_an_export_is_overwritten_and_only_if_asked(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = model_folder.parent / "out"
    assert export(model_folder, "--max-shard-size", "20KB") == 0
    assert export(model_folder) == 2
    assert "holds an export already" in capsys.readouterr().err
    assert export(model_folder, "--overwrite") == 0
    assert not (out / "model.safetensors.index.json").exists()
    assert (out / "model.safetensors").exists()
    assert export(model_folder, "--overwrite", to=model_folder) == 2
    assert "is not empty and no export" in capsys.readouterr().err
    assert left_beside(model_folder.parent) == ["model", "out"]


def test_a_full_disk_is_said_before_anything_is_written(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("milepost.posttrain.new_folder.free_bytes", lambda path: 1 << 20)
    assert export(model_folder) == 7
    assert "1.0 MiB are free" in capsys.readouterr().err
    assert left_beside(model_folder.parent) == ["model"]


@pytest.mark.parametrize("size", ["", "0", "5 parsecs", "GB", "-1", "1e9"])
def test_a_size_that_is_none_is_refused(
    model_folder: Path, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(model_folder, f"--max-shard-size={size}") == 2
    assert "is no size" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["gguf", "adapter"])
def test_a_size_of_shards_is_refused_where_there_are_none(
    model_folder: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(model_folder, "--format", form, "--max-shard-size", "1GB") == 2
    assert f"--format {form} writes one file" in capsys.readouterr().err


def test_gguf_without_its_package_says_what_to_install(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert export(model_folder, "--format", "gguf") == 2
    assert "pip install 'milepost[export]'" in capsys.readouterr().err


def test_tokenizer_and_chat_template_go_along_to_the_byte(model_folder: Path) -> None:
    (model_folder / "chat_template.jinja").write_text(VICUNA_JINJA)
    (model_folder / "training_args.bin").write_bytes(b"a pickle, which nobody wants")
    assert export(model_folder) == 0
    out = model_folder.parent / "out"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (model_folder / name).read_bytes()
    assert not (out / "training_args.bin").exists()


def test_the_control_tokens_of_a_strangers_config_stay_and_code_does_not(
    model_folder: Path,
) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    config |= {"eos_token_id": [0, 7], "pad_token_id": 5, "auto_map": {"AutoModel": "evil.Model"}}
    (model_folder / "config.json").write_text(json.dumps(config))
    assert export(model_folder) == 0
    written = json.loads((model_folder.parent / "out" / "config.json").read_text())
    assert (written["eos_token_id"], written["pad_token_id"]) == ([0, 7], 5)
    assert "auto_map" not in written


def test_an_adapter_is_asked_for_where_there_is_none(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(model_folder, "--format", "adapter") == 2
    assert "has no adapter" in capsys.readouterr().err


def write_adapter(base: Path) -> Path:
    """An adapter of the base, beside it."""
    model = load_model(base).model
    add_lora(model, rank=2, alpha=4, dropout=0, targets=("v_proj",), seed=1)
    folder = base.parent / "adapter"
    save_adapter(folder, model, base=str(base), base_sha256=base_sha256(model))
    return folder


def test_an_adapter_of_another_base_is_refused_and_leaves_nothing(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(model_folder)
    write_model_folder(model_folder.parent / "other", tiny_model(seed=2))
    assert export(model_folder.parent / "other", "--adapter", str(adapter)) == 4
    assert "was trained on another base" in capsys.readouterr().err
    assert left_beside(model_folder.parent) == ["adapter", "model", "other"]


def test_an_adapter_on_an_adapter_is_refused(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(model_folder)
    assert export(adapter, "--adapter", str(adapter)) == 2
    assert "is an adapter itself" in capsys.readouterr().err
    assert export(adapter) == 0


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_a_disk_that_fills_up_on_the_way_is_said_and_leaves_nothing(
    model_folder: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = {"hf": "safetensors.torch.serialize_file", "gguf": "gguf.GGUFWriter.write_tensor_data"}
    monkeypatch.setattr(writer[form], full)
    assert export(model_folder, "--format", form) == 7
    assert left_beside(model_folder.parent) == ["model"]


def test_rows_without_a_token_are_marked_as_unused(tmp_path: Path) -> None:
    tokenizer = write_model_folder(tmp_path, tiny_model())
    found = gguf_tokenizer(tokenizer, vocab_size=tokenizer.vocab_size + 2)
    assert len(found.tokens) == len(found.types) == tokenizer.vocab_size + 2
    assert found.types[-2:] == [5, 5] and found.types[tokenizer.end_of_text_id] == 3
    assert len(set(found.tokens)) == len(found.tokens)


def test_a_tokenizer_that_llama_cpp_would_cut_otherwise_is_refused(tmp_path: Path) -> None:
    tokenizer = write_model_folder(tmp_path, tiny_model())
    content = json.loads(tokenizer.files()["tokenizer.json"])
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"pre_tokenizer.type is 'Whitespace', only 'ByteLevel'"):
        gguf_tokenizer(load_tokenizer(str(tmp_path)), vocab_size=280)


def test_a_template_without_its_markers_gives_the_same_text() -> None:
    plain = plain_template(VICUNA_JINJA)
    assert "generation %}" not in plain
    talk = [Message("user", "Who?"), Message("assistant", "Nobody."), Message("user", "Why?")]
    texts = {
        ChatTemplate(source, name="it").render(talk, add_generation_prompt=True, eos="<end>")
        for source in (VICUNA_JINJA, plain)
    }
    assert len(texts) == 1


def test_ollama_is_told_to_end_a_prompt_without_a_space() -> None:
    text = modelfile("m.gguf", template=VICUNA_JINJA, end_of_text="<end>", context_tokens=48)
    assert "USER: {{ .Content }} ASSISTANT:{{ else }} {{ .Content }}<end>{{ end }}" in text
    assert f'SYSTEM """{DEFAULT_SYSTEM}"""' in text
    assert 'PARAMETER stop "<end>"\nPARAMETER num_ctx 48\n' in text
    bare = modelfile("m.gguf", template=None, end_of_text="<end>", context_tokens=48)
    assert 'TEMPLATE """{{ .Prompt }}"""' in bare
