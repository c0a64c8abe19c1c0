"""`milepost doctor`: what this machine has and what will be used."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from milepost.config.schema import TrainSection
from milepost.core.console import show, show_json
from milepost.core.environment import (
    PACKAGES,
    code_version,
    cpu_flags,
    cpu_name,
    memory_bytes,
    num_available_cores,
    package_version,
)
from milepost.core.errors import UsageError
from milepost.core.files import free_bytes
from milepost.core.units import GIBIBYTE, format_bytes

OLDEST_TORCH = (2, 11)
FIRST_UNTRIED_TORCH = (2, 14)
"""The range of pyproject.toml; a test holds the two together."""

LITTLE_MEMORY_BYTES = 4 * GIBIBYTE
LITTLE_DISK_BYTES = 10 * GIBIBYTE


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, what was found, and what to do where that is a problem.

    Attributes:
        hint: None where all is well.
    """

    name: str
    found: str
    hint: str | None = None


def doctor(*, json: bool = False) -> None:
    """Say what this machine has and what will be used.

    Nothing is changed and no network is used. A warning comes with a hint; Milepost may still
    work.

    Example: `milepost doctor`

    Args:
        json: Write one JSON document.
    """
    checks = [*_software_checks(), *_machine_checks(), *_torch_checks()]
    if json:
        lines: list[dict[str, Any]] = [
            asdict(check) | {"status": "ok" if check.hint is None else "warning"}
            for check in checks
        ]
        show_json({"checks": lines})
        return
    for check in checks:
        show(f"{'ok' if check.hint is None else 'warning':<8} {check.name:<18} {check.found}")
        if check.hint is not None:
            show(f"{'':<8} hint: {check.hint}")


def _software_checks() -> Iterator[Check]:
    yield Check("milepost", code_version())
    yield Check("python", f"{platform.python_version()}, {sys.executable}")
    versions = {name: package_version(name) for name in PACKAGES if name != "torch"}
    yield Check("packages", ", ".join(f"{k} {v or 'not installed'}" for k, v in versions.items()))
    compiler = next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    yield Check(
        "C++ compiler",
        compiler or "none",
        None
        if compiler
        else "without one train.compile is off on the CPU; Debian, Ubuntu: apt install g++",
    )
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    state = "switched off by HF_HUB_OFFLINE" if offline else "not tried"
    yield Check("hub", f"{endpoint}, {state}; only hf:// sources need it, offline is fine")


def _machine_checks() -> Iterator[Check]:
    yield Check("cpu", f"{cpu_name()}, {num_available_cores()} cores to use")
    fast = [name for flag, name in _BFLOAT16_FLAGS.items() if flag in cpu_flags()]
    yield Check("cpu bfloat16", ", ".join(fast) or "no instructions of its own")
    memory = memory_bytes()
    little = memory is not None and memory < LITTLE_MEMORY_BYTES
    yield Check(
        "memory",
        "unknown" if memory is None else format_bytes(memory),
        "the demo needs about 2 GiB; see milepost plan RECIPE" if little else None,
    )
    free = free_bytes(Path.cwd())
    yield Check(
        "disk",
        f"{format_bytes(free)} free in {Path.cwd()}",
        "checkpoints fill a disk fast; milepost plan RECIPE says how much a run takes"
        if free < LITTLE_DISK_BYTES
        else None,
    )


_BFLOAT16_FLAGS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}


def _torch_checks() -> Iterator[Check]:
    try:
        import torch
    except ImportError as error:
        yield Check(
            "torch",
            f"cannot be imported: {error}",
            "training and sampling need it: ./run installs it; plan, report and data do without",
        )
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    is_tried = OLDEST_TORCH <= version < FIRST_UNTRIED_TORCH
    oldest, untried = (".".join(map(str, v)) for v in (OLDEST_TORCH, FIRST_UNTRIED_TORCH))
    yield Check(
        "torch",
        f"{torch.__version__}, {build}",
        None if is_tried else f"Milepost is made for torch>={oldest},<{untried}",
    )
    yield from _gpu_checks()
    yield from _choices()


def _gpu_checks() -> Iterator[Check]:
    import torch

    from milepost.planner.duration import gpu_of_device

    if not torch.cuda.is_available():
        has_driver = Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None
        yield Check(
            "gpus",
            "none that torch can use",
            "an NVIDIA driver is here: install a CUDA build of torch that fits it, and see that "
            "CUDA_VISIBLE_DEVICES is not empty"
            if has_driver
            else None,
        )
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        known = gpu_of_device(properties.name)
        peak = "unknown" if known is None else f"{known.bf16_flops / 1e12:g} TFLOP/s"
        yield Check(
            f"gpu {index}",
            f"{properties.name}, {format_bytes(properties.total_memory)}, bf16 peak {peak}",
        )


def _choices() -> Iterator[Check]:
    """What "auto" becomes on this machine."""
    import torch

    from milepost.distributed.devices import choose_ranks, count_gpus
    from milepost.train.precision import resolve_precision

    try:
        num_gpus = count_gpus()
    except UsageError as error:
        yield Check("trains on", error.message, error.hint)
        return
    device = torch.device("cuda" if num_gpus else "cpu")
    yield Check("trains on", f"GPUs: {num_gpus}" if num_gpus else "the CPU")
    yield Check("precision auto", resolve_precision("auto", device=device))
    lanes = TrainSection.model_fields["lanes"].default
    ranks = choose_ranks(requested=None, lanes=lanes, num_gpus=num_gpus)
    place = "one a GPU" if num_gpus else "one thread each"
    yield Check("ranks", f"{ranks} for the usual {lanes} lanes, {place}")
