"""Bytes and seconds as people read them."""

from __future__ import annotations

__all__ = ["human_bytes", "human_seconds"]


def human_bytes(size: float) -> str:
    """Return `1.5 GiB`: binary units, three significant digits."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 1000 else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def human_seconds(seconds: float) -> str:
    """Return `12.3 ms` or `1.23 s`."""
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
