"""Weights and states away from the device, on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.distributed
@pytest.mark.parametrize("stages", ["0,1,2", "3"])
def test_two_ranks_train_the_same_bit_for_bit(run_ranks, stages):
    cells = run_ranks(Path(__file__).with_name("two_ranks_worker.py"), stages)
    assert [cell["stage"] for cell in cells] == [int(stage) for stage in stages.split(",")]
    assert all(cell["ranks_equal"] == 2 and cell["compared"] > 150 for cell in cells)
    if stages == "3":
        # Only what trains is gathered: 5 % and the norms.
        (cell,) = cells
        assert cell["streamed"] < 0.06 * cell["stock"] < 0.12 * cell["sent"], cell
