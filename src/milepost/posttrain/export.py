"""Exports a model in another form and holds what was written to what the model says itself."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from milepost import __version__
from milepost.core.console import progress
from milepost.core.errors import CheckpointError
from milepost.core.files import as_utf8, storage_errors, write_json
from milepost.inference.load import (
    FoundModel,
    LoadedModel,
    find_model,
    identify,
    read_separate,
    verify_found,
)
from milepost.model.llama import Llama
from milepost.planner.cost import count_parameters
from milepost.posttrain.export_forms import ExportRequest, Form, make_form
from milepost.posttrain.export_target import (
    CARD_FILE,
    RECORD_FILE,
    record_of_files,
    refuse_target,
)
from milepost.posttrain.finite_weights import refuse_not_finite
from milepost.posttrain.folder_files import TEMPLATE_FILE, folder_files, read_file
from milepost.posttrain.gguf_file import require_gguf
from milepost.posttrain.model_card import model_card
from milepost.posttrain.new_folder import new_folder, refuse_full_disk
from milepost.posttrain.parity import (
    Parity,
    fixed_ids,
    judge_parity,
    logits_of,
    refuse_other_weights,
)
from milepost.posttrain.run_facts import read_run_facts
from milepost.runs.events import utc_now

FormName = Literal["hf", "gguf", "adapter"]
Dtype = Literal["bfloat16", "float16", "float32"]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        folder: where it lies.
        source: the model folder it was made from.
        step: updates the model had seen; None where the folder's name does not say.
        num_parameters: of the model.
        files: bytes by name.
        parity: how far its logits are from the model's own.
    """

    folder: Path
    source: Path
    step: int | None
    num_parameters: int
    files: dict[str, int]
    parity: Parity


def export_model(
    model: Path,
    *,
    to: Path,
    form: FormName,
    dtype: Dtype,
    step: int | None,
    adapter: Path | None,
    max_file_bytes: int,
    may_overwrite: bool,
) -> Exported:
    """Writes a model in another form, reads it back and holds its logits to the model's own.

    Args:
        model: as `find_model` takes it, like `step` and `adapter`.
        to: the new folder; it appears whole or not at all.
        form: "hf": a Hugging Face folder; "gguf": a GGUF file with an Ollama Modelfile;
            "adapter": the adapter alone, as PEFT reads it.
        dtype: of the weights; in GGUF those of the norms stay float32.
        step: which checkpoint; None: the latest.
        adapter: put on the model, and merged in every form but its own; None: what the model
            itself has.
        max_file_bytes: of one safetensors file's tensors.
        may_overwrite: whether an earlier export may be replaced.

    Raises:
        UsageError: there is no model or adapter, the target may not be overwritten, or the
            tokenizer has no form in GGUF.
        CheckpointError: a file is damaged, the adapter is of another base, or the logits differ
            by more than the dtype may cost; nothing was left behind.
        StorageError: it does not fit on the disk or cannot be written; nothing was left behind.
    """
    to = to.resolve()
    if form == "gguf":
        require_gguf()
    refuse_filled = functools.partial(refuse_target, to, may_overwrite=may_overwrite)
    refuse_filled()
    found = find_model(model, step=step, adapter=adapter)
    verify_found(found)
    loaded = read_separate(found)
    made = make_form(form, found=found, loaded=loaded)
    request = _request(found, loaded, name=to.name, dtype=dtype, max_file_bytes=max_file_bytes)
    refuse_not_finite(loaded.model, folder=found.folder)
    llama, ids = loaded.model, fixed_ids(loaded.tokenizer, model=request.config)
    own = logits_of(llama, ids)
    weights = made.weights(llama)
    num_bytes = sum(
        tensor.numel() * made.stored(name, tensor, dtype=dtype).itemsize
        for name, tensor in weights.items()
    )
    refuse_full_disk(to, needed_bytes=num_bytes)
    _round(llama, form=made, dtype=dtype)
    rounded = logits_of(llama, ids)
    with new_folder(to, refuse_filled=refuse_filled) as folder:
        with progress(f"writing {to}", total=num_bytes) as bar, storage_errors(to):
            made.write(folder, request, weights, on_written=bar.update)
        read = made.read(folder, config=request.config)
        refuse_other_weights(read, expected=llama)
        exported = logits_of(read, ids)
        parity = judge_parity(own, rounded=rounded, exported=exported, dtype=dtype)
        _describe(folder, request, found=found, form=made, parity=parity)
    return Exported(
        folder=to,
        source=found.folder,
        step=found.step,
        num_parameters=count_parameters(request.config).total,
        files={path.name: path.stat().st_size for path in sorted(to.iterdir())},
        parity=parity,
    )


def _request(
    found: FoundModel, loaded: LoadedModel, *, name: str, dtype: str, max_file_bytes: int
) -> ExportRequest:
    config = loaded.model.config
    files = folder_files(found.base, model=config, tokenizer=loaded.tokenizer, dtype=dtype)
    template = None if found.adapter is None else read_file(found.adapter / TEMPLATE_FILE)
    return ExportRequest(
        name=name,
        config=config,
        files=files if template is None else files | {TEMPLATE_FILE: template},
        dtype=dtype,
        max_file_bytes=max_file_bytes,
    )


@torch.no_grad()
def _round(llama: Llama, *, form: Form, dtype: str) -> None:
    """Rounds each weight to its type in the export, in place, so that the file holds the same.

    Raises:
        CheckpointError: a weight is too large for the type.
    """
    for name, parameter in llama.named_parameters():
        rounded = parameter.to(form.stored(name, parameter, dtype=dtype))
        if not rounded.isfinite().all():
            raise CheckpointError(
                f"{name} has a weight of {float(parameter.abs().max()):g}, {dtype} cannot hold it",
                hint="export it with --dtype bfloat16 or float32",
            )
        parameter.copy_(rounded)


def _describe(
    folder: Path, request: ExportRequest, *, found: FoundModel, form: Form, parity: Parity
) -> None:
    """Writes the model card and the record of the export."""
    facts, sha256 = read_run_facts(found.folder), identify(found)
    card = model_card(
        request.name,
        model=request.config,
        facts=facts,
        source_sha256=sha256,
        adapter=None if found.adapter is None else form.adapter_in_words,
        parity=parity,
        library=form.library,
        usage=form.usage(folder, name=request.name),
    )
    with storage_errors(folder):
        (folder / CARD_FILE).write_bytes(as_utf8(card))
    record = {
        "v": SCHEMA_VERSION,
        "milepost": __version__,
        "time": utc_now(),
        "library": form.library,
        "dtype": parity.dtype,
        "checkpoint_sha256": sha256,
        "run_id": None if facts is None else facts.manifest.run_id,
        "step": None if facts is None else facts.step,
        "parity": asdict(parity),
        **record_of_files(folder),
    }
    write_json(folder / RECORD_FILE, record)
