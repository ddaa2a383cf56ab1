"""Update rules that leave the update itself behind, so that its size can be measured for free.

A rule works on lists of flat float32 tensors, one per layer shard. It turns each gradient, in place,
into the update dW; the caller measures dW against W, then adds it. So the statistic of the schedule
needs no second copy of the weights (the gradient's own buffer holds dW).

All tensors of one call stand on one device; lists go through torch's foreach kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimfit_ds.errors import ConfigError

__all__ = ["RULES", "UpdateRule", "rule_of"]

Hyperparameters = Mapping[str, Any]
States = Mapping[str, Sequence[Tensor]]


@dataclass(frozen=True)
class UpdateRule:
    """An optimizer as a pure step function."""

    name: str
    states: Callable[[Hyperparameters], tuple[str, ...]]
    """hyperparameters -> names of the state tensors of a layer."""
    update: Callable[[list[Tensor], list[Tensor], States, Sequence[int], Hyperparameters], None]
    """(gradients -> updates in place, weights, states, step of each layer (first: 1), hyperparameters)."""
    decay: Callable[[Mapping[str, Tensor], int, Hyperparameters], None]
    """(states of one layer, missed steps, hyperparameters): what zero gradients would have made of them."""
    unsupported: tuple[str, ...] = ()
    """Options of the torch optimizer that must be off."""
    fused: Callable[..., Tensor] | None = None
    """The update, its addition to the weights and the sums of the statistic in one kernel: `triton_adam.adam_step`."""


def _adam_update(
    gradients: list[Tensor],
    weights: list[Tensor],
    states: States,
    steps: Sequence[int],
    options: Hyperparameters,
    decoupled: bool,
) -> None:
    beta1, beta2 = options["betas"]
    lr, weight_decay = float(options["lr"]), options["weight_decay"]
    first, second = list(states["exp_avg"]), list(states["exp_avg_sq"])
    if weight_decay and not decoupled:
        torch._foreach_add_(gradients, weights, alpha=weight_decay)
    torch._foreach_lerp_(first, gradients, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, gradients, gradients, value=1 - beta2)
    denominators = torch._foreach_sqrt(second)
    torch._foreach_div_(denominators, [math.sqrt(1 - beta2**step) for step in steps])
    torch._foreach_add_(denominators, options["eps"])
    torch._foreach_copy_(gradients, first)
    torch._foreach_div_(gradients, denominators)
    torch._foreach_mul_(gradients, [-lr / (1 - beta1**step) for step in steps])
    if weight_decay and decoupled:
        torch._foreach_add_(gradients, weights, alpha=-lr * weight_decay)


def _adamw_update(gradients, weights, states, steps, options) -> None:
    _adam_update(gradients, weights, states, steps, options, decoupled=True)


def _adam_l2_update(gradients, weights, states, steps, options) -> None:
    _adam_update(gradients, weights, states, steps, options, decoupled=False)


def _fused_adamw(*args: Any, **kwargs: Any) -> Tensor:
    from slimfit_ds.optim.triton_adam import adam_step

    return adam_step(*args, **kwargs, decoupled=True)


def _fused_adam_l2(*args: Any, **kwargs: Any) -> Tensor:
    from slimfit_ds.optim.triton_adam import adam_step

    return adam_step(*args, **kwargs, decoupled=False)


def _adam_decay(states: Mapping[str, Tensor], missed: int, options: Hyperparameters) -> None:
    beta1, beta2 = options["betas"]
    states["exp_avg"].mul_(beta1**missed)
    states["exp_avg_sq"].mul_(beta2**missed)


def _sgd_states(options: Hyperparameters) -> tuple[str, ...]:
    return ("momentum_buffer",) if options["momentum"] else ()


def _sgd_update(
    gradients: list[Tensor],
    weights: list[Tensor],
    states: States,
    steps: Sequence[int],
    options: Hyperparameters,
) -> None:
    momentum = options["momentum"]
    if options["weight_decay"]:
        torch._foreach_add_(gradients, weights, alpha=options["weight_decay"])
    if momentum:
        buffers = list(states["momentum_buffer"])
        # torch's first step takes the gradient whole, without dampening.
        factors = [1.0 if step == 1 else 1 - options["dampening"] for step in steps]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, torch._foreach_mul(gradients, factors))
        if options["nesterov"]:
            torch._foreach_add_(gradients, buffers, alpha=momentum)
        else:
            torch._foreach_copy_(gradients, buffers)
    torch._foreach_mul_(gradients, -float(options["lr"]))


def _sgd_decay(states: Mapping[str, Tensor], missed: int, options: Hyperparameters) -> None:
    if options["momentum"]:
        states["momentum_buffer"].mul_(options["momentum"] ** missed)


_ADAM_STATES = ("exp_avg", "exp_avg_sq")

RULES: dict[str, UpdateRule] = {
    rule.name: rule
    for rule in (
        # Loshchilov and Hutter, "Decoupled Weight Decay Regularization", as torch.optim.AdamW.
        UpdateRule(
            "AdamW",
            lambda o: _ADAM_STATES,
            _adamw_update,
            _adam_decay,
            ("amsgrad", "maximize", "capturable"),
            _fused_adamw,
        ),
        UpdateRule(
            "Adam",
            lambda o: _ADAM_STATES,
            _adam_l2_update,
            _adam_decay,
            ("amsgrad", "maximize", "capturable"),
            _fused_adam_l2,
        ),
        UpdateRule("SGD", _sgd_states, _sgd_update, _sgd_decay, ("maximize",)),
    )
}


def rule_of(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """The rule that does what an optimizer would do.

    DeepSpeed's FusedAdam and CPUAdam are AdamW or Adam by their `adam_w_mode`.

    Raises:
        ConfigError: no rule for this class, or an option that the rule does not know is on.
    """
    name = type(optimizer).__name__
    if name in {"FusedAdam", "DeepSpeedCPUAdam"}:
        name = "AdamW" if getattr(optimizer, "adam_w_mode", True) else "Adam"
    elif name == "Adam" and optimizer.param_groups[0].get("decoupled_weight_decay"):
        name = "AdamW"
    if name not in RULES:
        raise ConfigError(
            [
                f"optimizer {type(optimizer).__name__} cannot step single layers; "
                f"use one of torch.optim.{', torch.optim.'.join(RULES)}"
            ]
        )
    rule = RULES[name]
    wrong = sorted({key for group in optimizer.param_groups for key in rule.unsupported if group.get(key)})
    if wrong:
        raise ConfigError(
            [f"optimizer {name}: {', '.join(wrong)} is not supported with freezing; turn it off"]
        )
    return rule
