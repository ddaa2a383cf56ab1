"""Run under a launcher: a batch that one rank has shows a fault; prints what each rank found and what it does from then on."""

from __future__ import annotations

import json

import deepspeed
import torch
from torch import nn

import slimfit_ds

FAULTY_RANK = 1


class Encoder(nn.Module):
    """Blocks that normalise first: their input must not be rounded where a row is nearly zero."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            32, 2, 64, dropout=0.0, batch_first=True, norm_first=True, layer_norm_eps=1e-12
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x).pow(3).mean()


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 6,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "slimfit": {"freeze": {"policy": "none"}, "activations": "minimal"},
    }
    engine, *_ = slimfit_ds.initialize(model=Encoder().train(), config=config)
    x = torch.randn(6, 5, 32, generator=torch.Generator().manual_seed(rank))
    if rank == FAULTY_RANK:
        x[:, 0] *= 1e-7
    engine.backward(engine(x))
    own = [block.__dict__.get("_slimfit_changed", "as it was") for block in engine.module.encoder.layers]
    engine.step()
    kept = [block.__dict__.get("_slimfit_changed", "as it was") for block in engine.module.encoder.layers]
    found = {"failures": len(engine.proof.failures), "before the step": own, "kept": kept}
    everyone: list = [None, None]
    torch.distributed.all_gather_object(everyone, found)
    if rank == 0:
        print("RESULT " + json.dumps(everyone), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
