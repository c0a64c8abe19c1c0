"""How many ranks a machine takes, asked without importing torch where there is no GPU."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

from milepost.core.environment import memory_bytes, num_available_cores
from milepost.core.errors import UsageError

_SIGNS_OF_A_DRIVER = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg")
"""What a machine with an NVIDIA driver has: Linux, a container on it, Windows' Linux."""


def count_gpus() -> int:
    """CUDA devices that torch can use; torch is imported only where a driver is there.

    Raises:
        UsageError: there are GPUs, but torch cannot use them.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return 0
    has_driver = any(Path(sign).exists() for sign in _SIGNS_OF_A_DRIVER)
    if not has_driver and shutil.which("nvidia-smi") is None:
        return 0
    import torch

    num_gpus = torch.cuda.device_count()  # as the driver counts them
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        is_usable = num_gpus == 0 or torch.cuda.is_available()
    if not is_usable:
        reason = "".join(f": {warning.message}" for warning in caught[:1])
        raise UsageError(
            f"torch {torch.__version__} cannot use the {num_gpus} GPUs of this machine{reason}",
            hint="update the NVIDIA driver or install a torch build that fits it (milepost doctor "
            "shows both); CUDA_VISIBLE_DEVICES='' trains on the CPU",
        )
    return num_gpus


def choose_ranks(*, requested: int | None, lanes: int, num_gpus: int) -> int:
    """Processes to start: what was asked for, or the largest divisor of `lanes` that fits.

    Args:
        requested: from the command line, None for the default.
        lanes: of the recipe; ranks must divide them.
        num_gpus: 0 means that training runs on the CPU, one thread a rank.

    Raises:
        UsageError: the lanes cannot be dealt to so many ranks, or there are too few GPUs.
    """
    places = num_gpus or num_available_cores()
    divisors = [n for n in range(1, lanes + 1) if lanes % n == 0]
    if requested is None:
        return max(n for n in divisors if n <= max(places, 1))
    check_ranks(requested, lanes=lanes)
    if num_gpus and requested > num_gpus:
        raise UsageError(
            f"--ranks {requested} needs as many GPUs, this machine has {num_gpus}",
            hint=f"use --ranks {max(n for n in divisors if n <= num_gpus)}",
        )
    return requested


def choose_scoring_ranks(*, requested: int | None, num_gpus: int, rank_bytes: int) -> int:
    """Processes that share the scoring of models: any number gives the same numbers.

    Args:
        requested: from the command line, None for the default: one a GPU, or one a core as far
            as half of the memory goes.
        num_gpus: 0 means that the CPU does the work, one thread a rank.
        rank_bytes: memory of one process.

    Raises:
        UsageError: there cannot be so many.
    """
    if requested is None:
        fitting = (memory_bytes() or 0) // 2 // max(rank_bytes, 1)
        return num_gpus or max(1, min(num_available_cores(), fitting))
    if requested < 1 or (num_gpus and requested > num_gpus):
        most = f"1 to {num_gpus}, one a GPU" if num_gpus else "1 or more"
        raise UsageError(f"--ranks {requested} cannot be", hint=f"give {most}")
    return requested


def check_ranks(ranks: int, *, lanes: int) -> None:
    """Refuses a number of ranks that the lanes cannot be dealt to.

    Raises:
        UsageError: says which numbers would do.
    """
    if ranks < 1 or lanes % ranks:
        divisors = [str(n) for n in range(1, lanes + 1) if lanes % n == 0]
        raise UsageError(
            f"{lanes} lanes cannot be dealt to {ranks} ranks",
            hint=f"use {' or '.join(divisors)} ranks, or a recipe with other train.lanes",
        )
