"""Program: bytes that one rank of a pretended world sends per step, BERT-base shape: `fake_traffic.py RANKS METHOD`."""

from __future__ import annotations

import json
import os
import sys

STEPS = 20
"""A cycle of the schedule at 95 % frozen: each layer trains once."""


def main() -> None:
    ranks, method = int(sys.argv[1]), sys.argv[2]
    os.environ["DS_ACCELERATOR"] = "cpu"
    from slimfit_ds.memory.traffic import TrafficCounter
    from slimfit_ds.planner import simulate
    from slimfit_ds.planner.fake_world import FakeWorld
    from slimfit_ds.planner.strategy import Strategy, slimfit_block
    from slimfit_ds.planner.workload import Workload

    slim, stage = not method.startswith("full"), int(method[-1])
    simulate._prepare()
    counter = TrafficCounter().install()
    import torch

    import slimfit_ds

    workload = Workload("bert-base-uncased", 1, 32, "sequence_classification", dtype="bf16")
    block = slimfit_block("minimal") if slim else None
    steps = STEPS if slim else 2
    with FakeWorld(ranks):
        model = workload.build()
        config = Strategy("traffic", stage=stage, slimfit=block).deepspeed_config(1, "bf16", ranks)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        engine = slimfit_ds.initialize(model=model, optimizer=optimizer, config=config)[0]
        sent = []
        for _ in range(steps + 1):
            counter.reset()
            engine.backward(engine(**workload.inputs(1)).loss)
            engine.step()
            sent.append(counter.total)
    # ZeRO 3 learns in the first step when to fetch what.
    result = {"bytes": sum(sent[1:]) / steps, "largest": max(sent[1:]), "steps": steps}
    print("RESULT " + json.dumps(result), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
