"""`MeasureSteps`: a Trainer's steps timed, the last ones with their memory by kind, and the bytes they send."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slimfit_ds.engine.memory_roots import engine_roots, is_offloaded
from slimfit_ds.memory.probe import StepProbe
from slimfit_ds.memory.tracker import Roots, optimizer_tensors
from slimfit_ds.memory.traffic import TrafficCounter

__all__ = ["MEASURES", "TIMELINE", "MeasureSteps"]

MEASURES, TIMELINE = "measures.json", "memory_of_one_step.png"


class MeasureSteps(TrainerCallback):
    """Measures every optimizer step of a Trainer, under DeepSpeed or without.

    A tracked step is many times slower than an ordinary one, so it does not count for the time.

    Example:
        measure = MeasureSteps()  # before the process group is made: DeepSpeed looks collectives up at that time
        trainer = Trainer(model, args, train_dataset=data, callbacks=[measure])
        measure.trainer = trainer  # callbacks are not shown DeepSpeed's engine
        trainer.train()
        measure.write(Path("outputs"))
    """

    def __init__(self, warmup: int = 2, tracked: int = 3):
        """
        Args:
            warmup: first steps that count neither for the time nor for the bytes sent.
            tracked: last steps whose memory is tracked.
        """
        self._warmup, self._tracked = warmup, tracked
        self._late = torch.distributed.is_initialized()
        self._traffic = TrafficCounter().install()
        self.trainer: Any = None
        self.probe: StepProbe | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        engine = None if self.trainer is None else self.trainer.deepspeed
        if engine is not None and self._late:
            raise RuntimeError(
                "MeasureSteps was made after the process group: DeepSpeed has looked its collectives up, and what it "
                "sends would not be counted; make it before"
            )
        if engine is not None:
            on_host = is_offloaded(engine.optimizer)
            self.probe = StepProbe(
                engine.module, engine, engine_roots(engine), args.device, self._traffic, on_host
            )
        elif args.deepspeed:
            raise RuntimeError("MeasureSteps.trainer is not set: under DeepSpeed it must be, before train()")
        else:
            optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
            roots: Roots = {"optimizer": lambda: optimizer_tensors(optimizer)}
            self.probe = StepProbe(kwargs["model"], optimizer, roots, args.device, self._traffic)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.probe is not None
        left = state.max_steps - state.global_step
        self.probe.begin(track=left <= self._tracked, timeline=left == 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.probe is not None
        self.probe.end()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget a step that was begun and stopped halfway; count no more."""
        if self.probe is not None:
            self.probe.abandon()
        self._traffic.remove()

    def write(self, folder: Path) -> None:
        """Write `measures.json`, of the rank with the highest peak, and a picture of the last step; called by all ranks.

        Args:
            folder: where to.

        Raises:
            RuntimeError: no step was tracked.
        """
        if self.probe is None or (own := self.probe.summary(self._warmup))["memory"] is None:
            raise RuntimeError("MeasureSteps: no step was tracked; train for at least one")
        parameters = self.probe.model.parameters()
        own["parameters"] = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
        everyone: list[Any] = [own]
        if torch.distributed.is_initialized():
            everyone = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, own)
            if torch.distributed.get_rank() > 0:
                return
        from slimfit_ds.report.memory_plot import plot_timeline

        peaks = [measures["memory"]["peak"] for measures in everyone]
        widest = everyone[peaks.index(max(peaks))]
        (folder / MEASURES).write_text(json.dumps({**widest, "peaks": peaks}, indent=2) + "\n")
        timeline = self.probe.costs[-1].timeline
        if timeline:
            plot_timeline(timeline, folder / TIMELINE, "Memory of one rank over one step")
