"""Every stage, dtype, accumulation and clipping on two ranks against plain PyTorch in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("stage_matrix_worker.py")

# Distance to the reference's weights as a share of how far those moved in 8 steps. A step missed, doubled
# or scaled wrongly is worth 0.1 or more; in 16 bits Adam turns a rounded gradient near zero into a step.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.05}


def check(results: list[dict], cells: list[dict]) -> None:
    assert len(results) == len(cells)
    for result, cell in zip(results, cells, strict=True):
        assert result["drift"] == 0.0, result
        assert result["frozen_gradients"] == 0, result
        assert result["sets_equal"], result
        assert result["norm_error"] < 1e-3, result
        assert result["values_not_set"] == 0, result
        assert result["moments"] < TOLERANCE[cell.get("dtype", "fp32")], result
        assert result["difference"] < TOLERANCE[cell.get("dtype", "fp32")], result


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stage_against_plain_pytorch(run_ranks, stage):
    cells = [
        {"stage": stage, "dtype": dtype, "accumulation": accumulation, "clip": clip}
        for dtype in ("fp32", "bf16", "fp16")
        for accumulation in (1, 2)
        for clip in (0.0, 0.05)
    ]
    results = run_ranks(WORKER, json.dumps(cells))
    check(results, cells)
    # 8 steps of 3 of 30 layers, none of them twice before all have trained.
    assert all(result["trained"] == 24 for result in results)


@pytest.mark.slow
@pytest.mark.distributed
def test_options_that_must_not_change_the_result(run_ranks):
    small_buckets = {"reduce_bucket_size": 500, "allgather_bucket_size": 700}
    cells = [
        {"stage": 1, "zero": small_buckets, "dtype": "bf16", "clip": 0.05},
        {"stage": 2, "zero": small_buckets, "accumulation": 2},
        {"stage": 0, "zero": small_buckets},
        {"stage": 1, "states": {"inactive": "host"}, "dtype": "bf16", "steps": 24},
        {"stage": 0, "states": {"inactive": "host"}, "steps": 24},
        {"stage": 2, "freeze": {"policy": "none"}},
        {"stage": 1, "freeze": {"interval": 3}, "accumulation": 2, "steps": 9},
        {"stage": 1, "states": {"stale_moments": "decay"}, "freeze": {"policy": "random"}, "steps": 30},
        {"stage": 2, "states": {"stale_moments": "reset"}, "freeze": {"policy": "random"}, "steps": 30},
        {"stage": 1, "states": {"stale_moments": "keep"}, "freeze": {"policy": "random"}, "steps": 30},
    ]
    check(run_ranks(WORKER, json.dumps(cells)), cells)


@pytest.mark.slow
@pytest.mark.distributed
def test_learning_rates_of_chosen_layers_and_of_what_always_trains(run_ranks):
    scales = {"lr_scale": 3.0, "always_lr_scale": 0.5, "always_active": ["classifier"]}
    cells = [{"stage": stage, "freeze": scales} for stage in (0, 1, 2, 3)]
    cells += [{"stage": 1, "freeze": scales, "accumulation": 2, "clip": 0.05}]
    cells += [{"stage": 3, "freeze": scales, "dtype": "bf16"}]
    check(run_ranks(WORKER, json.dumps(cells)), cells)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_front(run_ranks):
    half = {"policy": "none", "front": "half"}
    cells = [{"stage": stage, "freeze": half, "accumulation": 2, "clip": 0.05} for stage in (0, 1, 2, 3)]
    cells += [
        {"stage": 2, "freeze": half, "dtype": "bf16"},
        {"stage": 1, "freeze": half, "states": {"stale_moments": "decay", "inactive": "host"}},
        {"stage": 1, "freeze": {"policy": "none", "front": "statistics"}, "steps": 12},
        {"stage": 3, "freeze": {"policy": "none", "front": "statistics"}, "steps": 12},
    ]
    results = run_ranks(WORKER, json.dumps(cells))
    check(results, cells)
    # Two ranks and all stages see the same statistics, so the same fronts.
    *halves, one, three = [result["fronts"] for result in results]
    assert all(fronts == [0, 1, 0, 1, 0, 0, 1, 0] for fronts in halves)
    assert one == three
    assert len(set(one)) > 1


@pytest.mark.slow
@pytest.mark.distributed
def test_three_ranks_that_divide_nothing_evenly(run_ranks):
    cells = [{"stage": 1, "steps": 4}, {"stage": 2, "accumulation": 2, "steps": 4}]
    check(run_ranks(WORKER, json.dumps(cells), ranks=3), cells)


@pytest.mark.slow
@pytest.mark.distributed
def test_states_live_where_they_should(run_ranks):
    cells = [
        {"stage": 1, "dtype": "bf16", "steps": 24, "states": {"inactive": inactive}}
        for inactive in ("device", "host")
    ]
    device, host = (result["report"] for result in run_ranks(WORKER, json.dumps(cells)))
    assert device["optimizer_host"] == 0
    assert device["gradients"] == host["gradients"] == 0
    # After 24 steps of 3 of 30 layers nearly every layer has states; on the host option only the
    # active tenth and the biases (3 % of this small model) remain on the device.
    assert host["optimizer"] < 0.35 * device["optimizer"]
    assert host["optimizer_host"] > 0.6 * device["optimizer"]
