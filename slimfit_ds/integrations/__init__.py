"""SlimFit in scripts of the Hugging Face Trainer: the only room that knows Trainer and accelerate.

Without DeepSpeed: `Trainer(..., callbacks=[SlimFitCallback({"freeze": {"rate": 0.9}})])`. With
`TrainingArguments(deepspeed=...)`: a `"slimfit"` block in the JSON and one call of `enable_deepspeed()`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimfit_ds.integrations.accelerate_deepspeed import disable_deepspeed, enable_deepspeed
    from slimfit_ds.integrations.trainer_callback import SlimFitCallback

__all__ = ["SlimFitCallback", "disable_deepspeed", "enable_deepspeed"]

# Imported at first use: `ranks` needs neither transformers nor DeepSpeed.
_HOMES = {
    "SlimFitCallback": "trainer_callback",
    "disable_deepspeed": "accelerate_deepspeed",
    "enable_deepspeed": "accelerate_deepspeed",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
