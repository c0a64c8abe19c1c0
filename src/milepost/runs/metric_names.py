"""What a measured number is called, the same in live trackers, in tables and in imports.

A slash parts the group from the name, as trackers expect it: `train/loss`, `eval/piqa/acc_norm`.
"""

from __future__ import annotations

TRAIN_LOSS = "train/loss"
GRAD_NORM = "train/grad_norm"
LEARNING_RATE = "train/learning_rate"
VAL_LOSS = "val/loss"
BITS_PER_BYTE = "val/bits_per_byte"
TOKENS_PER_SECOND = "perf/tokens_per_second"
STEP_SECONDS = "perf/step_seconds"
MFU = "perf/mfu_fraction"

STEP_METRICS = {
    "loss_nats": TRAIN_LOSS,
    "grad_norm": GRAD_NORM,
    "learning_rate": LEARNING_RATE,
    "tokens_per_second": TOKENS_PER_SECOND,
    "step_seconds": STEP_SECONDS,
    "mfu_fraction": MFU,
}
"""Field of a `step` event to the metric's name."""

VALIDATION_METRICS = {"loss_nats": VAL_LOSS, "bits_per_byte": BITS_PER_BYTE}
"""Field of a `validation` event to the metric's name."""


def benchmark_metric(benchmark: str, metric: str) -> str:
    """'eval/hellaswag/acc_norm'"""
    return f"eval/{benchmark}/{metric}"


def rubric_metric(rater_kind: str, criterion: str) -> str:
    """'rubric/person/coherence'; people and models are never one metric."""
    return f"rubric/{rater_kind}/{criterion}"
