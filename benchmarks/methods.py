"""The methods that are compared: full fine-tuning and its thrifty variants, other people's optimizers, and SlimFit.

What the planner knows (`Strategy`) is built from that; GaLore, APOLLO, BAdam and the optimizers of torchao and
bitsandbytes are built here.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from common import Failed, free_port
from shapes import Shape
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slimfit_ds.activations.recognise import find_blocks
from slimfit_ds.engine.memory_roots import engine_roots, is_offloaded
from slimfit_ds.memory.tracker import Roots, optimizer_tensors
from slimfit_ds.planner.strategies import Strategy, slimfit_block

__all__ = ["METHODS", "EngineTrainer", "Method", "PlainTrainer", "Trainer", "micro_batch"]

LEARNING_RATE = 1e-4
RATE = 0.95
"""Share that SlimFit freezes."""


class Trainer:
    """A model and what trains it: forward and backward, then the update, so that both can be measured."""

    autocast = False
    # Phases that work in host memory, which a CPU run cannot tell from the device's, or in a compiled kernel without
    # temporaries, which a tracker cannot enter.
    uncounted_phases: tuple[str, ...] = ()

    def __init__(self, model: nn.Module):
        self.model = model

    def forward_backward(self, batch: dict[str, Tensor]) -> Tensor:
        """Compute gradients; return the loss, detached."""
        raise NotImplementedError

    def update(self) -> None:
        """Take the optimizer's step and drop the gradients."""
        raise NotImplementedError

    def roots(self) -> Roots:
        """Return where optimizer states are, for the memory tracker."""
        raise NotImplementedError

    def step(self, batch: dict[str, Tensor], phase: Callable[[str], AbstractContextManager] | None = None):
        """Take a whole step and return the loss; `phase` names the update for a tracker."""
        loss = self.forward_backward(batch)
        with phase("step") if phase else nullcontext():
            self.update()
        return loss


class PlainTrainer(Trainer):
    """The ordinary PyTorch loop.

    Args:
        model: on its device.
        optimizer: any optimizer.
        autocast: run the forward pass under bf16 autocast.
        micro_batch: samples per forward pass; None: the whole batch.
        states: returns the tensors of the optimizer; default: everything in `optimizer.state`.
        host_states: returns those of them that stand in host memory.
    """

    def __init__(self, model, optimizer, autocast, micro_batch=None, states=None, host_states=None):
        super().__init__(model)
        self.optimizer, self.autocast, self._micro_batch = optimizer, autocast, micro_batch
        self._states = states or (lambda: optimizer_tensors(self.optimizer))
        self._host_states = host_states
        self._device = next(model.parameters()).device.type

    def forward_backward(self, batch: dict[str, Tensor]) -> Tensor:
        samples = len(next(iter(batch.values())))
        size = min(self._micro_batch or samples, samples)
        total = torch.zeros((), device=self._device)
        for start in range(0, samples, size):
            micro = {key: value[start : start + size] for key, value in batch.items()}
            with torch.autocast(self._device, torch.bfloat16, enabled=self.autocast):
                loss = self.model(**micro).loss
            weight = len(next(iter(micro.values()))) / samples
            (loss if weight == 1 else loss * weight).backward()
            total += weight * loss.detach()
            del loss
        return total

    def update(self) -> None:
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def roots(self) -> Roots:
        roots: dict[str, Any] = {"optimizer": self._states}
        return roots if self._host_states is None else roots | {"optimizer_host": self._host_states}


class EngineTrainer(Trainer):
    """A DeepSpeed engine of one or more ranks, SlimFit's if the configuration has a `"slimfit"` block."""

    def __init__(self, model: nn.Module, config: dict[str, Any], optimizer: Any = None):
        need("deepspeed")
        if "RANK" not in os.environ:
            os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        if next(model.parameters()).device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        import slimfit_ds
        from slimfit_ds.engine.processes import start_processes

        if not torch.distributed.is_initialized():
            start_processes()
        self.engine = slimfit_ds.initialize(model=model, optimizer=optimizer, config=config)[0]
        super().__init__(self.engine.module)
        self._dtype = next(self.engine.module.parameters()).dtype
        if is_offloaded(self.engine.optimizer):
            self.uncounted_phases = ("step",)

    def forward_backward(self, batch: dict[str, Tensor]) -> Tensor:
        floats = {key: value.to(self._dtype) for key, value in batch.items() if value.is_floating_point()}
        loss = self.engine(**(batch | floats)).loss
        self.engine.backward(loss)
        return loss.detach()

    def update(self) -> None:
        self.engine.step()

    def roots(self) -> Roots:
        return engine_roots(self.engine)


