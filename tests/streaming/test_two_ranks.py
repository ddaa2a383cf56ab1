"""Weights and states away from the device, on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.distributed
def test_two_ranks_train_the_same_bit_for_bit(run_ranks):
    results = run_ranks(Path(__file__).with_name("two_ranks_worker.py"))
    assert [cell["stage"] for cell in results] == [0, 1, 2]
    assert all(cell["ranks_equal"] == 2 and cell["compared"] > 150 for cell in results)
