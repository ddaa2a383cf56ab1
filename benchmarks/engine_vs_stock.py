"""What a step costs at 95 % frozen against stock DeepSpeed of the same ZeRO stage, counted on two CPU ranks.

    python benchmarks/engine_vs_stock.py            # BERT-base shape, bf16
    python benchmarks/engine_vs_stock.py --tiny --csv /tmp/rows.csv

For each stage one launch of two ranks trains the same model first with stock DeepSpeed, then with the freeze-aware
engine, on equal batches. Counted: payload bytes of all collectives of a step, gradient bytes held when backward ends,
bytes of optimizer states on the device, seconds in `engine.step()`, in the reduction of gradients at the end of backward
(stages 0 to 2, ours), and in the whole step. Adds the stages that `benchmarks/results/engine_vs_stock.csv` (`--csv`) lacks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from common import Study, launch_ranks, machine, markdown

BY_PARAMETERS = "slimfit, budget: parameters"


def variants(seed: int) -> dict[str, dict[str, Any] | None]:
    freeze = {"policy": "ils", "rate": 0.95, "seed": seed}
    host = {"inactive": "host"}
    return {
        "stock": None,
        "slimfit": {"freeze": freeze, "optimizer_states": host},
        BY_PARAMETERS: {"freeze": {**freeze, "budget": "parameters"}, "optimizer_states": host},
    }


def settings(stage: int, slimfit: dict | None) -> dict:
    buckets = {"reduce_bucket_size": int(5e7), "allgather_bucket_size": int(5e7)}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, **buckets},
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-5, "torch_adam": True}},
        "steps_per_print": None,
    }
    return config if slimfit is None else {**config, "slimfit": slimfit}


def measure(model, config: dict, steps: int, warm_up: int, counter) -> dict:
    """Return figures of a step of one engine: mean (seconds: median) and `_max`; the first steps are not counted."""
    import torch

    import slimfit_ds
    from slimfit_ds.engine.memory_roots import engine_roots

    engine, *_ = slimfit_ds.initialize(model=model, config=config)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    roots, slim, reducing = engine_roots(engine), hasattr(engine, "active_layers"), [0.0]

    def held(kind: str, extra=()) -> int:
        tensors = [*roots.get(kind, lambda: ())(), *extra]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    if hasattr(engine.optimizer, "collect_gradients"):
        engine.optimizer.collect_gradients = timed(engine.optimizer.collect_gradients, reducing)
    rows: list[dict] = []
    generator = torch.Generator().manual_seed(0)
    for step in range(warm_up + steps):
        ids = torch.randint(0, engine.module.config.vocab_size, (1, 32), generator=generator)
        counter.reset()
        reducing[0], began = 0.0, time.perf_counter()
        engine.backward(engine(input_ids=ids, labels=torch.zeros(1, dtype=torch.long)).loss)
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        row: dict[str, float] = {"gradients": held("gradients", gradients)}
        if slim:
            row = {"gradients": engine.optimizer.state_bytes()["gradients"]}
            sizes = {layer.name: layer.numel for layer in engine.roles.units}
            row["active_share"] = sum(sizes[name] for name in engine.active_layers) / parameters
        started = time.perf_counter()
        engine.step()
        row |= {"seconds": time.perf_counter() - started, "traffic": counter.total}
        row |= {"whole_seconds": time.perf_counter() - began, "reduce_seconds": reducing[0]}
        states = engine.optimizer.state_bytes() if slim else {}
        row |= {"optimizer": states.get("optimizer", held("optimizer"))}
        row |= {"host": states.get("optimizer_host", held("optimizer_host"))}
        if step >= warm_up:
            rows.append(row)
    weights = held("none", [getattr(p, "ds_tensor", p.data) for p in engine.module.parameters()])
    engine.destroy()
    result: dict = {"parameters": parameters, "weights": weights}
    for key in rows[0]:
        values = [row[key] for row in rows]
        result[key] = statistics.median(values) if key.endswith("seconds") else statistics.fmean(values)
        result[f"{key}_max"] = max(values)
    return result


def timed(function, total: list[float]):
    """Return the function, whose seconds are added to `total`."""

    def run(*args, **kwargs):
        started = time.perf_counter()
        result = function(*args, **kwargs)
        total[0] += time.perf_counter() - started
        return result

    return run


def rank_worker(arguments: argparse.Namespace) -> None:
    """Program of one rank: all engines of a stage."""
    import deepspeed
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from slimfit_ds.memory.traffic import TrafficCounter

    torch.set_num_threads(1)
    counter = TrafficCounter().install()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo")
    small: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 128,
    }
    config = BertConfig(**small, vocab_size=500) if arguments.tiny else BertConfig()
    results = {}
    for name, slimfit in variants(arguments.seed).items():
        torch.manual_seed(arguments.seed)
        model = BertForSequenceClassification(config)
        numbers = (arguments.steps, arguments.warm_up)
        results[name] = measure(model, settings(arguments.stages[0], slimfit), *numbers, counter)
    if torch.distributed.get_rank() == 0:
        print("RESULT " + json.dumps(results), flush=True)
    torch.distributed.destroy_process_group()


def tables(csv: str = "engine_vs_stock") -> dict[str, str]:
    """Return the table of the documents by its mark: ours as a share of stock DeepSpeed of the same stage."""
    rows, lines = {(r["stage"], r["engine"]): r for r in Study(csv, ()).rows()}, []

    def per_parameter(row: dict) -> float:
        return (row["weights"] + row["gradients"] + row["optimizer"]) / row["parameters"]

    for stage in sorted({stage for stage, _ in rows}):
        stock, own = rows[stage, "stock"], rows[stage, BY_PARAMETERS]
        ratios = [f"{own[key] / stock[key]:.3f}" for key in ("traffic", "gradients", "optimizer")]
        if stage == 3:
            ratios[0] += " (it gathers weights for forward and backward)"
        states = f"{per_parameter(own):.2f} ({per_parameter(stock):#.3g})"
        lines.append([stage, *ratios, states, f"{own['seconds'] / stock['seconds']:.2f}"])
    titles = ["ZeRO stage", "bytes sent", "gradient bytes held", "state bytes on the device after a step"]
    titles += ["model states, bytes per parameter (stock)", "time in `engine.step()`"]
    return {"engine-vs-stock": markdown(titles, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--steps", type=int, default=17)
    # In the first 17 steps each layer trains once; what a run costs shows after them.
    parser.add_argument("--warm-up", type=int, default=18, help="steps before those that are counted (18)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a small model")
    parser.add_argument(
        "--csv", default="engine_vs_stock", help="name of a study, or a path that ends in .csv"
    )
    parser.add_argument("--rank-worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_worker:
        return rank_worker(arguments)
    study = Study(arguments.csv, ("stage", "engine"))
    numbers = {"steps": arguments.steps, "warm_up": arguments.warm_up, "seed": arguments.seed}
    for stage in arguments.stages:
        if not study.has({"stage": stage, "engine": "stock"}):
            options = [f"--{key.replace('_', '-')}={value}" for key, value in numbers.items()]
            options += ["--tiny"] if arguments.tiny else []
            found = launch_ranks(2, __file__, "--rank-worker", "--stages", stage, *options)
            for name, row in found.items():
                study.add(
                    {"stage": stage, "engine": name, **row, "dtype": "bf16", "ranks": 2} | numbers | machine()
                )
    print(tables(arguments.csv)["engine-vs-stock"])


if __name__ == "__main__":
    main()
