"""`milepost export`: a model for other programs."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from milepost.core import console
from milepost.core.errors import UsageError
from milepost.core.units import format_bytes, format_count

if TYPE_CHECKING:
    from milepost.posttrain.export import Exported

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20}
_UNITS |= {"GIB": 2**30}
_USUAL_SIZE = "5GB"


def export(
    model: Path,
    *,
    to: Path,
    format: Literal["hf", "gguf", "adapter"] = "hf",
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    step: int | None = None,
    adapter: Path | None = None,
    max_shard_size: str | None = None,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Write a model for other programs: a Hugging Face folder, or a GGUF file.

    What was written is read back and its logits are held to the model's own; if they differ by
    more than the type of the weights may cost, nothing is left behind. A model card with what
    the run's records say comes with it.

    Example: `milepost export runs/demo --to exports/demo --format gguf --dtype float16`

    Parameters
    ----------
    model
        A run, a checkpoint, or any Hugging Face LLaMA folder; tuned or not.
    to
        The new folder. It appears whole or not at all.
    format
        hf: what transformers, vLLM and others load. gguf: for llama.cpp, with a Modelfile for
        Ollama; needs `pip install 'milepost[export]'`. adapter: the adapter alone, for PEFT.
    dtype
        Of the weights. Default: bfloat16, for an adapter float32.
    step
        Which checkpoint of a run, of --adapter where that is one. Default: the latest.
    adapter
        A fine-tuning run or a folder in PEFT's format, whose adapter is put on the model; merged
        in all forms but its own.
    max_shard_size
        Of --format hf: weights above it go into several files, with an index; such as 500MiB.
        Default: 5GB.
    overwrite
        Replace an earlier export, if nobody added files to it or edited its model card.
    json
        One JSON document on stdout.
    """
    from milepost.posttrain.export import export_model

    if max_shard_size is not None and format != "hf":
        raise UsageError(
            f"--max-shard-size is of --format hf; --format {format} writes one file",
            hint="leave --max-shard-size out",
        )
    exported = export_model(
        model,
        to=to,
        form=format,
        dtype=dtype or ("float32" if format == "adapter" else "bfloat16"),
        step=step,
        adapter=adapter,
        max_file_bytes=_bytes(_USUAL_SIZE if max_shard_size is None else max_shard_size),
        may_overwrite=overwrite,
    )
    if json:
        console.show_json(asdict(exported))
    else:
        _show(exported)


def _bytes(text: str) -> int:
    """5GB -> 5000000000."""
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?) ?([A-Za-z]*)", text.strip())
    unit = None if match is None else _UNITS.get(match[2].upper())
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise UsageError(
            f"--max-shard-size {text!r} is no size", hint="give one such as 5GB, 500MiB or 1000000"
        )
    return int(float(match[1]) * unit)


def _show(exported: Exported) -> None:
    of_step = "" if exported.step is None else f", step {exported.step}"
    console.show(
        f"{exported.source}: {format_count(exported.num_parameters)} parameters{of_step}, "
        f"as {exported.parity.dtype}"
    )
    console.show(exported.parity.in_words())
    total = sum(exported.files.values())
    console.show(f"{exported.folder}: {len(exported.files)} files, {format_bytes(total)}")
    for name, size in exported.files.items():
        console.show(f"  {format_bytes(size):>10}  {name}")
