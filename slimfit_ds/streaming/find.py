"""What of a model is streamed, and what speaks against it."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from slimfit_ds.activations.recognise import find_blocks, has_checkpoint_hook, inside
from slimfit_ds.streaming.config import FrozenWeightsConfig
from slimfit_ds.trainable.split import SplitModule

__all__ = ["Streamed", "find_streamed", "streaming_problems"]


@dataclass(frozen=True)
class Streamed:
    """Modules, and of each the weights that live on the host.

    Attributes:
        blocks: name -> block, in model order; the output layer comes last, as one more.
        head: whether it does.
        tables: weights of word embeddings, with the embeddings that read them; one may be that of the output layer too.
        columns: of a block by its name, layers whose trained columns live on the host too.
    """

    blocks: dict[str, tuple[nn.Module, list[nn.Parameter]]]
    head: bool
    tables: list[tuple[nn.Parameter, list[nn.Embedding]]]
    columns: dict[str, list[SplitModule]]

    @property
    def weights(self) -> list[list[nn.Parameter]]:
        """What has a copy of its own on the host, each weight once."""
        found = [weights for _, weights in self.blocks.values()]
        known = {id(p) for weights in found for p in weights}
        return found + [[p] for p, _ in self.tables if id(p) not in known]


def _is_frozen(parameter: nn.Parameter) -> bool:
    return not parameter.requires_grad


def find_streamed(
    model: nn.Module, config: FrozenWeightsConfig, frozen: Callable[[nn.Parameter], bool] = _is_frozen
) -> Streamed:
    """Find the weights that never train: of blocks, of the output layer and of the word embedding.

    Vectors stay on the device, as do weights of a block that a module outside of it holds too.
    """
    holders: dict[int, list[Any]] = defaultdict(list)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)].append(module)

    def streams(parameter: nn.Parameter) -> bool:
        plain = type(parameter) in (nn.Parameter, FakeTensor) and parameter.is_contiguous()
        return plain and parameter.dim() > 1 and frozen(parameter)

    found: dict[str, tuple[nn.Module, list[nn.Parameter]]] = {}
    blocks = find_blocks(model)
    for name, block in list(blocks.items())[: max(len(blocks) - config.kept, 0)]:
        within = Counter(id(p) for module in block.modules() for p in module.parameters(recurse=False))
        # Where a block is computed again, its forward is called without the hooks around it.
        direct = {id(p) for p in block.parameters(recurse=False)} if has_checkpoint_hook(block) else set()
        parameters = [
            p
            for p in block.parameters()
            if streams(p) and id(p) not in direct and len(holders[id(p)]) == within[id(p)]
        ]
        if parameters:
            found[name] = (block, parameters)
    table, head = _ends(model, blocks)
    tables: dict[int, tuple[nn.Parameter, list[nn.Embedding]]] = {}
    has_head = False
    for end in (table, head):
        weight = None if end is None else end._parameters["weight"]
        if end is None or weight is None or not streams(weight):
            continue
        tables_of = [module for module in holders[id(weight)] if _takes_rows(module)]
        if len(tables_of) + (head in holders[id(weight)]) < len(holders[id(weight)]):
            continue  # somebody else reads it
        if tables_of:
            tables[id(weight)] = (weight, tables_of)
        if end is head:
            name = next(name for name, module in model.named_modules() if module is head)
            found[name], has_head = (head, [weight]), True
    columns: dict[str, list[SplitModule]] = {}
    if config.columns == "host":
        for name, (block, weights) in found.items():
            own = {id(p) for p in weights}
            splits = [m for m in block.modules() if isinstance(m, SplitModule) and id(m.frozen_weight) in own]
            columns[name] = [m for m in splits if not isinstance(m, nn.Embedding)]
    return Streamed(found, has_head, list(tables.values()), columns)


def _ends(model: nn.Module, blocks: dict[str, nn.Module]) -> tuple[nn.Embedding | None, nn.Linear | None]:
    """The word embedding and the output layer of a transformers model, where they are plain and outside of the blocks."""
    found = []
    for question, kind in (("get_input_embeddings", nn.Embedding), ("get_output_embeddings", nn.Linear)):
        try:
            module = getattr(model, question)()
        except (AttributeError, NotImplementedError):
            module = None
        name = next((n for n, m in model.named_modules() if m is module), "")
        plain = isinstance(module, kind) and bool(name) and not inside(name, blocks)
        found.append(
            module if plain and not (kind is nn.Linear and isinstance(module, SplitModule)) else None
        )
    return found[0], found[1]


def _takes_rows(module: nn.Module) -> bool:
    """Whether a module is an embedding that gives the same for rows, numbered from 0, as for the whole weight and ids."""
    if not isinstance(module, nn.Embedding):
        return False
    if isinstance(module, SplitModule):
        return True
    if module.max_norm is not None or "forward" in module.__dict__:
        return False
    weight, forward = module.weight, type(module).forward
    if forward is nn.Embedding.forward or weight.is_meta or isinstance(weight, FakeTensor):
        return True
    # Some scale what they look up, which is all the same.
    whole, ids = weight.data, torch.tensor([[len(weight) - 1, 0]], device=weight.device)
    try:
        with torch.no_grad():
            expected = forward(module, ids)
            weight.data = whole.index_select(0, ids[0])
            found = forward(module, torch.arange(2, device=weight.device)[None])
    except (TypeError, ValueError, LookupError, RuntimeError, AssertionError):
        return False
    finally:
        weight.data = whole
    return torch.equal(found, expected)


def streaming_problems(
    model: nn.Module,
    config: FrozenWeightsConfig,
    splits: bool,
    compiles: bool,
    states: float = 0,
    shares: bool = False,
) -> list[str]:
    """What is wrong with a `frozen_weights` block for this model, a line each; nothing is changed or loaded.

    Args:
        model: whole layers, or split ones.
        config: the block.
        splits: whether the freezing splits layers, so that a whole weight never trains.
        compiles: whether blocks run compiled.
        states: bytes of host memory that this rank's optimizer states will take.
        shares: ranks of one host will share the frozen weights.
    """
    if config.live != "host":
        return []
    problems = []
    blocks = find_blocks(model)
    found = find_streamed(model, config, (lambda p: True) if splits else _is_frozen)
    if not blocks:
        problems.append(
            f"slimfit.frozen_weights.live 'host': no repeated blocks were found in {type(model).__name__}; use 'device'"
        )
    elif config.kept >= len(blocks):
        problems.append(
            f"slimfit.frozen_weights.resident {config.kept} leaves none of the {len(blocks)} blocks to stream; lower it, "
            "or set live to 'device'"
        )
    elif len(found.blocks) == found.head:
        problems.append(
            "slimfit.frozen_weights.live 'host' is for weights that never train, and with this freeze policy every layer of "
            "the blocks trains at some step; use policy static (the default), a width below 1, or live 'device'"
        )
    if config.columns == "host" and not splits:
        problems.append(
            "slimfit.frozen_weights.columns 'host' is for layers of which columns train, and this freeze policy trains whole "
            "layers; use policy static (the default), or columns 'device'"
        )
    if compiles:
        problems.append(
            "slimfit.frozen_weights.live 'host': a compiled block holds on to its weights; set activations.compile to false"
        )
    parameters = [p for weights in found.weights for p in weights]
    if any(p.is_meta for p in parameters):
        problems.append(
            "slimfit.frozen_weights.live 'host': weights on the meta device have no values; load them by from_pretrained(..., "
            "dtype='auto'), which maps the files: their pages take no memory of their own"
        )
    elif not any(isinstance(p, FakeTensor) for p in parameters):
        # torchrun's name, and that of DeepSpeed's launcher.
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        problems += _room_problems(found.weights, states, ranks, shares)
    return problems


def _mapped_ranges() -> list[tuple[int, int]]:
    """Addresses at which files are mapped, in order: their pages are the page cache's, which gives them up."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    fields = [line.split(maxsplit=5) for line in lines]
    spans = [each[0].split("-") for each in fields if len(each) == 6 and each[5].startswith("/")]
    return [(int(start, 16), int(stop, 16)) for start, stop in spans]


