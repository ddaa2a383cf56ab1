"""Run under a launcher: cells of (stage, dtype, accumulation, clipping, ...) against `plain_reference`.

Argument: a JSON list of cells. Prints one JSON line on rank 0: for each cell the largest drift of a frozen
weight, the relative error of the gradient norm, the distance to the reference's weights as a share of how
far those moved, and whether ranks chose the same layers.
"""

from __future__ import annotations

import argparse
import json
import re

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from plain_reference import Reference
from transformers import BertConfig, BertForSequenceClassification

import slimfit_ds

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def tiny_bert() -> torch.nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def batch_of(step: int, micro: int, rank: int, size: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    return {
        "input_ids": torch.randint(0, 64, (size, 8), generator=generator),
        "labels": torch.randint(0, 3, (size,), generator=generator),
    }


def at_or_above(front: int, name: str) -> bool:
    """Whether a parameter of `tiny_bert` stands in this block or above it; embeddings stand with the first."""
    block = re.search(r"layer\.(\d+)\.", name)
    return front <= (int(block[1]) if block else 0 if "embeddings" in name else 99)


def full_weights(engine) -> dict[str, torch.Tensor]:
    result = {}
    for name, parameter in engine.module.named_parameters():
        gathered = [parameter] if hasattr(parameter, "ds_id") else []
        with deepspeed.zero.GatheredParameters(gathered):
            result[name] = parameter.detach().clone()
    return result


def expected_rates(
    freeze: dict, lr: float, active: set[str], freezable: set[str], reference: Reference
) -> dict[str, float] | None:
    """The learning rate of each parameter that trains: chosen layers have one factor, all else the other."""
    if "lr_scale" not in freeze:
        return None
    always = {name for name in freezable if name.startswith(tuple(freeze.get("always_active", ["-"])))}
    return {
        name: lr * (freeze["lr_scale"] if name in active - always else freeze["always_lr_scale"])
        for name in reference.masters
    }


def value_errors(engine, reference: Reference, waiting: set[str]) -> dict[str, float]:
    """What DeepSpeed's own functions say of single parameters, against the reference, and what they set.

    Moments of `waiting` layers are not compared: what the missed steps do to them is made up for when they wake.
    """
    error, size, unlike = 0.0, 0.0, 0
    for name, parameter in engine.module.named_parameters():
        moment = deepspeed.utils.safe_get_full_optimizer_state(parameter, "exp_avg")
        expected = reference.optimizers[name].state.get(reference.masters[name], {}).get("exp_avg")
        expected = torch.zeros_like(moment) if expected is None else expected
        if name not in waiting:
            error += (moment - expected).square().sum().item()
            size += expected.square().sum().item()
        for value, get, put in (
            (reference.masters[name].detach(), (), ()),
            (moment + 0.5, ("exp_avg",), ("exp_avg",)),
        ):
            setter = "safe_set_full_optimizer_state" if put else "safe_set_full_fp32_param"
            getattr(deepspeed.utils, setter)(parameter, value, *put)
            getter = "safe_get_full_optimizer_state" if get else "safe_get_full_fp32_param"
            unlike += not torch.equal(getattr(deepspeed.utils, getter)(parameter, *get), value)
    for name, weight in full_weights(engine).items():
        unlike += not torch.equal(weight, reference.masters[name].detach().to(weight.dtype))
    return {"moments": (error / size) ** 0.5, "values_not_set": unlike}


def run_cell(
    stage: int,
    dtype: str = "fp32",
    accumulation: int = 1,
    clip: float = 0.0,
    steps: int = 8,
    zero: dict | None = None,
    freeze: dict | None = None,
    states: dict | None = None,
) -> dict:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    lr, weight_decay = 1e-4, 0.1
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **(zero or {})},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": lr, "weight_decay": weight_decay, "torch_adam": True},
        },
        "steps_per_print": None,
        "slimfit": {
            "freeze": {"policy": "ils", "rate": 0.9, **(freeze or {})},
            "optimizer_states": states or {},
        },
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if dtype == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 8}
    model = tiny_bert()
    stale = (states or {}).get("stale_moments", "keep")
    reference = Reference(model, DTYPES[dtype], lr, weight_decay, clip, stale)
    engine, *_ = slimfit_ds.initialize(model=model, config=config)
    freezable = set(engine.layer_names)
    start = full_weights(engine)
    drift, norm_error, sets_equal, leaks = 0.0, 0.0, True, 0
    fronts = []
    for step in range(steps):
        active = set(engine.active_layers)
        if "front" in (freeze or {}):
            fronts.append(engine.schedule.front)
            # Under policy none: vectors too, so all parameters count as layers.
            freezable = set(start)
            active = {name for name in freezable if at_or_above(fronts[-1], name)}
            assert set(engine.active_layers) == active & set(engine.layer_names)
        before = full_weights(engine)
        for micro in range(accumulation):
            batch = batch_of(step, micro, rank)
            engine.backward(engine(**batch).loss)
            engine.step()
            leaks += sum(
                p.grad is not None for n, p in engine.module.named_parameters() if n in freezable - active
            )
        norm = reference.step(
            [batch_of(step, micro, r) for micro in range(accumulation) for r in range(world)],
            active,
            freezable,
            loss_scale=256.0 if dtype == "fp16" else 1.0,
            rates=expected_rates(freeze or {}, lr, active, freezable, reference),
        )
        norm_error = max(norm_error, abs(float(engine.get_global_grad_norm()) - norm) / norm)
        after = full_weights(engine)
        for name in freezable - active:
            drift = max(drift, (after[name].float() - before[name].float()).abs().max().item())
        sets: list = [None] * world
        torch.distributed.all_gather_object(sets, sorted(active))
        sets_equal &= all(s == sets[0] for s in sets)
    error, moved = 0.0, 0.0
    for name, weight in full_weights(engine).items():
        expected = reference.model.get_parameter(name).detach().double()
        error += (weight.double() - expected).square().sum().item()
        moved += (expected - start[name].double()).square().sum().item()
    values = value_errors(engine, reference, set() if stale == "keep" else freezable - active)
    trained = len(engine.update_statistics)
    report = engine.memory_report()
    engine.destroy()
    return {
        "cell": f"stage{stage}-{dtype}-acc{accumulation}-clip{clip}",
        "drift": drift,
        "norm_error": norm_error,
        "difference": (error / moved) ** 0.5,
        **values,
        "sets_equal": sets_equal,
        "frozen_gradients": leaks,
        "trained": trained,
        "layers": len(freezable),
        "report": report,
        "fronts": fronts,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cells", type=json.loads)
    parser.add_argument("--local_rank", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    # DeepSpeed refuses fp16 on a CPU although torch can.
    type(get_accelerator()).is_fp16_supported = lambda self: True
    deepspeed.init_distributed("gloo")
    results = [run_cell(**cell) for cell in arguments.cells]
    if torch.distributed.get_rank() == 0:
        print("RESULT " + json.dumps(results), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
