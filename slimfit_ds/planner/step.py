"""One measured training step of a workload under a strategy: the same code on fake and on real tensors."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from slimfit_ds.activations.codecs.backend import fakes_stand_for_a_cpu
from slimfit_ds.activations.language_head import named_changes
from slimfit_ds.activations.recognise import find_blocks
from slimfit_ds.config import SlimFitConfig
from slimfit_ds.engine.memory_roots import engine_roots, is_offloaded, shard_updater
from slimfit_ds.memory.probe import StepCost, StepProbe
from slimfit_ds.memory.tracker import MemoryReport, optimizer_tensors
from slimfit_ds.planner.fake_world import CudaSemantics
from slimfit_ds.planner.speed import ProductCounter
from slimfit_ds.planner.strategies import Strategy
from slimfit_ds.planner.workload import DTYPES, Workload
from slimfit_ds.schedule.policies import Budget
from slimfit_ds.schedule.schedule import FreezeSchedule, room_at
from slimfit_ds.streaming.streaming import streaming_of
from slimfit_ds.trainable.plan import Plan, plan_units
from slimfit_ds.trainable.split import split_columns
from slimfit_ds.trainable.units import Unit, discover, match_globs

__all__ = [
    "ACTIVE_SETS",
    "choose_active",
    "inspect_model",
    "takes_loss_in_chunks",
    "track_cost",
    "track_step",
]


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
        The report and facts about the run: parameters, layers, active layers, `flops` of the step's matrix products,
        `copied` bytes from the host, and with streamed weights `blocks` and the bytes of the largest, `block`.

    Raises:
        ValueError: the batch does not divide into the strategy's micro-batches.
    """
    cost, facts = track_cost(workload, strategy, world_size, active, target)
    assert cost.memory is not None
    return cost.memory, facts


def track_cost(
    workload: Workload,
    strategy: Strategy,
    world_size: int = 1,
    active: str | Sequence[str] | None = None,
    target: str = "cpu",
    like: Plan | None = None,
    warm: bool = True,
) -> tuple[StepCost, dict[str, Any]]:
    """As `track_step`, with the largest totals by phase and module.

    Args:
        like: split layers as in this plan.
        warm: do a whole step before the tracked one, also where making the optimizer states is enough.
    """
    if workload.batch % strategy.accumulation:
        raise ValueError(f"batch {workload.batch} does not divide into {strategy.accumulation} micro-batches")
    dtype = strategy.dtype or workload.dtype
    workload = replace(workload, dtype=dtype, attention=strategy.attention or workload.attention)
    autocast = dtype == "bf16_autocast"
    micro = workload.batch // strategy.accumulation
    with ExitStack() as stack:
        stack.enter_context(CudaSemantics(autocast) if target == "cuda" else fakes_stand_for_a_cpu())
        model = _adapt(workload.build(), strategy, dtype)
        facts: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
        batch = workload.inputs(micro)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=strategy.fused)
        if strategy.stage is None:
            cost = _plain(model, optimizer, batch, strategy.accumulation, autocast, facts, warm)
        else:
            config = strategy.deepspeed_config(micro, dtype, world_size)
            if "slimfit" in config:
                config["slimfit"] = _of_largest_step(config["slimfit"], active, model)
            if like is not None:
                freeze = SlimFitConfig.parse(config["slimfit"]).freeze
                same = plan_units(model, always=freeze.always_active, never=freeze.never_active, like=like)
                split_columns(model, same, freeze.seed)
            cost = _engine(model, optimizer, batch, config, facts, warm)
    return cost, facts


def _adapt(model: nn.Module, strategy: Strategy, dtype: str) -> nn.Module:
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


def _track(
    probe: StepProbe,
    work: Callable[[], None],
    facts: dict[str, Any],
    steps: int,
    prepare: Callable[[], None] = lambda: None,
    copied: Callable[[], int] = lambda: 0,
) -> StepCost:
    """Do so many steps and return the cost of the last, of which facts are added; `prepare` runs before it."""
    counter = ProductCounter()
    for left in reversed(range(steps)):
        if left == 0:
            prepare()
        gc.collect()
        before = copied()
        with probe.step(track=left == 0), counter if left == 0 else nullcontext():
            work()
    facts |= {"flops": counter.flops, "copied": copied() - before}
    return probe.costs[-1]


