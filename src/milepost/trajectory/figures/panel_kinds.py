"""What the six panels of the paper's Figure 1 show, and how their values are said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from milepost.runs.metric_names import (
    GRAD_NORM,
    LEARNING_RATE,
    TOKENS_PER_SECOND,
    TRAIN_LOSS,
    VAL_LOSS,
    benchmark_metric,
)
from milepost.trajectory.collect import Table, Trajectory


@dataclass(frozen=True)
class PanelKind:
    """What a panel shows.

    Attributes:
        letter: A to F, as in the paper's Figure 1.
        key: of its files and ids.
        unit: of its values, for people.
        metric: the name of its curve.
        table: of a run, which its CSV is written from.
        field: the column.
        extra_fields: further columns of its CSV.
        text: how one of its values is said.
        from_zero: whether its axis begins at zero.
        is_fraction: whether its values are shares, shown in percent.
        absence: what stands in its place where it has no values.
    """

    letter: str
    key: str
    title: str
    unit: str
    metric: str
    table: Callable[[Trajectory], Table]
    field: str
    extra_fields: tuple[str, ...]
    text: Callable[[float], str]
    from_zero: bool = False
    is_fraction: bool = False
    absence: str = "no values yet"


def _loss(value: float) -> str:
    """Four decimals; of a published number, which has two, those."""
    told = f"{value:.4f}"
    return told.removesuffix("00") if abs(value - round(float(value), 2)) < 1e-12 else told


def _rate(value: float) -> str:
    return f"{value:.3g}"


def _speed(value: float) -> str:
    return f"{value:,.0f}"


def percent(value: float) -> str:
    """A share as people read it: '27.3 %'."""
    return f"{100 * value:.1f} %"


def _steps(trajectory: Trajectory) -> Table:
    return trajectory.steps


PANEL_KINDS = (
    PanelKind(
        "A",
        "validation_loss",
        "Validation loss",
        "nats per token",
        VAL_LOSS,
        lambda trajectory: trajectory.validation,
        "loss_nats",
        ("bits_per_byte", "tokens", "seconds"),
        _loss,
    ),
    PanelKind(
        "B",
        "hellaswag",
        "HellaSwag",
        "accuracy, length-normalized",
        benchmark_metric("hellaswag", "acc_norm"),
        lambda trajectory: trajectory.hellaswag,
        "acc_norm",
        ("acc_norm_stderr",),
        percent,
        is_fraction=True,
        absence="not evaluated",
    ),
    PanelKind(
        "C",
        "training_loss",
        "Training loss",
        "nats per token",
        TRAIN_LOSS,
        _steps,
        "loss_nats",
        ("tokens_seen", "data_step"),
        _loss,
    ),
    PanelKind(
        "D",
        "tokens_per_second",
        "Tokens per second",
        "tokens per second",
        TOKENS_PER_SECOND,
        _steps,
        "tokens_per_second",
        ("step_seconds", "mfu_fraction"),
        _speed,
        from_zero=True,
    ),
    PanelKind(
        "E",
        "learning_rate",
        "Learning rate",
        "of each update",
        LEARNING_RATE,
        _steps,
        "learning_rate",
        (),
        _rate,
    ),
    PanelKind(
        "F",
        "gradient_norm",
        "Gradient norm",
        "L2 norm before clipping",
        GRAD_NORM,
        _steps,
        "grad_norm",
        ("loss_scale",),
        _rate,
    ),
)

_UNITS_OF_FINETUNING = {
    VAL_LOSS: "nats per answer token, held-out conversations",
    TRAIN_LOSS: "nats per answer token",
    TOKENS_PER_SECOND: "all positions of the rows, questions and filling too",
}


def panel_kinds_of(run: Trajectory | None) -> list[PanelKind]:
    """The panels with the units that the values of a run have; None for what is no run."""
    units = _UNITS_OF_FINETUNING if run is not None and run.is_finetuning else {}
    return [replace(kind, unit=units.get(kind.metric, kind.unit)) for kind in PANEL_KINDS]
