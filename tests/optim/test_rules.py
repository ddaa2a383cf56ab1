from __future__ import annotations

import pytest
import torch

from slimfit_ds.optim.rules import RULES, rule_of

SIZES = (7, 20)


def played(rule_name: str, options: dict, steps: int) -> list[torch.Tensor]:
    """Weights after some steps of a rule, on seeded weights and gradients."""
    rule = RULES[rule_name]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, generator=generator) for size in SIZES]
    states = {name: [torch.zeros(size) for size in SIZES] for name in rule.states(options)}
    for step in range(1, steps + 1):
        gradients = [torch.randn(size, generator=generator) for size in SIZES]
        rule.update(gradients, weights, states, [step] * len(SIZES), options)
        for weight, update in zip(weights, gradients, strict=True):
            weight += update
    return weights


def reference(optimizer_class, options: dict, steps: int) -> list[torch.Tensor]:
    """The same with torch's own optimizer."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in SIZES]
    optimizer = optimizer_class(weights, **options)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return [weight.detach() for weight in weights]


ADAM = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}
SGD = {"lr": 1e-1, "dampening": 0.0, "nesterov": False}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamW", {**ADAM, "weight_decay": 0.1}),
        ("AdamW", {**ADAM, "weight_decay": 0.0}),
        ("Adam", {**ADAM, "weight_decay": 0.1}),
        ("SGD", {**SGD, "momentum": 0.0, "weight_decay": 0.1}),
        ("SGD", {**SGD, "momentum": 0.9, "weight_decay": 0.0}),
        ("SGD", {**SGD, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
        ("SGD", {**SGD, "momentum": 0.9, "weight_decay": 0.0, "dampening": 0.5}),
    ],
)
def test_rules_do_what_torch_does(name, options):
    expected = reference(getattr(torch.optim, name), options, steps=6)
    torch.testing.assert_close(played(name, options, steps=6), expected, rtol=1e-5, atol=1e-6)


def test_layers_have_their_own_step_counts():
    options = {**ADAM, "weight_decay": 0.0}
    gradients = [torch.ones(3), torch.ones(3)]
    states = {name: [torch.zeros(3), torch.zeros(3)] for name in ("exp_avg", "exp_avg_sq")}
    RULES["AdamW"].update(gradients, [torch.zeros(3), torch.zeros(3)], states, [1, 100], options)
    # First step of Adam: the bias-corrected ratio is 1, so the update is -lr.
    torch.testing.assert_close(gradients[0], torch.full((3,), -1e-2))
    late = -1e-2 * (0.1 / (1 - 0.9**100)) / (0.01 / (1 - 0.99**100)) ** 0.5
    torch.testing.assert_close(gradients[1], torch.full((3,), late))


def test_decay_is_what_zero_gradients_do():
    options = {**ADAM, "weight_decay": 0.0}
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([parameter], **options)
    parameter.grad = torch.randn(4)
    optimizer.step()
    states = {
        key: value.clone() for key, value in optimizer.state[parameter].items() if key.startswith("exp_avg")
    }
    for _ in range(5):
        parameter.grad = torch.zeros(4)
        optimizer.step()
    RULES["AdamW"].decay(states, 5, options)
    for key, value in states.items():
        torch.testing.assert_close(value, optimizer.state[parameter][key])


def test_rule_of_known_and_unknown_optimizers():
    parameter = [torch.nn.Parameter(torch.zeros(2))]
    assert rule_of(torch.optim.AdamW(parameter)).name == "AdamW"
    assert rule_of(torch.optim.Adam(parameter)).name == "Adam"
    assert rule_of(torch.optim.SGD(parameter, lr=0.1)).name == "SGD"
    with pytest.raises(
        ValueError, match=r"RMSprop cannot step single layers; use one of torch\.optim\.AdamW"
    ):
        rule_of(torch.optim.RMSprop(parameter))
    with pytest.raises(ValueError, match="amsgrad is not supported"):
        rule_of(torch.optim.AdamW(parameter, amsgrad=True))
