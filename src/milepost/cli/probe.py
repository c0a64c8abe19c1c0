"""`milepost probe`: what a small change of a prompt does to a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from milepost.core import console

if TYPE_CHECKING:
    from milepost.evaluation.checkpoints import Checkpoint
    from milepost.posttrain.probe import ProbeSettings
    from milepost.posttrain.variants import Variant
    from milepost.runs.probes import ProbeRecord


def probe(
    model: Path,
    *,
    question: str | None = None,
    prompt: str | None = None,
    variants: Path | None = None,
    adapter: Path | None = None,
    steps: str | None = None,
    top: int = 5,
    max_new_tokens: int = 24,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Show what a small change of a prompt does to a model: one space, a line break, the case.

    For a prompt and its variants: the tokens of each, how far the distribution of the next token
    moves (Kullback-Leibler divergence, nats), the likeliest next tokens, and what the model
    writes, greedily. Of several checkpoints: a line a step. Probes of a run or of one of its
    checkpoints are recorded in the run's probes.jsonl.

    Example: `milepost probe runs/demo --prompt "My fellow citizens" --steps all`

    Parameters
    ----------
    model
        A run folder, a checkpoint folder, an adapter, or any Hugging Face LLaMA folder.
    question
        A question for the chat template (Vicuna 1.1). Default: the first of the paper's Table V.
    prompt
        A text as it is, in place of a question.
    variants
        A file of variants in place of the built-in ones: .txt with a prompt a line, or .jsonl
        with `prompt` or `question` (and `system`), and `name`. The first is the base, unless
        --question or --prompt gives one.
    adapter
        A fine-tuning run or a folder in PEFT's format, whose adapter is put on the model.
    steps
        Checkpoints of a run, of --adapter where that is one: all, latest (the default), every:N,
        or steps such as 100,200.
    top
        How many of the likeliest next tokens to show.
    max_new_tokens
        Most tokens of a completion; 0 writes none.
    json
        One JSON document on stdout.
    """
    from milepost.cli.probe_tables import course, shown_model
    from milepost.evaluation.checkpoints import find_checkpoints, run_of_model
    from milepost.posttrain.probe import ProbeSettings
    from milepost.runs.layout import RunLayout
    from milepost.runs.probes import append_probe

    settings = ProbeSettings(num_likeliest=top, max_new_tokens=max_new_tokens)
    asked = _variants(question=question, prompt=prompt, file=variants)
    checkpoints = find_checkpoints(model, steps=steps, dtype="float32", adapter=adapter)
    of_run = run_of_model(adapter or model)
    by_model: list[list[ProbeRecord]] = []
    # Of one checkpoint there is nothing to count.
    with console.progress("probing", total=len(checkpoints) if steps else None) as bar:
        for checkpoint in checkpoints:
            records = _probed(checkpoint, asked, settings=settings)
            by_model.append(records)
            if of_run is not None:
                for record in records:
                    append_probe(RunLayout(of_run).probes, record)
            bar.update(len(by_model), note=checkpoint.folder.name)
    if json:
        every_line = [record.as_line() for records in by_model for record in records]
        console.show_json({"probes": every_line})
    else:
        title = _title(checkpoints[0])
        alone = len(by_model) == 1
        width = console.width()
        one = shown_model(by_model[0], title=title, width=width) if alone else []
        for line in one or course(by_model, width=width):
            console.show(line)
    if of_run is not None:
        console.say(f"recorded in {RunLayout(of_run).probes}")


def _variants(*, question: str | None, prompt: str | None, file: Path | None) -> list[Variant]:
    """What is probed, the base first."""
    from milepost.core.errors import UsageError
    from milepost.posttrain.variants import (
        DEFAULT_QUESTION,
        checked,
        read_variants,
        variants_of_prompt,
        variants_of_question,
    )

    if question is not None and prompt is not None:
        raise UsageError(
            "a probe has a question or a prompt, not both",
            hint="a question goes into the chat template, a prompt stays as it is",
        )
    if prompt is not None:
        built_in = variants_of_prompt(prompt)
    else:
        built_in = variants_of_question(DEFAULT_QUESTION if question is None else question)
    if file is None:
        return built_in
    of_file = read_variants(file)
    if question is None and prompt is None:
        return of_file
    return checked([built_in[0], *of_file], source=str(file))


def _probed(
    checkpoint: Checkpoint,
    variants: list[Variant],
    *,
    settings: ProbeSettings,
) -> list[ProbeRecord]:
    import torch

    from milepost.core.environment import code_version, cpu_name
    from milepost.distributed.devices import count_gpus
    from milepost.evaluation.checkpoints import load_verified
    from milepost.inference.chat_model import template_of
    from milepost.inference.load import adapter_sha256
    from milepost.posttrain.probe import Provenance, probe
    from milepost.runs.events import utc_now

    loaded = load_verified(checkpoint)
    is_gpu = count_gpus() > 0
    loaded.model.to("cuda" if is_gpu else "cpu")
    sha256 = checkpoint.weights.checkpoint_sha256
    assert sha256 is not None, "a folder has a hash"
    provenance = Provenance(
        checkpoint_sha256=sha256,
        adapter=adapter_sha256(checkpoint.found),
        device=torch.cuda.get_device_name() if is_gpu else cpu_name(),
        milepost=code_version(),
        time=utc_now(),
    )
    settings = replace(settings, has_beginning=template_of(checkpoint.found) is None)
    return probe(loaded, variants, settings=settings, provenance=provenance)


def _title(checkpoint: Checkpoint) -> str:
    found = checkpoint.found
    if found.step is not None:
        return f"step {found.step}"
    return str(found.base) if found.adapter is None else f"{found.base} with {found.adapter}"
