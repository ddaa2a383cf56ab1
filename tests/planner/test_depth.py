"""Deep models from shallow ones against the step of all their blocks; questions that were asked before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slimfit_ds.planner import answers
from slimfit_ds.planner.depth import blocks_alike
from slimfit_ds.planner.strategies import Strategy, get_strategy
from slimfit_ds.planner.workload import Workload

SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 6}
LLAMA = {
    **SIZES,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_key_value_heads": 2,
    "vocab_size": 3000,
}
BERT = {**SIZES, "model_type": "bert", "vocab_size": 3000}
CHUNKED = {"preset": "minimal", "chunk_tokens": 64, "chunk_loss_tokens": 32}
CASES = {
    "LoRA": (LLAMA, 1, get_strategy("lora").with_(gradient_checkpointing=True)),
    "chunks, states on host": (
        LLAMA,
        1,
        Strategy(
            "a",
            0,
            slimfit={"activations": CHUNKED, "optimizer_states": {"inactive": "host", "precision": "8bit"}},
        ),
    ),
    "streamed, one resident": (
        LLAMA,
        1,
        Strategy(
            "b",
            0,
            slimfit={
                "activations": CHUNKED,
                "optimizer_states": {"active": "host"},
                "frozen_weights": {"live": "host", "resident": 1},
            },
        ),
    ),
    "four ranks": (BERT, 4, get_strategy("balanced")),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_deep_model_is_what_a_step_of_all_its_blocks_says(case, fake, fake_of_four, monkeypatch):
    config, ranks, strategy = CASES[case]
    workload = Workload(config, batch=2, seq=64, task="auto")
    simulator = fake if ranks == 1 else fake_of_four
    whole = simulator.run(workload, strategy, "worst")
    monkeypatch.setattr(simulator, "_deep", True)
    found = simulator.run(workload, strategy, "worst")
    assert simulator.run(workload, strategy, "worst") == found  # as it was kept
    assert found.error == whole.error == ""
    # Tables that codecs make once, in a first step that the shallow models need not do, are thousands of bytes.
    assert found.report.peak == pytest.approx(whole.report.peak, abs=10_000)
    for kind in (
        "parameters",
        "gradients",
        "optimizer",
        "optimizer_host",
        "parameters_host",
        "saved_activations",
    ):
        assert getattr(found.report, kind) == getattr(whole.report, kind), kind
    keys = ("flops", "copied", "parameters", "layers", "blocks", "block")
    assert [getattr(found, key) for key in keys] == [getattr(whole, key) for key in keys]


def test_an_answer_is_kept_for_this_model_and_code_only(tmp_path, monkeypatch):
    job, workload = {"strategy": "x"}, Workload(BERT)
    file = answers.place(job, workload, 1)
    assert answers.read(file) is None
    answers.write(file, {"report": 1})
    assert answers.read(file) == {"report": 1}
    assert tmp_path in file.parents
    others = [
        answers.place({"strategy": "y"}, workload, 1),
        answers.place(job, Workload({**BERT, "hidden_size": 512}), 1),
        answers.place(job, workload, 2),
    ]
    monkeypatch.setattr(answers, "_code", lambda: "edited")
    assert len({file, *others, answers.place(job, workload, 1)}) == 5
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    answers.write(answers.place(job, workload, 1), {})


class _Block(nn.Module):
    def __init__(self, width: int, layer_idx: int):
        super().__init__()
        self.one, self.two, self.layer_idx = nn.Linear(4, width), nn.Linear(width, 4), layer_idx


def test_blocks_that_differ_are_not_worked_out_from_few():
    def model(widths: list[int], counted: int | None = None) -> nn.Module:
        made = nn.Module()
        made.layers = nn.ModuleList(_Block(width, i) for i, width in enumerate(widths))
        made.config = type("Config", (), {"num_hidden_layers": counted or len(widths)})
        return made

    with torch.device("meta"):
        assert blocks_alike(model([8] * 5)) == 5
        assert blocks_alike(model([8] * 3)) == 0  # too few to gain anything
        assert blocks_alike(model([8, 8, 8, 8, 16])) == 0
        assert blocks_alike(model([8] * 5, counted=10)) == 0
        odd = model([8] * 5)
        odd.layers[2].is_sliding = True
        assert blocks_alike(odd) == 0
