"""One rank of a training whose memory is read: `python -m on_cpu.memory_rank FOLDER`.

The folder holds `config.json`. Started as the product starts a rank; what it does is two updates,
a validation, a save, and an update while that is written. Answers with one JSON line on stdout.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from pathlib import Path

import numpy as np
import torch
from on_gpu.setting import new_optimizer, new_stepper

from milepost.checkpoint.state import Progress
from milepost.config.recipe import config_from_plain
from milepost.config.schema import Config
from milepost.data.batch import Batch
from milepost.distributed.place import read_place
from milepost.distributed.world import join_world
from milepost.evaluation.validation import ValidationSet, validate
from milepost.model.init import initialize
from milepost.model.llama import Llama
from milepost.model.lora import add_lora, lora_state
from milepost.runs.events import EventWriter
from milepost.runs.layout import RunLayout
from milepost.train import build  # noqa: F401  what a rank imports lies in its memory
from milepost.train.objective import LOSS_CHUNK_ROWS
from milepost.train.precision import DTYPES
from milepost.train.saving import CheckpointWriter, Saver

_JOIN_SECONDS = 600.0
_NUM_UPDATES = 2


def peak_bytes() -> int:
    """The largest resident set so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(folder: Path) -> None:
    """Trains, and says what it took at each stage."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    config = config_from_plain(json.loads((folder / "config.json").read_text()), source="the work")
    place = read_place(os.environ)
    assert place is not None
    peaks = {"imported": peak_bytes()}
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(
            join_world(place, device_type="cpu", timeout_seconds=_JOIN_SECONDS)
        )
        model = _new_model(config)
        optimizer = new_optimizer(model, config=config)
        stepper = new_stepper(
            model, optimizer=optimizer, config=config, world=world, end_of_text_id=0
        )
        saver = None
        if world.is_main:
            saver = stack.enter_context(
                _new_saver(config, model=model, optimizer=optimizer, folder=folder)
            )
        batch = _made_up_batch(config)

        def update() -> None:
            stepper.run_step(batch, learning_rate=1e-4, stop_requested=lambda: False)

        peaks["made"] = peak_bytes()
        for _ in range(_NUM_UPDATES):
            update()
        peaks["updated"] = peak_bytes()
        separator = 0 if batch.documents is not None else None
        validate(
            model,
            rows=ValidationSet(batch.inputs, batch.targets, 1, separator),
            microbatch_rows=config.train.rows_of_forward,
            compute_dtype=DTYPES[config.train.precision],
            chunk_rows=LOSS_CHUNK_ROWS,
            world=world,
        )
        peaks["validated"] = peak_bytes()
        if saver is not None:
            saver.save(Progress(step=1))
        update()
        if saver is not None:
            saver.finish()
        peaks["saved"] = peak_bytes()
    print(json.dumps({"peaks_bytes": peaks}), file=answers, flush=True)


def _new_model(config: Config) -> Llama:
    model = Llama(config.model)
    initialize(model, config=config.model, seed=config.run.seed)
    if config.lora.rank is not None:
        add_lora(
            model,
            rank=config.lora.rank,
            alpha=config.lora.alpha,
            dropout=config.lora.dropout,
            targets=config.lora.targets,
            seed=config.run.seed,
        )
    return model


def _new_saver(
    config: Config, *, model: Llama, optimizer: torch.optim.Optimizer, folder: Path
) -> Saver:
    layout = RunLayout(folder / "run")
    layout.root.mkdir()
    writer = CheckpointWriter(
        layout=layout,
        run_id="benchmark",
        config=config.checkpoint,
        model_files={},
        events=EventWriter(layout.events, segment=1),
        good_step=0,
    )
    weights = None if config.lora.rank is None else lora_state(model)
    return Saver(writer, model=model, weights=weights, optimizer=optimizer, saved_step=0)


def _made_up_batch(config: Config) -> Batch:
    """Tokens of no meaning; of documents, as conversations are, in a fine-tuning."""
    shape = (config.rows_per_step, config.data.sequence_length + 1)
    tokens = np.random.default_rng(1).integers(0, config.model.vocab_size, shape, dtype=np.uint32)
    batch = Batch.of_tokens(tokens)
    if not config.is_finetuning:
        return batch
    places = np.arange(config.data.sequence_length) // 100
    documents = np.broadcast_to(places, batch.inputs.shape).astype(np.int64).copy()
    return Batch(batch.inputs, batch.targets, documents)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
