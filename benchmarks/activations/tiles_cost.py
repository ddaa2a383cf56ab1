"""CPU seconds of a step of blocks in tiles of the sequence against whole sequences, in turns in one process.

    python benchmarks/activations/tiles_cost.py --tokens 4096 --chunks 1024,512

A Llama shape of two layers, recomputed blocks with their input kept exactly, weights frozen but the recommended columns, fp32, one
thread. CPU seconds of this process, since the machine may do other work; the median of the ratios of neighbouring steps.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import transformers

import slimfit_ds


def main() -> None:
    """Print a line for each size of tiles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--chunks", default="1024,512")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        hidden_size=arguments.width,
        intermediate_size=7 * arguments.width // 2,
        num_hidden_layers=2,
        num_attention_heads=arguments.width // 64,
        num_key_value_heads=arguments.width // 256,
        vocab_size=1024,
        max_position_embeddings=arguments.tokens,
    )
    ids = torch.randint(1024, (1, arguments.tokens), generator=torch.Generator().manual_seed(0))
    steps = {}
    for chunk in (None, *map(int, arguments.chunks.split(","))):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).train()
        slimfit_ds.slim(
            model,
            {
                "freeze": {"rate": 0.95},
                "activations": {"operations": {"block": "recompute"}, "chunk_tokens": chunk},
            },
        )
        steps[chunk] = model

    def seconds(model: torch.nn.Module) -> float:
        before = time.process_time()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()
        return time.process_time() - before

    for model in steps.values():
        seconds(model)
    times: dict[int | None, list[float]] = {chunk: [] for chunk in steps}
    for _ in range(arguments.rounds):
        for chunk, model in steps.items():
            times[chunk].append(seconds(model))
    print(f"whole: {statistics.median(times[None]):.2f} s")
    for chunk in list(steps)[1:]:
        ratios = [mine / whole for mine, whole in zip(times[chunk], times[None], strict=True)]
        print(f"tiles of {chunk}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
