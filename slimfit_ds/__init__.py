"""Fine-tune transformers in a fraction of the memory: per-step layer freezing on DeepSpeed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimfit_ds.config import SlimFitConfig
    from slimfit_ds.engine.initialize import initialize

__all__ = ["SlimFitConfig", "initialize"]
__version__ = "0.1.0"

# Imported at first use: DeepSpeed takes seconds to import, and a plain `--help` needs none of it.
_HOMES = {
    "SlimFitConfig": "slimfit_ds.config",
    "initialize": "slimfit_ds.engine.initialize",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
