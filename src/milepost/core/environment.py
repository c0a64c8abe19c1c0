"""What machine and which versions a number came from, without importing torch."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import milepost

PACKAGES = ("torch", "numpy", "tokenizers", "tiktoken", "safetensors", "pydantic", "transformers")


def package_version(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def num_available_cores() -> int:
    """Cores this process may use (affinity respected)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def cpu_name() -> str:
    """The processor's own name, or the architecture where it does not say."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The instruction-set flags Linux reports; empty elsewhere."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    return frozenset()


def memory_bytes() -> int | None:
    """Physical memory, or None where it cannot be asked."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def code_version() -> str:
    """Milepost's version, with the commit where it runs from a checkout."""
    folder = Path(milepost.__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return milepost.__version__
    commit = answer.stdout.strip()
    return f"{milepost.__version__}+{commit}" if answer.returncode == 0 else milepost.__version__


def describe_environment() -> dict[str, Any]:
    """Everything about this machine and installation that a record should carry."""
    return {
        "milepost": code_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": num_available_cores(),
        "memory_bytes": memory_bytes(),
        "packages": {name: package_version(name) for name in PACKAGES},
    }
