"""Start the process group the way DeepSpeed wants it, without its traps."""

from __future__ import annotations

import logging
import os

import torch

__all__ = ["accelerator_and_backend", "start_processes"]


def accelerator_and_backend() -> tuple[str, str]:
    """The accelerator that a run would use, and the library its ranks would talk through; joins no group."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    return accelerator.device_name(), accelerator.communication_backend_name()


def start_processes() -> torch.device:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

    Returns:
        the device of this rank.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # This op serves inference only, takes half a minute to build, and a killed build blocks the next run for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = get_accelerator()
    device = accelerator.device_name(int(os.environ["LOCAL_RANK"]))
    if accelerator.device_name() != "cpu":
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
    torch.distributed.barrier()
    return torch.device("cpu" if accelerator.device_name() == "cpu" else device)