def _is_mapped(parameter: nn.Parameter, ranges: Sequence[tuple[int, int]]) -> bool:
    at = bisect_right(ranges, (parameter.data_ptr(), 1 << 64)) - 1
    return at >= 0 and parameter.data_ptr() < ranges[at][1]


def _room_problems(
    blocks: Sequence[Sequence[nn.Parameter]], states: float, ranks: int, shares: bool
) -> list[str]:
    """Whether the host has room: for what is not there yet, and for one block while it is taken over, of every rank."""
    sizes = [sum(p.nbytes for p in block) for block in blocks]
    ranges = _mapped_ranges()
    new = sum(p.nbytes for block in blocks for p in block if p.device.type != "cpu" or _is_mapped(p, ranges))
    needed = new * (1 if shares else ranks) + ranks * (max(sizes, default=0) + states)
    available = psutil.virtual_memory().available
    if needed <= available:
        return []
    return [
        f"slimfit.frozen_weights.live 'host': frozen weights take {sum(sizes) / 2**30:.1f} GiB of host memory"
        f"{'' if shares or ranks == 1 else ' for each rank'}, optimizer states {states / 2**30:.1f} for each of {ranks} ranks on "
        f"this host; {needed / 2**30:.1f} GiB must be free for what is not "
        f"there yet, and {available / 2**30:.1f} GiB are; keep more blocks on the device (resident), or set live to 'device'"
    ]
