"""The peers: full fine-tuning and its thrifty variants, adapters, low-bit and low-rank optimizers, block training."""

from __future__ import annotations

import random
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from peers_methods.building import LEARNING_RATE, Request, Unavailable, adamw, build_model, make_engine, need
from peers_methods.trainers import EngineTrainer, PlainTrainer, Trainer
from slimfit_ds.activations.blocks import find_blocks
from slimfit_ds.memory.tracker import optimizer_tensors
from slimfit_ds.planner.strategy import Strategy

__all__ = [
    "accumulation",
    "apollo",
    "badam",
    "bitsandbytes_8bit",
    "full",
    "galore",
    "gradient_checkpointing",
    "gradients_leave",
    "lisa",
    "lora",
    "micro_batch",
    "torchao_8bit",
    "torchao_offload",
    "zero_offload",
]


def full(request: Request, dtype: str = "fp32") -> Trainer:
    """Fused AdamW, SDPA; fp32 weights under bf16 autocast, or weights and states in bf16."""
    model = build_model(request, dtype)
    return PlainTrainer(model, adamw(model.parameters()), autocast=dtype == "fp32")


def gradient_checkpointing(request: Request) -> Trainer:
    """torch's checkpointing of every block, under autocast."""
    model = build_model(request, "fp32")
    checkpoint = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    model._set_gradient_checkpointing(True, checkpoint)  # type: ignore[operator]
    return PlainTrainer(model, adamw(model.parameters()), autocast=True)


