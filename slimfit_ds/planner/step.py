"""One tracked training step of a workload under a strategy: the same code on fake and on real tensors."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from slimfit_ds.activations.codecs.base import fakes_stand_for_a_cpu
from slimfit_ds.engine.memory_roots import engine_roots, is_offloaded, shard_updater
from slimfit_ds.memory.tracker import MemoryReport, MemoryTracker, optimizer_tensors
from slimfit_ds.planner.active_sets import choose_active
from slimfit_ds.planner.cuda_semantics import CudaSemantics
from slimfit_ds.planner.strategy import Strategy
from slimfit_ds.planner.workload import DTYPES, Workload
from slimfit_ds.schedule.schedule import room_at

__all__ = ["inspect_model", "track_step"]


def track_step(
    workload: Workload,
    strategy: Strategy,
    world_size: int = 1,
    active: str | Sequence[str] | None = None,
    target: str = "cpu",
) -> tuple[MemoryReport, dict[str, Any]]:
    """Train two steps and track the second, when every optimizer state exists.

    Args:
        workload: model and batch of one rank.
        strategy: how it is trained.
        world_size: ranks of the (real or pretended) process group.
        active: layers that train (SlimFit only): their names, `expected` or `worst`; None: what the policy chooses.
        target: `cpu`: what this machine keeps; `cuda`: fused attention and CUDA's autocast, fake tensors only.

    Returns:
        The report and facts about the run (parameters, layers, active layers).

    Raises:
        ValueError: the batch does not divide into the strategy's micro-batches.
    """
    if workload.batch % strategy.accumulation:
        raise ValueError(f"batch {workload.batch} does not divide into {strategy.accumulation} micro-batches")
    dtype = strategy.dtype or workload.dtype
    workload = Workload(
        **{**workload.to_dict(), "dtype": dtype, "attention": strategy.attention or workload.attention}
    )
    autocast = dtype == "bf16_autocast"
    micro = workload.batch // strategy.accumulation
    with ExitStack() as stack:
        stack.enter_context(CudaSemantics(autocast) if target == "cuda" else fakes_stand_for_a_cpu())
        model = _adapt(workload.build(), strategy, dtype)
        facts: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
        batch = workload.inputs(micro)
        if strategy.stage is None:
            report = _plain(model, batch, strategy, autocast)
        else:
            report = _engine(model, batch, strategy, micro, dtype, world_size, active, facts)
    return report, facts


def _adapt(model: nn.Module, strategy: Strategy, dtype: str) -> nn.Module:
    from functools import partial

    from torch.utils.checkpoint import checkpoint

    if strategy.loss_chunk is not None:
        from slimfit_ds.activations.language_head import chunk_language_model_loss

        chunk_language_model_loss(model, strategy.loss_chunk)
    if strategy.gradient_checkpointing:
        model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))  # type: ignore[operator]
    if strategy.lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    heads = [name for name, _ in model.named_children() if name in {"classifier", "score", "qa_outputs"}]
    config = LoraConfig(
        r=strategy.lora,
        lora_alpha=2 * strategy.lora,
        target_modules="all-linear",
        modules_to_save=heads or None,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    try:
        return get_peft_model(model, config, autocast_adapter_dtype=False)
    finally:
        torch.set_default_dtype(default)


def _optimizer(model: nn.Module, strategy: Strategy) -> torch.optim.Optimizer:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, lr=1e-4, fused=strategy.fused)


def _plain(
    model: nn.Module, batch: dict[str, torch.Tensor], strategy: Strategy, autocast: bool
) -> MemoryReport:
    optimizer = _optimizer(model, strategy)
    tracker = None
    for step in range(2):
        gc.collect()
        tracker = MemoryTracker(model, {"optimizer": lambda: optimizer_tensors(optimizer)}) if step else None
        with tracker or nullcontext():
            for _ in range(strategy.accumulation):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = model(**batch).loss
                loss.backward()
                del loss
            with tracker.phase("step") if tracker else nullcontext():
                optimizer.step()
                optimizer.zero_grad()
    assert tracker is not None
    return tracker.report()


def _engine(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    strategy: Strategy,
    micro: int,
    dtype: str,
    world_size: int,
    active: str | Sequence[str] | None,
    facts: dict[str, Any],
) -> MemoryReport:
    # Only the programs that simulate or measure a step import DeepSpeed.
    from slimfit_ds.engine.initialize import initialize

    config = strategy.deepspeed_config(micro, dtype, world_size)
    if active is not None and "slimfit" in config:
        config["slimfit"] = _with_active(config["slimfit"], active, model)
    engine = initialize(model=model, optimizer=_optimizer(model, strategy), config=config)[0]
    if hasattr(engine, "layer_names"):
        facts |= {"layers": len(engine.layer_names), "active": sorted(engine.active_layers)}
    tracker = None
    for step in range(2):
        gc.collect()
        tracker = MemoryTracker(engine.module, engine_roots(engine)) if step else None
        with tracker or nullcontext():
            for _ in range(strategy.accumulation):
                loss = engine(**batch).loss
                engine.backward(loss)
                del loss
                with tracker.phase("step") if tracker else nullcontext():
                    engine.step()
        if not step:
            _make_all_states(engine)
    assert tracker is not None
    # DeepSpeed's host optimizer works in host memory, which a fake or CPU run cannot tell apart.
    without = ("step",) if is_offloaded(engine.optimizer) else ()
    report = tracker.report(without_phases=without)
    engine.destroy()
    return report


def _with_active(block: dict[str, Any], active: str | Sequence[str], model: nn.Module) -> dict[str, Any]:
    """The block with exactly `active` as active set, through the public configuration."""
    from slimfit_ds.config import SlimFitConfig
    from slimfit_ds.schedule.schedule import FreezeSchedule
    from slimfit_ds.trainable.units import discover, match_globs

    freeze = SlimFitConfig.parse(block).freeze
    if freeze.splits:
        # Of narrow units the policy's own choice costs what any other does.
        return block
    roles = discover(model)
    if FreezeSchedule(roles, freeze).is_static:
        return block
    layers = roles.units
    if isinstance(active, str):
        never = match_globs(freeze.never_active, roles, "never_active", [])
        free = [position for position in range(len(layers)) if position not in never]
        names = choose_active(layers, free, room_at(roles, freeze.budget, freeze.rate), active)
    else:
        names = list(active)
    rate = (len(layers) - len(names)) / len(layers)
    exactly = {
        "rate": rate,
        "budget": "layers",
        "policy": "ils",
        "always_active": names,
    }
    return {**block, "freeze": {**block.get("freeze", {}), **exactly}}


def inspect_model(workload: Workload) -> dict[str, Any]:
    """Facts of a model that a plan needs: its size, its embedding layers, and whether its loss may be in chunks."""
    from slimfit_ds.planner.language_loss import takes_loss_in_chunks
    from slimfit_ds.trainable.units import discover

    model = workload.build()
    layers = discover(model).units
    head = model.get_output_embeddings()
    names = {layer.name for layer in layers if layer.kind == "embedding"}
    names |= {name for name, p in model.named_parameters() if head is not None and p is head.weight}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": len(layers),
        "embeddings": [layer.name for layer in layers if layer.name in names],
        "loss_in_chunks": workload.resolved_task(model.config) == "causal_lm"
        and takes_loss_in_chunks(model, replace(workload, seq=min(workload.seq, 16)).inputs(1)),
    }


def _make_all_states(engine: Any) -> None:
    """Where states stay on the device, every layer has trained once before long: make them all."""
    updater = shard_updater(engine.optimizer)
    if updater is not None and not updater.states.to_host:
        for unit in updater.units:
            updater.states.get(unit.index)
