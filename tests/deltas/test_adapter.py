"""Adapters: plain peft on plain transformers computes what the trained model does."""

from __future__ import annotations

import copy
import json
import re
import warnings

import pytest
import torch
import transformers
from peft import PeftModel
from tiny_bases import CONFIGS, IDS, Trained, logits, start

import slimfit_ds
from slimfit_ds.cli import main
from slimfit_ds.deltas.base import DeltaError
from slimfit_ds.deltas.delta import read_delta


def adapted(base, folder, kind):
    if kind == "bert":
        model = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=3)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, folder)


CASES = {
    **{kind: (kind, {}) for kind in CONFIGS},
    "llama width": ("llama", {"width": 0.4}),
    "columns in turn": ("bert", {"policy": "ils", "width": 0.4}),
    "whole embedding": ("llama", {"always_active": ["model.embed_tokens"], "rate": 0.5}),
    "bert whole embedding": ("bert", {"width": 0.4}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_computes_what_the_trained_model_does(tmp_path, case):
    kind, freeze = CASES[case]
    trained = start(tmp_path, kind, **freeze)
    before = trained.logits()
    trained.train(steps=4)
    trained.handle.save_delta(tmp_path / "delta.safetensors")
    assert main(["adapter", str(trained.base), str(tmp_path), str(tmp_path / "adapter")]) == 0
    model = adapted(trained.base, tmp_path / "adapter", kind)
    expected = trained.logits()
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    if kind != "bert":
        with model.disable_adapter():
            torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)
        kwargs = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        ids = torch.arange(60).view(20, 3) * 7 % 31
        assert torch.equal(model.generate(input_ids=ids, **kwargs), trained.model.generate(ids, **kwargs))
    # In float64 nothing is left but the rounding of what was added to the weights.
    trained.handle.remove()
    torch.testing.assert_close(
        double_logits(model), double_logits(trained.model), rtol=0, atol=3e-7 * expected.abs().max().item()
    )


@torch.no_grad()
def double_logits(model) -> torch.Tensor:
    return copy.deepcopy(model).double().eval()(input_ids=IDS).logits


def test_ranks_are_the_numbers_of_trained_columns(tmp_path):
    trained = start(tmp_path, "llama")
    trained.train(steps=2)
    trained.handle.save_delta(tmp_path / "delta.safetensors")
    assert main(["adapter", str(trained.base), str(tmp_path), str(tmp_path / "adapter")]) == 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    places = read_delta(tmp_path).places
    for name, split in places.items():
        module = name.removesuffix(".weight")
        rank = config["rank_pattern"].get(module, config["r"])
        assert rank == split.count
        assert config["alpha_pattern"].get(module, config["lora_alpha"]) == rank
    assert config["base_model_name_or_path"] == str(trained.base)
    assert config["task_type"] == "CAUSAL_LM"


def test_a_cut_adapter_says_what_it_loses(tmp_path, capsys):
    trained = start(tmp_path, "llama", width=0.5)
    trained.train(steps=3)
    trained.handle.save_delta(tmp_path / "delta.safetensors")
    command = ["adapter", str(trained.base), str(tmp_path), str(tmp_path / "adapter"), "--rank", "3"]
    assert main(command) == 0
    stated = re.search(r"leaves out ([\d.]+)% .* worst layer ([\d.]+)%", capsys.readouterr().out)
    model = adapted(trained.base, tmp_path / "adapter", "llama").merge_and_unload()
    original = transformers.AutoModelForCausalLM.from_pretrained(trained.base)
    lost = total = worst = 0.0
    for name in (name for name, p in original.named_parameters() if p.dim() == 2):
        want = trained.model.state_dict()[name] - original.state_dict()[name]
        got = model.state_dict()[name] - original.state_dict()[name]
        assert torch.linalg.matrix_rank(got.double(), rtol=1e-4) <= 3
        # The best that any matrix of this rank can do.
        best = torch.linalg.svdvals(want.double())[3:].norm()
        assert (want - got).norm().item() == pytest.approx(best.item(), rel=1e-3, abs=1e-6)
        lost, total = lost + best.square().item(), total + want.norm().square().item()
        worst = max(worst, best.item() / want.norm().item())
    assert float(stated[1]) == pytest.approx(100 * (lost / total) ** 0.5, abs=0.011)
    assert float(stated[2]) == pytest.approx(100 * worst, abs=0.011)
    assert 1 < float(stated[1]) < 80


def test_layers_that_trained_whole_need_a_rank(tmp_path, capsys):
    trained = start(tmp_path, "llama", policy="ils")
    trained.train(steps=3)
    trained.handle.save_delta(tmp_path / "delta.safetensors")
    command = ["adapter", str(trained.base), str(tmp_path), str(tmp_path / "adapter")]
    assert main(command) == 2
    assert "no linear layer has trained in part" in capsys.readouterr().err
    # No rank of these layers is above 16, so nothing is cut.
    assert main([*command, "--rank", "16"]) == 0
    assert "leaves out 0.00%" in capsys.readouterr().out
    model = adapted(trained.base, tmp_path / "adapter", "llama")
    torch.testing.assert_close(logits(model), trained.logits(), rtol=0, atol=1e-5)


def test_what_peft_cannot_hold_is_refused_by_name(tmp_path, capsys):
    trained = start(tmp_path, "llama_tied", rate=0.3, always_active=["model.embed_tokens"])
    trained.train(steps=2)
    trained.handle.save_delta(tmp_path / "delta.safetensors")
    assert main(["adapter", str(trained.base), str(tmp_path), str(tmp_path / "adapter")]) == 2
    text = capsys.readouterr().err
    assert "PEFT cannot hold model.embed_tokens.weight, which lm_head and model.embed_tokens share" in text
    assert not (tmp_path / "adapter").exists()


def test_another_base_is_refused(tmp_path):
    from slimfit_ds.deltas.adapter import export_adapter

    trained = start(tmp_path, "llama")
    trained.train(steps=1)
    trained.handle.save_delta(tmp_path / "delta.safetensors")
    other = start(tmp_path / "other", "gpt2")
    with pytest.raises(DeltaError, match="sha256"):
        export_adapter(other.base, read_delta(tmp_path), tmp_path / "adapter")


def export(trained, folder, rank=None):
    trained.handle.save_delta(folder / "delta.safetensors")
    rank = [] if rank is None else ["--rank", str(rank)]
    return main(["adapter", str(trained.base), str(folder), str(folder / "adapter"), *rank])


@pytest.mark.parametrize("freeze", [{}, {"policy": "ils"}])
def test_a_head_that_the_base_lacks_is_saved_whole_whatever_the_rank(tmp_path, freeze):
    trained = start(tmp_path, "bert", **freeze)
    trained.train(steps=4)
    # No rank of these layers is above 64, so nothing is cut.
    assert export(trained, tmp_path, rank=64) == 0
    torch.manual_seed(7)
    model = adapted(trained.base, tmp_path / "adapter", "bert")
    torch.testing.assert_close(logits(model), trained.logits(), rtol=0, atol=1e-5)
    assert "classifier" in model.peft_config["default"].modules_to_save


def test_a_head_that_never_trained_is_saved_even_if_loading_draws_it_again(tmp_path):
    trained = start(tmp_path, "bert", never_active=["classifier"], train_biases=False)
    trained.train(steps=2)
    torch.manual_seed(2)  # As `start` did: the head that is made for the adapter is the same.
    assert export(trained, tmp_path, rank=4) == 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "classifier" in config["modules_to_save"]


@pytest.mark.parametrize("rank", [None, 64])
@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("layer", ["word embedding", "linear"])
def test_a_weight_that_was_changed_before_the_run_has_its_columns_in_it(tmp_path, layer, kind, rank):
    trained = start(tmp_path, kind)
    module = trained.model.get_input_embeddings()
    if layer == "linear":
        module = next(m for n, m in trained.model.named_modules() if n.endswith(("q_proj", "query")))
    with torch.no_grad():
        module.frozen_weight.add_(0.1)
    trained.train(steps=3)
    assert export(trained, tmp_path, rank) == 0
    model = adapted(trained.base, tmp_path / "adapter", kind)
    torch.testing.assert_close(logits(model), trained.logits(), rtol=0, atol=1e-5)


def test_a_resized_vocabulary_is_saved_whole_and_said(tmp_path):
    start(tmp_path, "llama")
    resized = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    resized.resize_token_embeddings(40)
    trained = Trained(
        tmp_path / "base",
        resized,
        slimfit_ds.slim(resized, {"freeze": {"rate": 0.7}, "activations": "exact"}),
    )
    trained.train(steps=3)
    with pytest.warns(UserWarning, match=r"resize_token_embeddings\(40\) on the base"):
        assert export(trained, tmp_path) == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(40)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), trained.logits(), rtol=0, atol=1e-5)
    # Not without a word on the base as it is.
    with pytest.raises(RuntimeError, match="size mismatch"):
        adapted(tmp_path / "base", tmp_path / "adapter", "llama")


def test_a_base_that_has_moved_is_named_where_it_is(tmp_path):
    trained = start(tmp_path, "llama")
    trained.train(steps=1)
    trained.handle.save_delta(tmp_path / "delta.safetensors")
    moved = trained.base.rename(tmp_path / "moved")
    assert main(["adapter", str(moved), str(tmp_path), str(tmp_path / "adapter")]) == 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(moved)
