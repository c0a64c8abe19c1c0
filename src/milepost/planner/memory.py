"""Memory of one rank at the peak of a step, estimated from the config.

Weights, gradients, optimizer states and saved activations are counted; the buffers beside them
are those of the code that has them. A step has four stages that can be its peak, and the estimate
is that of the largest.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from milepost.config.schema import Config
from milepost.core.errors import UsageError
from milepost.core.units import GIBIBYTE, MEBIBYTE
from milepost.planner.activations import (
    COMPUTE_BYTES,
    FLOAT32_BYTES,
    backward_bytes,
    block_bytes_per_token,
    block_casts_bytes,
    final_norm_bytes,
    is_planned_compiled,
)
from milepost.planner.cost import (
    count_additions,
    count_parameters,
    count_trained,
    trained_sizes,
)

DeviceKind = Literal["cpu", "gpu"]

LOSS_CHUNK_ROWS = 1024
"""Rows of logits that exist at once."""

LOSS_BLOCK_ROWS = 8
"""Rows of float32 logits that exist at once on a CPU; on a GPU those of a chunk."""

VOCABULARY_MULTIPLE = 64
"""In 16 bits the head is padded to a multiple of so many columns."""

GPU_PROCESS_BYTES = 1 * GIBIBYTE
"""The CUDA context, library workspaces and what the allocator cannot use; a rough figure."""

CPU_PROCESS_BYTES = 330 * MEBIBYTE
"""Python, torch and its libraries, as measured (benchmarks/memory.py)."""

CPU_HOLES, CPU_LOSS_HOLES = 0.5, 0.6
"""What lies idle in the heap besides: of what blocks that are not compiled save, and of what the
loss takes; chosen after measuring. Up to glibc 2.37 an aligned block, as torch's are, does not go
where one of its size was freed, but where a larger one was. With blocks that are mapped one by
one (`glibc.malloc.mmap_threshold`) there are no such holes, and each step pays for fresh pages."""

CPU_COMPILER_BYTES = 90 * MEBIBYTE
"""What compiling a block leaves in the process besides, as measured."""

CPU_LOWBIT_BYTES = 75 * MEBIBYTE
"""torchao and the tables of its codes, as measured."""

LOWBIT_UPDATE_BYTES = 24
"""A number while 8-bit AdamW updates it: six float32 at once."""

LOWBIT_UPDATE_NUMBERS, LOWBIT_UPDATE_NUMBERS_CPU = 1 << 24, 1 << 20
"""The most numbers of a tensor that 8-bit AdamW updates at once."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes one rank holds at the peak of a step.

    Attributes:
        working_bytes: what the step's largest stage takes beside the rest: the loss, a block's
            backward pass, the embedding's gradient or an update.
        holes_bytes: what the heap has taken for these and cannot use again; 0 on a GPU.
        save_bytes: the copy that is written while training goes on, and the file that is read
            back, of the main rank; 0 on a GPU, whose host has them.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    casts_bytes: int
    activations_bytes: int
    working_bytes: int
    holes_bytes: int
    save_bytes: int
    process_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


def estimate_memory(
    config: Config,
    *,
    ranks: int = 1,
    microbatch_rows: int | None = None,
    device: DeviceKind = "gpu",
) -> MemoryEstimate:
    """Peak memory of one rank: of its GPU, or its resident set on a CPU.

    The resident set is the main rank's, with the allocator's settings of our launcher.

    Args:
        ranks: processes that share the lanes, one a GPU.
        microbatch_rows: in place of the config's.
        device: what is trained on.

    Raises:
        UsageError: the lanes cannot be dealt to so many ranks.
    """
    lanes_per_rank = _lanes_per_rank(config.train.lanes, ranks=ranks)
    num_trained = count_trained(config)
    num_weights = count_parameters(config.model).total
    num_weights += count_additions(config.model, lora=config.lora)
    rows = microbatch_rows or config.train.rows_of_forward
    tokens = rows * config.data.sequence_length
    on_cpu = device == "cpu"
    # One flat buffer a level of the tree in which lanes are summed: log2(lanes) + 1.
    gradient_buffers = lanes_per_rank.bit_length()
    num_at_once = max(1, config.model.num_hidden_layers - config.num_recomputed_blocks)
    casts = num_at_once * block_casts_bytes(config)
    activations = _activation_bytes(config, tokens=tokens, num_blocks=num_at_once, on_cpu=on_cpu)
    largest = max(_stages(config, tokens=tokens, on_cpu=on_cpu))
    holes = _holes_bytes(config, saved_bytes=casts + activations, tokens=tokens)
    return MemoryEstimate(
        weights_bytes=FLOAT32_BYTES * num_weights,
        gradients_bytes=FLOAT32_BYTES * num_trained * gradient_buffers,
        optimizer_bytes=2 * moment_bytes(config),
        casts_bytes=casts,
        activations_bytes=activations,
        working_bytes=largest - casts - activations,
        holes_bytes=holes if on_cpu else 0,
        save_bytes=save_copy_bytes(config) + _read_back_bytes(config) if on_cpu else 0,
        process_bytes=_process_bytes(config, on_cpu=on_cpu),
    )


