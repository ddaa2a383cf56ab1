"""One rank of a Trainer run over DistributedDataParallel; prints what the test compares.

Usage: ddp_worker.py FOLDER START PRESET [POLICY [FRONT]], where START is 1 if rank 1 begins with other weights.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from trainer_cases import Sentences, Watch, arguments, classifier
from transformers import Trainer, TrainerCallback

import slimfit_ds

folder, differing, activations = Path(sys.argv[1]), sys.argv[2] == "1", sys.argv[3]
policy = sys.argv[4] if len(sys.argv) > 4 else "ils"
front = sys.argv[5] if len(sys.argv) > 5 else "none"
config = {"freeze": {"rate": 0.8, "policy": policy, "front": front}, "activations": activations}
callback = slimfit_ds.SlimFitCallback(config)
watch = Watch(lambda: callback.active_layers)


sent: list[int] = []


class CountBytes(TrainerCallback):
    """Bytes of gradients this rank has sent, after each step."""

    def on_step_end(self, args, state, control, **kwargs):
        sent.append(callback.gradient_bytes_sent)


model = classifier()
if differing and os.environ["RANK"] == "1":
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
trainer = Trainer(
    model,
    arguments(
        folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=6,
    ),
    train_dataset=Sentences(),
    callbacks=[callback, watch, CountBytes()],
)
trainer.model_accepts_loss_kwargs = False
trainer.train()
wrapper = trainer.model_wrapped
assert isinstance(wrapper, DistributedDataParallel)
try:
    wrapper.train()(**Sentences().batch([0]))
    refusal = ""
except RuntimeError as error:
    refusal = str(error)
again = slimfit_ds.SlimFitCallback(config)
rest = Watch(lambda: again.active_layers)
resumed = Trainer(
    classifier(),
    arguments(folder / "rest", per_device_train_batch_size=2, gradient_accumulation_steps=2),
    train_dataset=Sentences(),
    callbacks=[again, rest],
)
resumed.model_accepts_loss_kwargs = False
resumed.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
pairs = zip(resumed.model.parameters(), trainer.model.parameters(), strict=True)
same = rest.sets == watch.sets[6:] and all(torch.equal(a, b) for a, b in pairs)
state = {name: p.detach().double().sum().item() for name, p in trainer.model.named_parameters()}
everyone: list = [None] * dist.get_world_size()
dist.all_gather_object(everyone, (watch.sets, watch.moved, state))
if dist.get_rank() == 0:
    trainer.save_model(str(folder / "model"))
    print(
        "RESULT "
        + json.dumps(
            {
                "ranks": everyone,
                "sent": sent,
                "reduced_by_ddp": sum(p.numel() for p in wrapper._module_parameters if p.requires_grad),
                "refusal": refusal,
                "resumed_as_whole": same,
            }
        ),
        flush=True,
    )
dist.barrier()
dist.destroy_process_group()
