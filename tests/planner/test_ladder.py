"""The ladder keeps what the user fixed."""

from slimfit_ds.config import SlimFitConfig
from slimfit_ds.planner.ladder import ERROR_CLASSES, ladder, merged


def test_every_rung_is_a_valid_block():
    for rung in ladder():
        block = merged(None, rung, ("embed.weight",))
        config = SlimFitConfig.parse(block)
        assert config.activations.preset == rung.preset
        assert rung.preset in ERROR_CLASSES


def test_fixed_values_survive_and_rungs_stay_distinct():
    fixed = {"freeze": {"rate": 0.5, "policy": "random"}, "activations": "lean", "memory_budget": "1GB"}
    rungs = ladder(fixed)
    assert 1 <= len(rungs) < len(ladder())
    seen = []
    for rung in rungs:
        block = merged(fixed, rung, ("embed.weight",))
        config = SlimFitConfig.parse(block)
        assert config.freeze.rate == 0.5
        assert config.freeze.policy == "random"
        assert config.activations.preset == "lean"
        assert config.memory_budget is None
        assert block not in seen
        seen.append(block)


def test_stage_3_has_no_8_bit_states():
    for rung in ladder(stage=3):
        assert "precision" not in merged(None, rung)["optimizer_states"]


def test_embeddings_are_named_or_left_out():
    blocks = [merged(None, rung, ("a.weight", "b.weight")) for rung in ladder()]
    assert any(block["freeze"].get("never_active") == ["a.weight", "b.weight"] for block in blocks)
    assert all("never_active" not in merged(None, rung)["freeze"] for rung in ladder())


def test_only_a_language_model_gets_its_loss_in_chunks():
    plain, language = ladder(), ladder(language_model=True)
    assert all("chunk_loss_tokens" not in rung.changes["activations"] for rung in plain)
    assert len(language) == len(plain) + 1
    chunked = [rung for rung in language if "chunk_loss_tokens" in rung.changes["activations"]]
    assert chunked == language[-len(chunked) :]  # once it is in chunks it stays so
    assert chunked[0].changes["activations"]["preset"] == "balanced"
    assert all("loss in chunks" in rung.label for rung in chunked)
    # Without them the settings are those of any model.
    assert {rung.label.replace(", loss in chunks", "") for rung in language} == {r.label for r in plain}
    assert SlimFitConfig.parse(merged(None, chunked[0])).activations.chunk_loss_tokens == 1024


def test_a_stated_chunk_of_the_loss_is_kept():
    fixed = {"activations": {"chunk_loss_tokens": 256}}
    for rung in ladder(fixed, language_model=True):
        assert merged(fixed, rung)["activations"]["chunk_loss_tokens"] == 256
