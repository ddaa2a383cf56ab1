"""Two ranks of stock ZeRO 3 on a tiny BERT, compressed or not; rank 0 writes losses and gradients."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import torch
import torch.multiprocessing as mp

ROWS, MICRO_STEPS = 2, 2


def run(rank: int, port: int, preset: str, target: str) -> None:
    """One rank."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import deepspeed
    from deepspeed.utils import safe_get_full_grad
    from tiny_models import batch_for, build, freeze_some, without_dropout

    from slimfit_ds.activations.apply import compress
    from slimfit_ds.activations.config import ActivationsConfig

    # Building DeepSpeed's shared-memory op takes a minute and is not needed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = without_dropout(build("bert"))
    compress(model, ActivationsConfig(preset=preset, chunk_tokens=10))
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_accumulation_steps": MICRO_STEPS,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    freeze_some(engine.module)
    losses, gradients = [], {}
    for step in range(MICRO_STEPS):
        loss = engine(**batch_for("bert", rows=ROWS, seed=10 * step + rank)).loss
        engine.backward(loss)
        losses.append(loss.item())
        if step == MICRO_STEPS - 1:
            for name, parameter in engine.module.named_parameters():
                if parameter.requires_grad:
                    gradients[name] = safe_get_full_grad(parameter).tolist()
        engine.step()
    if rank == 0:
        Path(target).write_text(json.dumps({"losses": losses, "gradients": gradients}))


def main() -> None:
    """Start both ranks on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(run, args=(port, sys.argv[1], sys.argv[2]), nprocs=2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
