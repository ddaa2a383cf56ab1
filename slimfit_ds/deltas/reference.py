"""A reference model that is no second model: the policy itself, with what its training changes as it was before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimfit_ds.deltas.base import whole_name
from slimfit_ds.deltas.overlay import Overlay
from slimfit_ds.errors import ConfigError
from slimfit_ds.trainable.split import Split, column_places
from slimfit_ds.trainable.units import is_part

__all__ = ["ReferenceModel", "hold_reference", "reference_problems", "share_reference"]

_ON_MODEL = "slimfit_reference"


class ReferenceModel(nn.Module):
    """Takes the place of a `ref_model` of TRL's trainers (DPO, KTO); for GRPO see `share_reference`.

    It is the model as it is when this is made. What will train is copied when the training begins (a tenth of the weights at
    90 % frozen), and changes places with what has been learned while the reference computes.

    Args:
        model: the policy; of one process, or of each under DistributedDataParallel or the engine at ZeRO 0 to 2.

    Example:
        model = AutoModelForCausalLM.from_pretrained(...)
        trainer = DPOTrainer(model, ref_model=ReferenceModel(model), args=args, callbacks=[SlimFitCallback(...)], ...)
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        # In a list: it is no part of this module, which has no weights.
        self._policy = [model]
        self.config: Any = getattr(model, "config", None)
        self._overlay: Overlay | None = None
        self._held: dict[str, Split | None] = {}
        self._versions = self._count_changes()
        self._before: dict[str, Tensor] | None = None
        self._loading = model.register_load_state_dict_pre_hook(self._remember)
        # Past `nn.Module`, which would take it for a part of the model.
        model.__dict__[_ON_MODEL] = self

    def _count_changes(self) -> int:
        return sum(p._version for p in self._policy[0].parameters())

    def _remember(self, *_: Any) -> None:
        """A run resumes: what is about to be loaded is not the reference."""
        if self._overlay is None and self._before is None:
            self._check_unchanged()
            self._before = {n: p.detach().cpu().clone() for n, p in self._policy[0].named_parameters()}

    def _check_unchanged(self) -> None:
        if self._count_changes() != self._versions:
            raise RuntimeError(
                "the model has changed since ReferenceModel was made of it, and nothing was kept: give the trainer a "
                "SlimFitCallback, or call slimfit_ds.slim(model) first"
            )

    def hold(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Keep what will train as it was when this was made; `slim`, `SlimFitCallback` and the engine call this.

        Args:
            parameters: by name; of split layers the columns.

        Raises:
            ConfigError: other parts trained before, and the reference holds those.
        """
        model = self._policy[0]
        split = {name: Split(*place) for name, place in column_places(model).items()}
        held = {name: split[whole_name(name)] if is_part(name) else None for name in parameters}
        if self._overlay is not None:
            if held != self._held:
                raise ConfigError(
                    [
                        "the model's ReferenceModel holds what trained before, and other parts train now: train the same ones "
                        "(rate, seed, policy), or make a ReferenceModel of the model as it is"
                    ]
                )
            return
        self._held = held
        before = self._before
        if before is None:
            values = {name: p.detach() for name, p in parameters.items()}
        else:
            values = {
                name: split[whole_name(name)].of_weight(before[whole_name(name)])
                if is_part(name) and name not in before
                else before[name]
                for name in parameters
            }
        self._overlay = Overlay(model, values, split)
        self._before = None
        self._loading.remove()

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """A context in which the policy is the reference, in evaluation mode; without gradients."""
        model = self._policy[0]
        if self._overlay is None:
            self._check_unchanged()
        modes = [module for module in model.modules() if module.training]
        for module in modes:
            module.training = False
        try:
            with torch.no_grad():
                if self._overlay is None:
                    yield model
                else:
                    with self._overlay():
                        yield model
        finally:
            for module in modes:
                module.training = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Not by `forward`: TRL and accelerate put others into its place, and have done so in the policy as well.
        with self.active() as model:
            return model(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The reference's weights, by which TRL knows it."""
        with self.active() as model:
            return {name: tensor.clone() for name, tensor in model.state_dict(*args, **kwargs).items()}


def hold_reference(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Let the `ReferenceModel` of a model, if it has one, keep what will train."""
    reference = model.__dict__.get(_ON_MODEL)
    if reference is not None:
        reference.hold(parameters)


def reference_problems(model: nn.Module, stage: int) -> list[str]:
    """Whether a model that an engine of a ZeRO stage is about to take has a `ReferenceModel` that cannot work there; a line."""
    if _ON_MODEL not in model.__dict__ or stage < 3:
        return []
    return [
        f"ReferenceModel: at zero_optimization.stage {stage} no rank has whole weights that could take turns; use stage 0 to 2, or "
        "leave ref_model out and set precompute_ref_log_probs=True, which needs no second model in training either"
    ]


def share_reference(trainer: Any, beta: float) -> None:
    """Give a GRPO trainer a reference without a second model.

    TRL's trainer makes a second model as soon as its arguments have a `beta`, so it is made without one and gets it here.

    Args:
        trainer: a `GRPOTrainer` or `RLOOTrainer` with `beta=0.0`.
        beta: weight of the divergence from the reference.

    Raises:
        ValueError: the trainer has a reference already, or is none of these.
    """
    if getattr(trainer, "beta", None) != 0.0 or getattr(trainer, "ref_model", None) is not None:
        raise ValueError(
            f"share_reference takes a trainer that was made with beta=0.0 and has no reference, got beta "
            f"{getattr(trainer, 'beta', None)!r}"
        )
    trainer.ref_model = ReferenceModel(trainer.model)
    trainer.beta = trainer.args.beta = beta
