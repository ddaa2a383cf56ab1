"""Thirty families of the zoo, and what its recorded run holds."""

from __future__ import annotations

import pytest

FAMILIES = [
    "albert",
    "arcee",
    "bart",
    "bert",
    "big_bird",
    "blenderbot",
    "cohere",
    "convbert",
    "distilbert",
    "falcon",
    "gemma",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "granite",
    "hubert",
    "llama",
    "llava",
    "mamba",
    "mistral",
    "mixtral",
    "olmoe",
    "phi",
    "qwen2_vl",
    "qwen3_moe",
    "resnet",
    "swinv2",
    "t5",
    "vit",
    "wav2vec2",
]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_setting_gives_the_loss_and_the_gradients_of_plain_pytorch(model_type):
    from zoo import SETTINGS, rows_of

    rows = list(rows_of(model_type, list(SETTINGS)))
    assert [row["setting"] for row in rows] == list(SETTINGS), rows[0]["reason"]
    bad = {row["setting"]: row["reason"] for row in rows if row["verdict"] in ("wrong", "error")}
    assert bad == {}
    assert any(row["verdict"] != "refused" for row in rows)


def test_no_cell_of_the_recorded_run_is_wrong():
    from zoo import STUDY

    rows = [row for row in STUDY.rows(proof="on") if row["verdict"] != "not built"]
    assert len({row["type"] for row in rows}) >= 300
    assert [(row["type"], row["setting"]) for row in rows if row["verdict"] in ("wrong", "error")] == []


def test_a_gradient_that_is_lost_and_one_that_is_off_are_found():
    import torch
    from zoo import difference

    expected = {"a": torch.ones(4), "b": torch.full((4,), 2.0)}
    assert difference(dict(expected), expected)[0] == 0
    assert difference({"a": torch.ones(4)}, expected)[:2] == (pytest.approx((16 / 20) ** 0.5), "b")
    off = {"a": torch.ones(4), "b": torch.full((4,), 2.2)}
    assert difference(off, expected)[2] == pytest.approx(0.1)
