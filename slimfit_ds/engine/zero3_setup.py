"""Let DeepSpeed build its ZeRO 3 optimizer, of our class."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from slimfit_ds.engine import zero3_linear
from slimfit_ds.engine.freeze_zero3 import REDUCE_BUCKET, FreezeZero3Optimizer, Setting

__all__ = ["NEEDED", "configure_zero3"]

# Methods of DeepSpeed's class that are overridden or called here: if one of them is gone, frozen layers
# would silently move.
NEEDED = (
    REDUCE_BUCKET,
    "_partition_all_parameters",
    "_post_step",
    "_pre_step",
    "_setup_for_real_optimizer",
    "get_param_comm_dtype",
    "independent_gradient_partition_epilogue",
    "partition_grads",
    "reduce_ready_partitions_and_remove_grads",
    "zero_grad",
)


def configure_zero3(
    engine: Any, stock_configure: Callable[[torch.optim.Optimizer], Any], optimizer: torch.optim.Optimizer
) -> FreezeZero3Optimizer:
    """Let DeepSpeed build its ZeRO 3 optimizer, of our class.

    Args:
        engine: the engine under construction; read: `slimfit_config`, `roles`, its DeepSpeed config.
        stock_configure: DeepSpeed's `_configure_zero_optimizer`.
        optimizer: the torch optimizer that carries the hyperparameters.

    Raises:
        RuntimeError: this DeepSpeed lacks a method that is overridden here.
    """
    missing = [name for name in NEEDED if not hasattr(DeepSpeedZeroOptimizer_Stage3, name)]
    if missing:
        raise RuntimeError(
            f"DeepSpeedZeroOptimizer_Stage3 of this DeepSpeed lacks {missing}; install deepspeed==0.19.*"
        )
    setting = Setting(
        engine.slimfit_config,
        engine.roles,
        # Few gradients travel, and summed in bf16 the norm is off by 2e-3 on two ranks.
        engine._config.communication_data_type or torch.float32,
    )
    # Derives from the class when it is first imported, which must not be while ours stands in for it.
    importlib.import_module("deepspeed.runtime.superoffload.superoffload_stage3")
    # DeepSpeed has no hook for the class; it looks the name up when it is called.
    stock = stage3.DeepSpeedZeroOptimizer_Stage3
    stage3.DeepSpeedZeroOptimizer_Stage3 = functools.partial(FreezeZero3Optimizer, setting=setting)
    try:
        built = stock_configure(optimizer)
    finally:
        stage3.DeepSpeedZeroOptimizer_Stage3 = stock
    zero3_linear.install()
    return built
