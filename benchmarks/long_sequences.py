"""One sample of growing length: peak, what grows by the token, the rest, and the host's bytes. Simulated.

    python benchmarks/long_sequences.py --tokens 2048,8192,32768,131072,262144,1000000

95 % frozen, `minimal`, frozen weights, columns, states and block inputs on the host, loss in chunks of 256, bf16, CUDA semantics; what
kernels take inside themselves is not in it. Slopes are those from the line before, in bytes per token over the hidden size.
"""

from __future__ import annotations

import argparse

from slimfit_ds.planner.simulate import Simulator
from slimfit_ds.planner.strategies import Strategy
from slimfit_ds.planner.workload import Workload, load_config


def main() -> None:
    """Print a row for each length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="meta-llama/Meta-Llama-3-8B")
    parser.add_argument("--tokens", default="2048,8192,32768,131072,262144,1000000")
    parser.add_argument("--inputs", default="int8_channel", help="codec of block inputs")
    parser.add_argument("--columns", default="host", help="of trained columns: device or host")
    arguments = parser.parse_args()
    width = load_config(arguments.model).hidden_size
    block = {
        "freeze": {"rate": 0.95},
        "activations": {
            "preset": "minimal",
            "operations": {"block": arguments.inputs},
            "chunk_loss_tokens": 256,
            "offload": True,
        },
        "frozen_weights": {"live": "host", "columns": arguments.columns},
        "optimizer_states": {"active": "host"},
    }
    print(
        "| tokens | GB on the GPU | h per token | rest, GiB | block inputs on the host, GB | all of the host, GB |"
    )
    print("|---:|---:|---:|---:|---:|---:|")
    before = None
    with Simulator(deep=True) as simulator:
        for tokens in map(int, arguments.tokens.split(",")):
            workload = Workload(arguments.model, seq=tokens)
            found = simulator.run(workload, Strategy("long", slimfit=block), "worst")
            report = found.report
            if report is None:
                raise SystemExit(found.error)
            slope, rest = "", ""
            if before is not None:
                each = (report.peak - before[1]) / (tokens - before[0])
                slope, rest = f"{each / width:.2f}", f"{(report.peak - each * tokens) / 2**30:.2f}"
            inputs = report.saved_activations_host / 1e9
            print(
                f"| {tokens:,} | {report.peak / 1e9:.2f} | {slope} | {rest} | {inputs:.1f} | {report.host / 1e9:.1f} |",
                flush=True,
            )
            before = tokens, report.peak


if __name__ == "__main__":
    main()
