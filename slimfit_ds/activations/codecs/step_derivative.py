"""The derivative of an activation function as a step function: 5, 4 or 1 bits instead of the input.

The backward of `f` needs only `f'(x)`. Storing which of a few cells `x` lies in, and multiplying by the mean
of `f'` over that cell, costs fewer bits for the same error than storing `x` coarsely and evaluating `f'` there.

Cells are given by thresholds on the magnitude. A bf16 value has 65,536 patterns, so a table over them finds the cell
exactly for every set of thresholds that are bf16 numbers themselves, at one look-up per element; fp32 values are
truncated to their upper 16 bits, which moves no value across such a threshold.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from slimfit_ds.activations.codecs.base import FloatCodec, StorageLayout, chunks
from slimfit_ds.activations.codecs.packing import (
    byte_table,
    gather_bytes,
    pack_planes,
    packed_bytes,
    split_planes,
    unpack_planes,
)

__all__ = ["ACTIVATIONS", "Activation", "Cells", "StepDerivative", "find_activation", "fit_cells"]


@dataclass(frozen=True)
class Activation:
    """An activation function as its derivative.

    Attributes:
        derivative: f' on float64 tensors.
        antisymmetric: f'(-x) = 1 - f'(x); otherwise f' is 0 for x <= 0.
        scales_with_input: f'(s x) = s f'(x) for s > 0, so that cells fitted to N(0, 1) need the data's scale.
    """

    derivative: Callable[[Tensor], Tensor]
    antisymmetric: bool = True
    scales_with_input: bool = False


def _gelu(x: Tensor) -> Tensor:
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(x) + x * density


def _gelu_tanh(x: Tensor) -> Tensor:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    return 0.5 * (1 + torch.tanh(inner)) + 0.5 * x * (1 - torch.tanh(inner) ** 2) * slope


def _sigmoid_weighted(x: Tensor, beta: float) -> Tensor:
    gate = torch.sigmoid(beta * x)
    return gate * (1 + beta * x * (1 - gate))


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(_gelu),
    "gelu_tanh": Activation(_gelu_tanh),
    "silu": Activation(lambda x: _sigmoid_weighted(x, 1.0)),
    "quick_gelu": Activation(lambda x: _sigmoid_weighted(x, 1.702)),
    "relu": Activation(lambda x: (x > 0).to(x.dtype), antisymmetric=False),
    "relu2": Activation(lambda x: 2 * torch.relu(x), antisymmetric=False, scales_with_input=True),
}
_ALIASES = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}


def find_activation(name: str) -> Activation:
    """Return the activation of that name or alias.

    Raises:
        ValueError: the name is unknown.
    """
    known = {**ACTIVATIONS, **{alias: ACTIVATIONS[target] for alias, target in _ALIASES.items()}}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown activation {name!r}{hint} Known: {', '.join(sorted(known))}")
    return known[name]


@dataclass(frozen=True)
class Cells:
    """Cells of a scalar quantiser and the value that each stands for.

    Attributes:
        bits: width of a code.
        thresholds: ascending positive bf16 values; a value's interval is the number of thresholds that its
            magnitude reaches.
        levels: what each of the 2^bits codes decodes to.
        cells: the cell of each interval; several intervals may share one.
        signed: the sign bit selects the upper half of the codes. Otherwise negative values fall into interval 0.
    """

    bits: int
    thresholds: tuple[float, ...]
    levels: tuple[float, ...]
    cells: tuple[int, ...]
    signed: bool = True


def bf16_pattern(value: float) -> int:
    """Return the 16 bits of the bf16 number nearest to a value >= 0; they ascend with the value."""
    return int(torch.tensor(value).to(torch.bfloat16).view(torch.int16))


class StepDerivative(FloatCodec):
    """Encode `x` as the cell it lies in; decode to the approximate `f'(x)`.

    Infinities and NaN saturate: they decode to the outermost level of their sign. For relu2, whose derivative
    scales with its input, cells and levels are in units of the tensor's root mean square, which is stored as fp32 beside
    the cells; a tensor with a non-finite element then decodes to NaN.

    Args:
        activation: a name in `ACTIVATIONS` or an alias of transformers (gelu_new, swish).
        bits: 1, 4 or 5.
        scale: standard deviation of the inputs that the cells are fitted to, N(0, scale^2).
    """

    def __init__(self, activation: str, bits: int = 4, scale: float = 1.0):
        function = find_activation(activation)
        if bits not in (1, 4, 5):
            raise ValueError(f"bits must be 1, 4 or 5, got {bits}")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}")
        self.activation = _ALIASES.get(activation, activation)
        self.name = f"{activation}_step{bits}"
        self.cells = fit_cells(function, bits, float(scale))
        self.rms_scaled = function.scales_with_input
        self._tables: dict[Hashable, Tensor] = {}

    @property
    def fits_kernels(self) -> bool:
        """Whether kernels that compute something else too can pack by it: no sum over the tensor comes first."""
        return not self.rms_scaled

    def storage(self, numel: int, dtype: torch.dtype) -> StorageLayout:
        codes = (torch.uint8, packed_bytes(numel, self.cells.bits))
        return (codes, (torch.float32, 1)) if self.rms_scaled else (codes,)

    def _encode(self, flat: Tensor, kept: tuple[Tensor, ...]) -> None:
        packed = kept[0]
        bits = self.cells.bits
        inverse = self._store_rms(flat, kept)
        table = self.code_table(flat.device)
        planes = split_planes(packed, flat.numel(), bits)
        for start, stop in chunks(flat.numel(), flat.device, 8):
            block = flat[start:stop] if inverse is None else flat[start:stop] * inverse
            codes = table.index_select(0, _upper_half(block).to(torch.int32))
            pack_planes(F.pad(codes, (0, -len(codes) % 8)), start, stop, planes)

    def _decode(self, kept: tuple[Tensor, ...], out: Tensor) -> None:
        planes = split_planes(kept[0], out.numel(), self.cells.bits)
        for start, stop in chunks(out.numel(), out.device, 8):
            whole = -(-(stop - start) // 8) * 8
            target = out[start:stop] if whole == stop - start else out.new_empty(whole)
            self._gather(planes, start, stop, target)
            if self.rms_scaled:
                target.mul_(kept[1])
            if whole != stop - start:
                out[start:stop] = target[: stop - start]

    def _gather(self, planes: tuple[tuple[int, Tensor], ...], start: int, stop: int, target: Tensor) -> None:
        """Fill `target`, at least `stop - start` long, with the levels of the elements `start` to `stop`."""
        if len(planes) > 1:
            codes = unpack_planes(planes, start, stop).to(torch.int32)
            torch.index_select(self.levels(target.device, target.dtype), 0, codes, out=target)
            return
        width, plane = planes[0]
        block = plane[start * width // 8 : -(-stop * width // 8)]
        gather_bytes(block, self._byte_table(target.device, target.dtype), target[: len(block) * 8 // width])

    def _store_rms(self, flat: Tensor, kept: tuple[Tensor, ...]) -> Tensor | None:
        """Store the root mean square and return its inverse, fp32 [1], where the codec is scaled by it."""
        if not self.rms_scaled:
            return None
        norm = torch.linalg.vector_norm(flat, dtype=torch.promote_types(flat.dtype, torch.float32))
        kept[1].copy_(norm / math.sqrt(flat.numel()))
        return torch.where(kept[1] > 0, kept[1].reciprocal(), 0.0)

    def _encode_in_triton(self, flat: Tensor, kept: tuple[Tensor, ...]) -> None:
        from slimfit_ds.activations.codecs.triton_table import encode_table

        encode_table(flat, kept[0], self, self._store_rms(flat, kept))

    def _decode_in_triton(self, kept: tuple[Tensor, ...], out: Tensor) -> None:
        from slimfit_ds.activations.codecs.triton_table import decode_table

        decode_table(kept[0], out, self, kept[1] if self.rms_scaled else None)

    def levels(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the levels [2^bits], rounded once."""
        key = device, dtype
        if key not in self._tables:
            self._tables[key] = torch.tensor(self.cells.levels, dtype=torch.float64).to(dtype).to(device)
        return self._tables[key]

    def code_table(self, device: torch.device) -> Tensor:
        """Return the code of each bf16 pattern, uint8 [65536]."""
        key = device, "codes"
        if key not in self._tables:
            magnitude = torch.arange(1 << 15)
            thresholds = torch.tensor([bf16_pattern(t) for t in self.cells.thresholds], dtype=torch.int64)
            interval = torch.bucketize(magnitude, thresholds, right=True)
            code = torch.tensor(self.cells.cells, dtype=torch.uint8)[interval]
            negative = code + (1 << (self.cells.bits - 1)) if self.cells.signed else torch.zeros_like(code)
            self._tables[key] = torch.cat([code, negative]).to(device)
        return self._tables[key]

    def _byte_table(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the levels in each packed byte [256, 8 / bits]."""
        key = device, dtype, "bytes"
        if key not in self._tables:
            self._tables[key] = byte_table(self.levels(device, dtype), self.cells.bits)
        return self._tables[key]


def _upper_half(x: Tensor) -> Tensor:
    """Return the upper 16 bits of each value as fp32: uint16 [n], strided for fp32."""
    if x.dtype == torch.bfloat16:
        return x.view(torch.uint16)
    return x.float().view(torch.uint16)[1::2]


@cache
def fit_cells(activation: Activation, bits: int, scale: float = 1.0) -> Cells:
    """Return the cells of least mean squared error of f' for x ~ N(0, scale^2) among all with bf16 thresholds.

    The optimal quantiser of the value f'(x): by dynamic programming over the intervals between the bf16 numbers
    from 2^-6 to 8 standard deviations, sorted by their mean of f'. Where f' rises and falls (GELU has its peak at
    sqrt(2)), intervals on both sides share a cell.

    Args:
        activation: the function.
        bits: 1, 4 or 5.
        scale: standard deviation of the inputs.
    """
    candidates = _bf16_range(scale * 2.0**-6, scale * 8)
    edges = torch.cat(
        [torch.zeros(1, dtype=torch.float64), candidates, candidates.new_tensor([12.0 * scale])]
    )
    weight, first, second = _moments(activation.derivative, edges, scale)
    # The far tail has no weight that fp64 could divide by; its value is that of its middle.
    value = torch.where(weight > 1e-30, first / weight, activation.derivative((edges[1:] + edges[:-1]) / 2))
    order = value.argsort(stable=True)
    sums = [torch.cat([m.new_zeros(1), m[order].cumsum(0)]) for m in (weight, first, second)]
    count = 1 << (bits - 1) if activation.antisymmetric else (1 << bits) - 1
    bounds = _best_partition(sums[0], sums[1], sums[2], count)
    cell_of = torch.empty_like(order)
    means = []
    for cell, (start, stop) in enumerate(pairwise(bounds)):
        cell_of[order[start:stop]] = cell
        means.append(float(first[order[start:stop]].sum() / weight[order[start:stop]].sum()))
    changes = (cell_of[1:] != cell_of[:-1]).nonzero().flatten() + 1
    thresholds = [float(edges[i]) for i in changes]
    cells = [int(cell_of[0]), *(int(cell_of[i]) for i in changes)]
    if activation.antisymmetric:
        levels = means + [1 - m for m in means]
        return Cells(bits, tuple(thresholds), tuple(levels), tuple(cells))
    # Not antisymmetric: f' is 0 for x <= 0, which takes the first cell.
    smallest = float(torch.tensor([1], dtype=torch.int16).view(torch.bfloat16))
    shifted = (0, *(cell + 1 for cell in cells))
    return Cells(bits, (smallest, *thresholds), (0.0, *means), shifted, signed=False)


def _bf16_range(low: float, high: float) -> Tensor:
    """Return every bf16 number from `low` to `high`, as float64."""
    patterns = torch.arange(bf16_pattern(low), bf16_pattern(high) + 1, dtype=torch.int16)
    return patterns.view(torch.bfloat16).to(torch.float64)


def _moments(derivative: Callable[[Tensor], Tensor], edges: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Return the integrals of p, p f' and p f'^2 over each interval between `edges` [n + 1], p the density of N(0, scale^2).

    By Gauss's rule with three nodes, whose error is far below fp32 resolution on intervals this narrow.
    """
    node = math.sqrt(0.6)
    half = (edges[1:] - edges[:-1]) / 2
    x = (edges[1:] + edges[:-1])[:, None] / 2 + half[:, None] * edges.new_tensor([-node, 0, node])
    weight = half[:, None] * edges.new_tensor([5 / 9, 8 / 9, 5 / 9])
    weight = weight * torch.exp(-((x / scale) ** 2) / 2) / (scale * math.sqrt(2 * math.pi))
    slope = derivative(x)
    return weight.sum(1), (weight * slope).sum(1), (weight * slope**2).sum(1)


def _best_partition(weight: Tensor, first: Tensor, second: Tensor, cells: int) -> list[int]:
    """Return the bounds [cells + 1] of the consecutive cells with the least summed squared error.

    Args:
        weight, first, second: cumulated moments [n + 1] of the n elementary intervals.
        cells: how many cells to form, at most n.
    """

    def difference(m: Tensor) -> Tensor:
        return m[None, :] - m[:, None]

    error = difference(second) - difference(first) ** 2 / difference(weight).clamp_min(1e-300)
    below = torch.ones_like(error, dtype=torch.bool).tril()
    error = error.clamp_min(0).masked_fill_(below, math.inf)
    best = error[0]
    choices = []
    for _ in range(cells - 1):
        best, choice = (best[:, None] + error).min(0)
        choices.append(choice)
    bounds = [len(weight) - 1]
    for choice in reversed(choices):
        bounds.append(int(choice[bounds[-1]]))
    return [0, *bounds[::-1]]
