"""Run under a launcher: streamed training against resident training at ZeRO 0, 1 and 2, bit for bit, on this rank.

Prints one JSON line on rank 0: for each cell the number of losses and weights compared, and on how many ranks all were
equal.
"""

from __future__ import annotations

import json
from typing import Any

import deepspeed
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import slimfit_ds
from slimfit_ds.planner import budget
from slimfit_ds.streaming.streaming import streaming_of

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
AWAY = {"frozen_weights": {"live": "host", "columns": "host"}, "optimizer_states": {"active": "host"}}


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


def train(stage: int, dtype: str, clip: float, away: bool) -> list[Tensor]:
    """Losses and weights of four steps; ranks differ until the first one's weights are sent."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=100, num_key_value_heads=2))
    block: dict[str, Any] = {"freeze": {"rate": 0.8}, "activations": "minimal", **(AWAY if away else {})}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": clip,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage},
        "steps_per_print": None,
        "slimfit": block,
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    engine = slimfit_ds.initialize(model=model.train(), config=config)[0]
    streaming = streaming_of(engine.module)
    assert (streaming is not None) == away
    if streaming is not None:
        assert_shared(streaming.blocks[0].weights[0], rank)
    seen = []
    for step in range(4):
        for part in range(2):
            random = torch.Generator().manual_seed(100 * rank + 2 * step + part)
            ids = torch.randint(2, 100, (2, 10), generator=random)
            loss = engine(input_ids=ids, labels=ids).loss
            seen.append(loss.detach().clone())
            engine.backward(loss)
            engine.step()
        seen += [t.clone() for t in engine.module.state_dict().values()]
    return seen


def assert_least_free_decides(rank: int) -> None:
    """What is left to `auto` is decided for the device that has least free, the same on all ranks."""
    budget._free_bytes = lambda *_: (5000, 3000)[rank]
    budget.settings_for_budget = lambda limit, *_: ({"memory_budget": limit}, "")
    config = {"train_micro_batch_size_per_gpu": 1, "slimfit": {"frozen_weights": {"live": "auto"}}}
    assert budget.resolve_budget(config, torch.nn.Linear(1, 1), {})["slimfit"] == {"memory_budget": 3000}


def main() -> None:
    deepspeed.init_distributed("gloo")
    assert_least_free_decides(torch.distributed.get_rank())
    results = []
    for stage, dtype, clip in ((0, "fp32", 0.0), (1, "bf16", 0.5), (2, "bf16", 0.0)):
        resident, streamed = (train(stage, dtype, clip, away) for away in (False, True))
        same = len(resident) == len(streamed) and all(map(torch.equal, resident, streamed))
        equal = torch.tensor(float(same))
        torch.distributed.all_reduce(equal)
        results.append({"stage": stage, "compared": len(resident), "ranks_equal": int(equal)})
    if torch.distributed.get_rank() == 0:
        print("RESULT " + json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
