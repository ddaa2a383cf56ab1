"""`SlimFitCallback`: an existing `Trainer` or `SFTTrainer` script becomes a SlimFit run by one more callback."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from slimfit_ds.activations.apply import activation_problems
from slimfit_ds.config import SlimFitConfig
from slimfit_ds.deltas.base import base_problems
from slimfit_ds.deltas.delta import DELTA, Delta, Source, write_delta
from slimfit_ds.errors import ConfigError
from slimfit_ds.integrations.data_parallel import ActiveGradients, hide_from_ddp, show_to_ddp
from slimfit_ds.integrations.delta_checkpoints import forget_read, has_read, read_deltas, write_deltas
from slimfit_ds.integrations.hub_push import prepare_push
from slimfit_ds.integrations.plain_loop import SlimHandle
from slimfit_ds.integrations.run_log import RunLog
from slimfit_ds.schedule.schedule import freeze_problems
from slimfit_ds.streaming.find import streaming_problems

__all__ = ["SlimFitCallback"]

_log = logging.getLogger(__name__)

_WITH_DEEPSPEED = (
    "run it under DeepSpeed instead: TrainingArguments(deepspeed=...) with a slimfit block, and "
    "slimfit_ds.integrations.enable_deepspeed()"
)
_MOVES_FROZEN_WEIGHTS = ("lomo", "schedule_free", "layerwise")
"""Optimizers of transformers that step inside the backward pass, or move weights without a gradient."""


_IN_ANY_LOOP = {"inactive", "stale_moments"}
"""Settings of `optimizer_states` that do not need the engine."""


class SlimFitCallback(TrainerCallback, ExportableState):
    """Freezes all but a few layers at each step of a Trainer, and stores activations compressed.

    For one process, and for several under `torchrun` or `accelerate launch` (DistributedDataParallel): gradients of
    active layers only are sent. The schedule is saved in the Trainer's own checkpoints and goes on from there.
    At the end of training the model is restored: what is saved loads with plain transformers. With `checkpoints: delta` the
    output folder has `delta.safetensors` then.

    Args:
        config: the `"slimfit"` block; `memory_budget` and some of `optimizer_states` need the DeepSpeed engine.
        history: write `history.jsonl` to the output folder, for `slimfit-ds report`: for each step the
            learning rate, active layers and their statistics, loss and evaluation where the Trainer reports them.

    Raises:
        ConfigError: all problems of the block, or (when the Trainer is made) of the block with this model and
            these arguments.

    Example:
        trainer = Trainer(model, args, train_dataset=data, callbacks=[SlimFitCallback({"freeze": {"rate": 0.9}})])
        trainer.train()
    """

    def __init__(self, config: SlimFitConfig | Mapping[str, Any] | None = None, history: bool = True):
        self.config = SlimFitConfig.parse(config)
        self.saved_schedule: dict[str, Any] | None = None
        self._run_log = (
            RunLog(lambda: None if self._handle is None else self._handle.schedule) if history else None
        )
        self._handle: SlimHandle | None = None
        self._source: Source | None = None
        self._reading: RemovableHandle | None = None
        self._end_writing: Callable[[], None] | None = None
        self._gradients: ActiveGradients | None = None

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Every freezable layer, by the name of its weight, in model order; empty when no training runs."""
        return () if self._handle is None else self._handle.schedule.names

    @property
    def active_layers(self) -> frozenset[str]:
        """The layers that train in the coming step; empty when no training runs."""
        return frozenset() if self._handle is None else self._handle.active_layers

    @property
    def gradient_bytes_sent(self) -> int:
        """Bytes of gradients that this rank has handed to all-reduce in this training; 0 with one process."""
        return 0 if self._gradients is None else self._gradients.bytes_sent

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into `trainer_state.json` at each save."""
        saved = self.saved_schedule if self._handle is None else self._handle.state_dict()
        return {
            "args": {"config": self.config.model_dump(mode="json"), "history": self._run_log is not None},
            "attributes": {"saved_schedule": saved},
        }

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot work, and let DDP leave the layers alone when it wraps the model."""
        model = kwargs["model"]
        plugin = AcceleratorState().dynamo_plugin
        if args.torch_compile or plugin.backend != DynamoBackend.NO:
            # The blocks instead of the whole model, of which our own functions cannot be traced.
            block = self.config.model_dump(mode="json")
            block["activations"]["compile"] = True
            self.config = SlimFitConfig.parse(block)
        self._check(args, model)
        plugin.backend = DynamoBackend.NO
        self._read_deltas(model)
        if _wrapped_by_ddp():
            hide_from_ddp(model, _trainable(model))

    def _read_deltas(self, model: nn.Module) -> None:
        """A checkpoint may be one, whatever this run writes."""
        self._forget_deltas()
        self._source = Source(model)
        self._reading = read_deltas(model, self._source)

    def _forget_deltas(self) -> None:
        """The model writes and reads whole weights again, as any other."""
        if self._reading is not None:
            self._reading.remove()
        if self._end_writing is not None:
            self._end_writing()
        self._source = self._reading = self._end_writing = None

    def _is_followed_by(self, trainer: Any) -> bool:
        return self._handle is not None and self in getattr(
            getattr(trainer, "callback_handler", None), "callbacks", ()
        )

    def _capture(self) -> Delta:
        assert self._handle is not None
        assert self._source is not None
        return self._source.capture(self._handle.trained_names)

    def _check(self, args: TrainingArguments, model: nn.Module) -> None:
        problems = _argument_problems(args, self.config)
        problems += [f"slimfit.{line}" for line in activation_problems(model, self.config.activations)]
        problems += freeze_problems(model, self.config.freeze)
        if self.config.checkpoints == "delta":
            problems += _delta_problems(model, args.output_dir or "trainer_output")
        problems += streaming_problems(
            model, self.config.frozen_weights, self.config.freeze.splits, self.config.activations.compile
        )
        if problems:
            raise ConfigError(problems)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Everything is built and loaded: freeze the first set, or the one that the checkpoint names."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if AcceleratorState().dynamo_plugin.backend != DynamoBackend.NO:
            raise ConfigError(
                [
                    "the whole model has been compiled (torch_compile, or accelerate's dynamo_backend): hand the callback to the "
                    "Trainer when it is made"
                ]
            )
        self._remove()
        self._check(args, model)
        saved = _saved(state, type(self).__name__) if state.global_step else {}
        kept = saved.get("args", {}).get("config", {}).get("checkpoints")
        if not has_read(model) and kept == "delta":
            raise ConfigError(
                [
                    "resume_from_checkpoint: the checkpoint holds what trained only, and this model was not prepared to read it "
                    "(train() a second time, model_init, or a callback that was added later): make a new Trainer with "
                    "callbacks=[SlimFitCallback(...)] and a model, and resume that"
                ]
            )
        # The model may be another one, or other weights, than when the Trainer was made.
        self._read_deltas(model)
        if self.config.checkpoints == "delta":
            self._end_writing = write_deltas(model, self._capture, self._is_followed_by)
        self._handle = SlimHandle(model, self.config)
        if state.global_step:
            self._resume(state, saved)
        if _wrapped_by_ddp():
            self._gradients = ActiveGradients(model, self._handle.trainable)
        combine = self._gradients.average if self._gradients is not None else None
        self._handle.follow(getattr(optimizer, "optimizer", optimizer), combine)
        if self._run_log is not None:
            self._run_log.on_train_begin(args, state, control, **kwargs)

    def _resume(self, state: TrainerState, entry: Mapping[str, Any]) -> None:
        assert self._handle is not None
        saved = entry.get("attributes", {}).get("saved_schedule")
        if saved is None:
            _log.warning(
                "the checkpoint was written without SlimFitCallback: the schedule of layers starts afresh at "
                "step %d",
                state.global_step,
            )
        else:
            self._handle.load_state_dict(saved)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._run_log is not None:
            self._run_log.on_step_begin(args, state, control, **kwargs)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Whether the ranks' gradients have met: a loss made of something else than the model's output would not."""
        if self._gradients is not None and not self._gradients.take_reduction():
            raise RuntimeError(
                "no gradient passed through the output of the model, so the ranks have averaged nothing: "
                "compute the loss from what model(**inputs) returns"
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._run_log is not None:
            self._run_log.on_step_end(args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._run_log is not None:
            self._run_log.on_log(args, state, control, logs, **kwargs)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._run_log is not None:
            self._run_log.on_evaluate(args, state, control, metrics, **kwargs)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._run_log is not None:
            self._run_log.on_save(args, state, control, **kwargs)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After a run `Trainer.push_to_hub` sends what it has trained; in a run the Trainer sends its checkpoints."""
        if self._handle is None and self.saved_schedule is not None:
            prepare_push(kwargs["model"], self.config)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give back the model as it was: every weight trainable, nothing compressed."""
        if self._handle is not None:
            self.saved_schedule = self._handle.state_dict()
            if self.config.checkpoints == "delta" and state.is_world_process_zero:
                write_delta(self._capture(), Path(args.output_dir or "trainer_output", DELTA))
        if self._run_log is not None:
            self._run_log.on_train_end(args, state, control, **kwargs)
        self._remove()
        self._forget_deltas()
        forget_read(kwargs["model"])
        show_to_ddp(kwargs["model"], _trainable(kwargs["model"]))

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        if self._gradients is not None:
            self._gradients.remove()
        self._handle = self._gradients = None


def _saved(state: TrainerState, name: str) -> Mapping[str, Any]:
    """What the callback has written into the checkpoint that a run goes on from; empty: it was not there."""
    # Declared as a list of callbacks; by now it is the mapping that the Trainer saves.
    states: Any = state.stateful_callbacks
    entry = states.get(name) or {}
    return entry[0] if isinstance(entry, list) else entry


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _wrapped_by_ddp() -> bool:
    """Whether accelerate wraps models by DistributedDataParallel; one process under torchrun counts."""
    return _kind_of_run() in {"MULTI_GPU", "MULTI_CPU"}


def _kind_of_run() -> str:
    return AcceleratorState().distributed_type.name


def _delta_problems(model: nn.Module, output: str) -> list[str]:
    """What keeps deltas of a model from being written to a folder; a line, or nothing."""
    problems = base_problems(model, output)
    if not problems and (problem := Source(model).target_problem(Path(output, DELTA))):
        problems.append(f"slimfit.checkpoints is delta, and output_dir: {problem}")
    return problems


def _argument_problems(args: TrainingArguments, config: SlimFitConfig) -> list[str]:
    """What of the arguments and of the block needs another engine than the Trainer's own loop; a line each."""
    problems = []
    kind = _kind_of_run()
    if kind == "DEEPSPEED":
        problems.append(
            "SlimFitCallback is for runs without DeepSpeed: remove the callback, put its config into the "
            'DeepSpeed JSON as "slimfit", and call slimfit_ds.integrations.enable_deepspeed()'
        )
    elif args.deepspeed is not None:
        problems.append(
            f"deepspeed is given, but accelerate has chosen {kind} and would train without it: unset ACCELERATE_USE_CPU and "
            "set DS_ACCELERATOR=cpu to train on a CPU with DeepSpeed, or leave deepspeed out"
        )
    elif kind not in {"NO", "MULTI_GPU", "MULTI_CPU"}:
        problems.append(f"SlimFitCallback does not work with {kind}: {_WITH_DEEPSPEED}")
    if args.n_gpu > 1:
        problems.append(
            f"{args.n_gpu} GPUs in one process (DataParallel) are not supported: start one process for each by "
            "torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES=0"
        )
    parallel = getattr(args, "parallelism_config", None)
    for name in ("cp_size", "sp_size", "tp_size"):
        size = getattr(parallel, name, None) or 1
        if size > 1:
            problems.append(
                f"parallelism_config.{name} is {size}: sequences and layers cut over ranks are not supported, use 1; long "
                "sequences run in tiles on each rank (activations minimal, with offload)"
            )
    chosen = args.torch_compile_backend, args.torch_compile_mode
    if args.torch_compile and chosen != ("inductor", None):
        problems.append(
            f"torch_compile_backend and torch_compile_mode are {chosen}: blocks are compiled by torch's defaults, leave both out"
        )
    backend = AcceleratorState().dynamo_plugin.backend
    if not args.torch_compile and backend not in (DynamoBackend.NO, DynamoBackend.INDUCTOR):
        problems.append(
            f"accelerate's dynamo_backend is {backend.value.lower()!r}: blocks are compiled by torch's default, use inductor or no"
        )
    optim = str(getattr(args.optim, "value", args.optim))
    if any(name in optim for name in _MOVES_FROZEN_WEIGHTS):
        problems.append(
            f"optim {optim!r} moves weights that have no gradient, or steps inside of the backward pass: use "
            "adamw_torch"
        )
    defaults = SlimFitConfig()
    for name, value in config.optimizer_states:
        if name in _IN_ANY_LOOP:
            continue
        default = getattr(defaults.optimizer_states, name)
        if value != default:
            problems.append(
                f"slimfit.optimizer_states.{name} is {value!r}, which the Trainer's own optimizer cannot do: "
                f"set {default!r}, or {_WITH_DEEPSPEED}"
            )
    if config.memory_budget is not None:
        problems.append(
            f"slimfit.memory_budget is {config.memory_budget!r}: take the settings that `slimfit-ds plan` writes "
            "for it, and leave memory_budget out"
        )
    return problems
