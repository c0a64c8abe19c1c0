"""Composition: the parts of a pretraining run, made in one place, and the run around them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from milepost.checkpoint.retention import drop_old_train_states
from milepost.checkpoint.state import Progress, TrainState
from milepost.checkpoint.store import load_train_state, save_checkpoint
from milepost.config.recipe import as_plain, config_from_plain
from milepost.config.schema import Config
from milepost.core.console import say
from milepost.core.errors import CheckpointError, StorageError
from milepost.core.units import format_bytes
from milepost.data.loader import Loader, sequential_rows
from milepost.data.shards import PreparedData
from milepost.distributed.reduce import broadcast_json
from milepost.distributed.world import World
from milepost.evaluation.samples import record_samples
from milepost.evaluation.validation import ValidationSet, validate
from milepost.model.huggingface import hf_config, hf_generation_config
from milepost.model.init import initialize
from milepost.model.llama import Llama
from milepost.planner.cost import flops_per_token
from milepost.planner.duration import gpu_of_device
from milepost.runs.layout import RunLayout
from milepost.text.tokenizer import Tokenizer
from milepost.train.exactness import judge_exactness, machine_facts
from milepost.train.gradients import LaneGradients
from milepost.train.loop import LoopParts
from milepost.train.objective import LOSS_CHUNK_ROWS, build_objective
from milepost.train.opening import OpenedRun
from milepost.train.optimizer import build_optimizer, moments_by_name, restore_moments
from milepost.train.periodic import Periodic
from milepost.train.precision import DTYPES
from milepost.train.replay import ReplayCheck
from milepost.train.schedule import learning_rate
from milepost.train.step import FIRST_LOSS_SCALE, LossScale, Stepper
from milepost.train.throughput import Throughput


@dataclass(frozen=True)
class Agreement:
    """What the main rank decided and every rank builds from.

    Attributes:
        config: resolved.
        restore_from: the checkpoint folder, None for a new start.
        is_finished: nothing is left to do.
    """

    config: Config
    restore_from: Path | None
    is_finished: bool


def agree(opened: OpenedRun | None, *, world: World) -> Agreement:
    """Gives the main rank's decision to every rank; every rank must call."""
    plain: dict[str, Any] = {}
    if opened is not None:
        found = opened.restorable
        plain = {
            "config": as_plain(opened.config),
            "restore_from": None if found is None else str(found.folder),
            "is_finished": opened.is_finished,
        }
    plain = broadcast_json(plain, world=world)
    folder = plain["restore_from"]
    return Agreement(
        config=config_from_plain(plain["config"], source="the run's config"),
        restore_from=None if folder is None else Path(folder),
        is_finished=plain["is_finished"],
    )


def build(
    agreement: Agreement,
    *,
    layout: RunLayout,
    data: PreparedData,
    opened: OpenedRun | None,
    world: World,
    stop_requested: Callable[[], bool],
) -> LoopParts:
    """Everything the loop needs on this rank; every rank must call.

    Args:
        agreement: of all ranks.
        layout: the run folder.
        data: opened; verified by the main rank.
        opened: the run, on the main rank only.
        world: of this process.
        stop_requested: whether this process was asked to stop.

    Raises:
        CheckpointError: the train state does not fit the model.
        DataError: too little data.
    """
    config = agreement.config
    tokenizer = data.tokenizer()
    model = Llama(config.model)
    model.requires_grad_(True)
    state = None if agreement.restore_from is None else load_train_state(agreement.restore_from)
    if state is None:
        initialize(model, config=config.model, seed=config.run.seed)
        first_scale = FIRST_LOSS_SCALE if config.train.precision == "float16" else 1.0
        progress = Progress(loss_scale=first_scale)
    else:
        _restore_weights(model, state)
        progress = state.progress
    model.to(world.device)
    optimizer = build_optimizer(model, config=config.optimizer)
    if state is not None:
        restore_moments(
            model, optimizer=optimizer, moments=state.moments, num_updates=state.optimizer_step
        )
    del state
    stepper = Stepper(
        build_objective(model, config=config, end_of_text_id=data.end_of_text_id),
        optimizer=optimizer,
        gradients=LaneGradients(model),
        config=config,
        world=world,
        loss_scale=LossScale(progress.loss_scale, progress.steps_at_scale),
    )
    loader = Loader(
        data.train,
        seed=config.run.seed,
        sequence_length=config.data.sequence_length,
        rows_per_step=config.rows_per_step,
    )
    throughput = Throughput(
        tokens_per_step=config.train.global_batch_tokens,
        flops_per_token=flops_per_token(config.model, sequence_length=config.data.sequence_length),
        peak_flops=_peak_flops(world),
    )
    history = opened.history if opened is not None else None
    parts = LoopParts(
        progress=progress,
        last_step=config.last_step,
        batches=loader,
        learning_rate=lambda step: learning_rate(step, config=config),
        stepper=stepper,
        periodic=[],
        save=lambda step: None,
        throughput=throughput,
        replay=ReplayCheck(history, restored_step=progress.step),
        world=world,
        events=opened.events if opened is not None else None,
        stop_requested=stop_requested,
    )
    saver = _Saver(parts, model=model, optimizer=optimizer, config=config, layout=layout)
    saver.model_files = _model_files(config, tokenizer=tokenizer, data=data)
    saver.run_id = opened.manifest.run_id if opened is not None else ""
    parts.save = saver.save
    parts.periodic = _periodic(
        parts, model=model, config=config, data=data, tokenizer=tokenizer, layout=layout
    )
    return parts


