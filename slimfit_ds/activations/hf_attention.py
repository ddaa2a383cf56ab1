"""The place where transformers' models look their attention function up, and compressed attention through it.

An attention module looks its function up by the name in its config:
`ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention_forward)`. While a patched module runs, that
name leads to our function, which keeps queries, keys and values compressed and calls the one that stood there. Config, name and
mask stay the model's own (models build masks by the name), and outside of such a forward pass nothing is replaced.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn

from slimfit_ds.activations.checkpoint import compresses, left_exact
from slimfit_ds.activations.codecs import Codec
from slimfit_ds.activations.ops.attention import recomputed_attention, stored_probabilities
from slimfit_ds.activations.patch import Bound, Patches
from slimfit_ds.activations.saved_tensors import saved_as_they_are

__all__ = ["AttentionSetting", "attention_leads_to", "install_attention", "uses_interface"]

Handler = Callable[..., Any]
"""Called as `handler(base, module, query, key, value, ...)` in place of `base(module, query, key, value, ...)`."""


class _Handlers(threading.local):
    def __init__(self) -> None:
        self.stack: list[Handler] = []


_handlers = _Handlers()
# By interface and name: how many contexts are open (in any thread), and the function that stood there.
_running: dict[tuple[int, str], tuple[int, Callable | None]] = {}
_lock = threading.Lock()

_SETTING = "_slimfit_attention"
_ORIGINAL = "_slimfit_attention_forward"


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


def uses_interface(module: nn.Module) -> bool:
    """Return whether a module's forward looks its attention function up in transformers' interface."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


@contextlib.contextmanager
def attention_leads_to(handler: Handler, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let attention functions that these modules (each `uses_interface`) look up be called through `handler`, in this thread."""
    with contextlib.ExitStack() as stack:
        for interface, name in {
            (id(i), n): (i, n) for i, n in map(_place, modules) if n is not None
        }.values():
            stack.enter_context(_replaced(interface, name))
        _handlers.stack.append(handler)
        try:
            yield
        finally:
            _handlers.stack.pop()


def _place(module: nn.Module) -> tuple[Any, str | None]:
    return _globals(module)["ALL_ATTENTION_FUNCTIONS"], getattr(module.config, "_attn_implementation", None)


def _globals(module: nn.Module) -> dict[str, Any]:
    """Return the names in the file of a module's forward."""
    return inspect.unwrap(type(module).forward).__globals__


@contextlib.contextmanager
def _replaced(interface: Any, name: str) -> Iterator[None]:
    where = id(interface), name
    with _lock:
        count, function = _running.get(where, (0, None))
        if not count:
            function = interface.get(name)
            interface[name] = functools.partial(_handle, where)
        _running[where] = count + 1, function
    try:
        yield
    finally:
        with _lock:
            count, function = _running.pop(where)
            if count > 1:
                _running[where] = count - 1, function
            else:
                del interface[name]
                # An override that a modeling file had made itself.
                if interface.get(name) is not function:
                    interface[name] = function


def _handle(where: tuple[int, str], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # Eager attention is no entry of the interface: models hand over that of their own file.
    base = _running[where][1] or _globals(module)["eager_attention_forward"]
    handler = _handlers.stack[-1] if _handlers.stack else None
    return base(module, *args, **kwargs) if handler is None else handler(base, module, *args, **kwargs)


def install_attention(patches: Patches, module: nn.Module, setting: AttentionSetting) -> None:
    """Let a module that `uses_interface` keep its operands as `setting` says."""
    patches.set(module, _SETTING, setting)
    patches.set(module, _ORIGINAL, module.__dict__.get("forward"))
    patches.set(module, "forward", Bound(_forward, module))


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    original = self.__dict__[_ORIGINAL] or MethodType(type(self).forward, self)
    if not (compresses(self) or left_exact(self)):
        return original(*args, **kwargs)
    with attention_leads_to(_attention, [self]):
        return original(*args, **kwargs)


def _attention(
    base: Callable,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Take the place of the attention function `base`: same arguments and results."""
    function = functools.partial(base, module)
    operands = query, key, value, attention_mask
    setting: AttentionSetting | None = module.__dict__.get(_SETTING)
    if setting is None or not any(t.requires_grad for t in operands[:3]):
        return function(*operands, **kwargs)
    if setting.codec is None or left_exact(module):
        # Exact softmax statistics beside lossy queries and keys can overflow.
        with saved_as_they_are():
            return function(*operands, **kwargs)
    if not compresses(module):
        return function(*operands, **kwargs)
    learned = attention_mask is not None and attention_mask.requires_grad
    if setting.probabilities is None or learned or kwargs.get("dropout") or not _is_plain(kwargs):
        return recomputed_attention(
            function,
            *operands,
            codec=setting.codec,
            value_codec=setting.values or False,
            chunk_tokens=setting.chunk_tokens,
            **kwargs,
        )
    causal = kwargs.get("is_causal")
    causal = (
        getattr(module, "is_causal", getattr(module.config, "_attn_implementation", None) == "sdpa")
        if causal is None
        else causal
    )
    scale = kwargs.get("scaling")
    results: list[Any] = []

    def run() -> Tensor:
        results.extend(function(*operands, **kwargs))
        return results[0]

    output = stored_probabilities(
        run,
        *operands,
        query.shape[-1] ** -0.5 if scale is None else scale,
        bool(causal) and attention_mask is None and query.shape[2] > 1,
        setting.codec,
        setting.values,
        setting.probabilities,
    )
    return (output, *results[1:])


def _is_plain(kwargs: dict[str, Any]) -> bool:
    """Return whether scores are scaled products plus a mask, without bias, soft caps or sinks."""
    special = ("position_bias", "softcap", "s_aux", "cache")
    return not any(isinstance(kwargs.get(name), Tensor) or kwargs.get(name) for name in special)
