"""Fine-tune transformers in a fraction of the memory: per-step layer freezing on DeepSpeed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimfit_ds.comparison.runner import compare
    from slimfit_ds.config import SlimFitConfig
    from slimfit_ds.deltas.reference import ReferenceModel
    from slimfit_ds.facade import initialize
    from slimfit_ds.integrations.plain_loop import slim
    from slimfit_ds.integrations.trainer_callback import SlimFitCallback
    from slimfit_ds.planner.simulate import estimate

__all__ = ["ReferenceModel", "SlimFitCallback", "SlimFitConfig", "compare", "estimate", "initialize", "slim"]
__version__ = "0.1.0"

# Imported at first use: DeepSpeed takes seconds to import, and a plain `--help` needs none of it.
_HOMES = {
    "ReferenceModel": "slimfit_ds.deltas.reference",
    "SlimFitCallback": "slimfit_ds.integrations.trainer_callback",
    "SlimFitConfig": "slimfit_ds.config",
    "compare": "slimfit_ds.comparison.runner",
    "estimate": "slimfit_ds.planner.simulate",
    "initialize": "slimfit_ds.facade",
    "slim": "slimfit_ds.integrations.plain_loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