def _restore_weights(model: Llama, state: TrainState) -> None:
    own = model.state_dict()
    for name, tensor in own.items():
        saved = state.weights.get(name)
        if saved is None or saved.shape != tensor.shape:
            raise CheckpointError(f"the checkpoint has no fitting tensor {name}")
    if left := sorted(set(state.weights) - set(own)):
        raise CheckpointError(f"the checkpoint has an unknown tensor {left[0]}")
    model.load_state_dict(state.weights)


def _peak_flops(world: World) -> float | None:
    if world.device.type != "cuda":
        return None
    gpu = gpu_of_device(torch.cuda.get_device_name(world.device))
    return None if gpu is None else gpu.bf16_flops * world.size


def _model_files(config: Config, *, tokenizer: Tokenizer, data: PreparedData) -> dict[str, bytes]:
    """The Hugging Face files beside the weights."""
    end = data.end_of_text_id
    dtype = config.checkpoint.weights_dtype
    documents = {
        "config.json": hf_config(config.model, end_of_text_id=end, dtype=dtype),
        "generation_config.json": hf_generation_config(end_of_text_id=end),
    }
    texts = {name: (json.dumps(v, indent=2) + "\n").encode() for name, v in documents.items()}
    return texts | tokenizer.files()


def _periodic(
    parts: LoopParts,
    *,
    model: Llama,
    config: Config,
    data: PreparedData,
    tokenizer: Tokenizer,
    layout: RunLayout,
) -> list[Periodic]:
    """Validation, samples, saving: in this order, so that a checkpoint closes its step."""
    actions = []
    if data.validation is not None:
        scored = _validation_set(config, data=data, tokenizer=tokenizer)

        def run_validation(step: int) -> None:
            result = validate(
                model,
                rows=scored,
                microbatch_rows=config.train.microbatch_rows,
                compute_dtype=DTYPES[config.train.precision],
                chunk_rows=LOSS_CHUNK_ROWS,
                world=parts.world,
            )
            if parts.events is not None:
                parts.events.append(
                    "validation",
                    step=step,
                    loss_nats=result.loss_nats,
                    bits_per_byte=result.bits_per_byte,
                    tokens=result.num_tokens,
                    seconds=result.seconds,
                )
                bits = result.bits_per_byte
                shown = "" if bits is None else f"  {bits:.4f} bits per byte"
                say(f"step {step}  validation loss {result.loss_nats:.4f}{shown}")

        every = config.validation.every_steps
        actions.append(Periodic(every, run_validation, at_start=True))
    if config.samples.every_steps is not None and parts.events is not None:
        actions.append(
            Periodic(
                config.samples.every_steps,
                lambda step: _sample(
                    step,
                    parts=parts,
                    model=model,
                    config=config,
                    tokenizer=tokenizer,
                    layout=layout,
                ),
                at_start=True,
            )
        )
    actions.append(Periodic(config.checkpoint.every_steps, parts.save))
    return actions


