"""Quantities as people read them, and the definition of bits per byte."""

from __future__ import annotations

import math

MEBIBYTE = 1 << 20
GIBIBYTE = 1 << 30


def format_bytes(num_bytes: float) -> str:
    """1536 -> '1.5 KiB'; binary multiples."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def format_count(count: float) -> str:
    """1715951616 -> '1.72 B'; decimal multiples K, M, B, T."""
    value = float(count)
    for unit in ("", " K", " M", " B"):
        if abs(value) < 1000:
            return f"{value:.0f}" if unit == "" else f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} T"


def format_duration(seconds: float | None) -> str:
    """3725 -> '1 h 02 min'; None -> 'unknown'."""
    if seconds is None or not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole / 86400:.1f} days"


def bits_per_byte(*, total_nats: float, num_bytes: int) -> float | None:
    """All nats, end-of-text included, over ln 2 times the UTF-8 bytes of the text."""
    if num_bytes <= 0:
        return None
    return total_nats / (math.log(2) * num_bytes)
