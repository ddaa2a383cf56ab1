"""Pretrain the small ViT on six classes of CIFAR-10, so that training on the other four is fine-tuning.

    python benchmarks/fidelity/pretrain_vit.py [--steps 6000]

Ten minutes on one CPU core (float32); the weights go to `.cache/fidelity/vit_small.pt`.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
from problems import PRETRAINING_CLASSES, crop_and_flip, images_of, vit_config, vit_weights


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6000)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    torch.manual_seed(0)
    from transformers import ViTForImageClassification

    images, labels = images_of(PRETRAINING_CLASSES, "train")
    model = ViTForImageClassification(vit_config(len(PRETRAINING_CLASSES)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    chance = np.random.default_rng(0)
    for step in range(steps):
        rate = 1e-3 * min((step + 1) / 200, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.from_numpy(chance.integers(0, len(images), 64))
        loss = model(pixel_values=crop_and_flip(images[chosen], chance), labels=labels[chosen]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 200 == 199:
            print(f"{step + 1}/{steps} loss {loss.item():.3f}", flush=True)
    model.eval()
    images, labels = images_of(PRETRAINING_CLASSES, "test")
    with torch.no_grad():
        accuracy = (model(pixel_values=images).logits.argmax(-1) == labels).float().mean().item()
    print(f"accuracy on the six classes: {accuracy:.3f}")
    vit_weights().parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.vit.state_dict(), vit_weights())


if __name__ == "__main__":
    main()