def micro_batch(batch: int, most: int = 8) -> int:
    """Samples of a forward pass of accumulation: 8, or half the batch where that is less."""
    return min(most, max(1, batch // 2))


def accumulation(request: Request) -> Trainer:
    """The batch in micro-batches."""
    model = build_model(request, "fp32")
    size = micro_batch(request.batch)
    trainer = PlainTrainer(model, adamw(model.parameters()), autocast=True, micro_batch=size)
    trainer.facts["micro_batch"] = size
    return trainer


def lora(request: Request, rank: int = 8, checkpointing: bool = False) -> Trainer:
    """PEFT: bf16 base weights, fp32 adapters on all linear layers, heads trained whole."""
    need("peft")
    from peft import LoraConfig, get_peft_model

    model = build_model(request, "bf16")
    if checkpointing:
        checkpoint = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
        model._set_gradient_checkpointing(True, checkpoint)  # type: ignore[operator]
    heads = [name for name, _ in model.named_children() if name in {"classifier", "score", "qa_outputs"}]
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", modules_to_save=heads or None
    )
    adapted = get_peft_model(model, config).to(request.device)
    return PlainTrainer(adapted, adamw(p for p in adapted.parameters() if p.requires_grad), autocast=True)


def torchao_8bit(request: Request) -> Trainer:
    """torchao's AdamW8bit on fp32 weights under autocast."""
    need("torchao")
    from torchao.optim import AdamW8bit

    model = build_model(request, "fp32")
    optimizer = AdamW8bit(model.parameters(), lr=LEARNING_RATE)
    trainer = PlainTrainer(model, optimizer, autocast=True)
    # One compiled kernel per parameter; under a tracker it runs eagerly, with temporaries that are not its own.
    trainer.uncounted_phases = ("step",)
    return trainer


def torchao_offload(request: Request) -> Trainer:
    """torchao's CPUOffloadOptimizer around fused AdamW, gradients offloaded too."""
    need("torchao")
    if request.device.type != "cuda":
        raise Unavailable("torchao's CPUOffloadOptimizer works on CUDA and XPU only")
    from torchao.optim import CPUOffloadOptimizer

    model = build_model(request, "fp32")
    optimizer = CPUOffloadOptimizer(
        model.parameters(), torch.optim.AdamW, offload_gradients=True, lr=LEARNING_RATE, fused=True
    )

    def on_host() -> list[torch.Tensor]:
        inner = optimizer.optim_dict.values()
        return [t for one in inner for t in (*optimizer_tensors(one), *one.param_groups[0]["params"])]

    return PlainTrainer(model, optimizer, autocast=True, states=tuple, host_states=on_host)


def gradients_leave(request: Request) -> Trainer:
    """What CPUOffloadOptimizer leaves on the device, for fake tensors: weights; gradients go as they are made.

    The buffers of its transfers are not in it.
    """
    model = build_model(request, "fp32")

    def leave(parameter: torch.Tensor) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(leave)
    return PlainTrainer(model, _Elsewhere(), autocast=True, states=tuple)


class _Elsewhere:
    """An optimizer of which nothing happens on the device."""

    def step(self) -> None:
        pass


def bitsandbytes_8bit(request: Request) -> Trainer:
    """bitsandbytes' blockwise 8-bit Adam on fp32 weights under autocast."""
    need("bitsandbytes")
    from bitsandbytes.optim import Adam8bit

    model = build_model(request, "fp32")
    return PlainTrainer(model, Adam8bit(model.parameters(), lr=LEARNING_RATE), autocast=True)


def zero_offload(request: Request) -> Trainer:
    """DeepSpeed ZeRO 2 with the optimizer on the host: bf16 weights, fp32 masters and moments there."""
    need("deepspeed")
    model = build_model(request, "bf16")
    config = Strategy("offload", stage=2, offload=True).deepspeed_config(request.batch, "bf16", 1)
    config |= {"optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE}}}
    config.pop("zero_force_ds_cpu_optimizer")
    return EngineTrainer(make_engine(model, config))


def _matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Weights of the blocks' linear layers, which low-rank optimizers project, and everything else."""
    inside = {id(p) for block in find_blocks(model).values() for p in block.parameters() if p.dim() == 2}
    chosen = [p for p in model.parameters() if id(p) in inside]
    return chosen, [p for p in model.parameters() if id(p) not in inside]


def _quarter(model: Any) -> int:
    """A quarter of the hidden size: the rank that the papers on low-rank gradients use."""
    config = model.config
    return max(1, (getattr(config, "hidden_size", None) or config.n_embd) // 4)


def galore(request: Request) -> Trainer:
    """GaLore AdamW, bf16 weights, rank h / 4, a new projection every 200 steps."""
    need("galore_torch", "bitsandbytes")
    from galore_torch import GaLoreAdamW

    model = build_model(request, "bf16")
    low, rest = _matrices(model)
    options = {"rank": _quarter(model), "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    optimizer = GaLoreAdamW(
        [{"params": rest}, {"params": low, **options}], lr=LEARNING_RATE, no_deprecation_warning=True
    )

    def states() -> list[torch.Tensor]:
        # The projections hang on objects inside of the states.
        projectors = [state.get("projector") for state in optimizer.state.values()]
        bases = [getattr(projector, "ortho_matrix", None) for projector in projectors]
        return [*optimizer_tensors(optimizer), *(b for b in bases if isinstance(b, torch.Tensor))]

    trainer = PlainTrainer(model, optimizer, autocast=False, states=states)
    trainer.facts["rank"] = options["rank"]
    return trainer


def apollo(request: Request, mini: bool = False) -> Trainer:
    """APOLLO, bf16 weights: rank h / 4 scaled by channel; mini: rank 1 scaled by tensor."""
    need("apollo_torch", "bitsandbytes")
    from apollo_torch import APOLLOAdamW

    model = build_model(request, "bf16")
    low, rest = _matrices(model)
    options = {"rank": 1 if mini else _quarter(model), "proj": "random", "proj_type": "std"}
    options |= {"scale_type": "tensor" if mini else "channel", "scale": 128 if mini else 1}
    options |= {"update_proj_gap": 200}
    optimizer = APOLLOAdamW([{"params": rest}, {"params": low, **options}], lr=LEARNING_RATE)
    trainer = PlainTrainer(model, optimizer, autocast=False)
    trainer.facts["rank"] = options["rank"]
    return trainer


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

    model = build_model(request, "bf16")
    base = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    optimizer = BlockOptimizer(
        base,
        list(model.named_parameters()),
        block_prefix_list=[[f"{name}."] for name in find_blocks(model)],
        switch_block_every=2,
        switch_mode="random",
        verbose=0,
    )

    def states() -> list[torch.Tensor]:
        return [*optimizer_tensors(base), *optimizer.param_idx2hp.values()]

    return PlainTrainer(model, optimizer, autocast=False, states=states)


class _Lisa:
    """LISA (arXiv 2403.17919), our own few lines: two random blocks train, with everything outside of the blocks.

    The AdamW is made anew at each draw, so that no states of sleeping blocks are kept.
    """

    def __init__(self, model: nn.Module, active: int = 2, interval: int = 20, seed: int = 0):
        self._blocks = list(find_blocks(model).values())
        self._model, self._active, self._interval = model, active, interval
        self._random = random.Random(seed)
        self._steps = 0
        self._draw()

    def _draw(self) -> None:
        chosen = self._random.sample(self._blocks, min(self._active, len(self._blocks)))
        for block in self._blocks:
            block.requires_grad_(any(block is one for one in chosen))
        self._optimizer = adamw(p for p in self._model.parameters() if p.requires_grad)

    @property
    def state(self) -> Any:
        return self._optimizer.state

    def step(self) -> None:
        self._optimizer.step()
        self._steps += 1
        if self._steps % self._interval == 0:
            self._draw()


def lisa(request: Request) -> Trainer:
    """LISA with two random blocks, on fp32 weights under autocast."""
    model = build_model(request, "fp32")
    return PlainTrainer(model, _Lisa(model, seed=request.seed), autocast=True)
