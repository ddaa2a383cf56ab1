"""A block of a transformer in tiles of the sequence.

In front of its attention function and behind it a block treats tokens one by one (norms, projections, MLP); in between they meet.
So a block runs for one tile of tokens at a time up to its attention function, which then runs on the queries, keys and values
of all tiles, in groups of heads, and then each tile runs on with its part of the result. What exists of the whole sequence are the
operands and the result of the attention and what the block is given and gives; what a kernel takes inside itself, and gradients of
operands beside these, exist for one group of heads, everything else for one tile.

The code of the block is the model's own. It is stopped where it calls its attention function, by an exception; on its second way
the function hands out what is there already, and layers that lead to nothing but the attention are passed over. That it may be cut
is proven on the first batch (`tile_proof`), not assumed.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from slimfit_ds.activations.autograd_graph import Totals, heads_of
from slimfit_ds.activations.checkpoint import Replayer
from slimfit_ds.activations.hf_attention import attention_leads_to, uses_interface
from slimfit_ds.activations.replay import NotTokenwise, Piece, Tiles, is_opaque

__all__ = ["HEAD_TOKENS", "Seam", "TilePass", "seam_of"]

HEAD_TOKENS = 1 << 18
"""Tokens times heads whose attention is computed at a time, if a group of heads is enough for it: many waves of any GPU's blocks."""

_log = logging.getLogger(__name__)


def _say(block: nn.Module, against: str) -> None:
    _log.warning("%s is not cut into tiles: tokens %s", type(block).__name__, against)


class _Reached(Exception):
    """A block has come to its attention function."""


