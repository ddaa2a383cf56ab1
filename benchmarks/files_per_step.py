"""Count the files and functions of the package that one optimizer step of the demo ViT enters, per setting.

    python benchmarks/files_per_step.py            # a table on stdout
    python benchmarks/files_per_step.py --list     # and the files of each setting

One rank, CPU, ZeRO 1, float32; the third step is counted, after everything lazy has happened. A step is forward,
backward and `engine.step()`.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections import Counter
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from typing import Any

import deepspeed
import torch
from transformers import ViTConfig, ViTForImageClassification

import slimfit_ds

PACKAGE = str(Path(slimfit_ds.__file__).parent) + os.sep
FREEZE = {"static": {"policy": "auto", "rate": 0.9}, "ils": {"policy": "ils", "rate": 0.92}}
PRESETS = ("exact", "balanced", "minimal")


def demo_vit() -> torch.nn.Module:
    """Return the model of recipes/digits_vit.yaml."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "image_size": 8,
        "patch_size": 2,
        "num_channels": 1,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_labels": 10,
    }
    return ViTForImageClassification(ViTConfig(**sizes, num_attention_heads=4, intermediate_size=128))


def entered(freeze: dict, preset: str) -> Counter[tuple[str, str]]:
    """Return (file, function) of the package -> calls of one step."""
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "gradient_clipping": 1.0,
        "steps_per_print": None,
        "slimfit": {"freeze": freeze, "activations": preset},
    }
    engine, *_ = slimfit_ds.initialize(model=demo_vit(), config=config)
    engine.train()
    batch = {"pixel_values": torch.randn(8, 1, 8, 8), "labels": torch.randint(0, 10, (8,))}
    calls: Counter[tuple[str, str]] = Counter()

    def count(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls[frame.f_code.co_filename.removeprefix(PACKAGE), frame.f_code.co_qualname] += 1

    for step in range(3):
        sys.setprofile(count if step == 2 else None)
        engine.backward(engine(**batch).loss)
        engine.step()
    sys.setprofile(None)
    engine.destroy()
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="name the files of each setting")
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = port
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    print(f"{'freeze':8} {'activations':12} {'files':>6} {'functions':>10} {'calls':>7}")
    for policy, freeze in FREEZE.items():
        for preset in PRESETS:
            calls = entered(freeze, preset)
            files = sorted({file for file, _ in calls})
            print(f"{policy:8} {preset:12} {len(files):6} {len(calls):10} {sum(calls.values()):7}")
            if arguments.list:
                print("   " + "\n   ".join(files))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
