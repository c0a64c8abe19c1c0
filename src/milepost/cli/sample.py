"""`milepost sample`: let checkpoints continue a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from milepost.core import console

if TYPE_CHECKING:
    from milepost.runs.records import SampleRecord


def sample(
    model: Path,
    *,
    prompt: Annotated[list[str] | None, Parameter(negative="")] = None,
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
    training. Samples of a run are recorded in its samples.jsonl with all settings.

    Example: `milepost sample runs/demo --prompt "My fellow citizens" --steps all`

    Parameters
    ----------
    model
        A run folder, a checkpoint folder, or any Hugging Face LLaMA folder.
    prompt
        A text to continue; may be given several times. Default: the three prompts of the
        paper's Table III.
    steps
        Checkpoints of a run: all, latest (the default), every:N, or steps such as 100,200.
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
    from milepost.evaluation.samples import PAPER_PROMPTS, record_samples
    from milepost.inference.load import load_model
    from milepost.runs.layout import RunLayout
    from milepost.runs.steps import is_run

    log = RunLayout(model).samples if is_run(model) else None
    records: list[SampleRecord] = []
    for step in _steps(model, steps):
        loaded = load_model(model, step=step)
        new = record_samples(
            loaded.model,
            loaded.tokenizer,
            PAPER_PROMPTS if prompt is None else prompt,
            step=loaded.step,
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
    if log is not None:
        console.say(f"recorded in {log}")


def _steps(model: Path, text: str | None) -> list[int | None]:
    """Steps to load; None: what `load_model` takes by itself."""
    from milepost.core.errors import UsageError
    from milepost.runs.layout import RunLayout
    from milepost.runs.steps import is_run, parse_steps

    if text is None:
        return [None]
    if not is_run(model):
        raise UsageError(f"--steps needs a run, {model} is not one", hint="leave --steps out")
    return list(parse_steps(text, layout=RunLayout(model)))


def _show(folder: str, records: list[SampleRecord]) -> None:
    step = records[0].step if records else None
    console.show(f"step {step}" if step is not None else folder)
    for record in records:
        console.show("")
        console.show(f"  prompt      {_printable(record.prompt)}")
        console.show(f"  completion  {_printable(record.completion)}")
        stopped = record.decoding["stopped"].replace("_", " ")
        console.show(f"              ({len(record.token_ids)} tokens, stopped: {stopped})")
    console.show("")


def _printable(text: str) -> str:
    """The text on an indented block; a model can write bytes that steer a terminal."""
    lines = text.splitlines() or [""]
    plain = ["".join(c if c.isprintable() else "\ufffd" for c in line) for line in lines]
    return ("\n" + " " * 14).join(plain)
