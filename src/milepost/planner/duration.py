"""How long a run takes, from what GPUs can do at most and an assumed share of it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from milepost.config.schema import Config
from milepost.core.errors import UsageError
from milepost.core.units import GIBIBYTE
from milepost.planner.cost import flops_per_token, run_tokens

ASSUMED_MFU_FRACTION = 0.40
"""Model FLOPs utilization taken for granted where nothing was measured; an assumption."""

ASSUMED_MFU_FRACTION_WITH_RECOMPUTE = 0.30
"""The same with each block's forward pass done twice: 3 of 4 parts of the work count."""


@dataclass(frozen=True)
class Gpu:
    """What a GPU can do at most.

    Attributes:
        name: what it is called on the command line.
        device_names: what the driver calls it.
        memory_bytes: what CUDA reports, rounded down.
        bf16_flops: dense bfloat16 tensor peak with float32 accumulation, a second.
        source: where the peak stands.
    """

    name: str
    device_names: tuple[str, ...]
    memory_bytes: int
    bf16_flops: float
    source: str


def _gpu(name: str, gibibytes: float, teraflops: float, source: str, *devices: str) -> Gpu:
    return Gpu(
        name=name,
        device_names=tuple(f"NVIDIA {device}" for device in devices),
        memory_bytes=int(gibibytes * GIBIBYTE),
        bf16_flops=teraflops * 1e12,
        source=source,
    )


_GA102 = "NVIDIA Ampere GA102 whitepaper"
_HALF = "half of the figure with sparsity"
GPUS = (
    _gpu("a6000", 47.4, 154.8, f"{_GA102}; RTX A6000 datasheet, {_HALF}", "RTX A6000"),
    _gpu("a40", 44.3, 149.7, "A40 datasheet", "A40"),
    _gpu("a100-40gb", 39.3, 312, "A100 datasheet", "A100-SXM4-40GB", "A100-PCIE-40GB"),
    _gpu("a100", 79.1, 312, "A100 datasheet", "A100-SXM4-80GB", "A100 80GB PCIe"),
    _gpu("h100-pcie", 79.1, 756, f"H100 datasheet, {_HALF}", "H100 PCIe"),
    _gpu("h100", 79.1, 989.4, f"H100 datasheet (SXM), {_HALF}", "H100 80GB HBM3"),
    _gpu("h200", 139.7, 989.4, f"H200 datasheet (SXM), {_HALF}", "H200"),
    _gpu("b200", 178, 2250, f"HGX B200 datasheet, {_HALF}", "B200"),
    _gpu("l4", 22, 121, f"L4 datasheet, {_HALF}", "L4"),
    _gpu("l40s", 44.3, 362, "L40S datasheet", "L40S"),
    _gpu("rtx6000-ada", 47.4, 364.2, f"RTX 6000 Ada datasheet, {_HALF}", "RTX 6000 Ada Generation"),
    _gpu("rtx3090", 23.5, 71, _GA102, "GeForce RTX 3090"),
    _gpu("rtx4090", 23.5, 165.2, "NVIDIA Ada whitepaper", "GeForce RTX 4090"),
    _gpu("rtx5090", 31.3, 209.5, "NVIDIA RTX Blackwell whitepaper", "GeForce RTX 5090"),
)


@dataclass(frozen=True)
class DurationEstimate:
    """How long the steps of a run take; checkpoints and samples come on top.

    Attributes:
        training_seconds: all steps.
        validation_seconds: all validations, a third of training's work a token.
        tokens_per_second: in steps, all GPUs together.
        assumed_mfu_fraction: None where the tokens a second were given.
    """

    training_seconds: float
    validation_seconds: float
    tokens_per_second: float
    assumed_mfu_fraction: float | None

    @property
    def total_seconds(self) -> float:
        """Training and validation."""
        return self.training_seconds + self.validation_seconds


def find_gpu(name: str) -> Gpu:
    """The GPU called `name` on the command line.

    Raises:
        UsageError: it is not in the table; the nearest name and all names are given.
    """
    known = {gpu.name: gpu for gpu in GPUS}
    if name.lower() in known:
        return known[name.lower()]
    close = difflib.get_close_matches(name.lower(), known, n=1)
    nearest = f"did you mean {close[0]}? " if close else ""
    raise UsageError(
        f"there is no GPU {name!r} in the table",
        hint=f"{nearest}known: {', '.join(known)}; for another give --tokens-per-second",
    )


def gpu_of_device(device_name: str) -> Gpu | None:
    """The table's row for what the driver calls a device; None where it is not in the table."""
    return next((gpu for gpu in GPUS if device_name in gpu.device_names), None)


def num_validations(config: Config) -> int:
    """Validations of a run: before the first step, at every interval, and at the end."""
    return 1 + -(-config.last_step // config.validation.every_steps)


def estimate_duration(
    config: Config, *, gpu: Gpu | None, num_gpus: int = 1, tokens_per_second: float | None = None
) -> DurationEstimate | None:
    """Time of a run's steps and validations.

    Args:
        gpu: which GPU, None where it is not known.
        num_gpus: how many of them share the work; perfect scaling is assumed.
        tokens_per_second: as measured, all devices together; stands above the table.

    Returns:
        The estimate, or None where neither a GPU nor a speed is known.
    """
    assumed: float | None = None
    if tokens_per_second is None:
        if gpu is None:
            return None
        share = config.num_recomputed_blocks / config.model.num_hidden_layers
        assumed = 1 / (
            (1 - share) / ASSUMED_MFU_FRACTION + share / ASSUMED_MFU_FRACTION_WITH_RECOMPUTE
        )
        work_flops = flops_per_token(
            config.model, sequence_length=config.data.sequence_length, lora=config.lora
        )
        tokens_per_second = gpu.bf16_flops * num_gpus * assumed / work_flops
    validated_tokens = num_validations(config) * config.validation.tokens
    return DurationEstimate(
        training_seconds=run_tokens(config) / tokens_per_second,
        validation_seconds=validated_tokens / (3 * tokens_per_second),
        tokens_per_second=tokens_per_second,
        assumed_mfu_fraction=assumed,
    )
