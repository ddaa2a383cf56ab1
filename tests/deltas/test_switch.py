"""Several deltas of one base: one after another in a running model, and their weighted sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_bases import IDS, logits, start
from transformers import AutoModelForCausalLM, BertForSequenceClassification

from slimfit_ds.cli import main
from slimfit_ds.deltas.base import DeltaError
from slimfit_ds.deltas.combine import combine
from slimfit_ds.deltas.delta import Delta, read_delta
from slimfit_ds.deltas.load import load_merged
from slimfit_ds.deltas.overlay import DeltaSwitch


def trained(
    folder, kind: str, name: str, data_seed: int = 0, **freeze: Any
) -> tuple[Delta, torch.Tensor, dict]:
    made = start(folder, kind, **freeze)
    made.train(steps=3, rate=1e-2 * (1 + data_seed), seed=data_seed)
    made.handle.save_delta(folder / f"{name}.safetensors")
    found = made.logits()
    made.handle.remove()
    return read_delta(folder / f"{name}.safetensors"), found, made.model.state_dict()


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2"])
def test_deltas_take_turns_in_place(tmp_path, kind):
    one, one_logits, _ = trained(tmp_path, kind, "one")
    # Other columns, and whole layers.
    two, two_logits, _ = trained(tmp_path, kind, "two", 1, seed=3)
    three, three_logits, _ = trained(tmp_path, kind, "three", 2, policy="ils")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base_logits, identities = logits(model), [id(p) for p in model.parameters()]
    switch = DeltaSwitch(model)
    for delta, expected in (
        (one, one_logits),
        (two, two_logits),
        (None, base_logits),
        (three, three_logits),
        (one, one_logits),
        (None, base_logits),
    ):
        switch.use(delta)
        assert torch.equal(logits(model), expected)
    assert [id(p) for p in model.parameters()] == identities
    assert not torch.equal(one_logits, two_logits)


def test_a_layer_that_was_changed_before_it_trained_takes_its_turn(tmp_path):
    made = start(tmp_path, "llama")
    with torch.no_grad():
        made.model.model.layers[0].self_attn.q_proj.frozen_weight.add_(0.1)
    made.train(steps=3)
    made.handle.save_delta(tmp_path / "one.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base_logits = logits(model)
    switch = DeltaSwitch(model)
    for _ in range(2):
        switch.use(read_delta(tmp_path / "one.safetensors"))
        assert torch.equal(logits(model), made.logits())
        switch.use(None)
        assert torch.equal(logits(model), base_logits)


def test_what_does_not_belong_is_refused_and_changes_nothing(tmp_path):
    one, one_logits, _ = trained(tmp_path, "llama", "one")
    other, _, _ = trained(tmp_path / "other", "gpt2", "other")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    switch = DeltaSwitch(model)
    switch.use(one)
    with pytest.raises(DeltaError, match="sha256"):
        switch.use(other)
    assert torch.equal(logits(model), one_logits)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with pytest.raises(DeltaError, match="the model is not its base"):
        DeltaSwitch(model)


@pytest.mark.parametrize("freezes", [({}, {}), ({}, {"seed": 3}), ({}, {"policy": "ils"})], ids=str)
def test_a_sum_is_that_of_whole_weights(tmp_path, freezes):
    (one, _, first), (two, _, second) = (
        trained(tmp_path, "llama", str(i), i, **freeze) for i, freeze in enumerate(freezes)
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    total = combine(tmp_path / "base", [one, two], [0.75, -0.5])
    found = load_merged(tmp_path / "base", total).state_dict()
    for name, weight in base.items():
        want = weight + 0.75 * (first[name] - weight) - 0.5 * (second[name] - weight)
        torch.testing.assert_close(found[name], want, rtol=0, atol=1e-6)
    # Where columns are others, the sum has whole weights.
    assert total.places == {n: place for n, place in one.places.items() if two.places.get(n) == place}
    assert (total.places == one.places) == (not freezes[1])


def test_a_sum_of_classifiers_and_the_command(tmp_path):
    (one, _, first), (_, _, second) = (trained(tmp_path, "bert", str(i), i) for i in range(2))
    files = [str(tmp_path / f"{i}.safetensors") for i in range(2)]
    assert main(["merge", str(tmp_path / "base"), *files, str(tmp_path / "mean")]) == 0
    mean = BertForSequenceClassification.from_pretrained(tmp_path / "mean").state_dict()
    for name, weight in mean.items():
        torch.testing.assert_close(weight, (first[name] + second[name]) / 2, rtol=0, atol=1e-6)
    command = ["merge", str(tmp_path / "base"), *files, str(tmp_path / "sum"), "--weights", "1", "0"]
    assert main(command) == 0
    only = BertForSequenceClassification.from_pretrained(tmp_path / "sum")
    expected = load_merged(tmp_path / "base", one)
    torch.testing.assert_close(only(IDS).logits, expected(IDS).logits, rtol=0, atol=1e-6)
    assert main([*command[:-1]]) == 2


def test_deltas_of_other_bases_have_no_sum(tmp_path):
    one, _, _ = trained(tmp_path, "llama", "one")
    other, _, _ = trained(tmp_path / "other", "gpt2", "other")
    with pytest.raises(DeltaError, match="sha256"):
        combine(tmp_path / "base", [one, other])


def test_a_delta_that_the_model_would_round_is_refused(tmp_path):
    one, _, _ = trained(tmp_path, "llama", "one")
    switch = DeltaSwitch(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16))
    with pytest.raises(DeltaError, match=r"dtype=torch\.float32"):
        switch.use(one)
