"""`milepost sample`: let checkpoints continue a text."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from milepost.core import console

if TYPE_CHECKING:
    from milepost.runs.records import SampleRecord


def sample(
    model: Path,
    *,
    prompt: Annotated[list[str] | None, Parameter(negative="")] = None,
    adapter: Path | None = None,
    steps: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Let checkpoints continue a text.

    The end-of-text token is put before the prompt, as it stands before each document in
    training. Samples of a run or of one of its checkpoints are recorded in the run's
    samples.jsonl with all settings, and with counts of how much they repeat themselves.

    Example: `milepost sample runs/demo --prompt "My fellow citizens" --steps all`

    Parameters
    ----------
    model
        A run folder, a checkpoint folder, an adapter, or any Hugging Face LLaMA folder.
    prompt
        A text to continue; may be given several times. Default: the three prompts of the
        paper's Table III.
    adapter
        A fine-tuning run or a folder in PEFT's format, whose adapter is put on the model.
    steps
        Checkpoints of a run, of --adapter where that is one: all, latest (the default), every:N,
        or steps such as 100,200.
    max_new_tokens
        Most tokens of a completion.
    temperature
        0 takes the likeliest token each time; 1 draws from the model's own distribution.
    top_k
        Draw from the k likeliest tokens only.
    top_p
        Draw from the likeliest tokens that together have this probability.
    seed
        Of the random draws.
    json
        One JSON document on stdout.
    """
    from milepost.evaluation.checkpoints import run_of_model
    from milepost.evaluation.samples import PAPER_PROMPTS, record_samples
    from milepost.inference.load import adapter_sha256, find_models, load_found
    from milepost.runs.layout import RunLayout

    of_run = run_of_model(adapter or model)
    log = None if of_run is None else RunLayout(of_run).samples
    records: list[SampleRecord] = []
    for found in find_models(model, steps=steps, adapter=adapter):
        loaded = load_found(found)
        new = record_samples(
            loaded.model,
            loaded.tokenizer,
            PAPER_PROMPTS if prompt is None else prompt,
            step=loaded.step,
            adapter=adapter_sha256(found),
            path=log,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        records += new
        if not json:
            _show(str(loaded.folder), new)
    if json:
        console.show_json({"samples": [record.as_line() for record in records]})
    elif len({record.step for record in records}) > 1:
        _show_quality_by_step(records)
    if log is not None:
        console.say(f"recorded in {log}")


def _show(folder: str, records: list[SampleRecord]) -> None:
    step = records[0].step if records else None
    console.show(f"step {step}" if step is not None else folder)
    for record in records:
        console.show("")
        console.show(f"  prompt      {_printable(record.prompt)}")
        console.show(f"  completion  {_printable(record.completion)}")
        stopped = record.decoding["stopped"].replace("_", " ")
        console.show(f"              ({len(record.token_ids)} tokens, stopped: {stopped})")
        console.show(f"  quality     {_quality_in_words(record.quality or {})}")
    console.show("")


def _quality_in_words(quality: dict[str, Any]) -> str:
    parts = [
        f"{words} {_quality_text(name, quality[name])}"
        for name, words in _QUALITY_WORDS.items()
        if quality.get(name) is not None
    ]
    return ", ".join(parts) or "nothing to count"


_QUALITY_WORDS = {
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "repeated_4gram_fraction": "repeated 4-grams",
    "longest_repeat_tokens": "longest repeat",
}


def _quality_text(name: str, value: float) -> str:
    if name == "repeated_4gram_fraction":
        return f"{value:.0%}".replace("%", " %")
    return f"{value:.2f}" if name.startswith("distinct") else f"{value:.3g} tokens"


def _show_quality_by_step(records: list[SampleRecord]) -> None:
    """A row a step, each the mean over its samples, so that a trend is seen at a glance."""
    by_step: dict[int | None, list[dict[str, Any]]] = {}
    for record in records:
        by_step.setdefault(record.step, []).append(record.quality or {})
    console.show("quality, the mean over the prompts")
    console.show(f"{'step':>10}" + "".join(f"{words:>18}" for words in _QUALITY_WORDS.values()))
    for step, qualities in by_step.items():
        row = f"{'?' if step is None else step:>10}"
        for name in _QUALITY_WORDS:
            values = [q[name] for q in qualities if q.get(name) is not None]
            row += f"{_quality_text(name, mean(values)) if values else '-':>18}"
        console.show(row)


def _printable(text: str) -> str:
    """The text on an indented block; a model can write bytes that steer a terminal."""
    lines = text.splitlines() or [""]
    plain = ["".join(c if c.isprintable() else "\ufffd" for c in line) for line in lines]
    return ("\n" + " " * 14).join(plain)
