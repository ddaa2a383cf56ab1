"""What DistributedDataParallel does with layers that are frozen step by step, against SlimFitCallback's own reduction.

    python benchmarks/ddp_freezing.py

Each way trains the same BERT with the same active sets for a few steps on two gloo ranks: bytes of gradients sent, bytes
of gradient buckets held, the largest change of a frozen weight, and the error where there is one. Adds what
`benchmarks/results/ddp_freezing.csv` (`--csv`) lacks.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from common import Study, launch_ranks, machine, markdown
from torch import nn
from torch.nn.parallel import DistributedDataParallel

STUDY = "ddp_freezing"


def classifier(hidden: int, layers: int) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 4 * hidden,
    }
    return BertForSequenceClassification(
        BertConfig(**sizes, num_attention_heads=hidden // 64, vocab_size=8000)
    )


def stock(model: nn.Module, unused: bool) -> tuple[nn.Module, Callable[[], int]]:
    """Return DDP's wrapper, and a function that says how many bytes of gradients were sent."""
    wrapper = DistributedDataParallel(model, find_unused_parameters=unused)
    sent = [0]

    # No annotations: DDP reads them, and as text they are not the types it wants.
    def count(state, bucket):
        buffer = bucket.buffer().div_(dist.get_world_size())
        sent[0] += buffer.numel() * buffer.element_size()
        return dist.all_reduce(buffer, async_op=True).get_future().then(lambda done: done.value()[0])

    wrapper.register_comm_hook(None, count)
    return wrapper, lambda: sent[0]


def ours(model: nn.Module) -> tuple[nn.Module, Callable[[], int]]:
    """The same with the callback's reduction."""
    from slimfit_ds.integrations.data_parallel import ActiveGradients, hide_from_ddp

    parameters = dict(model.named_parameters())
    hide_from_ddp(model, parameters)
    wrapper = DistributedDataParallel(model, find_unused_parameters=True)
    gradients = ActiveGradients(model, parameters)
    return wrapper, lambda: gradients.bytes_sent


WAYS: dict[str, Callable[[nn.Module], tuple[nn.Module, Callable[[], int]]]] = {
    "DDP": lambda model: stock(model, unused=False),
    "DDP, find_unused_parameters": lambda model: stock(model, unused=True),
    "SlimFitCallback's reduction": ours,
}


def measure(way: str, hidden: int, layers: int, steps: int, rate: float) -> dict:
    """Train a few steps; the first does not count for bytes and time."""
    import slimfit_ds

    model = classifier(hidden, layers)
    size = sum(p.numel() for p in model.parameters())
    wrapper, sent = WAYS[way](model)
    handle = slimfit_ds.slim(model, {"freeze": {"policy": "ils", "rate": rate}})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    handle.follow(optimizer)
    ignored: Any = wrapper.parameters_to_ignore
    in_buckets: int = sum(p.numel() for n, p in model.named_parameters() if n not in ignored)
    row: dict[str, Any] = {
        "way": way,
        "buckets_bytes": 4 * in_buckets,
        "error": None,
        "drift": 0.0,
        "parameters_bytes": 4 * size,
    }
    random = torch.Generator().manual_seed(dist.get_rank())
    step, seconds, after_first = 0, 0.0, 0
    try:
        for step in range(steps):
            sleeping = set(handle.schedule.names) - set(handle.active_layers)
            frozen = {n: model.get_parameter(n).detach().clone() for n in sleeping}
            ids = torch.randint(0, 8000, (4, 32), generator=random)
            labels = torch.randint(0, 2, (4,), generator=random)
            started = time.perf_counter()
            wrapper(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step:
                seconds += time.perf_counter() - started
            else:
                after_first = sent()
            moved = [(model.get_parameter(n).detach() - p).abs().max().item() for n, p in frozen.items()]
            row["drift"] = max([row["drift"], *moved])
        row["sent_bytes_per_step"] = (sent() - after_first) // (steps - 1)
        row["ms_per_step"] = 1000 * seconds / (steps - 1)
    except RuntimeError as error:
        row["error"] = f"step {step}: {str(error).split('. ')[0]}"
    return row


def rank_worker(arguments: argparse.Namespace) -> None:
    """Program of one rank."""
    # The loop has no Trainer: every backward pass ends a step.
    from accelerate.state import GradientState

    GradientState()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    row = measure(arguments.way, arguments.hidden, arguments.layers, arguments.steps, arguments.rate)
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(row), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def tables(csv: str = STUDY) -> dict[str, str]:
    """Return the table of the documents by its mark."""
    lines = []
    for row in Study(csv, ()).rows():
        held, sent = row["buckets_bytes"], row["sent_bytes_per_step"]
        buckets = f"{held / 1e6:.1f} MB" if held > 1e5 else f"{held} bytes"
        per_step = "" if sent is None else f"{sent / 1e6:.3g} MB"
        lines.append([row["way"], buckets, per_step, f"fails: {row['error']}" if row["error"] else ""])
    titles = ["", "gradient buckets held", "gradients sent per step", ""]
    return {"ddp-freezing": markdown(titles, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256, help="size of the model")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the model")
    parser.add_argument("--rate", type=float, default=0.95, help="share of frozen layers")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--way", choices=list(WAYS), help="only this one")
    parser.add_argument("--csv", default=STUDY, help="name of a study, or a path that ends in .csv")
    parser.add_argument("--rank-worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_worker:
        return rank_worker(arguments)
    study = Study(arguments.csv, ("way",))
    settings = {key: getattr(arguments, key) for key in ("hidden", "layers", "rate", "steps")}
    for way in [arguments.way] if arguments.way else WAYS:
        if not study.has({"way": way}):
            options = [text for key, value in settings.items() for text in (f"--{key}", value)]
            row = launch_ranks(2, __file__, "--rank-worker", "--way", way, *options)
            study.add(row | {"rate": arguments.rate, "dtype": "fp32", "seed": 0, "ranks": 2} | machine())
    print(tables(arguments.csv)["ddp-freezing"])


if __name__ == "__main__":
    main()
