"""DeepSpeed's own monitors: TensorBoard, W&B, CSV and Comet behind one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["make_monitors"]


def make_monitors(blocks: Mapping[str, Mapping[str, Any]]) -> Any:
    """DeepSpeed's `MonitorMaster`; it writes on rank 0 only.

    Args:
        blocks: `tensorboard`, `wandb`, `csv_monitor` and `comet` of a DeepSpeed configuration.
    """
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    return MonitorMaster(get_monitor_config({name: dict(block) for name, block in blocks.items()}))
