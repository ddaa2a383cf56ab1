"""Deltas: base + delta is the trained model to the bit; what is not whole, or of another base, is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_bases import CONFIGS, logits, start

import slimfit_ds
from slimfit_ds.cli import main
from slimfit_ds.deltas import adapter
from slimfit_ds.deltas import load as load_module
from slimfit_ds.deltas.base import DeltaError, find_base
from slimfit_ds.deltas.delta import read_delta
from slimfit_ds.deltas.load import load_merged
from slimfit_ds.errors import ConfigError


def load(folder: Path):
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "freeze", "dtype"),
    [
        *((kind, {}, torch.float32) for kind in CONFIGS),
        *((kind, {"policy": "ils"}, torch.float32) for kind in ("llama_tied", "bert")),
        ("llama", {}, torch.bfloat16),
    ],
)
def test_merged_is_the_trained_model(tmp_path, kind, freeze, dtype):
    trained = start(tmp_path, kind, dtype, **freeze)
    before = trained.logits()
    trained.train()
    trained.handle.save_delta(tmp_path / "delta.safetensors")
    assert main(["merge", str(trained.base), str(tmp_path), str(tmp_path / "out")]) == 0
    merged = load(tmp_path / "out")
    assert type(merged).__name__ == type(trained.model).__name__
    assert merged.dtype == dtype
    assert torch.equal(logits(merged), trained.logits())
    assert not torch.equal(before, trained.logits())
    if not freeze:
        whole = sum(p.numel() for p in merged.parameters())
        delta = sum(t.numel() for t in load_file(tmp_path / "delta.safetensors").values())
        assert delta < 0.45 * whole


def test_a_base_of_16_bits_that_trains_in_32(tmp_path):
    trained = start(tmp_path, "gpt2", base_dtype=torch.bfloat16)
    trained.train()
    trained.handle.save_delta(tmp_path / "delta.safetensors")
    delta = read_delta(tmp_path)
    assert set(delta.tensors) == trained.handle.trained_names
    assert torch.equal(logits(load_merged(trained.base, delta)), trained.logits())


def test_a_narrow_unit_that_never_trained_is_left_out(tmp_path):
    trained = start(tmp_path, "llama", policy="ils", rate=0.9, width=0.25)
    trained.train(steps=1)
    trained.handle.save_delta(tmp_path / "delta.safetensors")
    delta = read_delta(tmp_path)
    assert set(delta.tensors) == set(trained.handle.schedule.trained_names)
    assert torch.equal(logits(load_merged(trained.base, delta)), trained.logits())


def test_what_somebody_else_has_changed_is_in_the_delta(tmp_path):
    trained = start(tmp_path, "llama", never_active=["*.layers.0.*", "model.layers.0*"])
    with torch.no_grad():
        trained.model.get_parameter("model.layers.0.self_attn.q_proj.weight").add_(1)
        # Beside the columns that train.
        layer = trained.model.get_submodule("model.layers.1.mlp.down_proj")
        layer.frozen_weight[:, (layer.split.start + 1) % layer.split.stride] += 1
    trained.train()
    trained.handle.save_delta(tmp_path / "delta.safetensors")
    delta = read_delta(tmp_path)
    assert "model.layers.0.self_attn.q_proj.weight" in delta.tensors
    assert "model.layers.0.self_attn.k_proj.weight" not in delta.tensors
    assert "model.layers.1.mlp.down_proj.weight" in delta.tensors
    assert torch.equal(logits(load_merged(trained.base, delta)), trained.logits())


def saved(tmp_path, kind: str = "llama") -> Path:
    trained = start(tmp_path, kind)
    trained.train(steps=1)
    trained.handle.save_delta(tmp_path / "delta.safetensors")
    return trained.base


def test_a_base_that_was_changed_by_one_byte_is_refused_with_both_hashes(tmp_path, capsys):
    base = saved(tmp_path)
    first = find_base(base)[1].sha256
    file = base / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    second = find_base(base)[1].sha256
    assert first != second
    assert main(["merge", str(base), str(tmp_path), str(tmp_path / "out")]) == 2
    text = capsys.readouterr().err
    assert first in text
    assert second in text
    assert not (tmp_path / "out").exists()


def test_the_same_base_in_other_files_is_the_same_base(tmp_path):
    base = saved(tmp_path)
    load(base).save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    assert find_base(tmp_path / "shards")[1].sha256 == find_base(base)[1].sha256
    delta = read_delta(tmp_path)
    assert torch.equal(logits(load_merged(tmp_path / "shards", delta)), logits(load_merged(base, delta)))


def test_the_hash_is_computed_once_for_a_file(tmp_path, monkeypatch):
    base = saved(tmp_path)
    found = find_base(base)

    def fail(files):
        raise AssertionError("hashed again")

    monkeypatch.setattr("slimfit_ds.deltas.base._hash", fail)
    assert find_base(base) == found
    os.utime(base / "model.safetensors", ns=(1, 1))
    with pytest.raises(AssertionError, match="hashed again"):
        find_base(base)


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
def test_a_truncated_delta_is_refused(tmp_path, capsys, keep):
    base = saved(tmp_path)
    file = tmp_path / "delta.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    assert main(["merge", str(base), str(file), str(tmp_path / "out")]) == 2
    assert "is no whole delta" in capsys.readouterr().err


def _rewritten(tmp_path, change) -> Path:
    file = tmp_path / "delta.safetensors"
    with safe_open(file, framework="pt") as opened:
        about = json.loads(opened.metadata()["slimfit_delta"])
    tensors = load_file(file)
    change(about, tensors)
    save_file(tensors, file, metadata={"slimfit_delta": json.dumps(about)})
    return file


def _place(number: int, value):
    def change(about, tensors):
        place = next(iter(about["places"].values()))
        place[number] = value

    return change


CHANGES = {
    "format": lambda about, tensors: about.update(format=2),
    "no base": lambda about, tensors: about.pop("base"),
    "a class of no model": lambda about, tensors: about.update(architecture="pipeline"),
    "a dtype that is none": lambda about, tensors: about.update(dtype="load"),
    "start outside": _place(0, 10**6),
    "negative": _place(0, -3),
    "stride 0": _place(1, 0),
    "text": _place(2, "8"),
    "other rows": lambda about, tensors: tensors.update(
        {name: t[1:].clone() for name, t in tensors.items() if name.endswith("q_proj.weight_columns")}
    ),
    "an unknown name": lambda about, tensors: tensors.update({"model.other": torch.zeros(2)}),
    "columns without a place": lambda about, tensors: about["places"].popitem(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_delta_that_does_not_hold_together_is_refused(tmp_path, name):
    base = saved(tmp_path)
    _rewritten(tmp_path, CHANGES[name])
    with pytest.raises(DeltaError):
        load_merged(base, read_delta(tmp_path))


def test_a_delta_from_an_untrusted_place_runs_no_code(tmp_path):
    base = saved(tmp_path)

    def poison(about, tensors):
        about["config"] |= {
            "auto_map": {"AutoModelForCausalLM": "evil--modeling.Evil"},
            "_attn_implementation": "evil/kernel",
            "attn_implementation": "evil/kernel",
            "experts_implementation": "evil",
            "quantization_config": {"quant_method": "evil"},
            "some_backbone": "evil/backbone",
        }

    _rewritten(tmp_path, poison)
    delta = read_delta(tmp_path)
    model = load_merged(base, delta)
    assert model.config._attn_implementation == "sdpa"
    text = json.dumps(model.config.to_dict())
    assert "evil" not in text
    # Pickled, it would be read by torch.load; it is not read at all.
    torch.save({"model": torch.zeros(1)}, tmp_path / "delta.safetensors")
    with pytest.raises(DeltaError, match="is no whole delta"):
        read_delta(tmp_path)


def test_a_model_without_a_base_is_refused(tmp_path):
    model = transformers.LlamaForCausalLM(CONFIGS["llama"][1])
    handle = slimfit_ds.slim(model, {"freeze": {"rate": 0.7}})
    with pytest.raises(DeltaError, match="the model has no base"):
        handle.save_delta(tmp_path / "delta.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_lost_once_layers_are_whole_again(tmp_path):
    trained = start(tmp_path, "llama")
    trained.train()
    trained.handle.save_delta(tmp_path / "delta.safetensors")
    expected = trained.logits()
    trained.handle.remove()
    trained.handle.save_delta(tmp_path / "delta.safetensors")
    assert torch.equal(logits(load_merged(trained.base, read_delta(tmp_path))), expected)


def test_a_base_by_a_relative_path_is_found_from_elsewhere(tmp_path, monkeypatch):
    base = saved(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert find_base("base")[1].name == str(base)


def test_files_beside_the_weights_come_along(tmp_path):
    base = saved(tmp_path)
    (base / "tokenizer.json").write_text("{}")
    (base / "chat_template.jinja").write_text("base")
    (base / "secrets.json").write_text("no")
    (tmp_path / "chat_template.jinja").write_text("trained with")
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 7}')
    (base / "token.txt").write_text("secret")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\nThe base's.")
    state = {"stateful_callbacks": {"SlimFitCallback": {"args": {"config": {"freeze": {"rate": 0.7}}}}}}
    state |= {"global_step": 4, "log_history": [{"loss": 2.0}, {"eval_loss": 1.5, "step": 4}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "recipe.yaml").write_text("data: local:sums\nslimfit: {freeze: {rate: 0.7}}")
    assert main(["merge", str(base), str(tmp_path), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
    }
    assert load(tmp_path / "out").generation_config.max_new_tokens == 7
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.tags) == ("apache-2.0", ["slimfit-ds"])
    for text in (str(base), read_delta(tmp_path).base.sha256, '"rate": 0.7', "sums", "| eval_loss | 1.5 |"):
        assert text in card.text
    assert "The base's" not in card.text
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "trained with"
    assert load(tmp_path / "out").dtype == torch.bfloat16
    assert main(["merge", str(base), str(tmp_path), str(tmp_path / "out")]) == 2


def test_nothing_but_a_delta_is_replaced(tmp_path):
    trained = start(tmp_path, "llama")
    trained.train(steps=1)
    base = find_base(trained.base)[1]
    (tmp_path / "notes.safetensors").write_text("mine")
    for name, message in {
        "base/model.safetensors": "weights of the base",
        "base/config.json": "is no delta, so it is not replaced",
        "notes.safetensors": "is no delta, so it is not replaced",
        "base": "is a folder",
    }.items():
        with pytest.raises(DeltaError, match=message):
            trained.handle.save_delta(tmp_path / name)
    assert find_base(trained.base)[1] == base
    assert (tmp_path / "notes.safetensors").read_text() == "mine"
    for _ in range(2):
        trained.handle.save_delta(trained.base / "delta.safetensors")
    assert torch.equal(logits(load_merged(trained.base, read_delta(trained.base))), trained.logits())


def test_the_name_of_weights_is_kept_free_in_a_base_of_shards(tmp_path):
    trained = start(tmp_path, "llama")
    load(trained.base).save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    model = load(tmp_path / "shards")
    handle = slimfit_ds.slim(model, {"freeze": {"rate": 0.7}})
    with pytest.raises(DeltaError, match="weights of the base"):
        handle.save_delta(tmp_path / "shards" / "model.safetensors")


def test_a_base_that_changes_during_a_run_is_compared_again(tmp_path):
    trained = start(tmp_path, "llama")
    trained.train()
    trained.handle.save_delta(tmp_path / "first.safetensors")
    before = read_delta(tmp_path / "first.safetensors").base.sha256
    changed = load(trained.base)
    torch.nn.init.zeros_(changed.model.layers[0].self_attn.q_proj.weight)
    changed.save_pretrained(trained.base)
    trained.handle.save_delta(tmp_path / "second.safetensors")
    delta = read_delta(tmp_path / "second.safetensors")
    assert delta.base.sha256 != before
    assert "model.layers.0.self_attn.q_proj.weight" in delta.tensors
    assert torch.equal(logits(load_merged(trained.base, delta)), trained.logits())


def test_a_model_with_adapters_has_no_delta(tmp_path):
    peft = pytest.importorskip("peft")
    base = saved(tmp_path)
    model = peft.get_peft_model(load(base), peft.LoraConfig(r=2))
    with pytest.raises(ConfigError, match="adapters of PEFT"):
        slimfit_ds.slim(model, {"checkpoints": "delta"})


def test_slim_refuses_the_key_for_a_model_without_a_base():
    model = transformers.LlamaForCausalLM(CONFIGS["llama"][1])
    with pytest.raises(ConfigError, match=r"slimfit\.checkpoints is delta, but the model has no base"):
        slimfit_ds.slim(model, {"checkpoints": "delta"})


def output_problem(command: str, tmp_path, place: str) -> tuple[int, Path]:
    base = saved(tmp_path)
    (tmp_path / "file").write_text("mine")
    output = Path(place) if place.startswith("/") else tmp_path / place
    return main([command, str(base), str(tmp_path), str(output)]), output


@pytest.mark.parametrize("command", ["merge", "adapter"])
@pytest.mark.parametrize("place", ["/proc/none/out", "file/out", "file/deeper/out"])
def test_an_output_that_cannot_be_written_is_said_before_any_work(
    tmp_path, capsys, monkeypatch, command, place
):
    def fail(*_):
        raise AssertionError("loads the base")

    for module in (adapter, load_module):
        monkeypatch.setattr(module, "load_base", fail)
    code, output = output_problem(command, tmp_path, place)
    assert code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("slimfit-ds"))
    assert f"nothing can be written to {output.parent}" in line
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command", ["merge", "adapter"])
def test_what_stands_beside_the_output_is_left_alone(tmp_path, command):
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "mine").write_text("mine")
    before = {*tmp_path.iterdir(), tmp_path / "base", tmp_path / "delta.safetensors", tmp_path / "file"}
    code, output = output_problem(command, tmp_path, "out")
    assert code == 0
    assert (tmp_path / ".out.part" / "mine").read_text() == "mine"
    assert {*tmp_path.iterdir()} == before | {output}


def test_what_fails_leaves_no_folder(tmp_path):
    base = saved(tmp_path)
    other = start(tmp_path / "other", "gpt2").base
    assert main(["merge", str(other), str(tmp_path), str(tmp_path / "new" / "out")]) == 2
    assert not (tmp_path / "new").exists()
    assert main(["merge", str(base), str(tmp_path), str(tmp_path / "new" / "out")]) == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_a_delta_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    trained = start(tmp_path, "llama")
    (tmp_path / "file").write_text("mine")
    for path in ("/proc/none/delta", tmp_path / "file" / "delta"):
        with pytest.raises(DeltaError, match=f"the delta {path} is not written: nothing can be written to"):
            trained.handle.save_delta(path)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "file"}


@pytest.mark.parametrize("weight", ["nan", "inf"])
def test_weights_that_are_no_numbers_are_refused(tmp_path, capsys, weight):
    base = saved(tmp_path)
    command = ["merge", str(base), str(tmp_path), str(tmp_path), str(tmp_path / "out")]
    assert main([*command, "--weights", "1", weight]) == 2
    assert f"weights must be finite, got 1.0, {weight}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_of_two_dtypes_keeps_both(tmp_path):
    start(tmp_path, "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model.model.to(torch.bfloat16)
    handle = slimfit_ds.slim(model, {"freeze": {"rate": 0.7}})
    handle.save_delta(tmp_path / "delta.safetensors")
    handle.remove()
    merged = load_merged(tmp_path / "base", read_delta(tmp_path / "delta.safetensors"))
    expected = model.state_dict()
    assert all(
        torch.equal(t, expected[n]) and t.dtype == expected[n].dtype for n, t in merged.state_dict().items()
    )


def test_a_card_keeps_what_was_written_behind_our_section(tmp_path):
    from slimfit_ds.deltas.card import CARD, append_section

    card = tmp_path / CARD
    card.write_text("# Model\n")
    append_section(card, "## Trained by slimfit_ds\n\n- one\n")
    card.write_text(card.read_text() + "\n## Limits\n\nMine.\n")
    append_section(card, "## Trained by slimfit_ds\n\n- two\n")
    assert card.read_text() == "# Model\n\n## Trained by slimfit_ds\n\n- two\n\n## Limits\n\nMine.\n"