class Seam:
    """Where the tokens of a block meet: its attention function, looked up in transformers' interface.

    Args:
        block: holds modules that use the interface.
        prove: finds out whether the block may be cut, called with the block's `Call` and `Chunks`; returns what speaks against it.

    Attributes:
        verdict: whether it may; `None`: not known yet.
        report: is told why a block is not cut.
        skipped: modules that lead to nothing but the attention, with width and dtype of their results.
        head_tokens: as `HEAD_TOKENS`; `None`: heads cannot be taken apart.
    """

    def __init__(self, block: nn.Module, prove: Callable[..., str | None]):
        self._modules = [module for module in block.modules() if uses_interface(module)]
        self._prove = prove
        self.verdict: bool | None = None
        self.report: Callable[[nn.Module, str], None] = _say
        self.skipped: dict[nn.Module, tuple[int, torch.dtype]] = {}
        self.head_tokens: int | None = HEAD_TOKENS

    def may_be_cut(self, call: Any, plan: Any) -> bool:
        """Return the verdict, which is found out on the first batch."""
        if self.verdict is None:
            against = self._prove(self, call, plan)
            self.verdict = against is None
            if against is not None:
                self.refuse(call.owner, against)
        return self.verdict

    def refuse(self, block: nn.Module, against: Any) -> None:
        """Cut the block no more, and say what speaks against it: of the first batch, or of a later one that is not like it."""
        self.verdict = False
        self.report(block, f"of the sequence {against}")

    def reach(
        self, run: Callable[[], Any]
    ) -> tuple[Callable, nn.Module, Tensor, Tensor, Tensor, tuple, dict]:
        """Run until the attention function is called; return that function and its arguments."""
        caught: list[Any] = []

        def stop(
            base: Callable,
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            *args: Any,
            **kwargs: Any,
        ):
            caught.append((base, module, query, key, value, args, kwargs))
            raise _Reached

        with attention_leads_to(stop, self._modules):
            try:
                run()
            except _Reached:
                return caught[0]
        raise NotTokenwise("meet elsewhere than in an attention function of transformers' interface")

    def groups(self, operands: Sequence[Tensor], tokens: int) -> list[list[slice]]:
        """Return for each group of heads which heads of queries, keys and values `[batch, heads, ..., width]` it takes."""
        heads, shared = operands[0].shape[1], operands[1].shape[1]
        count = 1
        if self.head_tokens is not None and heads % shared == 0 and operands[2].shape[1] == shared:
            wanted = min(-(-operands[0].shape[0] * heads * tokens // self.head_tokens), shared)
            count = next(n for n in range(wanted, shared + 1) if shared % n == 0)
        sizes = [t.shape[1] // count for t in operands]
        return [[slice(i * size, (i + 1) * size) for size in sizes] for i in range(count)]

    def resume(self, run: Callable[[], Any], output: Tensor) -> Any:
        """Run with this result `[batch, tokens, heads, width]` of the attention function."""
        calls = 0

        def give(*_: Any, **__: Any) -> tuple[Tensor, None]:
            nonlocal calls
            calls += 1
            return output, None

        with attention_leads_to(give, self._modules), self._passed_over():
            results = run()
        if calls != 1:
            raise NotTokenwise(f"meet {calls} times: its attention function is called so often")
        return results

    def over(self, tiles: Tiles, run: Callable[[Sequence[Tensor]], Any], tensors: list[Tensor]) -> TilePass:
        """Return a pass of the block, as `run`, over some samples."""
        return TilePass(self, tiles, run, tensors)

    @contextlib.contextmanager
    def _passed_over(self) -> Iterator[None]:
        before = [(module, module.__dict__.get("forward")) for module in self.skipped]
        for module, (width, dtype) in self.skipped.items():
            module.__dict__["forward"] = lambda x, *_, w=width, d=dtype: x.new_zeros(
                (*x.shape[:-1], w), dtype=d
            )
        try:
            yield
        finally:
            for module, forward in before:
                if forward is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = forward


def seam_of(module: nn.Module, prove: Callable[..., str | None]) -> Seam | None:
    """Return where the tokens of a block meet; `None`: nowhere that we know."""
    seam = Seam(module, prove)
    return seam if seam._modules else None


class TilePass:
    """One pass of a block over some samples, in tiles.

    Args:
        seam: of the block.
        tiles: of the sequence.
        run: the block's forward as a function of its tensors.
        tensors: leaves, of these samples.
    """

    def __init__(
        self, seam: Seam, tiles: Tiles, run: Callable[[Sequence[Tensor]], Any], tensors: Sequence[Tensor]
    ):
        self._seam, self._tiles, self._run, self._tensors = seam, tiles, run, tensors
        self.operands: list[list[Tensor]] = []
        """Of each group of heads queries, keys and values `[batch, heads, tokens, width]` of all tokens."""

    def __len__(self) -> int:
        return len(self.bounds)

    @property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """First token and end of each tile."""
        return self._tiles.bounds

    def each(self) -> Iterator[tuple[int, tuple[int, int]]]:
        """The tiles in order: number, first token and end."""
        yield from enumerate(self.bounds)

    def part(self, index: int) -> list[Tensor]:
        """Return the leaves of one tile; what is not cut is the same leaf for all."""
        return [
            whole if part is whole else part.detach().requires_grad_(whole.requires_grad)
            for whole, part in zip(self._tensors, self._tiles.slice(self._tensors, index), strict=True)
        ]

    def in_front(self, piece: Piece, part: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of a tile."""
        return self._reach(piece, part)[2:5]

    def _reach(self, piece: Piece, part: list[Tensor]) -> Any:
        return piece(lambda: self._seam.reach(lambda: self._run(part)), part)

    def gather(self, piece: Piece) -> None:
        """Make the operands of the attention tile by tile."""
        for index, (start, stop) in self.each():
            part = self.part(index)
            base, module, *operands, args, kwargs = self._reach(piece, part)
            if any(t.dim() != 4 or t.shape[2] != stop - start for t in operands):
                raise NotTokenwise(f"attend to others than themselves: {[tuple(t.shape) for t in operands]}")
            if not index:
                groups = self._seam.groups(operands, self._tiles.tokens)
                self.operands = [
                    [
                        _longer(t[:, heads], self._tiles.tokens)
                        for t, heads in zip(operands, group, strict=True)
                    ]
                    for group in groups
                ]
                rest, structure = pytree.tree_flatten((args, kwargs), is_leaf=is_opaque)
                rest = [self._whole(leaf, part, stop - start) for leaf in rest]
                args, kwargs = pytree.tree_unflatten(rest, structure)
                self._attention = _bound(base, module, args, kwargs)
            for wholes, group in zip(self.operands, groups, strict=True):
                for whole, operand, heads in zip(wholes, operands, group, strict=True):
                    whole.detach()[:, :, start:stop].copy_(operand.detach()[:, heads])
                    whole.requires_grad_(whole.requires_grad or operand.requires_grad)

    def _whole(self, value: Any, part: list[Tensor], tokens: int) -> Any:
        """Return what the attention function is given for all tokens where it is given `value` for one tile."""
        if not isinstance(value, Tensor):
            return value
        for whole, own in zip(self._tensors, part, strict=True):
            if value is own:
                return whole
        if isinstance(value, nn.Parameter):
            return value
        if tokens in value.shape or value.grad_fn is not None:
            raise NotTokenwise("have a mask or a bias that the block makes for each tile")
        return value

    def attend(self, piece: Piece) -> list[Tensor]:
        """Return the attention's results `[batch, tokens, heads, width]` of each group of heads."""
        results = []
        for operands in self.operands:
            run = functools.partial(self._attention, *operands)
            result = piece(run, [*operands, *self._tensors])
            if result.dim() < 3 or result.shape[:2] != (operands[0].shape[0], self._tiles.tokens):
                raise NotTokenwise(
                    f"are not the second dimension of the attention's result {tuple(result.shape)}"
                )
            results.append(result)
        return results

    def behind(self, piece: Piece, part: list[Tensor], output: Tensor) -> Any:
        """Return the block's results for a tile."""
        return piece(lambda: self._seam.resume(lambda: self._run(part), output), [*part, output])

    def output_of(self, wholes: Sequence[Tensor], index: int) -> Tensor:
        """Return the leaf of one tile of the attention's results."""
        start, stop = self._tiles.bounds[index]
        own = _joined([whole.detach()[:, start:stop] for whole in wholes], 2)
        return own.requires_grad_(any(whole.requires_grad for whole in wholes))

    def forward(self, piece: Piece) -> tuple[list[Any], Any]:
        """Return the leaves of the block's results, detached, for all tokens, and their structure."""
        self.gather(piece)
        outputs = [output.detach().requires_grad_(output.requires_grad) for output in self.attend(piece)]
        self.operands, self._attention = [], None  # type: ignore[assignment]
        joined: list[Any] = []
        batch = len(outputs[0])
        for index, (start, stop) in self.each():
            results = self.behind(piece, self.part(index), self.output_of(outputs, index))
            leaves, structure = pytree.tree_flatten(results)
            if not index:
                joined = [
                    leaf.new_empty((batch, self._tiles.tokens, *leaf.shape[2:]))
                    if isinstance(leaf, Tensor) else leaf
                    for leaf in leaves
                ]  # fmt: skip
            for whole, leaf in zip(joined, leaves, strict=True):
                if not isinstance(leaf, Tensor):
                    continue
                if leaf.dim() < 2 or leaf.shape[:2] != (batch, stop - start):
                    raise NotTokenwise(f"share a result {tuple(leaf.shape)}")
                whole.detach()[:, start:stop] = leaf.detach()
                whole.requires_grad_(whole.requires_grad or leaf.requires_grad)
        return joined, structure

    def backward(
        self, gradients: Sequence[Tensor | None], total: Totals, index: int, piece: Replayer
    ) -> None:
        """Add the gradients of one chunk to the total, tile by tile: behind the attention, through it, and in front of it.

        What is in front runs twice, so that nothing of it but the attention's operands exists for all tokens.
        """
        self.gather(piece)
        for operands in self.operands:
            for operand in operands:
                operand.requires_grad_()
        with torch.enable_grad():
            outputs = self.attend(piece)
        upstream = [torch.zeros_like(output) for output in outputs]
        for tile, (start, stop) in self.each():
            part, own = self.part(tile), self.output_of(outputs, tile)
            with torch.enable_grad():
                results = self.behind(piece, part, own)
                heads, weights = heads_of(results, gradients, total.plan, index, tile)
            found = total.add(heads, weights, part, index, tile, [own] if own.requires_grad else [])
            for gradient in (gradient for gradient in found if gradient is not None):
                sizes = [whole.shape[2] for whole in upstream]
                for whole, of_group in zip(upstream, gradient.split(sizes, 2), strict=True):
                    whole[:, start:stop] = of_group
            del results, heads, weights, own, found
        if not any(output.requires_grad for output in outputs):
            return
        of_groups = []
        while outputs:
            # Gradients of a group of heads take the place of its operands, results and their gradients.
            operands = self.operands.pop(0)
            of_groups.append(
                total.add([outputs.pop(0)], [upstream.pop(0)], self._tensors, index, None, operands)
            )
        del operands, operand
        if all(gradient is None for gradient in of_groups[0]):
            return
        piece.rewind()
        for tile, (start, stop) in self.each():
            part = self.part(tile)
            with torch.enable_grad():
                made = self.in_front(piece, part)
            pairs = [
                (operand, _joined([gradient[:, :, start:stop] for gradient in of_heads], 1))
                for operand, of_heads in zip(made, zip(*of_groups, strict=True), strict=True)
                if of_heads[0] is not None and operand.requires_grad
            ]
            total.add([head for head, _ in pairs], [weight for _, weight in pairs], part, index, tile)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _bound(base: Callable, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Callable[..., Tensor]:
    return lambda *operands: base(module, *operands, *args, **kwargs)[0]


def _longer(operand: Tensor, tokens: int) -> Tensor:
    """Return room for an operand [batch, heads, ..., width] of more tokens, its dimensions in the order in memory they have."""
    batch, heads, _, width = operand.shape
    if operand.stride(1) < operand.stride(2):
        return operand.new_empty((batch, tokens, heads, width)).transpose(1, 2)
    return operand.new_empty((batch, heads, tokens, width))
