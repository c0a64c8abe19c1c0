"""What "auto" means on a device: resolved once, when a run is made, and stored in it."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time

import torch

from milepost.config.schema import Config
from milepost.core.errors import StorageError, UsageError

WORTHWHILE_RATIO = 1.3
"""bfloat16 must win its matrix products by so much, since casts and reductions cost too."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_precision(requested: str, *, device: torch.device) -> str:
    """The compute dtype for "auto": bfloat16 where it is faster than float32, else float32."""
    if requested != "auto":
        return requested
    if device.type == "cuda":
        # Older GPUs emulate bfloat16, slower than float32.
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if is_native else "float16"
    return "bfloat16" if _matmul_ratio(device) > WORTHWHILE_RATIO else "float32"


def _matmul_ratio(device: torch.device) -> float:
    """Seconds of a float32 matrix product over those of a bfloat16 one, medians of 5."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left = torch.ones(512, 512, dtype=dtype, device=device)
        times = []
        for _ in range(6):
            started = time.perf_counter()
            torch.mm(left, left)
            times.append(time.perf_counter() - started)
        seconds[dtype] = statistics.median(times[1:])
    return seconds[torch.float32] / max(seconds[torch.bfloat16], 1e-9)


def resolve_compile(requested: bool | str, *, config: Config, device: torch.device) -> bool:
    """Whether to compile: on GPUs; on a CPU where a compiler is there and the run is long.

    A block takes about half a minute to compile on a CPU; a run of few tokens would not win
    that back.
    """
    if requested != "auto":
        return bool(requested)
    if device.type == "cuda":
        return True
    work_tokens = config.train.total_steps * config.train.global_batch_tokens
    work = work_tokens * config.model.hidden_size**2 * config.model.num_hidden_layers
    return _has_compiler() and work > COMPILE_PAYS_WORK


def check_compiler(config: Config, *, device: torch.device) -> None:
    """Refuses to compile where nothing can; a run keeps what it was made with.

    Raises:
        UsageError: train.compile is on, the device is a CPU, and there is no C++ compiler.
        StorageError: train.compile is on and the folder of compiled code cannot be written.
    """
    if not config.train.compile:
        return
    _check_compiler_cache()
    if device.type == "cpu" and not _has_compiler():
        raise UsageError(
            "train.compile is on and there is no C++ compiler here",
            hint="install g++, or turn it off with --train.compile false (for a run that was made "
            "with it also --override: its last bits change)",
        )


def _check_compiler_cache() -> None:
    try:
        from torch._inductor.runtime.cache_dir_utils import cache_dir  # makes it, so does the call

        with tempfile.TemporaryFile(dir=cache_dir()):
            return
    except OSError as error:
        raise StorageError(
            f"train.compile is on and compiled code cannot be kept: {error}",
            hint="set TORCHINDUCTOR_CACHE_DIR to a folder that can be written",
        ) from error


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


COMPILE_PAYS_WORK = 2e12
"""Tokens x layers x width^2 above which compiling was seen to win on two cores."""


def make_deterministic(*, device: torch.device) -> None:
    """Settings under which equal inputs give equal bits on this device."""
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory finds bugs of torch's own; it costs time and changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        from torch._inductor import config as inductor_config

        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        # The compiler may not choose by measuring where the choice shows in the bits (D8b).
        inductor_config.deterministic = True
