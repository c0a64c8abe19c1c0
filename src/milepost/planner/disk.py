"""Disk of a run and of its data, counted from the config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from milepost.config.schema import Config
from milepost.planner.cost import count_trained, run_tokens
from milepost.planner.memory import FLOAT32_BYTES, moment_bytes

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
    train_state_bytes -= 2 * (FLOAT32_BYTES * num_trained - moment_bytes(config))
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