def _holes_bytes(config: Config, *, saved_bytes: int, tokens: int) -> int:
    in_blocks = 0.0 if is_planned_compiled(config) else CPU_HOLES * saved_bytes
    return int(in_blocks + CPU_LOSS_HOLES * _loss_bytes(config, tokens=tokens, on_cpu=True))


def _process_bytes(config: Config, *, on_cpu: bool) -> int:
    if not on_cpu:
        return GPU_PROCESS_BYTES
    num_bytes = CPU_PROCESS_BYTES
    if is_planned_compiled(config):
        num_bytes += CPU_COMPILER_BYTES
    if config.optimizer.name == "adamw8bit":
        num_bytes += CPU_LOWBIT_BYTES
    return num_bytes


def _activation_bytes(config: Config, *, tokens: int, num_blocks: int, on_cpu: bool) -> int:
    """Of so many blocks, and the inputs of those that are computed again."""
    width = COMPUTE_BYTES[config.train.precision]
    inputs = config.num_recomputed_blocks * width * config.model.hidden_size
    return tokens * (inputs + num_blocks * block_bytes_per_token(config, on_cpu=on_cpu))


def _stages(config: Config, *, tokens: int, on_cpu: bool) -> list[int]:
    """Bytes of casts, activations and buffers at each stage of a step that can be its peak.

    The loss, when all blocks have saved what they do; the backward pass of the last block, or of
    one that was computed again, by when all others' is freed; the embedding's gradient, at the
    end; and the update of a tensor by 8-bit AdamW. A tied head's gradient waits for the
    embedding's.
    """
    model = config.model
    num_stored = model.num_hidden_layers - config.num_recomputed_blocks
    casts = block_casts_bytes(config)
    table = FLOAT32_BYTES * model.vocab_size * model.hidden_size
    waiting = table if model.tie_word_embeddings and not config.lora.rank else 0

    def saved(num_blocks: int) -> int:
        kept = _activation_bytes(config, tokens=tokens, num_blocks=num_blocks, on_cpu=on_cpu)
        return kept + num_blocks * casts

    loss = saved(num_stored) + final_norm_bytes(config, tokens=tokens)
    loss += _loss_bytes(config, tokens=tokens, on_cpu=on_cpu)
    backward = saved(max(1, num_stored)) + backward_bytes(config, tokens=tokens) + waiting
    embedding = 0
    if not config.lora.rank:
        embedding = waiting + table + FLOAT32_BYTES * tokens * model.hidden_size
    return [loss, backward, embedding, _update_bytes(config, on_cpu=on_cpu)]


def _update_bytes(config: Config, *, on_cpu: bool) -> int:
    """The buffers of an update; the fused AdamW has none."""
    if config.optimizer.name != "adamw8bit":
        return 0
    most = LOWBIT_UPDATE_NUMBERS_CPU if on_cpu else LOWBIT_UPDATE_NUMBERS
    return LOWBIT_UPDATE_BYTES * min(most, max(trained_sizes(config)))


