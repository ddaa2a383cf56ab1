"""How many kernels a block of a model launches in a step, counted in Triton's interpreter on a CPU; run as `test_triton_kernels.py` is.

Two tiny models of the architecture, of one block and of two, take a step with frozen weights; their difference is one
block's. The codecs and functions choose their Triton kernels as on a GPU. Counted are launches of those, and PyTorch
operations that are neither views nor allocations. That a kernel gives exactly the values of an activation function, which
only its device can tell, is taken for granted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import INTERPRETED

from slimfit_ds.activations import attention_glue
from slimfit_ds.activations.apply import compress
from slimfit_ds.activations.config import ActivationsConfig
from slimfit_ds.activations.ops import fused_activation
from slimfit_ds.activations.ops.triton_elementwise import FORMS

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="launches are counted in Triton's interpreter"),
    pytest.mark.filterwarnings("ignore:.*(invalid value|overflow|divide by zero):RuntimeWarning"),
]
# Triton's launches of a block, forward and backward.
#   BERT: two norms, queries with keys and values, GELU, two dropouts. Llama: the same without, and `up` of gate * up.
EXPECTED = {"bert": (6, 6), "llama": (5, 6)}


SIZES = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256, "vocab_size": 50}
MODELS: dict[str, Callable[[int], nn.Module]] = {
    "bert": lambda n: hf.BertForSequenceClassification(
        hf.BertConfig(**SIZES, num_hidden_layers=n, max_position_embeddings=32)
    ),
    "llama": lambda n: hf.LlamaForCausalLM(
        hf.LlamaConfig(**SIZES, num_hidden_layers=n, num_key_value_heads=1, use_cache=False)
    ),
}
# Operations of PyTorch that launch nothing.
_ALLOCATIONS = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
}


@dataclass(frozen=True)
class Launches:
    """Of one pass: launches of our kernels, and operations of PyTorch."""

    triton: int
    torch: int

    def __sub__(self, other: Launches) -> Launches:
        return Launches(self.triton - other.triton, self.torch - other.torch)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.torch = self.triton = self._depth = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        # What the interpreter does inside a kernel is not PyTorch's.
        if not self._depth and not function.is_view and name not in _ALLOCATIONS:
            self.torch += 1
        return function(*args, **(kwargs or {}))

    @contextmanager
    def watching(self) -> Iterator[None]:
        from triton.runtime.interpreter import GridExecutor

        launch = GridExecutor.__call__

        def counted(executor, *args, **kwargs):
            self.triton += 1
            self._depth += 1
            try:
                return launch(executor, *args, **kwargs)
            finally:
                self._depth -= 1

        with mock.patch.object(GridExecutor, "__call__", counted), self:
            yield


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Everything that asks whether its Triton kernels run is told so."""

    def in_triton(x: Tensor) -> bool:
        return x.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.bool)

    modules = [m for name, m in sys.modules.items() if name.startswith("slimfit_ds.activations")]
    patches = [
        mock.patch.object(m, "runs_in_triton", in_triton) for m in modules if hasattr(m, "runs_in_triton")
    ]
    patches.append(mock.patch.object(attention_glue, "_has_formula", return_value=False))
    patches.append(mock.patch.object(fused_activation, "_form_of", lambda _, function, x: FORMS[function][0]))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def count(
    model: nn.Module, config: ActivationsConfig, trains: Callable[[str], bool]
) -> tuple[Launches, Launches]:
    """Launches of the forward and of the backward pass of the second step: the first one fills tables.

    Args:
        model: takes `input_ids` of 50 words, and `labels`.
        config: how activations are stored.
        trains: whether a parameter of this name trains; embeddings always do.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name) or "embeddings" in name or "embed_tokens" in name)
    model.train()
    handle = compress(model, config)
    ids = torch.arange(2 * 8).view(2, 8) + 1
    labels = ids if hasattr(model, "lm_head") else torch.tensor([0, 1])
    found = ()
    with as_on_a_gpu():
        for _ in range(2):
            forward, backward = _Counter(), _Counter()
            with forward.watching():
                loss = model(input_ids=ids, labels=labels).loss
            with backward.watching():
                loss.backward()
            found = Launches(forward.triton, forward.torch), Launches(backward.triton, backward.torch)
    handle.remove()
    return found


def per_block(
    model: str, config: ActivationsConfig, trains: Callable[[str], bool] = lambda name: False
) -> tuple[Launches, Launches]:
    """Launches of one block, forward and backward."""
    passes = []
    for blocks in (1, 2):
        torch.manual_seed(0)
        passes.append(count(MODELS[model](blocks).to(torch.float16), config, trains))
    return passes[1][0] - passes[0][0], passes[1][1] - passes[0][1]


@pytest.mark.parametrize("model", EXPECTED)
def test_balanced_packs_in_few_launches(model):
    plain = per_block(model, ActivationsConfig())
    forward, backward = per_block(model, ActivationsConfig(preset="balanced"))
    assert (plain[0].triton, plain[1].triton) == (0, 0)
    assert (forward.triton, backward.triton) == EXPECTED[model]
    # No operation of PyTorch is added to the forward pass; the activation function's own is gone.
    assert forward.torch <= plain[0].torch