@dataclass(frozen=True)
class Request:
    """What is to be built: a shape on a device, with weights of a seed."""

    shape: Shape
    device: torch.device
    seed: int = 0

    def model(self, dtype: str) -> nn.Module:
        """Return the model with random weights, made on the device; `dtype`: `fp32` (for autocast) or `bf16`."""
        torch.manual_seed(self.seed)
        with self.device:
            return replace(self.shape.workload, dtype=dtype).build()


def need(*packages: str) -> None:
    """Check that packages are installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise Failed("unavailable", f"{package} is not installed")


def adamw(parameters: Any) -> torch.optim.AdamW:
    """Return torch's fused AdamW."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)


def micro_batch(batch: int, most: int = 8) -> int:
    """Return the samples of a forward pass of accumulation: 8, or half the batch where that is less."""
    return min(most, max(1, batch // 2))


def of_strategy(request: Request, strategy: Strategy) -> Trainer:
    """Return the trainer of a strategy of the planner."""
    model = request.model("fp32" if strategy.dtype == "bf16_autocast" else "bf16")
    batch = request.shape.workload.batch
    if strategy.loss_chunk is not None:
        from slimfit_ds.activations.language_head import chunk_language_model_loss

        chunk_language_model_loss(model, strategy.loss_chunk)
    if strategy.gradient_checkpointing:
        model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))  # type: ignore[operator]
    if strategy.lora is not None:
        need("peft")
        from peft import LoraConfig, get_peft_model

        heads = [name for name, _ in model.named_children() if name in {"classifier", "score", "qa_outputs"}]
        adapters = LoraConfig(
            r=strategy.lora,
            lora_alpha=2 * strategy.lora,
            target_modules="all-linear",
            modules_to_save=heads or None,
        )
        model = get_peft_model(model, adapters).to(request.device)
        return PlainTrainer(model, adamw(p for p in model.parameters() if p.requires_grad), autocast=True)
    if strategy.stage is None:
        micro = batch // strategy.accumulation
        return PlainTrainer(model, adamw(model.parameters()), strategy.dtype == "bf16_autocast", micro)
    config = strategy.deepspeed_config(batch, "bf16", 1)
    if strategy.offload:
        config |= {"optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE}}}
        config.pop("zero_force_ds_cpu_optimizer")
        return EngineTrainer(model, config)
    return EngineTrainer(model, config, adamw(model.parameters()))


def torchao_8bit(request: Request) -> Trainer:
    """torchao's AdamW8bit on fp32 weights under autocast."""
    need("torchao")
    from torchao.optim import AdamW8bit

    model = request.model("fp32")
    trainer = PlainTrainer(model, AdamW8bit(model.parameters(), lr=LEARNING_RATE), autocast=True)
    # One compiled kernel per parameter; under a tracker it runs eagerly, with temporaries that are not its own.
    trainer.uncounted_phases = ("step",)
    return trainer


def torchao_offload(request: Request) -> Trainer:
    """torchao's CPUOffloadOptimizer around fused AdamW, gradients offloaded too."""
    need("torchao")
    if request.device.type != "cuda":
        raise Failed("unavailable", "torchao's CPUOffloadOptimizer works on CUDA and XPU only")
    from torchao.optim import CPUOffloadOptimizer

    model = request.model("fp32")
    optimizer = CPUOffloadOptimizer(
        model.parameters(), torch.optim.AdamW, offload_gradients=True, lr=LEARNING_RATE, fused=True
    )

    def on_host() -> list[Tensor]:
        inner = optimizer.optim_dict.values()
        return [t for one in inner for t in (*optimizer_tensors(one), *one.param_groups[0]["params"])]

    return PlainTrainer(model, optimizer, autocast=True, states=tuple, host_states=on_host)


def gradients_leave(request: Request) -> Trainer:
    """What CPUOffloadOptimizer leaves on the device, for fake tensors: weights, without the buffers of its transfers."""
    model = request.model("fp32")
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return PlainTrainer(model, SimpleNamespace(step=lambda: None), autocast=True, states=tuple)


def bitsandbytes_8bit(request: Request) -> Trainer:
    """bitsandbytes' blockwise 8-bit Adam on fp32 weights under autocast."""
    need("bitsandbytes")
    from bitsandbytes.optim import Adam8bit

    model = request.model("fp32")
    return PlainTrainer(model, Adam8bit(model.parameters(), lr=LEARNING_RATE), autocast=True)


def _low_rank(request: Request) -> tuple[nn.Module, list[nn.Parameter], list[nn.Parameter], int]:
    """Return a bf16 model, the matrices of its blocks, everything else, and a quarter of the hidden size, the papers' rank."""
    model = request.model("bf16")
    inside = {id(p) for block in find_blocks(model).values() for p in block.parameters() if p.dim() == 2}
    config: Any = model.config
    rank = max(1, (getattr(config, "hidden_size", None) or config.n_embd) // 4)
    matrices = [p for p in model.parameters() if id(p) in inside]
    return model, matrices, [p for p in model.parameters() if id(p) not in inside], rank


def galore(request: Request) -> Trainer:
    """GaLore AdamW, bf16 weights, rank h / 4, a new projection every 200 steps."""
    need("galore_torch", "bitsandbytes")
    from galore_torch import GaLoreAdamW

    model, low, rest, rank = _low_rank(request)
    options = {"rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    optimizer = GaLoreAdamW(
        [{"params": rest}, {"params": low, **options}], lr=LEARNING_RATE, no_deprecation_warning=True
    )

    def states() -> list[Tensor]:
        # The projections hang on objects inside of the states.
        bases = [getattr(s.get("projector"), "ortho_matrix", None) for s in optimizer.state.values()]
        return [*optimizer_tensors(optimizer), *(b for b in bases if isinstance(b, Tensor))]

    return PlainTrainer(model, optimizer, autocast=False, states=states)


def apollo(request: Request) -> Trainer:
    """APOLLO, bf16 weights, rank h / 4 scaled by channel."""
    need("apollo_torch", "bitsandbytes")
    from apollo_torch import APOLLOAdamW

    model, low, rest, rank = _low_rank(request)
    options = {"rank": rank, "update_proj_gap": 200, "scale": 1, "scale_type": "channel"}
    options |= {"proj": "random", "proj_type": "std"}
    optimizer = APOLLOAdamW([{"params": rest}, {"params": low, **options}], lr=LEARNING_RATE)
    return PlainTrainer(model, optimizer, autocast=False)


def badam(request: Request) -> Trainer:
    """BAdam: one block trains at a time (random order), bf16 weights, fp32 copies of that block.

    A new block every other step, where its authors stay with one for 50 or 100: bytes and time depend on how far back
    the block lies, and a few steps should show them all. On fake tensors every draw is the first block, whose backward
    pass is the longest. The collection of garbage that comes with each switch is left out: a quarter of a second here,
    which 50 steps share.
    """
    need("badam")
    from badam import BlockOptimizer, block_optim

    block_optim.gc = SimpleNamespace(collect=lambda: 0)
    model = request.model("bf16")
    base = adamw(model.parameters())
    prefixes = [[f"{name}."] for name in find_blocks(model)]
    options = {"switch_block_every": 2, "switch_mode": "random", "verbose": 0}
    optimizer = BlockOptimizer(base, list(model.named_parameters()), block_prefix_list=prefixes, **options)

    def states() -> list[Tensor]:
        return [*optimizer_tensors(base), *optimizer.param_idx2hp.values()]

    return PlainTrainer(model, optimizer, autocast=False, states=states)


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    Args:
        label: what tables call it.
        tier: on a GPU 0 is measured first; the time budget drops the last.
        strategy: of a shape, for the planner; None: the planner knows no such thing.
        own: builds the trainer where there is no strategy.
        fake: the same for fake tensors; None: `own`.
        tracked: steps whose storages are tracked; more where what trains changes from step to step.
    """

    label: str
    tier: int
    strategy: Callable[[Shape], Strategy] | None = None
    own: Callable[[Request], Trainer] | None = None
    fake: Callable[[Request], Trainer] | None = None
    tracked: int = 2

    def build(self, request: Request) -> Trainer:
        """Return the trainer; raises `Failed` where the method cannot run."""
        if self.own is not None:
            return self.own(request)
        assert self.strategy is not None
        return of_strategy(request, self.strategy(request.shape))


_PLAIN = Strategy("plain", stage=None, dtype="bf16_autocast")
_LORA = Strategy("lora", None, lora=8, dtype="bf16")


def _always(label: str, tier: int, strategy: Strategy) -> Method:
    return Method(label, tier, lambda shape: strategy)


def _accumulation(shape: Shape) -> Strategy:
    return _PLAIN.with_(accumulation=shape.workload.batch // micro_batch(shape.workload.batch))


def ours(preset: str, policy: str = "ils", loss_chunk: int | None = None, **activations: Any) -> Strategy:
    """Return SlimFit at 95 % frozen, states of frozen layers on the host: whole layers (`ils`) or columns (`auto`)."""
    block = slimfit_block(preset, RATE, "host", policy, **activations)
    return Strategy(preset, stage=0, slimfit=block, dtype="bf16", loss_chunk=loss_chunk)


def _in_chunks(policy: str) -> Callable[[Shape], Strategy]:
    def strategy(shape: Shape) -> Strategy:
        recomputed, loss = shape.chunk
        options = {"chunk_tokens": recomputed, "chunk_forward": True, "operations": {"norm": "exact"}}
        return ours("minimal", policy, loss if shape.task == "causal_lm" else None, **options)

    return strategy


def _slimfit(label: str, tier: int, strategy: Callable[[Shape], Strategy]) -> Method:
    return Method(label, tier, strategy, tracked=4)


METHODS: dict[str, Method] = {
    "full": _always("full: fused AdamW, SDPA, bf16 autocast", 0, _PLAIN),
    "checkpointing": _always("full + gradient checkpointing", 0, _PLAIN.with_(gradient_checkpointing=True)),
    "accumulation": Method("full + accumulation, micro-batch 8", 1, _accumulation),
    "lora": _always("LoRA r 8 (PEFT), bf16 base", 1, _LORA),
    "lora_checkpointing": _always(
        "LoRA r 8 + gradient checkpointing", 1, _LORA.with_(gradient_checkpointing=True)
    ),
    "torchao_8bit": Method("torchao AdamW8bit", 3, own=torchao_8bit),
    "torchao_offload": Method("torchao CPUOffloadOptimizer", 3, own=torchao_offload, fake=gradients_leave),
    "bitsandbytes_8bit": Method("bitsandbytes Adam8bit", 3, own=bitsandbytes_8bit),
    "zero_offload": _always(
        "DeepSpeed ZeRO-Offload (stage 2)", 3, Strategy("offload", stage=2, offload=True, dtype="bf16")
    ),
    "galore": Method("GaLore, rank h/4", 3, own=galore),
    "apollo": Method("APOLLO, rank h/4", 3, own=apollo),
    "badam": Method("BAdam, a block at a time", 3, own=badam, tracked=24),
    "paper": _slimfit("the paper's codecs, our engine", 1, lambda _: ours("paper")),
    "balanced": _slimfit("ours, `balanced`", 0, lambda _: ours("balanced")),
    "minimal": _slimfit("ours, `minimal`", 0, lambda _: ours("minimal")),
    "ultra": _slimfit("ours, `ultra`", 1, lambda _: ours("ultra")),
    "minimal_tuned": _slimfit("ours, `minimal` in chunks", 2, _in_chunks("ils")),
    "auto_balanced": _slimfit("ours, `balanced`, policy static", 1, lambda _: ours("balanced", "auto")),
    "auto_minimal": _slimfit("ours, `minimal`, policy static", 1, lambda _: ours("minimal", "auto")),
    "auto_tuned": _slimfit("ours, `minimal` in chunks, policy static", 2, _in_chunks("auto")),
    "full_again": _always("full, once more at the end (noise)", 5, _PLAIN),
}
