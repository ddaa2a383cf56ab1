"""Arithmetic from a measured peak to other numbers of GPUs."""

from hypothesis import given
from hypothesis import strategies as st

from slimfit_ds.comparison.result import Outcome, gpus_needed

PEAK = {
    "parameters": 200,
    "gradients": 200,
    "optimizer": 1200,
    "saved_activations_static": 3000,
    "working": 100,
    "communication": 50,
}


def test_closed_form():
    # One rank measured. Stage 0: 1650 stay, 3100 divide; 1650 + 3100 / 4 = 2425.
    assert gpus_needed(PEAK, 1, 0, 4750) == 1
    assert gpus_needed(PEAK, 1, 0, 4749) == 2
    assert gpus_needed(PEAK, 1, 0, 2425) == 4
    assert gpus_needed(PEAK, 1, 0, 1650) is None
    # Stage 3: only the communication buffer stays.
    assert gpus_needed(PEAK, 1, 3, 50 + 4700 // 16 + 1) == 16
    # Measured on two ranks, the same batch on one rank has twice the activations.
    assert gpus_needed(PEAK, 2, 0, 1650 + 6200) == 1
    assert gpus_needed(PEAK, 2, 0, 1650 + 6199) == 2


@given(
    st.dictionaries(st.sampled_from(list(PEAK)), st.integers(0, 10**12)), st.integers(0, 3), st.integers(1, 8)
)
def test_more_memory_never_needs_more_gpus(peak, stage, ranks):
    counts = [gpus_needed(peak, ranks, stage, memory) for memory in (10**9, 10**10, 10**11, 10**13)]
    numbers = [float("inf") if count is None else count for count in counts]
    assert numbers == sorted(numbers, reverse=True)


def test_states_per_parameter():
    assert Outcome("a", "A", states=300, parameters=100).states_per_parameter == 3
    assert Outcome("a", "A", status="failed").states_per_parameter == 0
    assert not Outcome("a", "A", status="failed").ok
