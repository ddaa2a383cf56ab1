"""SlimFit at 95 % frozen with the states of frozen layers on the host: with DeepSpeed's engine, or without DeepSpeed."""

from __future__ import annotations

import importlib.util
from typing import Any

from peers_methods.building import LEARNING_RATE, Request, adamw, build_model, make_engine
from peers_methods.trainers import EngineTrainer, PlainTrainer, Trainer
from peers_methods.workloads import Case
from slimfit_ds.planner.strategy import Strategy, slimfit_block

__all__ = ["RATE", "block", "ours", "ours_tuned", "tuned"]

RATE = 0.95


def block(preset: str, policy: str = "ils", **activations: Any) -> dict[str, Any]:
    """The `"slimfit"` block of a preset: few whole layers (`ils`), or a part of every layer (`auto`)."""
    made = slimfit_block(preset, RATE, "host", **activations)
    return {**made, "freeze": {**made["freeze"], "policy": policy}}


def ours(
    request: Request, preset: str, loss_chunk: int | None = None, policy: str = "ils", **activations: Any
) -> Trainer:
    """The engine (bf16 weights, fp32 masters on the host) if DeepSpeed is installed, else `slim` and `follow`."""
    settings = block(preset, policy, **activations)
    build = _engine if importlib.util.find_spec("deepspeed") else _without_deepspeed
    trainer = build(request, settings, loss_chunk)
    trainer.facts |= {"slimfit": settings, "backend": "engine" if build is _engine else "slim"}
    return trainer


def tuned(case: Case) -> tuple[int | None, dict[str, Any]]:
    """`minimal` in chunks: tokens of a chunk of the loss (language models), and the options of the activations."""
    recomputed, loss = case.chunk
    options = {"chunk_tokens": recomputed, "chunk_forward": True, "operations": {"norm": "exact"}}
    return loss if case.task == "causal_lm" else None, options


def ours_tuned(request: Request, policy: str = "ils") -> Trainer:
    """`minimal` with recomputation and loss in the case's chunks, norms outside of blocks exact."""
    loss_chunk, options = tuned(request.case)
    return ours(request, "minimal", loss_chunk, policy, **options)


def _model(request: Request, dtype: str, loss_chunk: int | None) -> Any:
    model = build_model(request, dtype)
    if loss_chunk is not None:
        from slimfit_ds.activations.language_head import chunk_language_model_loss

        chunk_language_model_loss(model, loss_chunk)
    return model


def _engine(request: Request, block: dict[str, Any], loss_chunk: int | None) -> Trainer:
    model = _model(request, "bf16", loss_chunk)
    config = Strategy("ours", stage=0, slimfit=block).deepspeed_config(request.batch, "bf16", 1)
    return EngineTrainer(make_engine(model, config, adamw(model.parameters())))


def _without_deepspeed(request: Request, block: dict[str, Any], loss_chunk: int | None) -> Trainer:
    import slimfit_ds

    model = _model(request, "fp32", loss_chunk)
    block = {**block, "optimizer_states": {"inactive": "device"}}
    handle = slimfit_ds.slim(model, block)
    optimizer = adamw(model.parameters())
    handle.follow(optimizer)
    trainer = PlainTrainer(model, optimizer, autocast=True)
    trainer.facts["note"] = (
        f"without DeepSpeed: fp32 weights under autocast, states on the device, lr {LEARNING_RATE}"
    )
    return trainer
