"""One rank of a Trainer run on the SlimFit engine: whole, then resumed from its middle; prints what the test compares.

Usage: deepspeed_worker.py FOLDER STAGE CHECKPOINTS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist
from torch import nn
from trainer_cases import Sentences, Watch, arguments, classifier
from transformers import Trainer

from slimfit_ds.integrations import enable_deepspeed

folder, stage, checkpoints = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
JSON = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
    },
    "zero_optimization": {
        "stage": stage,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "slimfit": {"freeze": {"policy": "ils", "rate": 0.8}, "checkpoints": checkpoints},
}


def model() -> nn.Module:
    return classifier() if checkpoints == "whole" else type(classifier()).from_pretrained(folder / "base")


def train(name: str, resume: str | None) -> tuple[Trainer, Watch]:
    args = arguments(
        folder / name,
        deepspeed=JSON,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=5,
    )
    watch = Watch(lambda: trainer.deepspeed.active_layers)
    trainer = Trainer(model(), args, train_dataset=Sentences(), callbacks=[watch])
    trainer.model_accepts_loss_kwargs = False
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch


enable_deepspeed()
enable_deepspeed()  # twice is harmless
trainer, whole = train("whole", None)
filled = trainer.deepspeed.config
trainer.save_model(str(folder / "model"))
again, rest = train("rest", str(folder / "whole" / "checkpoint-5"))
again.save_model(str(folder / "resumed"))
everyone: list = [None] * dist.get_world_size()
dist.all_gather_object(everyone, (whole.sets, rest.sets))
if dist.get_rank() == 0:
    keys = ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping", "optimizer")
    found = {
        "engine": type(trainer.deepspeed).__name__,
        "ranks": everyone,
        "moved": whole.moved,
        "filled": {key: filled[key] for key in keys},
    }
    print("RESULT " + json.dumps(found), flush=True)
dist.barrier()
dist.destroy_process_group()
