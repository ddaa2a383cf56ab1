"""SlimFit in scripts of the Hugging Face Trainer: the only room that knows Trainer and accelerate.

Without DeepSpeed: `Trainer(..., callbacks=[SlimFitCallback({"freeze": {"rate": 0.9}})])`. With
`TrainingArguments(deepspeed=...)`: a `"slimfit"` block in the JSON and one call of `enable_deepspeed()`.
"""

from __future__ import annotations

from slimfit_ds.integrations.accelerate_deepspeed import disable_deepspeed, enable_deepspeed
from slimfit_ds.integrations.trainer_callback import SlimFitCallback

__all__ = ["SlimFitCallback", "disable_deepspeed", "enable_deepspeed"]
