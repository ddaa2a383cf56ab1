"""A DeepSpeed engine that trains a few layers at each step and leaves the others alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch._subclasses.fake_tensor import FakeTensor

from slimfit_ds.activations.apply import compress
from slimfit_ds.activations.proof import Proof
from slimfit_ds.config import SlimFitConfig
from slimfit_ds.deltas.base import DeltaError
from slimfit_ds.deltas.delta import Source, write_delta
from slimfit_ds.deltas.reference import hold_reference
from slimfit_ds.engine import checkpoint, weights
from slimfit_ds.engine.optimizer import FreezeOptimizer
from slimfit_ds.engine.sharding import Sharding, build_units
from slimfit_ds.engine.zero3 import configure_zero3
from slimfit_ds.engine.zero3_linear import ScopedLinear
from slimfit_ds.engine.zero12 import FreezeZeroOptimizer
from slimfit_ds.errors import ConfigError
from slimfit_ds.schedule.schedule import FreezeSchedule
from slimfit_ds.streaming.copies import node_memory
from slimfit_ds.streaming.streaming import streaming_of
from slimfit_ds.trainable.split import column_places, fill_columns
from slimfit_ds.trainable.units import discover

__all__ = ["ActiveSetMismatchError", "SlimFitEngine", "check_active_set"]

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


class SlimFitEngine(DeepSpeedEngine):
    """DeepSpeed's engine with a freeze schedule; made by `slimfit_ds.initialize`.

    Attributes:
        schedule: the freeze schedule.
        proof: compares changed blocks with themselves unchanged on the first batch; `None`: switched off, or nothing trains.
        source: the model and the base that it was loaded from.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.slimfit_config = SlimFitConfig.parse(kwargs["config"]["slimfit"])
        self.roles = discover(kwargs["model"])
        self.schedule = FreezeSchedule(self.roles, self.slimfit_config.freeze)
        self.source = Source(kwargs["model"], weights.whole)
        self._linear: ScopedLinear | None = None
        super().__init__(*args, **kwargs)
        if self.global_rank == 0:
            self.schedule.warn_of_oversized()
        activations = self.slimfit_config.activations
        self.compression = compress(self.module, activations)
        trains = activations.proof and isinstance(self.optimizer, FreezeOptimizer)
        self.proof = Proof(self.module, self.compression, activations) if trains else None
        self._apply_active_set()

    def _configure_basic_optimizer(self, model_parameters):
        """A torch optimizer that only carries hyperparameters: no kernels to build, no states."""
        options = dict(self.optimizer_params() or {})
        options.pop("torch_adam", None)
        decoupled = options.pop("adam_w_mode", True)
        name = str(self.optimizer_name()).lower()
        classes = {
            "adamw": torch.optim.AdamW,
            "adam": torch.optim.AdamW if decoupled else torch.optim.Adam,
            "sgd": torch.optim.SGD,
        }
        if name not in classes:
            raise ConfigError(
                [
                    f"optimizer.type {self.optimizer_name()!r} cannot step single layers; use AdamW, Adam or SGD"
                ]
            )
        return classes[name](model_parameters, **options)

    def zero_force_ds_cpu_optimizer(self):
        """With states on the host too, any optimizer serves: only its hyperparameters are used."""
        return False

    def _do_optimizer_sanity_check(self, basic_optimizer):
        """Every stage and dtype goes through the freeze-aware optimizers."""
        return ZERO_OPTIMIZATION

    def _configure_zero_optimizer(self, optimizer):
        if optimizer is None:
            # ZeRO 3 for inference: weights are cut, nothing trains.
            self._linear = ScopedLinear()
            with self._linear.kept():
                return super()._configure_zero_optimizer(optimizer)
        slim = self.slimfit_config
        if self.zero_optimization_stage() == ZeroStageEnum.weights:
            self._linear = ScopedLinear()
            if (streaming := streaming_of(self.module)) is not None:
                streaming.leave_parameters()
            with self._linear.kept():
                return configure_zero3(self, super()._configure_zero_optimizer, optimizer)
        stage = int(self.zero_optimization_stage())
        units = build_units(
            self.module,
            self.roles,
            optimizer.param_groups,
            slim.freeze.train_biases,
            self.schedule.depths,
        )
        hold_reference(self.module, {n: p for u in units for n, p in zip(u.names, u.parameters, strict=True)})
        streaming = streaming_of(self.module)
        sharding = Sharding(
            units,
            self.seq_data_parallel_group,
            sharded=stage > 0,
            reduce_bucket=int(self.zero_reduce_bucket_size()),
            gather_bucket=int(self.zero_allgather_bucket_size()),
            average=self.gradient_average,
            device=torch.device(self.device),
        )
        scaler = CreateLossScaler(
            self.get_data_types()[0],
            self.loss_scale(),
            self.dynamic_loss_scale(),
            self.dynamic_loss_scale_args(),
        )
        return FreezeZeroOptimizer(
            optimizer,
            sharding,
            stage,
            slim,
            self.schedule.measures,
            scaler,
            clip=self.gradient_clipping(),
            communication_dtype=self._config.communication_data_type or torch.float32,
            # DeepSpeed's own optimizers of other stages do not know the setting.
            must_use_all=stage in (1, 2) and not self.zero_ignore_unused_parameters(),
            **({} if streaming is None else {"arrive": streaming.finish_gradients}),
        )

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        if self._linear is None:
            return super().forward(*inputs, **kwargs)
        with self._linear:
            return super().forward(*inputs, **kwargs)

    def backward(self, loss, *args: Any, **kwargs: Any):
        try:
            return super().backward(loss, *args, **kwargs)
        finally:
            if self._linear is not None:
                self._linear.leave()

    def _backward_prologue(self):
        """Recomputed blocks call the linear function again, whoever has started the backward pass."""
        super()._backward_prologue()
        if self._linear is not None:
            self._linear.enter()

    def _backward_epilogue(self):
        if self._linear is not None:
            self._linear.leave()
        super()._backward_epilogue()

    def destroy(self):
        if self._linear is not None:
            self._linear.leave()
        super().destroy()

    def _broadcast_model(self):
        """Weights that live on the host travel through the device, block by block."""
        streaming = streaming_of(self.module)
        if streaming is None:
            return super()._broadcast_model()
        with streaming.hidden():
            super()._broadcast_model()
        group = self.seq_data_parallel_group
        first, rank = dist.get_global_rank(group, 0), dist.get_rank(group)

        def exchange(value: Any) -> list[Any]:
            found: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(found, value, group=group)
            return found

        def share(nbytes: int) -> tuple[torch.Tensor, bool] | None:
            fake = isinstance(next(self.module.parameters()), FakeTensor)
            return None if fake else node_memory(nbytes, rank, exchange)

        return streaming.send(lambda memory: dist.broadcast(memory, first, group=group), share)

    def _scheduler_from_config(self, optimizer):
        """Schedulers of torch want a torch optimizer; it holds the same parameter groups."""
        return super()._scheduler_from_config(self.basic_optimizer)

    def allreduce_gradients(self, bucket_size=0):
        if not isinstance(self.optimizer, FreezeZeroOptimizer):
            return super().allreduce_gradients(bucket_size)
        if self.proof is not None and not self.proof.settled:
            self.proof.see_gradients({n: self.module.get_parameter(n) for n in self.schedule.active_names})
        boundary = self.is_gradient_accumulation_boundary()
        self.optimizer.set_gradient_accumulation_boundary(boundary)
        self.optimizer.collect_gradients(boundary)

    def clip_fp32_gradients(self):
        """The optimizer clips by the norm of the reduced gradients; these are still local."""

    def zero_grad(self):
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    def _zero3_consolidated_16bit_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Whole weights on rank 0: accelerate and DeepSpeed save these at stage 3."""
        state = super()._zero3_consolidated_16bit_state_dict(*args, **kwargs)
        return state and fill_columns(state, column_places(self.module))

    def require_finite(self, value: torch.Tensor) -> None:
        """Make the coming step one that changes nothing, on any rank, if this scalar is not finite on one of them.

        Costs no message and no waiting: it travels with the norm of the gradients.

        Args:
            value: such as the loss of a micro-batch; several of one step add up.
        """
        self.optimizer.require_finite(value)

    def _sum_of_ranks(self, flags: torch.Tensor) -> torch.Tensor:
        flags = flags.to(self.device)
        dist.all_reduce(flags, group=self.seq_data_parallel_group)
        return flags

    def _take_model_step(self, lr_kwargs):
        if self.proof is not None and not self.proof.settled:
            self.proof.settle(self._sum_of_ranks)
        super()._take_model_step(lr_kwargs)
        if not self.optimizer.overflow:
            # A skipped step is tried again with the same layers and the next batch.
            self.schedule.advance(self.optimizer.layer_statistics)
            if not self.schedule.is_static:
                self._apply_active_set()
        if self.monitor.enabled and self.global_rank == 0 and self.layer_names:
            # Beside DeepSpeed's own learning rate, for loops that leave the logging to the engine.
            share = 1 - len(self.schedule.active) / len(self.layer_names)
            self.monitor.write_events([("Train/Samples/frozen_layers", share, self.global_samples)])

    def _apply_active_set(self) -> None:
        if not isinstance(self.optimizer, FreezeOptimizer):
            return
        every = self.slimfit_config.freeze.check_interval
        if every and self.schedule.step % every == 0:
            check_active_set(self.schedule, self.seq_data_parallel_group, self.device)
        self.optimizer.set_active(self.schedule.active, self.schedule.front)
        self.optimizer.updater.lr_factors = self.schedule.lr_factors()

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Every freezable layer, by the name of its weight, in model order."""
        return self.schedule.names

    @property
    def active_layers(self) -> frozenset[str]:
        """The layers that train in the coming step."""
        return self.schedule.active_names

    @property
    def update_statistics(self) -> dict[str, float]:
        """The latest statistic of each layer that has trained."""
        return {self.schedule.names[i]: value for i, value in sorted(self.schedule.statistics.items())}

    def memory_report(self) -> dict[str, int]:
        """Return the bytes that this rank holds now, by kind."""
        return {"parameters": weights.stored_bytes(self.module), **self.optimizer.state_bytes()}

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write weights, optimizer states, schedule and random states; see `engine.checkpoint`.

        Args:
            exclude_frozen_parameters: leave out weights that the user has frozen before the engine was made.
        """
        if save_dir is None or not os.fspath(save_dir):
            raise ValueError(f"save_dir must name a folder, got {save_dir!r}")
        excluded = set(self.roles.frozen) - set(column_places(self.module))
        checkpoint.save(
            self._training_state(),
            save_dir,
            tag,
            client_state or {},
            save_latest,
            exclude=excluded if exclude_frozen_parameters else (),
        )
        return True

    def _training_state(self) -> checkpoint.TrainingState:
        if not isinstance(self.optimizer, FreezeOptimizer):
            raise ConfigError(
                ["optimizer: this engine has none, so there is no training to save or to go on with"]
            )
        return checkpoint.TrainingState(
            self.module,
            self.optimizer,
            self.schedule,
            self.lr_scheduler,
            int(self.zero_optimization_stage()),
            {name: getattr(self, name) for name in _COUNTERS},
            self.source,
            self.trained_names if self.slimfit_config.checkpoints == "delta" else None,
        )

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, dict[str, Any]]:
        """Go on from a checkpoint, of any world size and stage; see `engine.checkpoint`.

        Args:
            custom_load_fn: called with `src`, whole weights by name, and `dst`, the module, sets the weights instead.
        """
        state = self._training_state()
        path, client_state = checkpoint.load(
            state,
            load_dir,
            tag,
            optimizer_states=load_optimizer_states and not load_module_only,
            lr_scheduler=load_lr_scheduler_states and not load_module_only,
            schedule=not load_module_only,
            strict=load_module_strict,
            custom_load_fn=custom_load_fn,
        )
        for name, value in state.counters.items():
            setattr(self, name, value)
        self._apply_active_set()
        return path, client_state

    def save_delta(self, path: str | os.PathLike) -> None:
        """Write what has trained, and nothing else, as one safetensors file; `slimfit-ds merge` puts it into the base.

        Raises:
            DeltaError: the model was not loaded by transformers from safetensors, or the path is that of another file.
            CheckpointError: rank 0 could not write it; on all ranks.
        """
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, self.source.target_problem(path))
        if problems[0]:
            raise DeltaError(problems[0])
        delta = weights.gather_delta(self.module, self.source, self.trained_names)

        def write() -> None:
            if dist.get_rank() == 0:
                write_delta(delta, path)

        checkpoint.together(write, f"the delta {path} could not be written")

    @property
    def trained_names(self) -> frozenset[str]:
        """Every parameter that has trained so far."""
        small = self.roles.small if self.slimfit_config.freeze.train_biases else ()
        return self.schedule.trained_names | {*small}

    def save_pretrained(self, save_dir: str | os.PathLike) -> None:
        """Write the model so that plain transformers loads it without this package.

        Raises:
            CheckpointError: rank 0 could not write it; on all ranks.
        """
        state = weights.gather(self.module)

        def write() -> None:
            if dist.get_rank() == 0:
                weights.save_pretrained(self.module, state, save_dir)

        checkpoint.together(write, f"the model could not be saved to {save_dir}")


class ActiveSetMismatchError(RuntimeError):
    """Ranks are about to train different layers."""


def check_active_set(schedule: FreezeSchedule, group, device: torch.device) -> None:
    """Compare the coming active set across ranks, one int64 each, before anything of it is sent.

    On a stock engine ranks that freeze different layers of one size train on silently, and hang otherwise.

    Raises:
        ActiveSetMismatchError: on every rank, naming the ranks and the layers that differ.
    """
    world = dist.get_world_size(group=group)
    if world == 1:
        return
    mine = torch.tensor([schedule.fingerprint()], dtype=torch.int64, device=device)
    everyone = torch.empty(world, dtype=torch.int64, device=device)
    dist.allgather_fn(everyone, mine, group=group)
    if len(set(everyone.tolist())) == 1:
        return
    sets: list = [None] * world
    dist.all_gather_object(sets, (schedule.step, sorted(schedule.active_names)), group=group)
    step0, names0 = sets[0]
    lines = []
    for rank, (step, names) in enumerate(sets):
        extra, missing = sorted(set(names) - set(names0)), sorted(set(names0) - set(names))
        if step != step0 or extra or missing:
            lines.append(f"rank {rank} (step {step}) trains {extra} and not {missing}")
    raise ActiveSetMismatchError(
        f"ranks would train different layers; against rank 0 (step {step0}): {'; '.join(lines)}. "
        "Resume all ranks from one checkpoint and give them the same slimfit block."
    )
