"""Exports, read by the programs that they are for: transformers and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from milepost.inference.load import load_model
from milepost.model.llama import Llama
from milepost.model.lora import add_lora, base_sha256, lora_layers
from milepost.posttrain.export import Exported, export_model
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


def test_transformers_reads_the_tokenizer_of_a_gguf(tmp_path: Path) -> None:
    own = write_model_folder(tmp_path / "model", tiny_model())
    exported = export(tmp_path / "model", tmp_path / "out", form="gguf")
    file = next(name for name in exported.files if name.endswith(".gguf"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=file)
    text = "The state  of the union: 17 people's\n\n naïve €"
    assert theirs(text, add_special_tokens=False)["input_ids"] == own.encode(text)
    assert theirs.eos_token_id == theirs.bos_token_id == own.end_of_text_id


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
