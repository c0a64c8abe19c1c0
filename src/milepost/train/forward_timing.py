"""Forward and backward passes of a run's shapes on made-up tokens, timed and thrown away.

On a GPU the whole model is timed, compiled as the run will be, beside as much memory as the
optimizer and the other lanes will take. On a CPU compiling for every number of rows would take
minutes: a few blocks are timed uncompiled, and stand for all, which are alike.
"""

from __future__ import annotations

import gc
import time
from types import TracebackType

import torch
from torch import Tensor

from milepost.config.schema import Config
from milepost.model.init import initialize
from milepost.model.llama import Llama
from milepost.model.lora import add_lora
from milepost.planner.memory import estimate_memory
from milepost.train.objective import build_objective

CPU_BLOCKS = 2
"""Blocks that are timed on a CPU."""


def has_run_out_of_memory(error: Exception) -> bool:
    """Whether an error of torch or Python says that memory was short."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


class ForwardTiming:
    """A model like a run's, for the block of a `with`; afterwards its memory is free again.

    Args:
        config: resolved but for `train.microbatch_rows`.
        device: of the run.
        ranks: processes that share the lanes.
    """

    def __init__(self, config: Config, *, device: torch.device, ranks: int) -> None:
        self._num_blocks = config.model.num_hidden_layers
        self._config = config if device.type == "cuda" else _on_cpu(config)
        self._device = device
        self._model = _made_up_model(self._config, device=device)
        self._objective = build_objective(self._model, config=self._config, end_of_text_id=0)
        self._in_blocks = _TimeInBlocks()
        if device.type == "cpu":
            self._watch_blocks()
        self._beside = _beside(config, device=device, ranks=ranks)

    def __enter__(self) -> ForwardTiming:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del self._model, self._objective, self._beside
        gc.collect()
        if self._config.train.compile:
            torch._dynamo.reset()  # the run compiles for its own rows alone
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def pass_seconds(self, rows: int) -> float:
        """Seconds of one forward and backward pass of so many rows through all blocks.

        Raises:
            RuntimeError: `has_run_out_of_memory`, most likely.
        """
        length, vocab_size = self._config.data.sequence_length, self._config.model.vocab_size
        places = torch.arange(rows * length, device=self._device).view(rows, length)
        ids = places * 7919 % vocab_size  # a prime: neighbors differ
        documents = torch.zeros_like(ids) if self._config.is_finetuning else None
        self._in_blocks = _TimeInBlocks()
        self._synchronize()
        started = time.perf_counter()
        # Every number of rows is compiled once; a run refuses a second one.
        with torch._dynamo.config.patch(error_on_recompile=False):
            loss, _ = self._objective(ids, ids, 1 / ids.numel(), documents)
            loss.backward()
        self._synchronize()
        seconds = time.perf_counter() - started
        num_others = self._num_blocks - self._config.model.num_hidden_layers
        if num_others == 0:
            return seconds
        block_seconds = self._in_blocks.seconds / self._config.model.num_hidden_layers
        return seconds + num_others * block_seconds

    def _watch_blocks(self) -> None:
        """Has the time in the blocks taken by itself, which on a CPU is when they are called."""
        blocks = self._model.model.layers
        blocks[0].register_forward_pre_hook(
            lambda _, inputs: self._in_blocks.enter_forward(inputs[0])
        )
        blocks[-1].register_forward_hook(
            lambda _, inputs, output: self._in_blocks.leave_forward(output)
        )

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _TimeInBlocks:
    """Seconds of the forward and of the backward pass between the first block and the last.

    Blocks that are computed again come by twice; their second forward pass is backward time.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._is_forward = True
        self._entered = 0.0

    def enter_forward(self, hidden: Tensor) -> None:
        if self._is_forward:
            hidden.register_hook(lambda _: self._leave())
            self._enter()

    def leave_forward(self, hidden: Tensor) -> None:
        if self._is_forward:
            self._is_forward = False
            self._leave()
            hidden.register_hook(lambda _: self._enter())

    def _enter(self) -> None:
        self._entered = time.perf_counter()

    def _leave(self) -> None:
        self.seconds += time.perf_counter() - self._entered


def _on_cpu(config: Config) -> Config:
    """Few blocks, not compiled; of those that are computed again as many as there can be."""
    num_blocks = min(CPU_BLOCKS, config.model.num_hidden_layers)
    recompute = min(config.num_recomputed_blocks, num_blocks) or "none"
    train = config.train.model_copy(update={"compile": False, "recompute": recompute})
    model = config.model.model_copy(update={"num_hidden_layers": num_blocks})
    return config.model_copy(update={"train": train, "model": model})


def _made_up_model(config: Config, *, device: torch.device) -> Llama:
    """Weights as a run begins with them, since some kernels are slower on odd numbers."""
    with device:
        model = Llama(config.model)
    initialize(model, config=config.model, seed=0)
    lora = config.lora
    if lora.rank is not None:
        add_lora(
            model,
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            targets=lora.targets,
            seed=0,
        )
    return model


def _beside(config: Config, *, device: torch.device, ranks: int) -> Tensor | None:
    """Memory of a GPU that the run holds and the timed passes do not: it is taken meanwhile."""
    if device.type != "cuda":
        return None
    planned = estimate_memory(config, ranks=ranks, microbatch_rows=1)
    buffers = (config.train.lanes // ranks).bit_length()
    other_gradients = planned.gradients_bytes // buffers * (buffers - 1)
    num_bytes = planned.optimizer_bytes + other_gradients
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)
