"""What DistributedDataParallel does with layers that are frozen step by step, against SlimFitCallback's own reduction.

    torchrun --nproc_per_node 2 benchmarks/integrations/ddp_freezing.py

Each way trains the same BERT with the same active sets for a few steps: bytes of gradients sent, bytes of gradient
buckets held, the largest change of a frozen weight, and the error where there is one.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForSequenceClassification

import slimfit_ds
from slimfit_ds.integrations.data_parallel import ActiveGradients, hide_from_ddp


def classifier(arguments: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=arguments.hidden,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.hidden // 64,
            intermediate_size=4 * arguments.hidden,
            vocab_size=8000,
        )
    )


class Ways:
    """Each wraps a model and returns the wrapper and a function that says how many bytes were sent."""

    @staticmethod
    def stock(model: nn.Module, unused: bool) -> tuple[nn.Module, Callable[[], int]]:
        wrapper = DistributedDataParallel(model, find_unused_parameters=unused)
        sent = [0]

        # No annotations: DDP reads them, and as text they are not the types it wants.
        def count(state, bucket):
            buffer = bucket.buffer().div_(dist.get_world_size())
            sent[0] += buffer.numel() * buffer.element_size()
            work = dist.all_reduce(buffer, async_op=True)
            return work.get_future().then(lambda done: done.value()[0])

        wrapper.register_comm_hook(None, count)
        return wrapper, lambda: sent[0]

    @staticmethod
    def ours(model: nn.Module) -> tuple[nn.Module, Callable[[], int]]:
        parameters = dict(model.named_parameters())
        hide_from_ddp(model, parameters)
        wrapper = DistributedDataParallel(model, find_unused_parameters=True)
        gradients = ActiveGradients(model, parameters)
        return wrapper, lambda: gradients.bytes_sent


def measure(name: str, make: Callable, arguments: argparse.Namespace) -> dict:
    model = classifier(arguments)
    wrapper, sent = make(model)
    handle = slimfit_ds.slim(model, {"freeze": {"rate": arguments.rate}})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    handle.follow(optimizer)
    in_buckets = sum(p.numel() for n, p in model.named_parameters() if n not in wrapper.parameters_to_ignore)
    row = {"way": name, "buckets_bytes": 4 * in_buckets, "error": None, "drift": 0.0}
    random = torch.Generator().manual_seed(dist.get_rank())
    steps, seconds, after_first = 0, 0.0, 0
    try:
        for steps in range(arguments.steps):
            frozen = {
                n: p.detach().clone() for n, p in model.named_parameters() if n in handle.schedule.names
            }
            frozen = {n: p for n, p in frozen.items() if n not in handle.active_layers}
            ids = torch.randint(0, 8000, (4, 32), generator=random)
            labels = torch.randint(0, 2, (4,), generator=random)
            started = time.perf_counter()
            wrapper(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if steps:
                seconds += time.perf_counter() - started
            else:
                after_first = sent()
            moved = [(model.get_parameter(n).detach() - p).abs().max().item() for n, p in frozen.items()]
            row["drift"] = max([row["drift"], *moved])
        row["sent_bytes_per_step"] = (sent() - after_first) // (arguments.steps - 1)
        row["ms_per_step"] = 1000 * seconds / (arguments.steps - 1)
    except RuntimeError as error:
        row["error"] = f"step {steps}: {str(error).split('. ')[0]}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=256, help="size of the model")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the model")
    parser.add_argument("--rate", type=float, default=0.95, help="share of frozen layers")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output", type=Path, help="a JSON file for the rows")
    arguments = parser.parse_args()
    # The loop has no Trainer: every backward pass ends a step.
    from accelerate.state import GradientState

    GradientState()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rows = [
        measure("DDP", lambda model: Ways.stock(model, unused=False), arguments),
        measure("DDP, find_unused_parameters", lambda model: Ways.stock(model, unused=True), arguments),
        measure("SlimFitCallback's reduction", Ways.ours, arguments),
    ]
    if dist.get_rank() == 0:
        total = sum(p.numel() for p in classifier(arguments).parameters())
        found = {
            "hardware": f"CPU {platform.machine()}, {dist.get_world_size()} gloo ranks, one thread each",
            "torch": torch.__version__,
            "dtype": "fp32",
            "seed": 0,
            "parameters_bytes": 4 * total,
            "rate": arguments.rate,
            "rows": rows,
        }
        print(json.dumps(found, indent=1))
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
