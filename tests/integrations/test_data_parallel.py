"""SlimFitCallback over two real processes (gloo): as in one process, and frozen gradients do not travel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_trainer_callback import assert_same_weights, reference, train
from trainer_cases import classifier

from slimfit_ds.integrations.data_parallel import hide_from_ddp, show_to_ddp
from slimfit_ds.trainable.units import discover

WORKER = Path(__file__).parent / "ddp_worker.py"


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("differing", ["0", "1"], ids=["same start", "other start on rank 1"])
def test_two_ranks_train_what_one_process_would(run_ranks, tmp_path, differing):
    found = run_ranks(WORKER, str(tmp_path), differing, "exact")
    (sets, moved, state), (other_sets, other_moved, other_state) = found["ranks"]
    assert sets == other_sets
    assert moved == other_moved
    assert state == other_state
    model = classifier()
    layers = {layer.name: layer.numel for layer in discover(model).units}
    for active, names in zip(sets, moved, strict=True):
        assert set(names) & layers.keys() == set(active)
    # Two ranks, two micro-batches of two: the eight examples of a step of the reference.
    expected, _ = reference(sets, batch=8)
    model.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"))
    assert_same_weights(model, expected, atol=1e-5)
    # Only active layers and the biases were sent, once for each step.
    biases = sum(p.numel() for name, p in model.named_parameters() if name not in layers)
    steps = [b - a for a, b in zip([0, *found["sent"]], found["sent"], strict=False)]
    assert steps == [4 * (biases + sum(layers[name] for name in active)) for active in sets]
    # DDP holds buckets for the smallest parameter alone.
    assert found["reduced_by_ddp"] == min(p.numel() for p in model.parameters())
    assert found["resumed_as_whole"]
    assert "wrap the model anew" in found["refusal"]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("front", ["none", "statistics"])
def test_two_ranks_train_the_columns_that_one_process_would(run_ranks, tmp_path, front):
    found = run_ranks(WORKER, str(tmp_path / "two"), "1", "exact", "static", front)
    (sets, _, _), (other_sets, _, _) = found["ranks"]
    assert sets == other_sets
    trained = load_file(tmp_path / "two" / "model" / "model.safetensors")
    assert (len({tuple(names) for names in sets}) > 1) == (front != "none")
    config = {"freeze": {"rate": 0.8, "policy": "static", "front": front}}
    alone, _, _ = train(tmp_path / "one", config)
    start = classifier().state_dict()
    for name, weight in alone.model.state_dict().items():
        torch.testing.assert_close(trained[name], weight, rtol=1e-4, atol=1e-5, msg=name)
    query = "bert.encoder.layer.1.attention.self.query.weight"
    assert not torch.equal(trained[query], start[query])
    assert found["resumed_as_whole"]


def test_hiding_parameters_leaves_what_others_have_hidden():
    model = classifier()
    names = [name for name, _ in model.named_parameters()]
    hide_from_ddp(model, names)
    hidden = set(model._ddp_params_and_buffers_to_ignore)
    assert len(hidden) == len(names) - 1
    show_to_ddp(model, names)
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")
    model._ddp_params_and_buffers_to_ignore = ["mine"]
    hide_from_ddp(model, names)
    show_to_ddp(model, names)
    assert model._ddp_params_and_buffers_to_ignore == ["mine"]
