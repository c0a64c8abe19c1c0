"""The seven benchmarks against lm-evaluation-harness itself, item by item.

The harness runs its own tasks and its own `hf` model on the same folder and the same rows; only
where the rows come from is changed, to files of this machine.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from milepost.evaluation.benchmarks import BENCHMARKS, open_benchmark
from milepost.evaluation.items import ItemSet
from milepost.evaluation.metrics import item_results, metric_values
from milepost.evaluation.scoring import score_items
from milepost.inference.load import load_model
from milepost.text.tokenizer import load_tokenizer
from tests.evaluations import ALONE
from tests.tiny_models import tiny_model, write_model_folder

pytest.importorskip("lm_eval")

YAML_FILES = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
}
"""Of the harness's own tasks."""

NUM_TRAIN = 40

ATOL = 1e-4
"""float32 in another order of operations. The harness is asked to add up in float64, an option of
its own: in float32 neighbors are 1.2e-4 apart above 1024 nats, and some sums are larger."""

pytestmark = pytest.mark.usefixtures("own_cache")


def read_shared(shared_data: Path, benchmark: str) -> list[dict[str, Any]]:
    (file,) = (shared_data / "eval").glob(f"{benchmark}_*.jsonl.gz")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_rows(folder: Path, shared_data: Path, *, first: int, longest: int) -> Path:
    """The first and the longest rows of each set, and some of the others as training rows.

    One row is in both: the harness leaves it out where it is asked itself.
    """
    folder.mkdir(parents=True)
    for name, benchmark in BENCHMARKS.items():
        rows = read_shared(shared_data, name)
        if name == "boolq":  # as on the hub, where the harness takes it
            rows = [{**row, "label": int(row.pop("answer"))} for row in rows]
        rest = sorted(rows[first + NUM_TRAIN :], key=lambda row: len(json.dumps(row)))
        asked = rows[:first] + rest[len(rest) - longest :]
        train = [asked[2], *(rows[first : first + NUM_TRAIN] or rows[:NUM_TRAIN])]
        for split, chosen in ((benchmark.split, asked), ("train", train)):
            text = "".join(json.dumps(row) + "\n" for row in chosen)
            (folder / f"{name}_{split}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def rows_folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("parity") / "rows", shared_data, first=12, longest=6)


def harness_tasks(folder: Path, rows_folder: Path) -> Any:
    """The harness's tasks on the rows of a folder; everything else is from its own files."""
    import lm_eval.tasks

    own = Path(lm_eval.tasks.__file__).parent
    folder.mkdir()
    for name, benchmark in BENCHMARKS.items():
        files = {s: str(rows_folder / f"{name}_{s}.jsonl") for s in (benchmark.split, "train")}
        config = {
            "include": str(own / YAML_FILES[name]),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        }
        (folder / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML
    return lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)


@dataclass(frozen=True)
class Answers:
    """What the harness says about one task."""

    results: dict[str, Any]
    samples: list[dict[str, Any]]

    def loglikelihoods(self) -> list[list[float]]:
        return [[float(nats) for nats, _ in s["filtered_resps"]] for s in self.samples]


def harness_model(model_folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=str(model_folder),
        device="cpu",
        dtype="float32",
        softmax_dtype="float64",
        batch_size=1,
    )


def run_harness(
    model: Any, rows_folder: Path, work: Path, *, num_fewshot: int, limit: int | None
) -> dict[str, Answers]:
    import lm_eval

    output = lm_eval.simple_evaluate(
        model,
        tasks=list(BENCHMARKS),
        task_manager=harness_tasks(work, rows_folder),
        num_fewshot=num_fewshot,
        limit=limit,
    )
    return {
        name: Answers(
            output["results"][name],
            sorted(output["samples"][name], key=lambda sample: sample["doc_id"]),
        )
        for name in BENCHMARKS
    }


def our_items(
    model_folder: Path, rows_folder: Path, *, num_fewshot: int, limit: int | None
) -> dict[str, ItemSet]:
    loaded = load_model(model_folder)
    return {
        name: open_benchmark(
            name,
            tokenizer=loaded.tokenizer,
            context_length=loaded.model.config.max_position_embeddings,
            data_dir=rows_folder,
            limit=limit,
            num_fewshot=num_fewshot,
        )
        for name in BENCHMARKS
    }


def assert_same_numbers(
    model_folder: Path,
    rows_folder: Path,
    work: Path,
    *,
    num_fewshot: int = 0,
    limit: int | None = None,
) -> dict[str, ItemSet]:
    """Scores, answers and metrics are equal; returns our items."""
    model = harness_model(model_folder)
    theirs = run_harness(model, rows_folder, work / "t", num_fewshot=num_fewshot, limit=limit)
    ours = our_items(model_folder, rows_folder, num_fewshot=num_fewshot, limit=limit)
    loaded = load_model(model_folder)
    for name, items in ours.items():
        answers = theirs[name]
        scores = score_items(loaded.model, items.items, compute_dtype=torch.float32, world=ALONE)
        assert scores is not None
        for item, mine, reference in zip(
            items.items, scores, answers.loglikelihoods(), strict=True
        ):
            assert mine == pytest.approx(reference, abs=ATOL, rel=0), (name, item.item_id)
        results = item_results(items.items, scores)
        for metric, chosen in (("acc", "chosen"), ("acc_norm", "chosen_norm")):
            if metric in items.metrics:
                hits = [float(getattr(r, chosen) == r.gold) for r in results]
                assert hits == [sample[metric] for sample in answers.samples], name
        mine = {}
        for metric, (value, error) in metric_values(results, items.metrics).items():
            mine |= {f"{metric},none": value, f"{metric}_stderr,none": error}
        reported = {key: value for key, value in answers.results.items() if "," in key}
        assert mine == pytest.approx(reported, rel=1e-12), name
    return ours


def assert_same_ids(
    model_folder: Path, rows_folder: Path, work: Path, *, num_fewshot: int
) -> dict[str, ItemSet]:
    """The harness would read and score the same tokens; returns our items."""
    model = harness_model(model_folder)
    length, seen = model.max_length, []

    def record(requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        for _, context_ids, target_ids in requests:
            whole = (context_ids + target_ids)[-(length + 1) :]  # as `_loglikelihood_tokens` cuts
            seen.append((tuple(whole), len(target_ids)))
        return [(-1.0, False)] * len(requests)

    model._loglikelihood_tokens = record
    run_harness(model, rows_folder, work / "t", num_fewshot=num_fewshot, limit=None)
    ours = our_items(model_folder, rows_folder, num_fewshot=num_fewshot, limit=None)
    mine = [
        (choice.context_ids + choice.target_ids, len(choice.target_ids))
        for items in ours.values()
        for item in items.items
        for choice in item.choices
    ]
    assert len(mine) == len(seen)
    for number, (ids, reference) in enumerate(zip(mine, seen, strict=True)):
        assert ids == reference, number
    return ours


def gpt2_folder(folder: Path, *, context_length: int) -> Path:
    """A random LLaMA with GPT-2's vocabulary, saved as a checkpoint is."""
    model = tiny_model(vocab_size=50257, max_position_embeddings=context_length)
    write_model_folder(folder, model, tokenizer=load_tokenizer("gpt2"))
    return folder


def llama_folder(folder: Path, rows_folder: Path, *, context_length: int) -> Path:
    """A random LLaMA with a tokenizer as the first LLaMA's: byte fallback, <s> before a text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=specials, show_progress=False)
    tokenizer.train([str(file) for file in sorted(rows_folder.iterdir())], trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    model = tiny_model(vocab_size=700, max_position_embeddings=context_length)
    write_model_folder(folder, model)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are ordinary tokens
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_scores_answers_and_metrics_equal_the_harness(tmp_path: Path, rows_folder: Path) -> None:
    folder = gpt2_folder(tmp_path / "model", context_length=256)
    ours = assert_same_numbers(folder, rows_folder, tmp_path)
    assert {name for name, items in ours.items() if items.num_truncated} == {"boolq"}


def test_solved_questions_and_a_tokenizer_that_adds_its_own_beginning_equal_the_harness(
    tmp_path: Path, rows_folder: Path
) -> None:
    folder = llama_folder(tmp_path / "model", rows_folder, context_length=700)
    assert load_tokenizer(str(folder)).ids_around == ((1,), ())
    ours = assert_same_numbers(folder, rows_folder, tmp_path, num_fewshot=2, limit=6)
    truncated = {name: items.num_truncated for name, items in ours.items()}
    assert truncated["boolq"] == 12  # two choices of each
    assert truncated["winogrande"] == 0


@pytest.mark.parametrize(("num_fewshot", "context_length"), [(0, 320), (5, 512)])
def test_prompts_and_truncation_equal_the_harness(
    num_fewshot: int, context_length: int, tmp_path: Path, rows_folder: Path
) -> None:
    folder = gpt2_folder(tmp_path / "model", context_length=context_length)
    ours = assert_same_ids(folder, rows_folder, tmp_path, num_fewshot=num_fewshot)
    assert ours["boolq"].num_truncated > 0


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_fewshot", [0, 3])
def test_every_prompt_of_every_set_equals_the_harness(
    num_fewshot: int, tmp_path: Path, shared_data: Path
) -> None:
    rows_folder = write_rows(tmp_path / "rows", shared_data, first=100_000, longest=0)
    folder = gpt2_folder(tmp_path / "model", context_length=1024)
    ours = assert_same_ids(folder, rows_folder, tmp_path, num_fewshot=num_fewshot)
    assert sum(len(items.items) for items in ours.values()) == 20_465


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_numbers_of_thousands_of_items_equal_the_harness(
    tmp_path: Path, shared_data: Path
) -> None:
    rows_folder = write_rows(tmp_path / "rows", shared_data, first=300, longest=100)
    assert_same_numbers(gpt2_folder(tmp_path / "model", context_length=1024), rows_folder, tmp_path)
