"""Run under a launcher: streamed training against resident training at ZeRO 0 to 3, bit for bit, on this rank.

Prints one JSON line on rank 0: for each cell the number of losses and weights compared, on how many ranks all were
equal, and the bytes that a step sent.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import deepspeed
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import slimfit_ds
from slimfit_ds.engine import weights
from slimfit_ds.memory.traffic import TrafficCounter
from slimfit_ds.planner import budget
from slimfit_ds.streaming.streaming import streaming_of

SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
AWAY = {"frozen_weights": {"live": "host", "columns": "host"}, "optimizer_states": {"active": "host"}}
CELLS = {
    0: ("fp32", 0.0, AWAY),
    1: ("bf16", 0.5, AWAY),
    2: ("bf16", 0.0, AWAY),
    3: ("bf16", 0.5, {"frozen_weights": {"live": "host"}, "optimizer_states": {"active": "host"}}),
}
"""ZeRO stage -> dtype, gradient clipping, what is on the host."""


def assert_shared(weight: Tensor, rank: int) -> None:
    """Frozen weights of the ranks of one host are one memory."""
    before = weight.data.clone()
    torch.distributed.barrier()
    if rank == 0:
        weight.data.fill_(7)
    torch.distributed.barrier()
    assert bool((weight == 7).all())
    torch.distributed.barrier()
    weight.data.copy_(before)
    torch.distributed.barrier()


def train(
    traffic: TrafficCounter, stage: int, dtype: str, clip: float, away: dict[str, Any] | None
) -> tuple[list[Tensor], int]:
    """Losses and weights of four steps, and what the last sent; ranks differ until the first one's weights are sent.

    Args:
        away: of the `slimfit` block; None: no such block.
    """
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=100, num_key_value_heads=2))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": clip,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_force_ds_cpu_optimizer": False,
        # As stock DeepSpeed's; ours is float32.
        "communication_data_type": "bf16" if stage == 3 else None,
        "steps_per_print": None,
    }
    if away is None:
        config["optimizer"]["params"]["torch_adam"] = True
    else:
        config["slimfit"] = {"freeze": {"rate": 0.95}, "activations": "minimal", **away}
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    engine = slimfit_ds.initialize(model=model.train(), config=config)[0]
    streaming = streaming_of(engine.module)
    assert (streaming is not None) == bool(away)
    if streaming is not None:
        assert_shared(streaming.blocks[0].weights[0], rank)
    seen = []
    for step in range(4):
        traffic.reset()
        for part in range(2):
            random = torch.Generator().manual_seed(100 * rank + 2 * step + part)
            ids = torch.randint(2, 100, (2, 10), generator=random)
            loss = engine(input_ids=ids, labels=ids).loss
            seen.append(loss.detach().clone())
            engine.backward(loss)
            engine.step()
        sent = traffic.total
        with weights.whole(*engine.module.parameters()):
            seen += [t.clone() for _, t in sorted(engine.module.state_dict().items())]
    engine.destroy()
    return seen, sent


def assert_least_free_decides(rank: int) -> None:
    """What is left to `auto` is decided for the device that has least free, the same on all ranks."""
    budget._free_bytes = lambda *_: (5000, 3000)[rank]
    budget.settings_for_budget = lambda limit, *_: ({"memory_budget": limit}, "")
    config = {"train_micro_batch_size_per_gpu": 1, "slimfit": {"frozen_weights": {"live": "auto"}}}
    assert budget.resolve_budget(config, torch.nn.Linear(1, 1), {})["slimfit"] == {"memory_budget": 3000}


def main() -> None:
    traffic = TrafficCounter().install()
    deepspeed.init_distributed("gloo")
    assert_least_free_decides(torch.distributed.get_rank())
    results = []
    for stage in map(int, sys.argv[1].split(",")):
        dtype, clip, away = CELLS[stage]
        (resident, sent), (streamed, less) = (train(traffic, stage, dtype, clip, how) for how in ({}, away))
        same = len(resident) == len(streamed) and all(map(torch.equal, resident, streamed))
        equal = torch.tensor(float(same))
        torch.distributed.all_reduce(equal)
        results.append(
            {
                "stage": stage,
                "compared": len(resident),
                "ranks_equal": int(equal),
                "sent": sent,
                "streamed": less,
            }
        )
        if stage == 3:
            results[-1]["stock"] = train(traffic, stage, dtype, clip, None)[1]
    if torch.distributed.get_rank() == 0:
        print("RESULT " + json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
