"""Batches are a function of the step and the global batch alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimfit_ds.training.batches import BatchPlan, evaluation_positions
from slimfit_ds.training.evaluation import in_order

layouts = st.tuples(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 20), st.integers(0, 9)
)


def plans(world, micro, accumulation, spare, seed, terms=None):
    batch = world * micro * accumulation
    examples = 2 * batch + spare
    return (
        batch,
        examples,
        [
            BatchPlan(examples, batch, micro, rank=rank, world_size=world, seed=seed, terms=terms)
            for rank in range(world)
        ],
    )


@given(layouts, st.integers(0, 12))
@settings(deadline=None)
def test_ranks_share_out_the_batch_of_one_rank(layout, step):
    batch, examples, ranks = plans(*layout)
    alone = BatchPlan(examples, batch, batch, seed=layout[-1])
    together = [index for plan in ranks for micro in plan.micro_batches(step) for index, _ in micro]
    assert together == [index for index, _ in alone.micro_batches(step)[0]]
    assert all(len(plan.micro_batches(step)) == layout[2] for plan in ranks)


@given(layouts)
@settings(deadline=None)
def test_an_epoch_visits_no_example_twice_and_epochs_differ(layout):
    batch, examples, _ = plans(*layout)
    plan = BatchPlan(examples, batch, batch, seed=layout[-1])
    steps = plan.steps_per_epoch
    seen = np.concatenate([plan.global_indices(step) for step in range(steps)])
    assert len(set(seen.tolist())) == len(seen) == steps * batch
    assert set(seen.tolist()) <= set(range(examples))
    if examples > 6:
        again = np.concatenate([plan.global_indices(step + steps) for step in range(steps)])
        assert not np.array_equal(seen, again)


@given(layouts, st.integers(0, 5), st.data())
@settings(deadline=None)
def test_weighted_means_of_micro_batches_are_the_global_mean(layout, step, data):
    world, micro, accumulation, spare, seed = layout
    examples = 2 * world * micro * accumulation + spare
    terms = np.array(data.draw(st.lists(st.integers(1, 50), min_size=examples, max_size=examples)))
    sums = np.random.default_rng(0).normal(size=examples) * terms
    batch, _, ranks = plans(*layout, terms=terms)
    reported = 0.0
    for plan in ranks:
        for part, weight in zip(plan.micro_batches(step), plan.loss_weights(step), strict=True):
            indices = [index for index, _ in part]
            reported += weight * sums[indices].sum() / terms[indices].sum() / (accumulation * world)
    indices = BatchPlan(examples, batch, batch, seed=seed).global_indices(step)
    assert reported == pytest.approx(sums[indices].sum() / terms[indices].sum(), abs=1e-9)


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 5))
def test_evaluation_counts_each_example_once_in_order(examples, batch, world):
    truth = np.arange(examples) * 10.0
    parts = []
    for rank in range(world):
        positions = evaluation_positions(examples, batch, rank, world)
        assert all(len(part) == batch for part in positions)
        flat = np.concatenate(positions)
        parts.append({"value": truth[np.minimum(flat, examples - 1)], "position": flat})
    assert len({len(part["position"]) for part in parts}) == 1
    np.testing.assert_array_equal(in_order(parts, examples)["value"], truth)
