"""Program of one rank: stock DeepSpeed ZeRO 1 against SlimFit at stage 1, in turns, on the small BERT."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROUNDS, WARM_UP = 8, 2


def main() -> None:
    import torch
    from peers_methods.trainers import EngineTrainer
    from peers_methods.workloads import CASES, make_batches

    import slimfit_ds
    from slimfit_ds.engine.processes import start_processes
    from slimfit_ds.memory.tracker import MemoryTracker
    from slimfit_ds.memory.traffic import TrafficCounter
    from slimfit_ds.planner.strategy import Strategy, slimfit_block
    from slimfit_ds.planner.workload import Workload

    torch.set_num_threads(1)
    counter = TrafficCounter().install()
    start_processes()
    case = CASES["bert-small"]
    batch, ranks = case.workload.batch, torch.distributed.get_world_size()
    strategies = {
        "full, ZeRO 1": Strategy("full", stage=1),
        "balanced, ZeRO 1": Strategy("balanced", stage=1, slimfit=slimfit_block("balanced")),
        "minimal, ZeRO 1": Strategy("minimal", stage=1, slimfit=slimfit_block("minimal")),
    }
    trainers = {}
    for name, strategy in strategies.items():
        torch.manual_seed(0)
        model = Workload(**{**case.workload.to_dict(), "dtype": "bf16"}).build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        config = strategy.deepspeed_config(batch, "bf16", ranks)
        trainers[name] = EngineTrainer(
            slimfit_ds.initialize(model=model, optimizer=optimizer, config=config)[0]
        )
    batches = make_batches(case, batch, torch.device("cpu"), seed=torch.distributed.get_rank())
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    sent = dict.fromkeys(trainers, 0)
    for number in range(WARM_UP + ROUNDS):
        for name, trainer in trainers.items():
            torch.distributed.barrier()
            counter.reset()
            begin = time.perf_counter()
            trainer.step(batches[number % len(batches)])
            torch.distributed.barrier()
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - begin)
                sent[name] += counter.total
    result = {}
    reference = seconds["full, ZeRO 1"]
    for name, trainer in trainers.items():
        with MemoryTracker(trainer.model, trainer.roots()) as tracker:
            trainer.step(batches[0], tracker.phase)
        result[name] = {
            "seconds": statistics.median(seconds[name]),
            "ratio": statistics.median(a / b for a, b in zip(seconds[name], reference, strict=True)),
            "bytes_sent": sent[name] / ROUNDS,
            "peak": tracker.report().peak,
        }
    if torch.distributed.get_rank() == 0:
        print("RESULT " + json.dumps(result), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
