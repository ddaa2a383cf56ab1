"""Per-layer freezing in plain PyTorch, one process, no code of the package: what the engine must equal."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn


class Reference:
    """Trains one model; at each step only the named weights (and all vectors but norm weights) move.

    Moments, step counts and float32 masters are kept per parameter, and untouched while it is frozen.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        lr: float,
        weight_decay: float,
        clip: float,
        stale_moments: str = "keep",
    ):
        self.model = copy.deepcopy(model).to(dtype)
        self.clip = clip
        self.stale_moments = stale_moments
        self.masters: dict[str, nn.Parameter] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for name, parameter in self.model.named_parameters():
            master = nn.Parameter(parameter.detach().float().clone())
            self.masters[name] = master
            self.optimizers[name] = torch.optim.AdamW([master], lr=lr, weight_decay=weight_decay)

    def step(
        self,
        micro_batches: list[dict],
        active: set[str],
        freezable: set[str],
        loss_scale: float = 1.0,
        rates: dict[str, float] | None = None,
    ) -> float:
        """One optimizer step; returns the global norm of the active gradients before clipping.

        `rates`: learning rates of parameters that have one of their own.
        """
        moving = [n for n in self.masters if n not in freezable or n in active]
        total = {name: torch.zeros_like(self.masters[name]) for name in moving}
        for batch in micro_batches:
            self.model.zero_grad(set_to_none=True)
            loss = self.model(**batch).loss / len(micro_batches)
            (loss * loss_scale).backward()
            for name, parameter in self.model.named_parameters():
                if name in total and parameter.grad is not None:
                    total[name] += parameter.grad.float() / loss_scale
        norm = math.sqrt(sum(g.double().square().sum().item() for g in total.values()))
        factor = min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0
        parameters = dict(self.model.named_parameters())
        for name, gradient in total.items():
            self.masters[name].grad = gradient * factor
            if rates:
                self.optimizers[name].param_groups[0]["lr"] = rates[name]
            self.optimizers[name].step()
            parameters[name].data.copy_(self.masters[name].data)
        for name in self.masters.keys() - total.keys():
            self._age(name)
        return norm

    def _age(self, name: str) -> None:
        """What one missed step does to the moments of a frozen weight; the weight stays."""
        optimizer, master = self.optimizers[name], self.masters[name]
        if self.stale_moments == "reset":
            optimizer.state.clear()
        elif self.stale_moments == "decay" and optimizer.state:
            weight = master.detach().clone()
            master.grad = torch.zeros_like(master)
            optimizer.step()
            master.data.copy_(weight)
