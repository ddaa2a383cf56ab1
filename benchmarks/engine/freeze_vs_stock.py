"""What a step costs at 95 % frozen against stock DeepSpeed of the same ZeRO stage, counted on real ranks.

    python benchmarks/engine/freeze_vs_stock.py            # BERT-base shape, bf16, 2 CPU ranks
    python benchmarks/engine/freeze_vs_stock.py --tiny     # the same on a small model, seconds

For each stage one launch of two ranks trains the same model first with stock DeepSpeed, then with the
freeze-aware engine, on equal batches. Counted: payload bytes of all collectives of a step, gradient bytes
held when backward ends, bytes of optimizer states on the device, seconds in `engine.step()`, in the reduction of
gradients at the end of backward (stages 0 to 2, ours), and in the whole step. Writes
`benchmarks/engine/results/freeze_vs_stock.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def settings(stage: int, slimfit: dict | None) -> dict:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": int(5e7),
            "allgather_bucket_size": int(5e7),
        },
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-5, "torch_adam": True}},
        "steps_per_print": None,
    }
    return config if slimfit is None else {**config, "slimfit": slimfit}


def measure(model, config: dict, steps: int, warm_up: int, counter) -> dict:
    """Per-step figures of one engine; the first steps warm up and are not counted."""
    import torch

    import slimfit_ds
    from slimfit_ds.engine.memory_roots import engine_roots

    engine, *_ = slimfit_ds.initialize(model=model, config=config)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    roots = engine_roots(engine)
    slim = hasattr(engine, "active_layers")

    def held(kind: str, extra=()) -> int:
        tensors = [*roots.get(kind, lambda: ())(), *extra]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    reducing = [0.0]
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
        row = {"gradients": held("gradients", gradients)}
        if slim:
            row = {"gradients": engine.optimizer.state_bytes()["gradients"]}
            sizes = {layer.name: layer.numel for layer in engine.roles.layers}
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
    """The function, whose seconds are added to `total`."""

    def run(*args, **kwargs):
        started = time.perf_counter()
        result = function(*args, **kwargs)
        total[0] += time.perf_counter() - started
        return result

    return run


def worker(arguments: argparse.Namespace) -> None:
    import deepspeed
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from slimfit_ds.memory.traffic import TrafficCounter

    torch.set_num_threads(1)
    counter = TrafficCounter().install()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo")
    small = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 128}
    config = BertConfig(**small, vocab_size=500) if arguments.tiny else BertConfig()

    def model():
        torch.manual_seed(arguments.seed)
        return BertForSequenceClassification(config)

    freeze = {"rate": 0.95, "seed": arguments.seed}
    by_parameters = {**freeze, "budget": "parameters"}
    host = {"inactive": "host"}
    variants = {
        "stock": None,
        "slimfit": {"freeze": freeze, "optimizer_states": host},
        "slimfit, budget: parameters": {"freeze": by_parameters, "optimizer_states": host},
    }
    results = {
        name: measure(
            model(), settings(arguments.stage, slimfit), arguments.steps, arguments.warm_up, counter
        )
        for name, slimfit in variants.items()
    }
    if torch.distributed.get_rank() == 0:
        print("RESULT " + json.dumps(results), flush=True)
    torch.distributed.destroy_process_group()


def launch(arguments: argparse.Namespace, stage: int) -> dict:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(port),
    ]
    command += [
        __file__,
        "--stage",
        str(stage),
        "--steps",
        str(arguments.steps),
        "--seed",
        str(arguments.seed),
    ]
    command += ["--warm-up", str(arguments.warm_up), *(["--tiny"] if arguments.tiny else [])]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"stage {stage} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def table(results: dict[int, dict]) -> str:
    lines = [
        "| stage | engine | bytes sent per step | ratio | gradient bytes | ratio | state bytes on device | ratio "
        "| on host | model states, B/param | step(), ms | ratio | reduction, share of whole step "
        "| active share of weights, mean (max) |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for stage, variants in results.items():
        stock = variants["stock"]
        for name, row in variants.items():

            def ratio(key: str, row=row, stock=stock) -> str:
                return f"{row[key] / stock[key]:.3f}" if stock[key] else "-"

            states = (row["weights"] + row["gradients"] + row["optimizer"]) / row["parameters"]
            share = (
                f"{row['active_share']:.3f} ({row['active_share_max']:.3f})" if "active_share" in row else "1"
            )
            cells = [stage, name]
            for key in ("traffic", "gradients", "optimizer"):
                cells += [f"{row[key]:,.0f}", ratio(key)]
            cells += [
                f"{row['host']:,.0f}",
                f"{states:.2f}",
                f"{1000 * row['seconds']:.0f}",
                ratio("seconds"),
                f"{row['reduce_seconds'] / row['whole_seconds']:.3f}" if row["reduce_seconds"] else "-",
                share,
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", type=int, help="worker only")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--steps", type=int, default=17)
    # In the first 17 steps each layer trains once; what a run costs shows after them.
    parser.add_argument("--warm-up", type=int, default=18, help="steps before those that are counted (18)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--local_rank", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.stage is not None:
        worker(arguments)
        return
    results = {stage: launch(arguments, stage) for stage in arguments.stages}
    text = table(results)
    print(text)
    if not arguments.tiny:
        import torch

        RESULTS.mkdir(exist_ok=True)
        hardware = (
            f"{os.cpu_count()} cores {platform.processor() or platform.machine()}, torch {torch.__version__}"
        )
        counted = f"--steps {arguments.steps} --warm-up {arguments.warm_up} --seed {arguments.seed}"
        stages = " ".join(map(str, arguments.stages))
        command = f"python benchmarks/engine/freeze_vs_stock.py {counted} --stages {stages}"
        note = f"BERT-base shape, bf16, 2 gloo ranks, 95 % frozen, {hardware}; `{command}`\n\n"
        (RESULTS / "freeze_vs_stock.md").write_text(note + text + "\n")
        (RESULTS / "freeze_vs_stock.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
