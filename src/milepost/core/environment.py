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


def available_memory_bytes() -> int | None:
    """Memory that is still to be had, a container's limit respected, or None as above."""
    limit = _first_number("/sys/fs/cgroup/memory.max")
    used = _first_number("/sys/fs/cgroup/memory.stat", after="anon ")
    free = _first_number("/proc/meminfo", after="MemAvailable:")
    known = [] if free is None else [free * 1024]
    if limit is not None:
        known.append(max(0, limit - (used or 0)))
    return min(known, default=memory_bytes())


def _first_number(file: str, *, after: str = "") -> int | None:
    """The number behind some words at the beginning of a line; None where there is none."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        words = line.removeprefix(after).split()
        if line.startswith(after) and words and words[0].isdecimal():
            return int(words[0])
    return None


def code_version() -> str:
    """Milepost's version, with the commit where it runs from its own checkout.

    `-dirty` says that the checkout differs from that commit.
    """
    package = Path(milepost.__file__).resolve().parent
    commit = _commit_of(package.parents[1]) if package.parent.name == "src" else None
    return f"{milepost.__version__}+{commit}" if commit else milepost.__version__


def _commit_of(checkout: Path) -> str | None:
    """None where the folder is no checkout itself, as when a repository only encloses it."""
    if not (checkout / ".git").exists() or not (checkout / "pyproject.toml").is_file():
        return None
    describe = ["describe", "--always", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(checkout), *describe],
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


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
