"""Results and samples as lm-evaluation-harness 0.4.13 writes them, for programs that read those.

What the harness has and a record has not is null: whether a choice was the greedy one, and the
number of items that a limit left out. A sample's document is the item's own name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from milepost.core.files import json_document, strict, write_atomically
from milepost.evaluation.choice_task import ChoiceTask
from milepost.evaluation.evaluate import Evaluation, Line
from milepost.evaluation.items import Item
from milepost.evaluation.tasks import Task
from milepost.text.tokenizer import Tokenizer

_FILTER = "none"


def write_harness_files(
    found: Evaluation, *, folder: Path, model: Path, now: datetime, log_samples: bool
) -> list[Path]:
    """Writes a results file a model, and a samples file for each of its tasks.

    Args:
        found: what was evaluated.
        folder: each model gets a folder in it, named after its path.
        model: the path that was given; the steps of a run stand behind it.
        now: part of the files' names.
        log_samples: whether samples files are written.

    Raises:
        StorageError: a file cannot be written.
    """
    written = []
    date_id = now.isoformat().replace(":", "-")
    steps = {line["step"]: None for line in found.lines}
    for step in steps:
        lines = [line for line in found.lines if line["step"] == step]
        name = str(model) if len(steps) == 1 else f"{model}/step-{step:08d}"
        place = _place(folder, name)
        results = place / f"results_{date_id}.json"
        write_atomically(results, json_document(_results(lines, name=name, now=now)))
        written.append(results)
        for line in lines if log_samples else ():
            samples = place / f"samples_{line['benchmark']}_{date_id}.jsonl"
            task = found.tasks[line["benchmark"]]
            content = "".join(
                json.dumps(strict(sample), ensure_ascii=False) + "\n"
                for sample in _samples(task, found.items_of(line), tokenizer=found.tokenizer)
            )
            write_atomically(samples, content)
            written.append(samples)
    return written


def write_harness_result(
    result: dict[str, Any],
    samples: dict[str, list[dict[str, Any]]],
    *,
    folder: Path,
    model: Path,
    now: datetime,
) -> None:
    """Writes what the harness itself gave for one model, under the names it would take.

    Args:
        result: of `run_harness`, without the samples.
        samples: of it, by task; empty: none are written.
        folder: each model gets a folder in it, named after its path.
        model: the folder that was scored.
        now: part of the files' names.

    Raises:
        StorageError: a file cannot be written.
    """
    place, date_id = _place(folder, str(model)), now.isoformat().replace(":", "-")
    document = json.dumps(result, indent=2, default=str, ensure_ascii=False) + "\n"
    write_atomically(place / f"results_{date_id}.json", document)
    for task, lines in samples.items():
        content = "".join(
            json.dumps(_as_written(sample), default=str, ensure_ascii=False) + "\n"
            for sample in lines
        )
        write_atomically(place / f"samples_{task}_{date_id}.jsonl", content)


def _as_written(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample with its arguments by name and its answers as text, as the harness's files have."""
    arguments = {
        f"gen_args_{place}": {f"arg_{number}": part for number, part in enumerate(parts)}
        for place, parts in enumerate(sample["arguments"])
    }
    texts = {name: _as_text(sample[name]) for name in ("resps", "filtered_resps")}
    return sample | texts | {"arguments": arguments, "target": str(sample["target"])}


def _as_text(value: Any) -> Any:
    return [_as_text(part) for part in value] if isinstance(value, list | tuple) else str(value)


def _place(folder: Path, name: str) -> Path:
    return folder / re.sub(r'["<>:/|\\?*\[\]]+', "__", name)


def _results(lines: Sequence[Line], *, name: str, now: datetime) -> dict[str, Any]:
    by_task = {line["benchmark"]: line for line in lines}
    first = lines[0]
    return {
        "results": {task: _scores(line) for task, line in by_task.items()},
        "group_subtasks": {task: [] for task in by_task},
        "configs": {task: _task_config(line) for task, line in by_task.items()},
        "versions": {task: line["protocol"] for task, line in by_task.items()},
        "n-shot": {task: line["num_fewshot"] for task, line in by_task.items()},
        "higher_is_better": {
            task: dict.fromkeys(line["metrics"], True) for task, line in by_task.items()
        },
        "n-samples": {task: _counts(line) for task, line in by_task.items()},
        "config": {
            "model": "milepost",
            "model_args": {"pretrained": name, "dtype": first["dtype"]},
            "model_dtype": first["dtype"],
            "model_sha": first["checkpoint_sha256"],
            "device": first["device"],
            "limit": first["limit"],
        },
        "date": now.timestamp(),
        "model_source": "milepost",
        "model_name": name,
        "milepost_version": first["milepost"],
        "total_evaluation_time_seconds": str(sum(line["seconds"] for line in lines)),
    }


def _scores(line: Line) -> dict[str, Any]:
    name = line["benchmark"]
    scores: dict[str, Any] = {"name": name, "alias": name, "sample_len": line["n"]}
    for metric_name, metric in line["metrics"].items():
        error = metric["stderr"]
        scores[f"{metric_name},{_FILTER}"] = metric["value"]
        scores[f"{metric_name}_stderr,{_FILTER}"] = "N/A" if error is None else error
    return scores


def _task_config(line: Line) -> dict[str, Any]:
    return {
        "task": line["benchmark"],
        "output_type": "multiple_choice",
        "num_fewshot": line["num_fewshot"],
        "metadata": {"version": line["protocol"], "data_sha256": line["data_sha256"]},
    }


def _counts(line: Line) -> dict[str, int | None]:
    is_all = line["limit"] is None or line["n"] < line["limit"]
    return {"original": line["n"] if is_all else None, "effective": line["n"]}


def _samples(
    task: Task, items: Sequence[dict[str, Any]], *, tokenizer: Tokenizer
) -> Iterator[dict[str, Any]]:
    asked = task.item_set.items if isinstance(task, ChoiceTask) else (None,) * len(items)
    for number, (item, line) in enumerate(zip(asked, items, strict=True)):
        arguments = [] if item is None else _arguments(item, tokenizer)
        answers = [[str(value), "None"] for value in line["loglikelihoods"]]
        scores = {
            name: float(line[chosen] == line["gold"])
            for name, chosen in (("acc", "chosen"), ("acc_norm", "chosen_norm"))
            if name in task.metrics
        }
        document = {"id": line["id"], **line.get("extra", {})}
        yield {
            "doc_id": number,
            "doc": document,
            "target": str(line["gold"]),
            "arguments": {
                f"gen_args_{place}": {"arg_0": context, "arg_1": continuation}
                for place, (context, continuation) in enumerate(arguments)
            },
            "resps": [[answer] for answer in answers],
            "filtered_resps": answers,
            "filter": _FILTER,
            "metrics": list(scores),
            "doc_hash": _hash(json.dumps(document, indent=2, ensure_ascii=False)),
            "prompt_hash": _hash(arguments[0][0] if arguments else ""),
            "target_hash": _hash(str(line["gold"])),
            **scores,
        }


def _arguments(item: Item, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Context and continuation of each choice, as text."""
    return [
        (tokenizer.decode(choice.context_ids), tokenizer.decode(choice.target_ids))
        for choice in item.choices
    ]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
