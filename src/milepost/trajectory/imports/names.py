"""What other programs call the metrics that Milepost has a name for.

Only names that mean one thing wherever they are used; every other name is kept as it is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from milepost.runs.metric_names import (
    BITS_PER_BYTE,
    GRAD_NORM,
    LEARNING_RATE,
    STEP_METRICS,
    TOKENS_PER_SECOND,
    TRAIN_LOSS,
    VAL_LOSS,
    VALIDATION_METRICS,
    benchmark_metric,
)
from milepost.trajectory.benchmarks import METRICS, NAMES

STEP_NAMES = (
    *("step", "global_step", "train/global_step", "trainer/global_step", "train/step"),
    *("iter", "iteration", "Step", "_step"),
)
"""The first of these that a source has is its step; `_step` counts calls in wandb, so is last."""

TOKEN_NAMES = frozenset(
    [
        *("tokens", "tokens_seen", "num_tokens", "total_tokens", "train_tokens"),
        *("num_input_tokens_seen", "train_num_input_tokens_seen", "consumed_tokens"),
    ]
)
"""Counts of tokens seen, as `_plain` writes names."""

_SYNONYMS: dict[str, tuple[str, ...]] = {
    TRAIN_LOSS: ("loss", "train_loss", "training_loss", "loss_train"),
    VAL_LOSS: (
        *("val_loss", "valid_loss", "validation_loss", "eval_loss"),
        *("loss_val", "loss_valid", "loss_validation", "loss_eval"),
    ),
    BITS_PER_BYTE: ("val_bits_per_byte", "bits_per_byte", "val_bpb", "bpb"),
    GRAD_NORM: ("grad_norm", "gradient_norm", "train_grad_norm", "train_gradient_norm"),
    LEARNING_RATE: ("lr", "learning_rate", "train_lr", "train_learning_rate"),
    TOKENS_PER_SECOND: (
        *("tokens_per_second", "tokens_per_sec", "tok_per_sec"),
        *("train_tokens_per_second", "train_tokens_per_sec", "perf_tokens_per_second"),
    ),
}
ACCURACIES = tuple(benchmark_metric(name, metric) for name in NAMES for metric in METRICS)
"""Metrics that are fractions, in the order of the page."""

_OWN = frozenset([*ACCURACIES, *STEP_METRICS.values(), *VALIDATION_METRICS.values()])
_METRIC_OF = {
    **{word: metric for metric, words in _SYNONYMS.items() for word in words},
    **{metric.replace("/", "_"): metric for metric in ACCURACIES},
    **{metric.replace("/", "_").removeprefix("eval_"): metric for metric in ACCURACIES},
}


def step_name(names: Iterable[str]) -> str | None:
    """Which of a source's names is its step; None where none is."""
    given = set(names)
    return next((name for name in STEP_NAMES if name in given), None)


@functools.cache
def is_token_count(name: str) -> bool:
    """Whether a source's name means the tokens seen."""
    return _plain(name) in TOKEN_NAMES


def metric_names(names: Iterable[str]) -> dict[str, str]:
    """Each name of a source to the metric's; two that mean one metric are not both renamed.

    The metric's own name counts before the others, then the first of them.
    """
    given = list(names)
    taken = {name for name in given if name in _OWN}
    renamed = {}
    for name in given:
        metric = _METRIC_OF.get(_plain(name), name)
        if name not in _OWN and metric in taken:
            metric = name
        taken.add(metric)
        renamed[name] = metric
    return renamed


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]+", "_", name.lower()).strip("_")