def _loss_bytes(config: Config, *, tokens: int, on_cpu: bool) -> int:
    """The chunked cross-entropy: a chunk's logits, the head's gradient, 16-bit copies.

    In float32: logits C V and the gradient V D. In 16 bits: logits in both widths, and the head
    and the product of a chunk in 16 bits besides, all with padded columns. And the gradient of
    the hidden states. Where the head is frozen it has no gradient.
    """
    model, width = config.model, COMPUTE_BYTES[config.train.precision]
    is_wide, is_trained = width == FLOAT32_BYTES, not config.lora.rank
    chunk_rows, columns = min(LOSS_CHUNK_ROWS, tokens), model.vocab_size
    if not is_wide:
        columns += -columns % VOCABULARY_MULTIPLE
    logits = width * chunk_rows * columns
    if on_cpu or not is_wide:
        wide_rows = min(LOSS_BLOCK_ROWS, chunk_rows) if on_cpu else chunk_rows
        logits += FLOAT32_BYTES * wide_rows * model.vocab_size
    head = 0
    if not is_wide:
        head += width * columns * model.hidden_size * (2 if is_trained else 1)
    if is_trained:
        head += FLOAT32_BYTES * model.vocab_size * model.hidden_size
    return logits + head + width * tokens * model.hidden_size


def moment_bytes(config: Config) -> int:
    """Bytes of one moment of AdamW.

    In 8 bits a tensor of 4096 numbers or more, a multiple of 256, has a byte for each, a scale of
    4 bytes for every 256 and a map of 1,024 bytes; any other stays float32 (`train.lowbit`).
    """
    sizes = trained_sizes(config)
    if config.optimizer.name != "adamw8bit":
        return FLOAT32_BYTES * sum(sizes)
    return sum(
        size + FLOAT32_BYTES * (size // 256 + 256)
        if size >= 4096 and size % 256 == 0
        else FLOAT32_BYTES * size
        for size in sizes
    )


def _read_back_bytes(config: Config) -> int:
    """Of the larger file of a checkpoint, which a save maps to hold it against the copy."""
    return max(FLOAT32_BYTES * count_trained(config), 2 * moment_bytes(config))


def host_bytes(config: Config) -> int:
    """Memory of the host that a restart of a GPU run takes on each rank, for a moment.

    The model is made in float32 (4 bytes a parameter) while the masters (4) and both moments of
    the train state are read. Masters and moments are of what is trained alone.
    """
    num_trained = count_trained(config)
    num_weights = count_parameters(config.model).total
    num_weights += count_additions(config.model, lora=config.lora)
    read_bytes = FLOAT32_BYTES * num_trained + 2 * moment_bytes(config)
    return FLOAT32_BYTES * num_weights + read_bytes


def save_copy_bytes(config: Config) -> int:
    """Memory of the host that the main rank keeps for its saves while it trains.

    The copy of the masters and both moments that is written while training goes on, and the
    weights in 16 bits where the model file has them so. On a CPU it lies beside the training.
    """
    num_trained = count_trained(config)
    weight_bytes = FLOAT32_BYTES
    if config.checkpoint.weights_dtype != "float32":
        weight_bytes += 2
    return weight_bytes * num_trained + 2 * moment_bytes(config)


def largest_microbatch_rows(
    config: Config, *, ranks: int, memory_bytes: int, device: DeviceKind = "gpu"
) -> int | None:
    """The most rows a forward pass can have in so much memory; None where not even one fits.

    Only numbers of rows that deal a lane out evenly are tried.
    """
    rows_per_lane = config.rows_per_step // config.train.lanes
    for rows in range(rows_per_lane, 0, -1):
        if rows_per_lane % rows:
            continue
        needed = estimate_memory(config, ranks=ranks, microbatch_rows=rows, device=device)
        if needed.total_bytes <= memory_bytes:
            return rows
    return None


def _lanes_per_rank(lanes: int, *, ranks: int) -> int:
    if ranks >= 1 and lanes % ranks == 0:
        return lanes // ranks
    divisors = [str(n) for n in range(1, lanes + 1) if lanes % n == 0]
    is_power_of_two = ranks >= 1 and ranks & (ranks - 1) == 0
    more_lanes = f", or --train.lanes {ranks}" if is_power_of_two else ""
    raise UsageError(
        f"{lanes} lanes cannot be dealt to {ranks} GPUs",
        hint=f"use {' or '.join(divisors)} GPUs{more_lanes}",
    )
