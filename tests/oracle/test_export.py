"""Exports, read by the programs that they are for: transformers and PEFT."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from milepost.inference.load import load_model
from milepost.model.llama import Llama
from milepost.model.lora import add_lora, base_sha256, lora_layers
from milepost.posttrain.export import Exported, export_model
from milepost.text.tokenizer import load_tokenizer
from tests.adapters import save_adapter
from tests.tiny_models import random_ids, tiny_model, write_model_folder

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

IDS = random_ids(2, 40)

# The same float32 weights in another program's order of sums; logits spread by about 1.
SAME = {"rtol": 0, "atol": 2e-5}


def logits(model: Llama) -> torch.Tensor:
    with torch.inference_mode():
        return F.linear(model(IDS), model.head_weight)


def rounded(model: Llama, dtype: torch.dtype, *, norms: torch.dtype) -> Llama:
    """The model with its weights rounded to the types of an export."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype if parameter.dim() > 1 else norms))
    return model


def their_logits(folder: Path, **more: Any) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    with torch.inference_mode():
        return model.eval()(IDS).logits


def export(source: Path, to: Path, **changes: Any) -> Exported:
    usual = {
        "form": "hf",
        "dtype": "float32",
        "step": None,
        "adapter": None,
        "max_file_bytes": 1 << 30,
        "may_overwrite": False,
    }
    return export_model(source, to=to, **(usual | changes))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_transformers_reads_a_gguf_with_the_same_logits(
    tmp_path: Path, dtype: str, is_tied: bool
) -> None:
    model = tiny_model(tie_word_embeddings=is_tied, rope_theta=10000.0)
    write_model_folder(tmp_path / "model", model)
    exported = export(tmp_path / "model", tmp_path / "out", form="gguf", dtype=dtype)
    file = next(name for name in exported.files if name.endswith(".gguf"))
    own = logits(rounded(model, getattr(torch, dtype), norms=torch.float32))
    torch.testing.assert_close(their_logits(tmp_path / "out", gguf_file=file), own, **SAME)


ODD_TEXTS = (
    "The state  of the union: 17 people's\n\n naïve €",
    "",
    " ",
    "\t\t x\n \n",
    "\r\n\r\n",
    "trail  ",
    "don't DON'T I'll 's 't ’s",
    "a\u00a0b\u2028c\x0b\x0c\x1c\x85 z\u200b\u200d",
    "😀 👩‍👩‍👧 日本語テキスト ١٢٣ ½ Ⅷ ²",
    "e\u0301 ſt ʼn \ufeff",
    "\x00\x01\x7f",
    "<|endoftext",
    "foo_bar-baz'S",
    "x" * 200,
)


def random_texts(count: int) -> list[str]:
    source = random.Random(1)
    kinds = ((0x20, 0x250), (0x250, 0xD000), (0x1F000, 0x1FAFF), (0x20, 0x21), (0x0A, 0x0B))
    return [
        "".join(chr(source.randrange(*source.choice(kinds))) for _ in range(40))
        for _ in range(count)
    ]


@pytest.mark.parametrize("form", ["hf", "gguf"])
@pytest.mark.parametrize("kind", ["trained here", "GPT-2"])
def test_transformers_cuts_odd_text_as_the_model_was_trained(
    tmp_path: Path, form: str, kind: str
) -> None:
    gpt2 = load_tokenizer("gpt2") if kind == "GPT-2" else None
    vocab_size = 288 if gpt2 is None else gpt2.vocab_size  # eight rows that no token has
    write_model_folder(tmp_path / "model", tiny_model(vocab_size=vocab_size), tokenizer=gpt2)
    own = load_tokenizer(str(tmp_path / "model"))
    exported = export(tmp_path / "model", tmp_path / "out", form=form)
    file = next((name for name in exported.files if name.endswith(".gguf")), None)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=file)
    for text in (*ODD_TEXTS, *random_texts(200)):
        assert theirs(text, add_special_tokens=False)["input_ids"] == own.encode(text), text
        assert theirs.decode(own.encode(text)) == own.decode(own.encode(text)) == text
    assert theirs.eos_token_id == theirs.bos_token_id == own.end_of_text_id


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_rows_that_no_token_has_are_kept_and_never_made_from_text(
    tmp_path: Path, form: str
) -> None:
    model = tiny_model(vocab_size=288)
    own = write_model_folder(tmp_path / "model", model)
    exported = export(tmp_path / "model", tmp_path / "out", form=form)
    file = next((name for name in exported.files if name.endswith(".gguf")), None)
    more = {} if file is None else {"gguf_file": file}
    own_logits = logits(rounded(model, torch.bfloat16, norms=torch.bfloat16))
    assert their_logits(tmp_path / "out", **more).shape == own_logits.shape
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", **more)
    for text in ("[unused 280]", "[unused 287] [unused 3]"):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == own.encode(text) and max(ids) < own.vocab_size


def test_transformers_reads_a_sharded_folder_with_the_same_logits(tmp_path: Path) -> None:
    model = tiny_model()
    write_model_folder(tmp_path / "model", model)
    exported = export(tmp_path / "model", tmp_path / "out", dtype="bfloat16", max_file_bytes=10_000)
    assert sum(name.endswith(".safetensors") for name in exported.files) > 3
    own = logits(rounded(model, torch.bfloat16, norms=torch.bfloat16))
    torch.testing.assert_close(their_logits(tmp_path / "out"), own, **SAME)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.dtype == torch.bfloat16


def tuned(folder: Path) -> Llama:
    """A base and an adapter in a folder; the model with its additions."""
    write_model_folder(folder / "base", tiny_model())
    model = load_model(folder / "base").model
    add_lora(model, rank=4, alpha=8, dropout=0, targets=("q_proj", "down_proj"), seed=1)
    with torch.no_grad():
        for number, (_, layer) in enumerate(lora_layers(model)):
            source = torch.Generator().manual_seed(number)
            layer.lora_B.weight.normal_(std=0.2, generator=source)
    name = str(folder / "base")
    save_adapter(folder / "adapter", model, base=name, base_sha256=base_sha256(model))
    return model


def test_transformers_reads_a_merged_adapter_with_the_tuned_logits(tmp_path: Path) -> None:
    own = logits(tuned(tmp_path))
    exported = export(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter")
    assert 0 < exported.parity.largest_difference < 1e-4
    torch.testing.assert_close(their_logits(tmp_path / "out"), own, **SAME)


def test_peft_reads_an_exported_adapter_with_the_tuned_logits(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    own = logits(tuned(tmp_path))
    # An adapter is enough: it says where its base is.
    export(tmp_path / "adapter", tmp_path / "out", form="adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits, own, **SAME)
