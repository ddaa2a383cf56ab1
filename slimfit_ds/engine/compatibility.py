"""What the freeze-aware engine works with; everything else is refused before anything is built.

The table in docs/composability.md says the same in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from slimfit_ds.activations.recognise import find_blocks
from slimfit_ds.config import SlimFitConfig

__all__ = ["config_problems"]


def _get(config: Mapping[str, Any], *path: str) -> Any:
    value: Any = config
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _offloads(config: Mapping[str, Any], what: str) -> bool:
    device = _get(config, "zero_optimization", what, "device")
    return _get(config, "zero_optimization", what) is not None and device not in (None, "none")


def _on(config: Mapping[str, Any], block: str) -> bool:
    return bool(_get(config, block, "enabled"))


def config_problems(config: Mapping[str, Any], slim: SlimFitConfig, model: nn.Module | None) -> list[str]:
    """Every setting of a DeepSpeed configuration that freezing cannot be combined with.

    Args:
        config: the DeepSpeed configuration.
        slim: its parsed `"slimfit"` block.
        model: the model, where there is one already.

    Returns:
        A line each: the key, its value, the remedy. Empty: all is well.
    """
    problems: list[str] = []
    stage = _get(config, "zero_optimization", "stage") or 0
    zero3 = stage == 3

    def refuse(condition: Any, text: str) -> None:
        if condition:
            problems.append(text)

    refuse(stage not in (0, 1, 2, 3), f"zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}")
    refuse(
        not zero3 and _offloads(config, "offload_optimizer"),
        "zero_optimization.offload_optimizer keeps stale gradients of frozen layers on the host: "
        'remove it and set "slimfit": {"optimizer_states": {"inactive": "host"}}',
    )
    for what in ("offload_optimizer", "offload_param"):
        refuse(
            zero3 and _get(config, "zero_optimization", what, "device") == "nvme",
            f"zero_optimization.{what}.device 'nvme' cannot skip frozen layers: use 'cpu'",
        )
    refuse(
        slim.optimizer_states.bf16_weights != "master" and not _on(config, "bf16"),
        "slimfit.optimizer_states.bf16_weights 'stochastic_rounding' needs bf16.enabled true",
    )
    for path, remedy in (
        (("zero_optimization", "zenflow"), "remove it: ZenFlow chooses what to update itself"),
        (("zero_optimization", "zero_quantized_gradients"), "set it to false"),
        (("zero_optimization", "zero_quantized_weights"), "set it to false"),
        (("zero_optimization", "zero_quantized_nontrainable_weights"), "set it to false"),
        (
            ("zero_optimization", "elastic_checkpoint"),
            "remove it: SlimFit checkpoints reload on any world size",
        ),
        (("zero_optimization", "offload_optimizer", "super_offload"), "set it to false"),
        (("hybrid_engine", "enabled"), "set it to false"),
        (
            ("compile", "deepcompile"),
            "set it to false: a graph compiled for one active set is wrong for the next",
        ),
        (("sparse_gradients",), "set it to false"),
        (("fp16", "auto_cast"), "cast inputs in the model instead"),
        (("fp16", "fp16_master_weights_and_grads"), "remove it: masters are float32"),
        (("bf16", "bf16_master_weights_and_grads"), "set slimfit.optimizer_states.bf16_weights instead"),
        (("bf16", "bf16_optimizer_states"), "set slimfit.optimizer_states.precision instead"),
    ):
        value = _get(config, *path)
        refuse(value, f"{'.'.join(path)} is {value!r}, which freezing does not support: {remedy}")
    refuse(
        _on(config, "torch_autocast") and _get(config, "torch_autocast", "dtype") in ("float16", "fp16"),
        f"torch_autocast.dtype is {_get(config, 'torch_autocast', 'dtype')!r}, which would train without loss "
        "scaling: use 'bfloat16', or fp16.enabled",
    )
    refuse(
        zero3 and slim.activations.compile,
        "slimfit.activations.compile is true under ZeRO stage 3, whose hooks gather the weights of each module: "
        "set it to false, or use stage 1 or 2",
    )
    streams3 = zero3 and slim.frozen_weights.live != "device"
    refuse(
        streams3 and slim.frozen_weights.columns == "host",
        "slimfit.frozen_weights.columns 'host' under ZeRO stage 3, which cuts trained columns over the ranks: set 'device'",
    )
    refuse(
        streams3 and _offloads(config, "offload_param"),
        "zero_optimization.offload_param with slimfit.frozen_weights, whose weights are on the host already: remove it",
    )
    refuse(
        streams3 and model is not None and any(hasattr(p, "ds_id") for p in model.parameters()),
        f"slimfit.frozen_weights.live {slim.frozen_weights.live!r}: the model was cut while it was made (deepspeed.zero.Init, which "
        "transformers uses once it knows of stage 3); load it before, by from_pretrained(..., dtype='auto'), which maps the files",
    )
    hpz = _get(config, "zero_optimization", "zero_hpz_partition_size") or 1
    refuse(
        hpz > 1,
        f"zero_optimization.zero_hpz_partition_size is {hpz}: a second cut of the weights is untested, use 1",
    )
    tensor_parallel = _get(config, "tensor_parallel", "autotp_size") or 0
    refuse(
        tensor_parallel > 1,
        f"tensor_parallel.autotp_size is {tensor_parallel}: layers cut over ranks are not supported, use 1",
    )
    sequence_parallel = _get(config, "sequence_parallel_size") or 1
    refuse(
        sequence_parallel > 1,
        f"sequence_parallel_size is {sequence_parallel}: gradients, statistics and the loss are summed over data-parallel ranks "
        "only, not over those that share a sequence; use 1, and for long sequences activations minimal with offload, which "
        "runs them in tiles on each rank",
    )
    refuse(
        _get(config, "managed_gradient_accumulation") is False,
        "managed_gradient_accumulation is false: the active set changes at boundaries that DeepSpeed counts",
    )
    refuse(
        _on(config, "bf16") and _get(config, "bf16", "check_grad_overflow") is False,
        "bf16.check_grad_overflow is false: a step whose gradients are not finite is always left out, remove the key",
    )
    if model is not None:
        problems += _model_problems(model)
        if zero3 and slim.activations.table().block != "exact":
            problems += _shared_block_weights(model)
    return problems


def _shared_block_weights(model: nn.Module) -> list[str]:
    """Under ZeRO 3 the gradients that two recomputed blocks give one weight are not added up."""
    owner: dict[int, str] = {}
    for block, module in find_blocks(model).items():
        for parameter in module.parameters():
            first = owner.setdefault(id(parameter), block)
            if first != block:
                return [
                    f"blocks {first!r} and {block!r} share weights, which recomputation under ZeRO stage 3 does "
                    "not support: use another stage, or an activations preset that recomputes no blocks"
                ]
    return []


def _model_problems(model: nn.Module) -> list[str]:
    problems = []
    classes = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    if "PipelineModule" in classes:
        problems.append(
            "the model is a deepspeed PipelineModule: pipeline parallelism is not supported, pass a plain module"
        )
    if "MoE" in classes or "MOELayer" in classes:
        problems.append(
            "the model holds deepspeed MoE layers: expert parallelism is not supported "
            "(experts of transformers models are, as ordinary layers)"
        )
    if "OptimizedModule" in classes:
        problems.append(
            "the model is compiled by torch.compile, and what is put into its blocks cannot be traced: pass the plain model, and "
            "set slimfit.activations.compile to true to compile the blocks"
        )
    return problems