def _plain(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, Tensor],
    accumulation: int,
    autocast: bool,
    facts: dict[str, Any],
    warm: bool,
) -> StepCost:
    """Track plain PyTorch without DeepSpeed."""

    def work() -> None:
        for _ in range(accumulation):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**batch).loss
            loss.backward()
            del loss
        optimizer.step()
        optimizer.zero_grad()

    if not warm:
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    probe = StepProbe(model, optimizer, {"optimizer": lambda: optimizer_tensors(optimizer)})
    return _track(probe, work, facts, 2 if warm else 1)


def _engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, Tensor],
    config: dict[str, Any],
    facts: dict[str, Any],
    warm: bool,
) -> StepCost:
    """Track DeepSpeed's engine, or ours if the configuration has a slimfit block."""
    from slimfit_ds.engine.initialize import (
        initialize,  # imports DeepSpeed, which only programs that do a step need
    )

    engine = initialize(model=model, optimizer=optimizer, config=config)[0]
    if hasattr(engine, "layer_names"):
        facts |= {"layers": len(engine.layer_names), "active": sorted(engine.active_layers)}

    def work() -> None:
        for _ in range(config["gradient_accumulation_steps"]):
            loss = engine(**batch).loss
            engine.backward(loss)
            del loss
            engine.step()

    # DeepSpeed's host optimizer works in host memory, which a fake or CPU run cannot tell apart.
    on_host = is_offloaded(engine.optimizer)
    probe = StepProbe(engine.module, engine, engine_roots(engine), updates_on_host=on_host)
    streaming, updater = streaming_of(engine.module), shard_updater(engine.optimizer)

    def copied() -> int:
        weights = streaming.copied if streaming is not None else 0
        return weights + (updater.states.copied if updater is not None else 0)

    if streaming is not None:
        sizes = [block.nbytes for block in streaming.blocks if block.name in find_blocks(engine.module)]
        facts |= {"blocks": len(sizes), "block": max(sizes)}
    stays = updater is not None and engine.slimfit_config.optimizer_states.active != "host"
    steps = 1 if stays and streaming is None and not warm else 2
    prepare = partial(_make_states, engine, updater) if stays else (lambda: None)
    cost = _track(probe, work, facts, steps, prepare, copied)
    engine.destroy()
    return cost


def _make_states(engine: Any, updater: Any) -> None:
    """Make the states that a later step finds: of what trains, and where they stay on the device of all units, each of
    which has trained once by then."""
    for unit in updater.units:
        asleep = unit.layer is not None and engine.layer_names[unit.layer] not in engine.active_layers
        if not (updater.states.to_host and asleep):
            updater.states.get(unit.index)


# Which layers to assume active: memory depends on it, because an embedding is one layer.

_GOLDEN = 0.6180339887498949


def _by_size(layers: Sequence[Unit], free: Collection[int]) -> list[int]:
    # Of equal weights the later ones: in a feed-forward pair the second keeps the wider input.
    return sorted(free, key=lambda i: (layers[i].numel, i), reverse=True)


def _expected(layers: Sequence[Unit], free: Collection[int], budget: Budget) -> Collection[int]:
    """Return layers at evenly spaced ranks of size: about the bytes of a random draw, the same every time."""
    order = _by_size(layers, free)
    mixed = sorted(range(len(order)), key=lambda rank: (rank * _GOLDEN) % 1)
    filled = budget.fill(order[rank] for rank in mixed)
    spaced = [order[int((i + 0.5) * len(order) / len(filled))] for i in range(len(filled))]
    # Layers of unlike cost: as many at even ranks may cost more than the budget allows.
    return spaced if budget.fits(spaced) else filled


def _worst(layers: Sequence[Unit], free: Collection[int], budget: Budget) -> Collection[int]:
    """Return the largest layers that fit."""
    return budget.fill(_by_size(layers, free))


