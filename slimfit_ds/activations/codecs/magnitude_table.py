"""Quantisers given by thresholds on the magnitude: one table look-up per element, any cells at one cost.

A bf16 value has 65,536 patterns, so a table over them is an exact quantiser for every set of thresholds that
are bf16 numbers themselves; fp32 values are truncated to their upper 16 bits, which moves no value across
such a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slimfit_ds.activations.codecs import cpu_support
from slimfit_ds.activations.codecs.base import FloatCodec, StorageLayout, chunks
from slimfit_ds.activations.codecs.channel_affine import ChannelAffine
from slimfit_ds.activations.codecs.cpu_support import runs_in_c
from slimfit_ds.activations.codecs.packing import (
    byte_table,
    gather_bytes,
    pack_planes,
    packed_bytes,
    split_planes,
    unpack_planes,
)
from slimfit_ds.activations.codecs.triton_support import runs_in_triton

__all__ = ["MagnitudeCells", "MagnitudeTableCodec", "bf16_pattern"]


@dataclass(frozen=True)
class MagnitudeCells:
    """Cells of a scalar quantiser and the value that each stands for.

    Attributes:
        bits: width of a code: 1, 2, 4 or 5.
        thresholds: ascending positive bf16 values; a value's interval is the number of thresholds that its
            magnitude reaches.
        levels: what each of the 2^bits codes decodes to.
        signed: the sign bit selects the upper half of the codes. Otherwise negative values fall into interval 0.
        cells: the cell of each interval, where several intervals share one; by default each is its own.
    """

    bits: int
    thresholds: tuple[float, ...]
    levels: tuple[float, ...]
    signed: bool = True
    cells: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.cells:
            object.__setattr__(self, "cells", tuple(range(len(self.thresholds) + 1)))
        count = (1 << self.bits) // (2 if self.signed else 1)
        if (
            len(self.cells) != len(self.thresholds) + 1
            or set(self.cells) != set(range(count))
            or len(self.levels) != 1 << self.bits
        ):
            raise ValueError(
                f"{self.bits} bits need {count} cells, each with an interval between thresholds, and "
                f"{1 << self.bits} levels, got {len(self.thresholds)} thresholds, cells {self.cells} "
                f"and {len(self.levels)} levels"
            )
        patterns = [bf16_pattern(t) for t in self.thresholds]
        if patterns != sorted(set(patterns)) or (patterns and patterns[0] <= 0):
            raise ValueError(
                f"thresholds must be positive and ascend by distinct bf16 values, got {self.thresholds}"
            )


def bf16_pattern(value: float) -> int:
    """The 16 bits of the bf16 number nearest to a value >= 0; they ascend with the value."""
    return int(torch.tensor(value).to(torch.bfloat16).view(torch.int16))


class MagnitudeTableCodec(FloatCodec):
    """Stores the cell of each element.

    Infinities and NaN fall into the outermost cell of their sign bit: the codec saturates. With a stored
    root mean square they turn the whole tensor into NaN instead.

    Args:
        name: the registered name.
        cells: thresholds and levels.
        rms_scaled: cells and levels are in units of the tensor's root mean square, which is stored as fp32.
    """

    def __init__(self, name: str, cells: MagnitudeCells, rms_scaled: bool = False):
        self.name = name
        self.cells = cells
        self.rms_scaled = rms_scaled
        self.fuses_channels = not rms_scaled
        self._tables: dict[Hashable, Tensor] = {}

    @property
    def fits_kernels(self) -> bool:
        """Whether kernels that compute something else too can pack by it: no sum over the tensor comes first."""
        return not self.rms_scaled

    def storage(self, numel: int, dtype: torch.dtype) -> StorageLayout:
        codes = (torch.uint8, packed_bytes(numel, self.cells.bits))
        return (codes, (torch.float32, 1)) if self.rms_scaled else (codes,)

    def _encode(self, flat: Tensor, kept: tuple[Tensor, ...], generator: torch.Generator | None) -> None:
        if runs_in_triton(flat):
            self.encode_in_triton(flat, kept, generator)
            return
        packed = kept[0]
        bits = self.cells.bits
        inverse = self._store_rms(flat, kept)
        table = self._code_table(flat.device)
        if inverse is None and runs_in_c(flat, bits):
            cpu_support.encode_table(flat, packed, table, bits=bits)
            return
        planes = split_planes(packed, flat.numel(), bits)
        for start, stop in chunks(flat.numel(), flat.device, 8):
            block = flat[start:stop] if inverse is None else flat[start:stop] * inverse
            index = _upper_half(block).to(torch.int32)
            codes = table.index_select(0, index)
            pack_planes(F.pad(codes, (0, -len(codes) % 8)), start, stop, planes)

    def _decode(self, kept: tuple[Tensor, ...], out: Tensor) -> None:
        if runs_in_triton(out):
            self.decode_in_triton(kept, out)
            return
        if not self.rms_scaled and runs_in_c(out, self.cells.bits):
            levels = self.levels(out.device, out.dtype)
            cpu_support.decode_table(kept[0], levels, out, bits=self.cells.bits)
            return
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
        """Its inverse, fp32 [1], where the codec is scaled by it."""
        if not self.rms_scaled:
            return None
        norm = torch.linalg.vector_norm(flat, dtype=torch.promote_types(flat.dtype, torch.float32))
        kept[1].copy_(norm / math.sqrt(flat.numel()))
        return torch.where(kept[1] > 0, kept[1].reciprocal(), 0.0)

    def encode_in_triton(
        self,
        flat: Tensor,
        kept: tuple[Tensor, ...],
        generator: torch.Generator | None,
        channels: ChannelAffine | None = None,
    ) -> None:
        from slimfit_ds.activations.codecs.triton_table import encode_table

        inverse = self._store_rms(flat, kept)
        search = self.search_tables(flat.device)
        cells = self.cells
        encode_table(flat, kept[0], *search, inverse, channels, bits=cells.bits, signed=cells.signed)

    def decode_in_triton(
        self, kept: tuple[Tensor, ...], out: Tensor, channels: ChannelAffine | None = None
    ) -> None:
        from slimfit_ds.activations.codecs.triton_table import decode_table

        levels = self.levels(out.device, out.dtype)
        rms = kept[1] if self.rms_scaled else None
        decode_table(kept[0], levels, rms, out, channels, bits=self.cells.bits)

    def search_tables(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """For a binary search of k steps: bf16 patterns of the thresholds, int32 [2^k - 1], filled up with what no
        magnitude reaches; cell of each interval, int32 [2^k], or None where each is its own."""
        key = device, "search"
        if key not in self._tables:
            patterns = [bf16_pattern(t) for t in self.cells.thresholds]
            intervals = 1 << len(patterns).bit_length()
            patterns += [1 << 15] * (intervals - 1 - len(patterns))
            self._tables[key] = torch.tensor(patterns, dtype=torch.int32, device=device)
            cells = [*self.cells.cells, *[0] * (intervals - len(self.cells.cells))]
            self._tables[device, "cells"] = torch.tensor(cells, dtype=torch.int32, device=device)
        own = self.cells.cells == tuple(range(len(self.cells.cells)))
        return self._tables[key], None if own else self._tables[device, "cells"]

    def levels(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[2^bits]: the levels, rounded once."""
        key = device, dtype
        if key not in self._tables:
            self._tables[key] = torch.tensor(self.cells.levels, dtype=torch.float64).to(dtype).to(device)
        return self._tables[key]

    def _code_table(self, device: torch.device) -> Tensor:
        """uint8 [65536]: the code of each bf16 pattern."""
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
        """[256, 8 / bits]: the levels in each packed byte."""
        key = device, dtype, "bytes"
        if key not in self._tables:
            self._tables[key] = byte_table(self.levels(device, dtype), self.cells.bits)
        return self._tables[key]


def _upper_half(x: Tensor) -> Tensor:
    """The upper 16 bits of each value as fp32: uint16 [n], strided for fp32."""
    if x.dtype == torch.bfloat16:
        return x.view(torch.uint16)
    return x.float().view(torch.uint16)[1::2]
