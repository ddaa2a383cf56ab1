"""Workloads: finding configurations, building models without memory, batches."""

import json

import pytest
import torch

from slimfit_ds.planner.workload import KNOWN_MODELS, ModelNotFound, Workload, load_config

# Parameter counts as published with the models (model cards and papers), task heads as built here.
PUBLISHED = {
    "bert-base-uncased": 109_483_778,  # 109,482,240 + a head of 2 x 768 + 2
    "gpt2": 124_439_808,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "google/vit-base-patch16-224": 85_800_194,  # 85,798,656 + a head of 2 x 768 + 2
}


@pytest.mark.slow
def test_known_models_have_the_published_size(fake):
    counts = {name: fake.inspect(Workload(name))["parameters"] for name in PUBLISHED}
    assert counts == PUBLISHED
    embeddings = fake.inspect(Workload("meta-llama/Meta-Llama-3-8B"))["embeddings"]
    assert embeddings == ["model.embed_tokens.weight", "lm_head.weight"]
    with pytest.raises(ValueError, match="no_such"):
        fake.inspect(Workload("gpt2", attention="no_such"))


def test_all_known_configurations_load():
    for name in KNOWN_MODELS:
        assert load_config(name).model_type


def test_file_directory_and_dict_are_the_same(tmp_path):
    values = {"model_type": "bert", "hidden_size": 96, "num_attention_heads": 3}
    (tmp_path / "config.json").write_text(json.dumps(values))
    for source in (values, str(tmp_path), str(tmp_path / "config.json")):
        assert load_config(source).hidden_size == 96


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("./no/such/place", "does not exist"),
        ("/no/such/config.json", "does not exist"),
        ({"hidden_size": 3}, "model_type"),
        ({"model_type": "brt"}, "brt"),
    ],
)
def test_what_is_not_a_model(source, words):
    with pytest.raises(ModelNotFound, match=words):
        load_config(source)


def test_a_misspelt_name_suggests_the_right_one(monkeypatch):
    import transformers

    def offline(name, **_):
        raise OSError("no network")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(ModelNotFound, match="did you mean 'bert-base-uncased'"):
        load_config("bert-base-uncasd")


def test_broken_files(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelNotFound, match="not a JSON"):
        load_config(str(tmp_path / "config.json"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        load_config(str(tmp_path / "empty"))


def test_all_problems_of_the_numbers_at_once():
    with pytest.raises(ValueError, match=r"batch must be.*0.*seq must be.*-1.*task.*'x'.*dtype.*'int8'"):
        Workload("bert-base-uncased", batch=0, seq=-1, task="x", dtype="int8")


@pytest.mark.parametrize(
    ("name", "task", "keys"),
    [
        ("bert-base-uncased", "auto", {"input_ids", "labels"}),
        ("bert-base-uncased", "question_answering", {"input_ids", "start_positions", "end_positions"}),
        ("gpt2", "auto", {"input_ids", "labels"}),
        ("google/vit-base-patch16-224", "auto", {"pixel_values", "labels"}),
    ],
)
def test_batches_fit_their_models(name, task, keys):
    small = {"num_hidden_layers": 1, "n_layer": 1, "hidden_size": 48, "n_embd": 48, "num_attention_heads": 2}
    small |= {"n_head": 2, "vocab_size": 100, "intermediate_size": 64}
    workload = Workload(
        name,
        batch=3,
        seq=8,
        task=task,
        dtype="fp32",
        image_size=32 if "vit" in name else None,
        overrides=small,
    )
    batch = workload.inputs(3)
    assert set(batch) == keys
    assert {len(values) for values in batch.values()} == {3}
    assert torch.isfinite(workload.build()(**batch).loss)