ACTIVE_SETS: dict[str, Callable[[Sequence[Unit], Collection[int], Budget], Collection[int]]] = {
    "expected": _expected,
    "worst": _worst,
}


def choose_active(layers: Sequence[Unit], free: Collection[int], budget: Budget, kind: str) -> list[str]:
    """Return the names of the layers assumed active, in model order.

    Args:
        layers: all freezable layers of the model, in model order.
        free: positions of those that may train.
        budget: of the freezing rate, over all layers.
        kind: `expected` or `worst`.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in ACTIVE_SETS:
        raise ValueError(f"active must be one of {', '.join(ACTIVE_SETS)}, got {kind!r}")
    return [layers[i].name for i in sorted(ACTIVE_SETS[kind](layers, free, budget))]


def _of_largest_step(
    block: dict[str, Any], active: str | Sequence[str] | None, model: nn.Module
) -> dict[str, Any]:
    """Return the block with exactly `active` as active set, through the public configuration, and without a front.

    The peak is that of a step the whole way; the second step, which is tracked, may be another.
    """
    if "front" in block.get("freeze", {}):
        block = {**block, "freeze": {**block["freeze"], "front": "none"}}
    freeze = SlimFitConfig.parse(block).freeze
    if active is None or freeze.splits:
        return block  # of narrow units the policy's own choice costs what any other does
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


# Facts of a model that a plan needs.


def inspect_model(workload: Workload) -> dict[str, Any]:
    """Return a model's size, its embedding layers, whether its loss may be computed in chunks, and elements of all linear
    layers of the blocks (`linear`), of all blocks (`in_blocks`), and of the largest layer and block."""
    model = workload.build()
    blocks = list(find_blocks(model).values())
    linear = [m.weight.numel() for b in blocks for m in b.modules() if isinstance(m, nn.Linear)]
    sizes = [sum(p.numel() for p in b.parameters()) for b in blocks]
    layers = discover(model).units
    head = model.get_output_embeddings()
    names = {layer.name for layer in layers if layer.kind == "embedding"}
    names |= {name for name, p in model.named_parameters() if head is not None and p is head.weight}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": len(layers),
        "linear": sum(linear),
        "in_blocks": sum(sizes),
        "largest_linear": max(linear, default=0),
        "largest_block": max(sizes, default=0),
        "embeddings": [layer.name for layer in layers if layer.name in names],
        "loss_in_chunks": workload.resolved_task(model.config) == "causal_lm"
        and takes_loss_in_chunks(model, replace(workload, seq=min(workload.seq, 16)).inputs(1)),
    }


_VIEWS = {"alias", "detach", "slice", "view", "_unsafe_view"}


class _OperationsBetween(TorchDispatchMode):
    """Collects the names of the operations while `inside` is true."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = False
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.inside:
            self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def takes_loss_in_chunks(model: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """Return whether the logits are the product of the head alone, and the loss is computed from them.

    `chunk_language_model_loss` compares real values; a plan has none, and looks instead whether anything happens to
    the logits between head and loss but scales and soft caps that the configuration names.

    Args:
        model: may be fake or on `meta`.
        inputs: a small batch with labels.
    """
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    if not isinstance(head, nn.Linear) or not hasattr(type(model), "loss_function"):
        return False
    between, reached = _OperationsBetween(), []
    plain: Any = model.loss_function

    def loss(*args: Any, **kwargs: Any) -> Any:
        reached.append(between.inside)
        between.inside = False
        return plain(*args, **kwargs)

    def leave(*_: Any) -> None:
        between.inside = True

    handle = head.register_forward_hook(leave)
    model.__dict__["_loss_function"], before = loss, model.__dict__.get("_loss_function")
    try:
        with torch.no_grad(), between:
            model(**inputs)
    finally:
        handle.remove()
        if before is None:
            del model.__dict__["_loss_function"]
        else:
            model.__dict__["_loss_function"] = before
    by_numbers = {"div", "mul", "tanh"} if named_changes(model)[0] != (1.0, None) else set()
    return reached == [True] and between.names <= _VIEWS | by_numbers