def _validation_set(config: Config, *, data: PreparedData, tokenizer: Tokenizer) -> ValidationSet:
    assert data.validation is not None
    inputs, targets = sequential_rows(
        data.validation,
        sequence_length=config.data.sequence_length,
        max_tokens=config.validation.tokens,
    )
    return ValidationSet(
        inputs=inputs,
        targets=targets,
        num_bytes=tokenizer.count_bytes(targets[targets >= 0]),
        document_separator=data.end_of_text_id if config.data.document_attention else None,
    )


def _sample(
    step: int,
    *,
    parts: LoopParts,
    model: Llama,
    config: Config,
    tokenizer: Tokenizer,
    layout: RunLayout,
) -> None:
    assert parts.events is not None
    records = record_samples(
        model,
        tokenizer,
        list(config.samples.prompts),
        step=step,
        path=layout.samples,
        max_new_tokens=config.samples.max_new_tokens,
        temperature=config.samples.temperature,
        top_k=config.samples.top_k,
        seed=config.run.seed,
        compute_dtype=DTYPES[config.train.precision],
    )
    for record in records:
        parts.events.append("sample", step=step, sample_id=record.sample_id)


class _Saver:
    """Writes checkpoints of the parts' present progress; the main rank's work."""

    model_files: dict[str, bytes]
    run_id: str

    def __init__(
        self,
        parts: LoopParts,
        *,
        model: Llama,
        optimizer: torch.optim.Optimizer,
        config: Config,
        layout: RunLayout,
    ) -> None:
        self._parts = parts
        self._model = model
        self._optimizer = optimizer
        self._config = config
        self._layout = layout
        self._saved_step: int | None = parts.progress.step or None

    def save(self, step: int) -> None:
        """Saves, then drops what retention says; a save that fails is tried once more after.

        Raises:
            StorageError: it failed twice; earlier checkpoints are as they were.
        """
        if self._parts.events is None or self._saved_step == step:
            return
        try:
            self._write(step)
        except StorageError:
            self._drop_old()
            self._write(step)
        self._saved_step = step
        self._drop_old()

    def _write(self, step: int) -> None:
        assert self._parts.events is not None
        moments, num_updates = moments_by_name(self._model, optimizer=self._optimizer)
        weights_dtype = self._config.checkpoint.weights_dtype
        state = TrainState(
            progress=self._parts.progress,
            weights={name: p.detach() for name, p in self._model.state_dict().items()},
            moments=moments,
            optimizer_step=num_updates,
        )
        saved = save_checkpoint(
            self._layout,
            run_id=self.run_id,
            state=state,
            model_files=self.model_files,
            weights_dtype=weights_dtype,
        )
        self._parts.events.append(
            "checkpoint_saved",
            step=step,
            sha256=saved.sha256,
            bytes=saved.num_bytes,
            seconds=saved.seconds,
        )
        say(f"step {step}  checkpoint saved, {format_bytes(saved.num_bytes)}")

    def _drop_old(self) -> None:
        assert self._parts.events is not None
        events = self._parts.events
        drop_old_train_states(
            self._layout,
            keep=self._config.checkpoint.keep_train_state,
            every_steps=self._config.checkpoint.keep_train_state_every_steps,
            record=lambda step: events.append("train_state_dropped", step=step),
        )


def start_segment(
    parts: LoopParts, *, opened: OpenedRun, config: Config, world: World, layout: RunLayout
) -> None:
    """Records and says what this segment is; main rank only."""
    assert parts.events is not None
    restored = None if opened.restorable is None else opened.restorable.step
    exactness, reason = judge_exactness(
        config=config, world=world, history=opened.history, restored_step=restored
    )
    facts = machine_facts(device=world.device)
    parts.events.append(
        "segment_started",
        ranks=world.size,
        threads=torch.get_num_threads(),
        device=facts["device"],
        devices=[facts["device"]] * (world.size if world.device.type == "cuda" else 1),
        versions=facts,
        restored_step=restored,
        restored="nothing" if restored is None else "full",
        exactness=exactness,
        reason=reason,
        compile=config.train.compile,
        precision=config.train.precision,
        changed=[{"field": f, "old": o, "new": n} for f, o, n in opened.changed],
    )
    where = "from the first step" if restored is None else f"goes on from step {restored}"
    compiled = "compiled" if config.train.compile else "not compiled"
    say(f"{layout.root}: {where}; {world.size} ranks, {config.train.precision}, {compiled}")
    say(f"{exactness}: {reason}")
    if parts.replay.num_expected:
        say(f"{parts.replay.num_expected} logged steps will be run again and compared")
