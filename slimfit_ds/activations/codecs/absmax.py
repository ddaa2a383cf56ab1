"""Group-wise absmax integers: each group of consecutive elements shares one 16-bit scale."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from slimfit_ds.activations.codecs.base import TINY_PEAK, Encoded, FloatCodec, StorageLayout, chunks
from slimfit_ds.activations.codecs.packing import (
    byte_table,
    gather_bytes,
    pack_planes,
    packed_bytes,
    split_planes,
    unpack_planes,
)

__all__ = ["AbsmaxCodec"]

# Elements of a part of a tensor that is encoded part by part: 8 MiB in fp32. A few such temporaries stay in a CPU's
# last-level cache.
_PART = 1 << 21


class AbsmaxCodec(FloatCodec):
    """Round each group of consecutive elements to integers times a bf16 step.

    A code stands for `(code - zero) * step`, with `step = absmax / half_width` and integers from -half_width to
    half_width. Groups run along the elements in memory order; the last one may be shorter. The step is rounded up to
    bf16, so no element is clipped and, with `step <= absmax / half_width * (1 + 2^-7)`, the error is at most half a step.

    A group that holds an infinity or a NaN decodes to NaN throughout (its codes are unspecified), so that an
    overflow stays visible. A group whose absmax is below 2^-100 decodes to zeros.

    Args:
        name: the registered name.
        bits: width of a code: 8 (stored as int8), 6 or 4.
        group: elements per scale, a multiple of 8 of at most 1024.
    """

    def __init__(self, name: str, bits: int, group: int):
        if not 8 <= group <= 1024 or group % 8:
            raise ValueError(f"group must be a multiple of 8 from 8 to 1024, got {group}")
        self.name = name
        self.bits = bits
        self.group = group
        self.half_width = (1 << (bits - 1)) - 1
        self.zero = 0 if bits == 8 else self.half_width
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def fits_kernels(self) -> bool:
        """Whether kernels that compute something else too can pack by it: a group is a row of a tile."""
        return self.group & (self.group - 1) == 0

    def storage(self, numel: int, dtype: torch.dtype) -> StorageLayout:
        codes = torch.int8 if self.bits == 8 else torch.uint8
        return (codes, packed_bytes(numel, self.bits)), (torch.bfloat16, -(-numel // self.group))

    def row_parts(self, rows: int, width: int) -> list[tuple[int, int]]:
        # Where groups cross rows there is one part.
        size = max(1, _PART // max(width, 1)) if width % self.group == 0 else max(rows, 1)
        return [(start, min(start + size, rows)) for start in range(0, max(rows, 1), size)]

    def encode_parts(self, make: Callable[[int], Tensor], count: int, shape: torch.Size) -> Encoded:
        if count == 1:
            return self.encode(make(0).view(shape))
        parts = [self.encode(make(index)) for index in range(count)]
        planes = [split_planes(part.tensors[0], part.shape.numel(), self.bits) for part in parts]
        codes = torch.cat([plane for same in zip(*planes, strict=True) for _, plane in same])
        return Encoded((codes, torch.cat([part.tensors[1] for part in parts])), shape, parts[0].dtype)

    def part(self, e: Encoded, start: int, stop: int) -> Encoded:
        if stop - start == e.shape[:-1].numel():
            return super().part(e, start, stop)
        codes, steps = e.tensors
        shape = torch.Size([stop - start, e.shape[-1]])
        first, end = start * shape[1], stop * shape[1]
        planes = [
            plane[first * width // 8 : -(-end * width // 8)]
            for width, plane in split_planes(codes, e.shape.numel(), self.bits)
        ]
        kept = planes[0] if len(planes) == 1 else torch.cat(planes)
        return Encoded((kept, steps[first // self.group : -(-end // self.group)]), shape, e.dtype)

    def _encode(self, flat: Tensor, kept: tuple[Tensor, ...]) -> None:
        codes, steps = kept
        group = self.group
        planes = split_planes(codes, flat.numel(), self.bits)
        for start, stop in chunks(flat.numel(), flat.device, group):
            padding = -(stop - start) % group
            block = F.pad(flat[start:stop].float(), (0, padding)) if padding else flat[start:stop].float()
            rows = slice(start // group, (stop + padding) // group)
            block_codes = self._quantise(block.view(-1, group), steps[rows]).view(codes.dtype)
            pack_planes(block_codes.view(-1), start, stop, planes)

    def _quantise(self, block: Tensor, steps: Tensor) -> Tensor:
        """Return the int8 codes [rows, group] of fp32 `block` [rows, group], and fill bf16 `steps` [rows]."""
        step, inverse = _step_of(block.abs().amax(1), self.half_width)
        steps.copy_(step)
        rounded = (block * inverse[:, None]).round_().to(torch.int8)
        return rounded.add_(self.zero) if self.zero else rounded

    def _decode(self, kept: tuple[Tensor, ...], out: Tensor) -> None:
        codes, steps = kept
        group = self.group
        # An integer of 8 bits and a bf16 step are exact in bf16, so their bf16 product is rounded once.
        work = torch.bfloat16 if out.dtype == torch.bfloat16 else torch.float32
        planes = split_planes(codes, out.numel(), self.bits)
        for start, stop in chunks(out.numel(), out.device, group):
            rows = -(-(stop - start) // group)
            full = (stop - start) % group == 0
            target = out[start:stop].view(-1, group) if full else out.new_empty(rows, group)
            step = steps[start // group : start // group + rows].to(work)[:, None]
            torch.mul(self._integers(planes, start, stop, rows, work), step, out=target)
            if not full:
                out[start:stop] = target.view(-1)[: stop - start]

    def _integers(
        self, planes: tuple[tuple[int, Tensor], ...], start: int, stop: int, rows: int, work: torch.dtype
    ) -> Tensor:
        """Return `code - zero` of the elements `start` to `stop`, filled up to [rows, group]; int8 or `work`."""
        width, plane = planes[0]
        block = plane[start * width // 8 : -(-stop * width // 8)]
        filled = rows * self.group
        if len(planes) > 1:
            codes = unpack_planes(planes, start, stop)
            return F.pad(codes, (0, filled - len(codes))).to(work).sub_(self.zero).view(rows, self.group)
        block = F.pad(block, (0, filled * width // 8 - len(block)))
        if width == 8:
            return block.view(rows, self.group)
        values = torch.empty(rows, self.group, dtype=work, device=plane.device)
        gather_bytes(block, self._table(plane.device, work), values.view(-1))
        return values

    def _table(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = device, dtype
        if key not in self._tables:
            levels = torch.arange(1 << self.bits, device=device) - self.zero
            self._tables[key] = byte_table(levels.to(dtype), self.bits)
        return self._tables[key]

    def _encode_in_triton(self, flat: Tensor, kept: tuple[Tensor, ...]) -> None:
        from slimfit_ds.activations.codecs.triton_absmax import encode_absmax

        encode_absmax(flat, kept, self)

    def _decode_in_triton(self, kept: tuple[Tensor, ...], out: Tensor) -> None:
        from slimfit_ds.activations.codecs.triton_absmax import decode_absmax

        decode_absmax(kept, out, self)


def _step_of(peak: Tensor, half_width: int) -> tuple[Tensor, Tensor]:
    """Return the fp32 step (a bf16 value) and its inverse of each group's absmax `peak` [rows] >= 0."""
    raw = (peak * (1.0 / half_width)).view(torch.int32)
    step = raw.add_(0xFFFF).bitwise_and_(-0x10000).view(torch.float32)
    tiny = peak < TINY_PEAK
    inverse = step.reciprocal().masked_fill_(tiny, 0.0)
    step.masked_fill_(tiny, 0.0).masked_fill_(~(peak < torch.inf), torch.nan)
    return step, inverse
