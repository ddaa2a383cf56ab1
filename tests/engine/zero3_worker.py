"""Run under a launcher: what only ZeRO 3 can get wrong, on several real ranks.

Argument: a JSON list of scenarios `[name, options]`. Prints one JSON line on rank 0, an entry for each.
"""

from __future__ import annotations

import argparse
import json
import math
from types import SimpleNamespace

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from plain_reference import Reference
from stage_matrix_worker import DTYPES, batch_of, full_weights, tiny_bert
from transformers import LlamaConfig, LlamaForCausalLM

import slimfit_ds


def make(model: torch.nn.Module, dtype: str = "fp32", zero: dict | None = None, **slimfit):
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **(zero or {})},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "slimfit": {"freeze": {"policy": "ils", "rate": 0.9}, **slimfit},
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if dtype == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 8, "hysteresis": 1}
    return slimfit_ds.initialize(model=model, config=config)[0]


def shared_batches(make_batch, step: int) -> tuple[dict, list[dict]]:
    """This rank's batch and those of all ranks."""
    everyone = [make_batch(step, rank) for rank in range(torch.distributed.get_world_size())]
    return everyone[torch.distributed.get_rank()], everyone


def compare(engine, plain: torch.nn.Module, make_batch, dtype: str, steps: int) -> dict:
    """Train beside the reference; the largest drift of frozen weights and the difference at the end."""
    reference = Reference(plain, DTYPES[dtype], 1e-3, 0.1, 0.0)
    freezable = set(engine.layer_names)
    drift = 0.0
    for step in range(steps):
        active = set(engine.active_layers)
        before = full_weights(engine)
        mine, everyone = shared_batches(make_batch, step)
        engine.backward(engine(**mine).loss)
        engine.step()
        reference.step(everyone, active, freezable)
        after = full_weights(engine)
        for name in freezable - active:
            drift = max(drift, (after[name].float() - before[name].float()).abs().max().item())
    last = full_weights(engine)
    difference = {
        name: (last[name].float() - weight.detach().float()).abs().max().item()
        for name, weight in reference.model.named_parameters()
    }
    return {
        "drift": drift,
        "difference": max(difference.values()),
        "trained": len(engine.update_statistics),
        "layers": len(freezable),
    }


class Reader(torch.nn.Module):
    """A classifier of token sequences; transformers' own models cannot be built under bare `zero.Init`."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(64, 12)
        self.norm = torch.nn.LayerNorm(12)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(12, 12) for _ in range(9))
        self.head = torch.nn.Linear(12, 3)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        x = self.norm(self.embed(input_ids))
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return SimpleNamespace(loss=torch.nn.functional.cross_entropy(self.head(x.mean(1)).float(), labels))


def zero_init(dtype: str) -> dict:
    """A model that is cut while it is built."""
    settings = {"bf16": {"enabled": True}} if dtype == "bf16" else {}
    init = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}, **settings}
    torch.manual_seed(torch.distributed.get_rank())
    with deepspeed.zero.Init(config_dict_or_path=init):
        model = Reader()
    cut = all(p.numel() == 0 for p in model.parameters())
    plain = Reader()
    with deepspeed.zero.GatheredParameters(list(model.parameters())), torch.no_grad():
        for mine, theirs in zip(plain.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    engine = make(model, dtype)
    result = compare(engine, plain, lambda step, rank: batch_of(step, 0, rank), dtype, 6)
    engine.destroy()
    return {**result, "cut": cut}


def tiny_llama() -> torch.nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
    )


def text_of(step: int, rank: int) -> dict:
    generator = torch.Generator().manual_seed(50 * step + rank)
    tokens = torch.randint(0, 48, (4, 6), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def no_biases(checkpointing: bool, persist: int = 0) -> dict:
    """Without biases backward ends at the first active layer, somewhere else at each step."""
    plain, model = tiny_llama(), tiny_llama()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    engine = make(model, zero={"stage3_param_persistence_threshold": persist})
    result = compare(engine, plain, text_of, "fp32", 10)
    engine.destroy()
    return result


def held_bytes(inactive: str, dtype: str) -> dict:
    """Bytes of gradients and states during and after each step, against what they should be."""
    engine = make(tiny_bert(), dtype, optimizer_states={"inactive": inactive})
    rank = torch.distributed.get_rank()
    own = {}
    for name, parameter in engine.module.named_parameters():
        start = rank * parameter.ds_tensor.ds_numel
        own[name] = max(min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start), 0)
    small = set(own) - set(engine.layer_names)
    each = 8 if dtype == "fp32" else 12
    seen: set[str] = set()
    problems: list = []
    for step in range(6):
        moving = small | engine.active_layers
        seen |= moving
        engine.backward(engine(**batch_of(step, 0, rank)).loss)
        during = engine.memory_report()
        engine.step()
        after = engine.memory_report()
        next_moving = small | engine.active_layers
        expected = {
            "gradients": (4 if dtype == "fp32" else 2) * sum(own[n] for n in moving),
            "optimizer": each * sum(own[n] for n in (seen if inactive == "device" else seen & next_moving)),
        }
        found = {"gradients": during["gradients"], "optimizer": after["optimizer"]}
        if found != expected or after["gradients"]:
            problems.append([step, found, expected, after["gradients"]])
    report = engine.memory_report()
    engine.destroy()
    return {"problems": problems, "report": report, "weights": sum(own.values())}


def overflow_on_one_rank() -> dict:
    """An infinite gradient on one rank: all skip the step, and nothing of it comes back later."""
    plain, model = tiny_bert(), tiny_bert()
    engine = make(model, "fp16", freeze={"rate": 0.9, "policy": "random"})
    reference = Reference(plain, torch.float16, 1e-3, 0.1, 0.0)
    freezable = set(engine.layer_names)
    scales, applied = [], []
    for step in range(6):
        active = set(engine.active_layers)
        mine, everyone = shared_batches(lambda step, rank: batch_of(step, 0, rank), step)
        before = full_weights(engine)
        loss = engine(**mine).loss
        broken = step in (1, 4)
        if broken and torch.distributed.get_rank() == 1:
            loss = loss * math.inf
        engine.backward(loss)
        engine.step()
        scales.append(engine.optimizer.loss_scale)
        if broken:
            after = full_weights(engine)
            same = all(torch.equal(after[name], before[name]) for name in after)
            applied.append(
                [same, engine.optimizer.layer_statistics == {}, set(engine.active_layers) == active]
            )
        else:
            reference.step(everyone, active, freezable, loss_scale=256.0)
    last = full_weights(engine)
    difference = max(
        (last[name].float() - weight.detach().float()).abs().max().item()
        for name, weight in reference.model.named_parameters()
    )
    skipped = engine.skipped_steps
    engine.destroy()
    return {"scales": scales, "skips": applied, "difference": difference, "skipped": skipped}


SCENARIOS = {
    function.__name__: function for function in (zero_init, no_biases, held_bytes, overflow_on_one_rank)
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scenarios", type=json.loads)
    parser.add_argument("--local_rank", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    # DeepSpeed refuses fp16 on a CPU although torch can.
    type(get_accelerator()).is_fp16_supported = lambda self: True
    deepspeed.init_distributed("gloo")
    results = [SCENARIOS[name](**options) for name, options in arguments.scenarios]
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, results)
    if torch.distributed.get_rank() == 0:
        print("RESULT " + json.dumps(everyone), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
