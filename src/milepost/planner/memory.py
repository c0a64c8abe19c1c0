"""Memory of one rank and disk of a run, estimated from the config.

Weights, gradients and optimizer states are exact counts; activations and the rest are
estimates, each with its formula beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from milepost.config.schema import Config, ModelSection
from milepost.core.errors import UsageError
from milepost.core.units import GIBIBYTE
from milepost.planner.cost import count_parameters, run_tokens

FLOAT32_BYTES = 4
COMPUTE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}
"""Bytes of a computed number; "auto" is planned as bfloat16, which it is on recent GPUs."""

LOSS_CHUNK_ROWS = 1024
"""Rows of logits planned to exist at once."""

PROCESS_BYTES = 1 * GIBIBYTE
"""The CUDA context, library workspaces and what the allocator cannot use; a rough figure."""

FOLDER_BYTES = 4 << 20
"""Tokenizer files, configs and manifests of a checkpoint, rounded up."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes one rank holds at the peak of a step."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    casts_bytes: int
    activations_bytes: int
    loss_bytes: int
    process_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class DiskEstimate:
    """Bytes a run and its data take.

    Attributes:
        weights_bytes: of every checkpoint.
        train_state_bytes: of each checkpoint that keeps one.
        num_checkpoints: over the whole run.
        num_train_states: kept at the end.
        run_bytes: at the end of the run.
        peak_bytes: at the end, while the last checkpoint is written beside what it replaces.
        data_bytes: of shards that hold each of the run's tokens once.
    """

    weights_bytes: int
    train_state_bytes: int
    num_checkpoints: int
    num_train_states: int
    run_bytes: int
    peak_bytes: int
    data_bytes: int


def estimate_memory(
    config: Config, *, ranks: int = 1, microbatch_rows: int | None = None
) -> MemoryEstimate:
    """Peak memory of one rank.

    Args:
        ranks: processes that share the lanes, one a GPU.
        microbatch_rows: in place of the config's.

    Raises:
        UsageError: the lanes cannot be dealt to so many ranks.
    """
    lanes_per_rank = _lanes_per_rank(config.train.lanes, ranks=ranks)
    model, counted = config.model, count_parameters(config.model)
    width = COMPUTE_BYTES[config.train.precision]
    rows = microbatch_rows or config.train.microbatch_rows
    tokens = rows * config.data.sequence_length
    # One flat buffer a level of the tree in which lanes are summed: log2(lanes) + 1.
    gradient_buffers = lanes_per_rank.bit_length()
    return MemoryEstimate(
        weights_bytes=FLOAT32_BYTES * counted.total,
        gradients_bytes=FLOAT32_BYTES * counted.total * gradient_buffers,
        optimizer_bytes=2 * FLOAT32_BYTES * counted.total,
        casts_bytes=_casts_bytes(config),
        activations_bytes=tokens * _activation_bytes_per_token(config),
        loss_bytes=_loss_bytes(model, tokens=tokens, width=width),
        process_bytes=PROCESS_BYTES,
    )


def host_bytes(config: Config) -> int:
    """Memory of the host that a restart of a GPU run takes on each rank, for a moment.

    The model is made in float32 (4 bytes a parameter) while the masters and both moments of the
    train state are read (12). A save holds a little less.
    """
    return 16 * count_parameters(config.model).total


def largest_microbatch_rows(config: Config, *, ranks: int, memory_bytes: int) -> int | None:
    """The most rows a forward pass can have in so much memory; None where not even one fits.

    Only numbers of rows that deal a lane out evenly are tried.
    """
    rows_per_lane = config.rows_per_step // config.train.lanes
    for rows in range(rows_per_lane, 0, -1):
        if rows_per_lane % rows:
            continue
        needed = estimate_memory(config, ranks=ranks, microbatch_rows=rows)
        if needed.total_bytes <= memory_bytes:
            return rows
    return None


def estimate_disk(config: Config) -> DiskEstimate:
    """Disk of the checkpoints of a run, with the retention of its config, and of its data."""
    counted, checkpoint = count_parameters(config.model).total, config.checkpoint
    if checkpoint.weights_dtype == "float32":
        weights_bytes, train_state_bytes = 4 * counted, 8 * counted
    else:  # the masters move into the train state
        weights_bytes, train_state_bytes = 2 * counted, 12 * counted
    weights_bytes += FOLDER_BYTES
    steps = _checkpoint_steps(config)
    kept = set(steps[-checkpoint.keep_train_state :])
    if checkpoint.keep_train_state_every_steps is not None:
        kept |= {step for step in steps if step % checkpoint.keep_train_state_every_steps == 0}
    run_bytes = len(steps) * weights_bytes + len(kept) * train_state_bytes
    token_bytes = 2 if config.model.vocab_size <= 1 << 16 else 4
    return DiskEstimate(
        weights_bytes=weights_bytes,
        train_state_bytes=train_state_bytes,
        num_checkpoints=len(steps),
        num_train_states=len(kept),
        run_bytes=run_bytes,
        # Retention frees the oldest train state only after the new checkpoint is whole.
        peak_bytes=run_bytes + train_state_bytes,
        data_bytes=run_tokens(config) * token_bytes,
    )


def _checkpoint_steps(config: Config) -> list[int]:
    """Steps a checkpoint is written at: every interval, and at the end."""
    steps = list(range(0, config.last_step + 1, config.checkpoint.every_steps))[1:]
    return steps if steps and steps[-1] == config.last_step else [*steps, config.last_step]


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


def _casts_bytes(config: Config) -> int:
    """16-bit copies of the float32 weights that a forward pass makes and its backward needs."""
    width = COMPUTE_BYTES[config.train.precision]
    if width == FLOAT32_BYTES:
        return 0
    counted = count_parameters(config.model)
    in_blocks = counted.attention + counted.feed_forward
    if config.train.recompute == "block":
        in_blocks //= config.model.num_hidden_layers
    return width * in_blocks


def _activation_bytes_per_token(config: Config) -> int:
    """What a token leaves behind in the forward pass for the backward pass.

    A block keeps its input, the input after each norm, the residual stream after attention,
    queries and the attention's output (6 D); keys and values (2 G H); gate, up and their
    product (3 F), all in the compute dtype; and a float32 log-sum a head. What is cheap to
    compute again inside a compiled block is not counted. With recompute a block keeps its
    input only, and one block at a time has the rest.
    """
    model, width = config.model, COMPUTE_BYTES[config.train.precision]
    block = width * (
        6 * model.hidden_size
        + 2 * model.num_key_value_heads * model.head_dim
        + 3 * model.intermediate_size
    )
    block += FLOAT32_BYTES * model.num_attention_heads
    if config.train.recompute == "block":
        return model.num_hidden_layers * width * model.hidden_size + block
    return model.num_hidden_layers * block


def _loss_bytes(model: ModelSection, *, tokens: int, width: int) -> int:
    """The chunked cross-entropy: logits of a chunk, the head's gradient, 16-bit copies.

    In float32: logits C V and the gradient V D. In 16 bits: logits in both widths, and the head
    and the product of a chunk in 16 bits besides. And the gradient of the hidden states.
    """
    chunk_rows = min(LOSS_CHUNK_ROWS, tokens)
    logits = chunk_rows * model.vocab_size
    head = model.vocab_size * model.hidden_size
    sixteen_bit = 0 if width == FLOAT32_BYTES else width * (logits + 2 * head)
    grad_hidden = width * tokens * model.hidden_size
    return FLOAT32_BYTES * (logits + head) + sixteen_bit + grad_hidden
