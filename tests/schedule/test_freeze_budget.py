"""What a layer costs, against what PyTorch counts."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from slimfit_ds.schedule.budget import COSTS
from slimfit_ds.trainable.layers import discover


def test_flops_are_those_of_the_weight_gradient():
    """Each layer of a ViT trains alone; what the backward pass then takes more of is its weight gradient."""
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=40,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    model = ViTForImageClassification(config)
    layers = discover(model).layers
    model.requires_grad_(False)
    batch = torch.randn(2, 3, 8, 8, requires_grad=True)

    def backward() -> int:
        loss = model(pixel_values=batch).logits.sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        return counter.get_total_flops()

    at_rest = backward()
    positions = {"convolution": 2 * 4, "linear": 2 * 5, "head": 2}
    seen = set()
    for layer in layers:
        weight = model.get_parameter(layer.name).requires_grad_(True)
        kind = "head" if layer.name.startswith("classifier") else layer.kind
        count = positions.get(kind, 1)
        assert backward() - at_rest == 2 * count * COSTS["flops"](layer), layer.name
        weight.requires_grad_(False)
        seen.add(kind)
    assert seen == {"convolution", "linear", "head", "norm", "parameter"}
