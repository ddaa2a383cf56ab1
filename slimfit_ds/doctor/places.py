"""Folders that runs, builds and the hub write to, as their libraries find them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

__all__ = ["existing_parent", "extensions_dir", "hub_cache"]


def extensions_dir(environment: Mapping[str, str]) -> Path:
    """Where torch builds extensions: `TORCH_EXTENSIONS_DIR`, else a folder of the user's cache."""
    named = environment.get("TORCH_EXTENSIONS_DIR")
    return Path(named) if named else _cache(environment) / "torch_extensions"


def hub_cache(environment: Mapping[str, str]) -> Path:
    """Where models of the hub are kept: `HF_HUB_CACHE`, `HF_HOME`, else a folder of the user's cache."""
    if named := environment.get("HF_HUB_CACHE"):
        return Path(named).expanduser()
    home = environment.get("HF_HOME")
    return (Path(home).expanduser() if home else _cache(environment) / "huggingface") / "hub"


def existing_parent(place: Path) -> Path:
    """The folder itself or the nearest one above it that exists.

    Raises:
        NotADirectoryError: a file stands in the way.
    """
    place = place.expanduser().absolute()
    existing = next(parent for parent in (place, *place.parents) if parent.exists())
    if not existing.is_dir():
        raise NotADirectoryError(20, f"{existing} is no folder")
    return existing


def _cache(environment: Mapping[str, str]) -> Path:
    named = environment.get("XDG_CACHE_HOME")
    return Path(named) if named else Path(environment.get("HOME", Path.home())) / ".cache"
