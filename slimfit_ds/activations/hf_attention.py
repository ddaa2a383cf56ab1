"""Compressed attention for transformers' models, through their attention interface.

A wrapper of each implementation is registered under its own name, with the mask function of the implementation it
wraps: an implementation without one silently gets no padding mask. Which codec a layer uses is an attribute of its
attention module, so that layers can differ.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from slimfit_ds.activations.checkpoint import compresses
from slimfit_ds.activations.codecs import Codec
from slimfit_ds.activations.ops.attention import recomputed_attention, stored_probabilities
from slimfit_ds.activations.patch import Patches
from slimfit_ds.activations.saved_tensors import saved_as_they_are

__all__ = ["AttentionSetting", "install_attention", "wrapped_implementation"]

_PREFIX = "slimfit_"
_SETTING = "_slimfit_attention"


@dataclass(frozen=True)
class AttentionSetting:
    """How one attention module stores its operands.

    Attributes:
        codec: of queries and keys; `None`: what the attention saves is left alone, also by `product`.
        values: codec of the values; `None`: they are kept as they are.
        probabilities: of the softmax output; `None`: recomputed.
        chunk_tokens: tokens recomputed at a time.
    """

    codec: Codec | None
    values: Codec | None
    probabilities: Codec | None
    chunk_tokens: int | None


def install_attention(
    patches: Patches, model: nn.Module, settings: dict[nn.Module, AttentionSetting]
) -> None:
    """Route the attention of `model` through the wrapper, with these settings by module.

    Args:
        patches: remembers what is changed.
        model: its modules' `config` objects name the implementation in use.
        settings: for modules without one, the wrapped implementation runs as it is.
    """
    if not settings:
        return
    for module, setting in settings.items():
        patches.set(module, _SETTING, setting)
    configs = {id(c): c for c in (getattr(m, "config", None) for m in model.modules()) if c is not None}
    for config in configs.values():
        base = getattr(config, "_attn_implementation", None)
        if isinstance(base, str) and not base.startswith(_PREFIX):
            patches.set(config, "_attn_implementation_internal", wrapped_implementation(base))


def wrapped_implementation(base: str) -> str:
    """The name under which the wrapper of an implementation is registered (it is, if it was not)."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = _PREFIX + base
    AttentionInterface.register(name, functools.partial(_attention, base))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _implementation(base: str, module: nn.Module) -> Callable:
    from transformers import AttentionInterface

    if base == "eager":
        # Models hand their own eager function over as a default, under this name in their own file.
        return sys.modules[type(module).__module__].eager_attention_forward
    return AttentionInterface()[base]


def _attention(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """The wrapper: same arguments and results as the implementation `base`."""
    function = functools.partial(_implementation(base, module), module)
    setting: AttentionSetting | None = module.__dict__.get(_SETTING)
    needed = query.requires_grad or key.requires_grad or value.requires_grad
    if setting is None or not needed or not compresses(module):
        return function(query, key, value, mask, **kwargs)
    if setting.codec is None:
        # Exact softmax statistics beside lossy queries and keys can overflow.
        with saved_as_they_are():
            return function(query, key, value, mask, **kwargs)
    dropout = kwargs.get("dropout") or 0.0
    if setting.probabilities is not None and not dropout and _is_plain(kwargs):
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", base == "sdpa") if causal is None else causal
        scale = kwargs.get("scaling")
        results: list[Any] = []

        def run() -> Tensor:
            results.extend(function(query, key, value, mask, **kwargs))
            return results[0]

        output = stored_probabilities(
            run,
            query,
            key,
            value,
            mask,
            query.shape[-1] ** -0.5 if scale is None else scale,
            bool(causal) and mask is None and query.shape[2] > 1,
            setting.codec,
            setting.values,
            setting.probabilities,
        )
        return (output, *results[1:])
    return recomputed_attention(
        function,
        query,
        key,
        value,
        mask,
        codec=setting.codec,
        value_codec=setting.values or False,
        chunk_tokens=setting.chunk_tokens,
        **kwargs,
    )


def _is_plain(kwargs: dict[str, Any]) -> bool:
    """Whether scores are scaled products plus a mask, without bias, soft caps or sinks."""
    special = ("position_bias", "softcap", "s_aux", "cache")
    return not any(isinstance(kwargs.get(name), Tensor) or kwargs.get(name) for name in special)
