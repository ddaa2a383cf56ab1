"""Time counts for the innermost phase, once."""

import time

import pytest
import torch

from slimfit_ds.monitoring.stopwatch import CudaClock, HostClock, Stopwatch


class CountedClock:
    """A clock that is told what time it is, and notes when somebody asks for a difference."""

    def __init__(self):
        self.now, self.asked = 0.0, 0

    def mark(self):
        return self.now

    def seconds(self, start, end):
        self.asked += 1
        return end - start


def test_inner_phases_are_taken_out_of_outer_ones():
    clock = CountedClock()
    watch = Stopwatch(clock)
    for _ in range(2):
        with watch.phase("forward"):
            clock.now += 3
        clock.now += 100  # between the phases
        with watch.phase("step"):
            clock.now += 1
            with watch.phase("schedule"):
                clock.now += 0.5
            clock.now += 2
    assert clock.asked == 0, "no difference is asked for while the step goes on"
    assert watch.read() == {"forward": 6, "step": 6, "schedule": 1}
    assert watch.read() == {}


def test_an_error_ends_its_phase():
    clock = CountedClock()
    watch = Stopwatch(clock)

    def fail():
        with watch.phase("step"):
            clock.now += 1
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    clock.now += 10
    assert watch.read() == {"step": 1}


def test_host_clock_measures_seconds():
    watch = Stopwatch.on(torch.device("cpu"))
    assert isinstance(watch._clock, HostClock)
    with watch.phase("sleep"):
        time.sleep(0.05)
    assert 0.05 <= watch.read()["sleep"] < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_see_the_work_of_the_gpu():
    watch = Stopwatch(CudaClock())
    torch.cuda.synchronize()
    start = time.perf_counter()
    with watch.phase("sleep"):
        torch.cuda._sleep(200_000_000)
    asked = time.perf_counter() - start
    torch.cuda.synchronize()
    whole = time.perf_counter() - start
    measured = watch.read()["sleep"]
    assert asked < whole / 2, "the phase waited for the GPU"
    assert measured == pytest.approx(whole, rel=0.3)
