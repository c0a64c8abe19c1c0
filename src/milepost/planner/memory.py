"""Memory of one rank and disk of a run, estimated from the config.

Weights, gradients and optimizer states are exact counts; activations and the rest are
estimates, each with its formula beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

from milepost.config.schema import Config, ModelSection
from milepost.core.errors import UsageError
from milepost.core.units import GIBIBYTE
from milepost.planner.cost import count_additions, count_parameters, count_trained, run_tokens

FLOAT32_BYTES = 4
COMPUTE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}
"""Bytes of a computed number; "auto" is planned as bfloat16, which it is on recent GPUs."""

LOSS_CHUNK_ROWS = 1024
"""Rows of logits planned to exist at once."""

PROCESS_BYTES = 1 * GIBIBYTE
"""The CUDA context, library workspaces and what the allocator cannot use; a rough figure."""

FOLDER_BYTES = 4 << 20
"""Tokenizer files, configs and manifests of a checkpoint, rounded up."""


STEP_EVENT_BYTES = 640
"""A step in the event log, with its share of the rarer events, rounded up."""

LOG_BYTES = 64 << 10
"""The run's manifest and the events of its segments, of a few restarts too."""

SAMPLE_BYTES = 1536
SAMPLE_TOKEN_BYTES = 24
"""A sample's record and event, and on top for each token its id and its text."""


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

    What a run is stopped for on request between two checkpoints, and damaged ones that were set
    aside, come on top: nobody can plan them.

    Attributes:
        weights_bytes: of every checkpoint.
        train_state_bytes: of each checkpoint that keeps one.
        num_checkpoints: over the whole run.
        num_train_states: kept at the end.
        history_bytes: of the event log and the samples.
        run_bytes: at the end of the run.
        peak_bytes: at the end, while the last checkpoint is written beside what it replaces.
        data_bytes: of shards that hold each of the run's tokens once.
    """

    weights_bytes: int
    train_state_bytes: int
    num_checkpoints: int
    num_train_states: int
    history_bytes: int
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
    model, num_trained = config.model, count_trained(config)
    num_weights = count_parameters(model).total + count_additions(model, lora=config.lora)
    width = COMPUTE_BYTES[config.train.precision]
    rows = microbatch_rows or config.train.microbatch_rows
    tokens = rows * config.data.sequence_length
    # One flat buffer a level of the tree in which lanes are summed: log2(lanes) + 1.
    gradient_buffers = lanes_per_rank.bit_length()
    return MemoryEstimate(
        weights_bytes=FLOAT32_BYTES * num_weights,
        gradients_bytes=FLOAT32_BYTES * num_trained * gradient_buffers,
        optimizer_bytes=2 * _moment_bytes(config, num_trained),
        casts_bytes=_casts_bytes(config),
        activations_bytes=tokens * _activation_bytes_per_token(config),
        loss_bytes=_loss_bytes(model, tokens=tokens, width=width),
        process_bytes=PROCESS_BYTES,
    )


def _moment_bytes(config: Config, num_trained: int) -> int:
    """One moment of AdamW; in 8 bits a byte a number, and a float32 scale for every 256."""
    if config.optimizer.name == "adamw8bit":
        return num_trained + FLOAT32_BYTES * num_trained // 256
    return FLOAT32_BYTES * num_trained


def host_bytes(config: Config) -> int:
    """Memory of the host that a restart of a GPU run takes on each rank, for a moment.

    The model is made in float32 (4 bytes a parameter) while the masters (4) and both moments of
    the train state are read. Masters and moments are of what is trained alone.
    """
    num_trained = count_trained(config)
    num_weights = count_parameters(config.model).total
    num_weights += count_additions(config.model, lora=config.lora)
    read_bytes = FLOAT32_BYTES * num_trained + 2 * _moment_bytes(config, num_trained)
    return FLOAT32_BYTES * num_weights + read_bytes


def save_copy_bytes(config: Config) -> int:
    """Memory of the host that the main rank keeps for its saves while it trains.

    The copy of the masters and both moments that is written while training goes on, and the
    weights in 16 bits where the model file has them so. On a CPU run it lies beside all that
    `estimate_memory` counts.
    """
    num_trained = count_trained(config)
    weight_bytes = FLOAT32_BYTES
    if config.checkpoint.weights_dtype != "float32":
        weight_bytes += 2
    return weight_bytes * num_trained + 2 * _moment_bytes(config, num_trained)


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


class CheckpointBytes(NamedTuple):
    """Bytes of one checkpoint on the disk: what stays, and the train state in it."""

    weights_bytes: int
    train_state_bytes: int


def checkpoint_bytes(num_parameters: int, *, weights_dtype: str) -> CheckpointBytes:
    """What one checkpoint takes on the disk, its small files among the weights.

    Args:
        num_parameters: of the model.
        weights_dtype: of the model file; with "bfloat16" the train state has float32 masters.
    """
    moments = 2 * FLOAT32_BYTES
    if weights_dtype == "float32":
        weights, states = FLOAT32_BYTES, moments
    else:
        weights, states = 2, FLOAT32_BYTES + moments
    return CheckpointBytes(weights * num_parameters + FOLDER_BYTES, states * num_parameters)


def estimate_disk(config: Config) -> DiskEstimate:
    """Disk of the checkpoints of a run, with the retention of its config, and of its data."""
    checkpoint = config.checkpoint
    weights_bytes, train_state_bytes = checkpoint_bytes(
        count_trained(config), weights_dtype=checkpoint.weights_dtype
    )
    num_trained = count_trained(config)
    train_state_bytes -= 2 * (FLOAT32_BYTES * num_trained - _moment_bytes(config, num_trained))
    steps = _checkpoint_steps(config)
    num_kept = _num_train_states(config, steps)
    # Retention frees an old train state only after the new checkpoint is whole.
    num_at_peak = _num_train_states(config, steps[:-1]) + 1
    history_bytes = _history_bytes(config)
    always_bytes = len(steps) * weights_bytes + history_bytes
    token_bytes = 2 if config.model.vocab_size <= 1 << 16 else 4
    return DiskEstimate(
        weights_bytes=weights_bytes,
        train_state_bytes=train_state_bytes,
        num_checkpoints=len(steps),
        num_train_states=num_kept,
        history_bytes=history_bytes,
        run_bytes=always_bytes + num_kept * train_state_bytes,
        peak_bytes=always_bytes + num_at_peak * train_state_bytes,
        data_bytes=run_tokens(config) * token_bytes,
    )


def _history_bytes(config: Config) -> int:
    """The event log and the samples, their events among them; both only grow."""
    steps, samples = config.last_step, config.samples
    num_samples = 0
    if samples.every_steps is not None:
        num_samples = len(samples.prompts) * (2 + steps // samples.every_steps)
    sample_bytes = SAMPLE_BYTES + SAMPLE_TOKEN_BYTES * samples.max_new_tokens
    return LOG_BYTES + STEP_EVENT_BYTES * steps + sample_bytes * num_samples


def _num_train_states(config: Config, steps: list[int]) -> int:
    """How many of the checkpoints of these steps have a train state after the last of them."""
    checkpoint = config.checkpoint
    kept = set(steps[-checkpoint.keep_train_state :])
    if checkpoint.keep_train_state_every_steps is not None:
        kept |= {step for step in steps if step % checkpoint.keep_train_state_every_steps == 0}
    if config.guards.spike == "rollback":
        kept |= set([step for step in steps if step % checkpoint.every_steps == 0][-2:])
    return len(kept)


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
    in_blocks += count_additions(config.model, lora=config.lora)
    if config.train.recompute == "block":
        in_blocks //= config.model.num_hidden_layers
    return width * in_blocks


def _activation_bytes_per_token(config: Config) -> int:
    """What a token leaves behind in the forward pass for the backward pass.

    A block keeps its input, the input after each norm, the residual stream after attention,
    queries and the attention's output (6 D); keys and values (2 G H); gate, up and their
    product (3 F), all in the compute dtype; and a float32 log-sum a head. LoRA's additions keep
    what lies between their two matrices, the rank of each. What is cheap to compute again inside
    a compiled block is not counted. With recompute a block keeps its input only, and one block
    at a time has the rest.
    """
    model, width = config.model, COMPUTE_BYTES[config.train.precision]
    block = width * (
        6 * model.hidden_size
        + 2 * model.num_key_value_heads * model.head_dim
        + 3 * model.intermediate_size
        + (config.lora.rank or 0) * len(config.lora.targets)
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
