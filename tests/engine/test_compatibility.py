from __future__ import annotations

import pytest
import torch
from torch import nn

from slimfit_ds.config import SlimFitConfig
from slimfit_ds.engine.compatibility import config_problems


def problems(config: dict, model: nn.Module | None = None, **slim) -> list[str]:
    return config_problems(config, SlimFitConfig.parse(slim), model)


@pytest.mark.parametrize(
    "config",
    [
        {},
        *({"zero_optimization": {"stage": stage, "overlap_comm": True}} for stage in range(4)),
        {"bf16": {"enabled": True}, "gradient_clipping": 1.0, "communication_data_type": "bf16"},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
    ],
)
def test_accepted(config):
    assert problems(config, nn.Linear(2, 2)) == []


@pytest.mark.parametrize(
    ("config", "key", "remedy"),
    [
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage", "0, 1, 2 or 3, got 4"),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer",
            '"host"',
        ),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "'nvme'", "use 'cpu'"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "offload_param",
            "use 'cpu'",
        ),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zenflow", "remove it"),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
            "quantized",
            "set it to false",
        ),
        ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, "elastic_checkpoint", "remove it"),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            "quantized_weights",
            "to false",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}},
            "hpz_partition_size is 8",
            "use 1",
        ),
        ({"hybrid_engine": {"enabled": True}}, "hybrid_engine.enabled", "set it to false"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile", "set it to false"),
        ({"sparse_gradients": True}, "sparse_gradients", "set it to false"),
        ({"fp16": {"enabled": True, "auto_cast": True}}, "fp16.auto_cast", "cast inputs"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast.dtype", "bfloat16"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "bf16_optimizer_states", "precision"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size is 2", "in tiles on each rank"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size is 2", "use 1"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation", "boundaries"),
    ],
)
def test_refused_with_key_and_remedy(config, key, remedy):
    (problem,) = problems(config)
    assert key in problem
    assert remedy in problem


def test_stochastic_rounding_is_for_bf16():
    block = {"optimizer_states": {"bf16_weights": "stochastic_rounding"}}
    assert problems({"bf16": {"enabled": True}}, **block) == []
    (problem,) = problems({}, **block)
    assert problem.endswith("needs bf16.enabled true")


class MoE(nn.Module):
    """Named as DeepSpeed's."""


class PipelineModule(nn.Module):
    """Named as DeepSpeed's."""


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (nn.Sequential(nn.Linear(2, 2), MoE()), "MoE layers"),
        (PipelineModule(), "pipeline parallelism is not supported"),
        (torch.compile(nn.Linear(2, 2)), "compiled by torch.compile"),
    ],
)
def test_models_that_are_refused(model, text):
    (problem,) = problems({}, model)
    assert text in problem


class SharedBlocks(nn.Module):
    """Two blocks of a list that hold one weight."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
        self.layers[1][0].weight = self.layers[0][0].weight


def test_shared_blocks_are_not_recomputed_under_zero_3():
    zero3 = {"zero_optimization": {"stage": 3}}
    (problem,) = problems(zero3, SharedBlocks(), activations="minimal")
    assert "blocks 'layers.0' and 'layers.1' share weights" in problem
    assert problems(zero3, SharedBlocks(), activations="balanced") == []
    assert problems({"zero_optimization": {"stage": 1}}, SharedBlocks(), activations="minimal") == []


def test_blocks_are_not_compiled_under_zero_3():
    activations = {"preset": "minimal", "compile": True}
    (problem,) = problems({"zero_optimization": {"stage": 3}}, activations=activations)
    assert "slimfit.activations.compile is true under ZeRO stage 3" in problem
    assert problems({"zero_optimization": {"stage": 2}}, activations=activations) == []
