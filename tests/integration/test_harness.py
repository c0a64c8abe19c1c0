"""lm-evaluation-harness over our engine, against its own `hf` model on the same folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from milepost.core.errors import UsageError
from milepost.evaluation.harness import run_harness
from milepost.inference.load import load_model
from milepost.text.tokenizer import Tokenizer
from tests.conftest import made_up_text
from tests.evaluations import ALONE
from tests.tiny_models import tiny_model, write_model_folder

CHOICES = """
task: made_up_choices
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
TEXTS = """
task: made_up_texts
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
"""
ANSWERS = """
task: made_up_answers
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: [" the", "."]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks on local rows; some texts are longer than the model's context."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": made_up_text(seed=number, num_words=5 + 9 * (number % 5)),
            "choices": [made_up_text(seed=100 + 4 * number + n, num_words=3) for n in range(3)],
            "answer": number % 3,
            "text": made_up_text(seed=number, num_words=40),
        }
        for number in range(9)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
    )
    for name, text in (("choices", CHOICES), ("texts", TEXTS), ("answers", ANSWERS)):
        (folder / f"{name}.yaml").write_text(text + source)
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def test_every_kind_of_request_has_the_numbers_of_the_harness_itself(
    tasks: Path, offline: None, tmp_path: Path
) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = tmp_path / "model"
    write_model_folder(folder, tiny_model(max_position_embeddings=96))
    names = ["made_up_choices", "made_up_texts", "made_up_answers"]
    loaded = load_model(folder)
    ours = run_harness(
        loaded.model,
        loaded.tokenizer,
        tasks=names,
        limit=None,
        num_fewshot=None,
        compute_dtype=torch.float32,
        world=ALONE,
        include_path=tasks,
        log_samples=True,
    )
    theirs = lm_eval.simple_evaluate(
        HFLM(str(folder), device="cpu", dtype="float32", batch_size=2),
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks)),
        log_samples=True,
    )
    for name in names:
        for key, value in theirs["results"][name].items():
            found = ours["results"][name][key]
            # Perplexities of hundreds in float32.
            assert found == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value)
        for ours_row, theirs_row in zip(
            ours["samples"][name], theirs["samples"][name], strict=True
        ):
            found, expected = ours_row["filtered_resps"], theirs_row["filtered_resps"]
            if name == "made_up_choices":
                assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
                found, expected = [v for v, _ in found], [v for v, _ in expected]
            if name != "made_up_answers":
                expected = pytest.approx(expected, abs=1e-4)
            assert found == expected


def test_the_vocabulary_is_decoded_once_for_the_same_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.instance import Instance

    from milepost.evaluation.harness_model import HarnessModel

    model = tiny_model()
    tokenizer = write_model_folder(tmp_path, model)
    decode, decoded = Tokenizer.decode, []

    def note(self: Tokenizer, ids: list[int]) -> str:
        decoded.append(ids)
        return decode(self, ids)

    monkeypatch.setattr(Tokenizer, "decode", note)
    settings = {"until": ["."], "max_gen_toks": 1}
    asked = [Instance("generate_until", {}, (f"{n} the", settings), n) for n in range(17)]
    harness_model = HarnessModel(model, tokenizer, compute_dtype=torch.float32, world=ALONE)
    assert len(harness_model.generate_until(asked)) == 17  # more than one batch
    assert len(decoded) == tokenizer.vocab_size + 17


def run_tiny(**changes) -> dict:
    settings = {"limit": 1, "num_fewshot": None, "compute_dtype": torch.float32, "world": ALONE}
    return run_harness(tiny_model(), None, tasks=["boolqq"], **(settings | changes))


def test_an_unknown_task_suggests_the_nearest(offline: None) -> None:
    with pytest.raises(UsageError, match="no task 'boolqq'") as caught:
        run_tiny()
    assert caught.value.hint == "did you mean boolq?"


def test_without_the_harness_the_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match="not installed") as caught:
        run_tiny()
    assert caught.value.hint == "pip install 'milepost[eval]'"
