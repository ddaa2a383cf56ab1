"""Bytes and seconds as people read them."""

from __future__ import annotations

__all__ = ["binary_unit", "human_bytes", "human_seconds"]


def human_bytes(size: float) -> str:
    """`1.50 GiB`: binary units, three significant digits."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return (
                f"{size:.0f} {unit}"
                if unit == "bytes"
                else f"{size:.3g} {unit}"
                if size < 1000
                else f"{size:.0f} {unit}"
            )
        size /= 1024
    return f"{size:.3g} TiB"


def human_seconds(seconds: float) -> str:
    """`12.3 ms` or `1.23 s`."""
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def binary_unit(size: float) -> float:
    """Bytes of the largest unit (GiB, MiB, ...) that fits into `size`."""
    return next((float(2**power) for power in (40, 30, 20, 10) if size >= 2**power), 1.0)
