"""Traffic counted against the sizes of the tensors that were sent."""

import torch
import torch.distributed as dist

from slimfit_ds.memory.traffic import TrafficCounter


def test_payload_of_each_collective(one_rank):
    x, out = torch.zeros(100), torch.zeros(100)
    with TrafficCounter() as traffic:
        dist.all_reduce(x)
        dist.broadcast(x.bfloat16(), 0)
        dist.all_gather_into_tensor(out, x)
        dist.all_gather([out], x)
        dist.reduce_scatter_tensor(out, x)
    assert traffic.bytes == {
        "all_reduce": 400,
        "broadcast": 200,
        "all_gather_into_tensor": 400,
        "all_gather": 400,
        "reduce_scatter_tensor": 400,
    }
    assert traffic.total == 1800
    assert set(traffic.calls.values()) == {1}
    traffic.reset()
    dist.all_reduce(x)
    assert traffic.total == 0


def test_through_deepspeed_style_keywords(one_rank):
    with TrafficCounter() as traffic:
        dist.all_reduce(tensor=torch.zeros(10))
        dist.reduce_scatter_tensor(output=torch.zeros(10), input=torch.zeros(10))
    assert traffic.bytes == {"all_reduce": 40, "reduce_scatter_tensor": 40}


def test_functions_are_restored():
    before = dist.all_reduce
    with TrafficCounter():
        assert dist.all_reduce is not before
    assert dist.all_reduce is before
