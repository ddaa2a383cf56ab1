"""The step probe against a tracker used by hand, element counts and the sizes of what was sent."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from slimfit_ds.memory.probe import StepProbe
from slimfit_ds.memory.tracker import MemoryTracker, optimizer_tensors
from slimfit_ds.memory.traffic import TrafficCounter


def parts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    return model, optimizer, {"optimizer": lambda: optimizer_tensors(optimizer)}


def work(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(2):
        model(torch.ones(4, 64)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_tracked_step_is_what_the_tracker_says_by_hand():
    model, optimizer, roots = parts()
    work(model, optimizer)
    with MemoryTracker(model, roots) as tracker:
        for _ in range(2):
            model(torch.ones(4, 64)).sum().backward()
        with tracker.phase("step"):
            optimizer.step()
        optimizer.zero_grad()
    by_hand = tracker.report()
    model, optimizer, roots = parts()
    probe = StepProbe(model, optimizer, roots)
    plain = optimizer.step
    for number in range(4):
        with probe.step(track=number % 2 == 1, timeline=number == 3):
            work(model, optimizer)
    assert optimizer.step == plain
    assert [cost.memory is None for cost in probe.costs] == [True, False, True, False]
    report = probe.costs[3].memory
    assert (report.peak, report.at_peak, report.peak_phase) == (by_hand.peak, by_hand.at_peak, "step")
    assert by_hand.peak_phase == "step"
    assert probe.costs[1].timeline is None
    assert {"forward", "backward", "step"} <= {phase for phase, _, _ in probe.costs[3].timeline}
    summary = probe.summary(warmup=1)
    numel = sum(p.numel() for p in model.parameters())
    assert summary["highest"]["gradients"] == 4 * numel
    assert (
        summary["highest"]["optimizer"] == 8 * numel + 4 * 4
    )  # two moments, a step count for each of 4 tensors
    assert (summary["steps"], summary["timed_steps"], summary["bytes_per_step"]) == (4, 1, None)
    assert summary["seconds_per_step"] == probe.costs[2].seconds


def test_an_update_in_host_memory_does_not_count():
    model, optimizer, roots = parts()
    probe = StepProbe(model, optimizer, roots, updates_on_host=True)
    with probe.step(track=True):
        work(model, optimizer)
    assert probe.costs[0].memory.peak_phase != "step"


def test_bytes_sent_are_those_of_the_step(one_rank):
    model, optimizer, roots = parts()
    with TrafficCounter() as traffic:
        probe = StepProbe(model, optimizer, roots, traffic=traffic)
        dist.all_reduce(torch.zeros(1000))
        with probe.step():
            dist.all_reduce(torch.zeros(10))
        with probe.step():
            dist.all_reduce(torch.zeros(30))
    assert [cost.bytes_sent for cost in probe.costs] == [40, 120]
    assert probe.summary()["bytes_per_step"] == 80
    assert probe.summary(warmup=1)["bytes_per_step"] == 120
    assert probe.summary()["memory"] is None


def test_a_step_that_fails_leaves_everything_as_it_was():
    model, optimizer, roots = parts()
    # A learning-rate scheduler puts its own function on the instance: it has to stay.
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    plain = vars(optimizer)["step"]
    probe = StepProbe(model, optimizer, roots)
    with pytest.raises(ZeroDivisionError), probe.step(track=True):
        raise ZeroDivisionError
    assert vars(optimizer)["step"] is plain
    assert not probe.costs
    with pytest.raises(RuntimeError, match="no step is being measured"):
        probe.end()
    probe.begin(track=True)
    assert optimizer.step._wrapped_by_lr_sched
    work(model, optimizer)
    probe.end()
    assert probe.costs[0].memory.peak > 0
