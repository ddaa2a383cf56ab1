"""FLOPs of a step by torch's own formulas, without the module hooks that torch's FlopCounterMode brings along.

Those hooks break where a function differentiates inside of its backward pass, as compressed checkpoints do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

__all__ = ["FlopCounter"]


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    # Five products instead of two: the scores again, and the gradients of q, k, v and the probabilities.
    return 5 * sdpa_flop_count(query.shape, key.shape, value.shape) // 2


# torch has no formula for the attention of CPUs.
_OWN = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of matrix products, convolutions and attention while open.

    Attributes:
        flops: so far; a multiplication and an addition count as two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        count = _OWN.get(packet) or flop_registry.get(packet)
        if count is not None:
            self.flops += int(count(*args, **(kwargs or {}), out_val=result))
        return result
