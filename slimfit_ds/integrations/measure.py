"""`MeasureSteps`: a Trainer's steps timed, some of them with their memory by kind and the bytes they send."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slimfit_ds.engine.memory_roots import engine_roots, is_offloaded
from slimfit_ds.memory.probe import StepProbe
from slimfit_ds.memory.tracker import optimizer_tensors
from slimfit_ds.memory.traffic import TrafficCounter

__all__ = ["MeasureSteps"]


class MeasureSteps(TrainerCallback):
    """Measures every optimizer step of a Trainer, under DeepSpeed or without.

    A tracked step is many times slower than an ordinary one, so it does not count for the time.

    Example:
        measure = MeasureSteps(first=2)
        trainer = Trainer(model, args, train_dataset=data, callbacks=[measure])
        measure.trainer = trainer  # under DeepSpeed only: callbacks are not shown the engine
        trainer.train()
        measure.probe.summary(warmup=2)
    """

    def __init__(
        self, first: int = 0, last: int = 0, traffic: TrafficCounter | None = None, timeline: bool = False
    ):
        """
        Args:
            first: steps at the beginning whose memory is tracked.
            last: steps at the end whose memory is tracked.
            traffic: an installed counter of bytes sent (install it before the process group is made).
            timeline: keep every change of the last step, for a picture.
        """
        self._first, self._last, self._traffic, self._timeline = first, last, traffic, timeline
        self.trainer: Any = None
        self.probe: StepProbe | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        engine = None if self.trainer is None else self.trainer.deepspeed
        if engine is not None:
            roots, on_host = engine_roots(engine), is_offloaded(engine.optimizer)
            self.probe = StepProbe(engine.module, engine, roots, args.device, self._traffic, on_host)
        elif args.deepspeed:
            raise RuntimeError("MeasureSteps.trainer is not set: under DeepSpeed it must be, before train()")
        else:
            optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
            roots = {"optimizer": lambda: optimizer_tensors(optimizer)}
            self.probe = StepProbe(kwargs["model"], optimizer, roots, args.device, self._traffic)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step
        track = step < self._first or step >= state.max_steps - self._last
        assert self.probe is not None
        self.probe.begin(track, timeline=self._timeline and step == state.max_steps - 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.probe is not None
        self.probe.end()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget a step that was begun and stopped halfway."""
        if self.probe is not None:
            self.probe.abandon()
