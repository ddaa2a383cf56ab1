"""What builders of methods share: the request, the model in a dtype, and the engine's surroundings."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from peers_methods.workloads import Case

__all__ = ["LEARNING_RATE", "Request", "Unavailable", "adamw", "build_model", "make_engine", "need"]

LEARNING_RATE = 1e-4


class Unavailable(RuntimeError):
    """The method cannot run here; the message is the reason that the table shows."""


@dataclass(frozen=True)
class Request:
    """What is to be built.

    Args:
        case: model and batch.
        batch: samples per step.
        device: where it trains.
        seed: of the weights.
    """

    case: Case
    batch: int
    device: torch.device
    seed: int = 0


def need(*packages: str) -> None:
    """Check that packages are installed.

    Raises:
        Unavailable: names the first that is not.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise Unavailable(f"{package} is not installed")


def build_model(request: Request, dtype: str) -> nn.Module:
    """The case's model with random weights, made on the device.

    Args:
        dtype: `fp32` (for autocast) or `bf16` weights.
    """
    torch.manual_seed(request.seed)
    with request.device:
        return replace(request.case.workload, dtype=dtype).build()


def adamw(parameters: Iterable[nn.Parameter], **options: Any) -> torch.optim.AdamW:
    """torch's fused AdamW."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True, **options)


def make_engine(model: nn.Module, config: dict[str, Any], optimizer: Any = None) -> Any:
    """A DeepSpeed engine of one rank, SlimFit's if the configuration has a `"slimfit"` block."""
    need("deepspeed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if next(model.parameters()).device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import slimfit_ds
    from slimfit_ds.engine.processes import start_processes

    start_processes()
    return slimfit_ds.initialize(model=model, optimizer=optimizer, config=config)[0]
