"""What `milepost probe` says of a model, held to the same numbers from transformers."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from milepost.cli.main import run
from milepost.text.tokenizer import load_tokenizer
from tests.tiny_models import tiny_model, write_model_folder

transformers = pytest.importorskip("transformers")

PROMPTS = {
    "as trained": "USER: Where? ASSISTANT:",
    "space": "USER: Where? ASSISTANT: ",
    "newline": "USER: Where? ASSISTANT:\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gpt2 = load_tokenizer("gpt2")
    folder = tmp_path_factory.mktemp("model")
    write_model_folder(folder, tiny_model(vocab_size=gpt2.vocab_size), tokenizer=gpt2)
    return folder


@pytest.fixture(scope="module")
def probed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    file = tmp_path_factory.mktemp("variants") / "v.jsonl"
    rows = [{"name": name, "prompt": prompt} for name, prompt in PROMPTS.items()]
    file.write_text("\n".join(map(json.dumps, rows)))
    out = file.with_suffix(".json")
    with out.open("w") as stream, redirect_stdout(stream):
        words = ["--variants", str(file), "--max-new-tokens", "8", "--top", "3", "--json"]
        assert run(["probe", str(folder), *words]) == 0
    return json.loads(out.read_text())["probes"]


def test_divergence_entropy_and_likeliest_are_those_of_transformers(folder, probed) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    log_p = []
    for prompt in PROMPTS.values():
        ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        with torch.inference_mode():
            log_p.append(model(torch.tensor([ids])).logits[0, -1].double().log_softmax(dim=0))
    # Logits of float32 in another order of sums agree to 2e-5; a divergence is their mean change.
    near = {"rel": 0, "abs": 5e-5}
    base = log_p[0]
    for record, mine in zip(probed, log_p, strict=True):
        assert record["kl_nats"] == pytest.approx(float((base.exp() * (base - mine)).sum()), **near)
        assert record["reverse_kl_nats"] == pytest.approx(
            float((mine.exp() * (mine - base)).sum()), **near
        )
        assert record["entropy_nats"] == pytest.approx(float(-(mine.exp() * mine).sum()), **near)
        probabilities, ids = mine.exp().topk(3)
        assert [token["token_id"] for token in record["likeliest"]] == ids.tolist()
        found = [token["probability"] for token in record["likeliest"]]
        assert found == pytest.approx(probabilities.tolist(), **near)
    assert probed[1]["kl_nats"] > 0.01


def test_completions_are_those_of_transformers(folder, probed) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for record in probed:
        ids = torch.tensor([[50256, *record["token_ids"]]])
        written = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=50256)
        assert written[0, ids.shape[1] :].tolist() == record["completion_ids"]
