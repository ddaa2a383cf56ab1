"""Results of chunks against plain concatenation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimfit_ds.activations.replay import Merged, plan_chunks


@given(st.integers(2, 9), st.integers(1, 9), st.integers(1, 4))
def test_rows_are_joined_and_the_rest_is_the_first_chunks(batch, rows, tokens):
    x = torch.arange(batch * tokens * 2.0).view(batch, tokens, 2)
    plan = plan_chunks([x], rows * tokens)
    merged = Merged(plan)
    chunks = [plan.slice([x], index)[0] for index in range(len(plan))]
    for index, chunk in enumerate(chunks):
        merged.add(index, [chunk * 2, torch.tensor(float(index)), "name", chunk[:, 0].bool()])
    assert torch.equal(merged.values[0], torch.cat([2 * chunk for chunk in chunks]))
    assert merged.values[1] == 0
    assert merged.values[2] == "name"
    assert torch.equal(merged.values[3], x[:, 0].bool())
    assert merged.by_row == (len(chunks) == 1)


def test_a_length_that_agrees_with_the_rows_by_chance_is_no_batch():
    x = torch.zeros(5, 3, 2)
    plan = plan_chunks([x], 6)
    merged = Merged(plan)
    for index in range(len(plan)):
        merged.add(index, [torch.full((2, 4), float(index))])
    assert torch.equal(merged.values[0], torch.zeros(2, 4))
    assert not merged.by_row


def test_samples_of_different_shapes_are_an_error():
    merged = Merged(plan_chunks([torch.zeros(4, 3, 2)], 6))
    merged.add(0, [torch.zeros(2, 1)])
    with pytest.raises(ValueError, match=r"\[1\] and \[3\]"):
        merged.add(1, [torch.zeros(2, 3)])
