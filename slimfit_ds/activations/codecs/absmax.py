"""Group-wise absmax integers: each group of consecutive elements shares one 16-bit scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from slimfit_ds.activations.codecs import cpu_support
from slimfit_ds.activations.codecs.base import Encoded, FloatCodec, StorageLayout, chunks
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
from slimfit_ds.activations.codecs.rounding import RandomBits
from slimfit_ds.activations.codecs.triton_support import runs_in_triton

__all__ = ["INT2", "INT4", "INT5", "INT6", "INT8", "UINT8", "AbsmaxCodec", "IntegerGrid", "Rounding"]

Rounding = Literal["nearest", "stochastic"]

# Below it a group's step would leave fp32's normal range, where devices disagree (flush to zero).
TINY_PEAK = 2.0**-100


@dataclass(frozen=True)
class IntegerGrid:
    """The levels that a group is rounded to: `(code - zero) * step`, `step = absmax / half_width`.

    Attributes:
        bits: width of a stored code.
        zero: the code, perhaps a half-integer, that stands for 0.
        half_width: the largest representable magnitude in steps.
        signed: codes are stored as int8 rather than uint8.
    """

    bits: int
    zero: float
    half_width: float
    signed: bool = False

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8 if self.signed else torch.uint8

    @property
    def code_range(self) -> tuple[int, int]:
        return round(self.zero - self.half_width), round(self.zero + self.half_width)


INT8 = IntegerGrid(bits=8, zero=0, half_width=127, signed=True)
INT6 = IntegerGrid(bits=6, zero=31, half_width=31)
INT5 = IntegerGrid(bits=5, zero=15, half_width=15)
INT4 = IntegerGrid(bits=4, zero=7, half_width=7)
# Four levels -1, -1/3, 1/3, 1 of the absmax; a grid with an exact zero would waste one of the four codes.
INT2 = IntegerGrid(bits=2, zero=1.5, half_width=1.5)
# For values that are never negative (softmax probabilities): 0 is a level.
UINT8 = IntegerGrid(bits=8, zero=0, half_width=255)


class AbsmaxCodec(FloatCodec):
    """Rounds each group of consecutive elements to integers times a bf16 step.

    Groups run along the elements in memory order; the last one may be shorter. The step is rounded up to
    bf16, so no element is clipped and, with `step <= absmax / half_width * (1 + 2^-7)`, the error is at most
    half a step (nearest) or below one step (stochastic, unbiased up to 2^-16 of a step).

    A group that holds an infinity or a NaN decodes to NaN throughout (its codes are unspecified), so that an
    overflow stays visible. A group whose absmax is below 2^-100 decodes to zeros.

    Args:
        name: the registered name.
        grid: the integer levels.
        group: elements per scale, a multiple of 8.
        rounding: nearest (ties to even) or stochastic.
        seed: seed of the codec's own random bits.
    """

    fuses_channels = True

    def __init__(
        self, name: str, grid: IntegerGrid, group: int, rounding: Rounding = "nearest", seed: int = 0
    ):
        if group < 8 or group % 8:
            raise ValueError(f"group must be a positive multiple of 8, got {group}")
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding must be 'nearest' or 'stochastic', got {rounding!r}")
        self.name = name
        self.grid = grid
        self.group = group
        self.rounding = rounding
        self.unbiased = rounding == "stochastic"
        self._random = RandomBits(seed)
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def fits_kernels(self) -> bool:
        """Whether kernels that compute something else too can pack by it: a group is a row of a tile."""
        whole = self.grid.zero == int(self.grid.zero)
        return self.rounding == "nearest" and whole and self.group & (self.group - 1) == 0

    def storage(self, numel: int, dtype: torch.dtype) -> StorageLayout:
        groups = -(-numel // self.group)
        return (self.grid.code_dtype, packed_bytes(numel, self.grid.bits)), (torch.bfloat16, groups)

    def part(self, e: Encoded, start: int, stop: int) -> Encoded:
        """The payload of the elements `start` to `stop` in memory order, [stop - start], whole groups."""
        codes, steps = e.tensors
        planes = [
            plane[start * width // 8 : -(-stop * width // 8)]
            for width, plane in split_planes(codes, e.shape.numel(), self.grid.bits)
        ]
        kept = planes[0] if len(planes) == 1 else torch.cat(planes)
        return Encoded(
            (kept, steps[start // self.group : -(-stop // self.group)]), torch.Size([stop - start]), e.dtype
        )

    def join(self, parts: Sequence[Encoded], shape: torch.Size) -> Encoded:
        """The payload of a contiguous tensor of this shape, from those of consecutive parts, whole groups each."""
        planes = [split_planes(part.tensors[0], part.shape.numel(), self.grid.bits) for part in parts]
        codes = torch.cat([plane for same in zip(*planes, strict=True) for _, plane in same])
        return Encoded((codes, torch.cat([part.tensors[1] for part in parts])), shape, parts[0].dtype)

    def _encode_flat(
        self, jobs: Sequence[tuple[Tensor, tuple[Tensor, ...]]], generator: torch.Generator | None
    ) -> None:
        if len(jobs) < 2 or self.rounding != "nearest" or not all(runs_in_triton(flat) for flat, _ in jobs):
            super()._encode_flat(jobs, generator)
            return
        from slimfit_ds.activations.codecs.triton_several import SEVERAL, encode_several

        for start in range(0, len(jobs), SEVERAL):
            encode_several(jobs[start : start + SEVERAL], self.grid, self.group)

    def _decode_flat(self, jobs: Sequence[tuple[tuple[Tensor, ...], Tensor]]) -> None:
        if len(jobs) < 2 or not all(runs_in_triton(out) for _, out in jobs):
            super()._decode_flat(jobs)
            return
        from slimfit_ds.activations.codecs.triton_several import SEVERAL, decode_several

        for start in range(0, len(jobs), SEVERAL):
            decode_several(jobs[start : start + SEVERAL], self.grid, self.group)

    def _encode(self, flat: Tensor, kept: tuple[Tensor, ...], generator: torch.Generator | None) -> None:
        if runs_in_triton(flat):
            self.encode_in_triton(flat, kept, generator)
            return
        codes, steps = kept
        group, grid = self.group, self.grid
        if self.rounding == "nearest" and runs_in_c(flat, grid.bits, group):
            cpu_support.encode_absmax(
                flat,
                codes,
                steps,
                group=group,
                bits=grid.bits,
                zero=int(grid.zero),
                half_width=grid.half_width,
                tiny_peak=TINY_PEAK,
            )
            return
        planes = split_planes(codes, flat.numel(), self.grid.bits)
        for start, stop in chunks(flat.numel(), flat.device, group):
            padding = -(stop - start) % group
            block = flat[start:stop].float()
            noise = None
            if self.rounding == "stochastic":
                noise = self._random.draw(stop - start, flat.device, generator)
            if padding:
                block = F.pad(block, (0, padding))
                noise = None if noise is None else F.pad(noise, (0, padding))
            rows = slice(start // group, (stop + padding) // group)
            block_codes = self._quantise(
                block.view(-1, group), None if noise is None else noise.view(-1, group), steps[rows]
            ).view(self.grid.code_dtype)
            pack_planes(block_codes.view(-1), start, stop, planes)

    def _quantise(self, block: Tensor, noise: Tensor | None, steps: Tensor) -> Tensor:
        """int8 codes [rows, group] of fp32 `block` [rows, group]; fills bf16 `steps` [rows]."""
        grid = self.grid
        step, inverse = _step_of(block.abs().amax(1), grid.half_width)
        steps.copy_(step)
        scaled = block * inverse[:, None]
        whole, fraction = divmod(grid.zero, 1)
        if fraction:
            scaled.add_(fraction)
        if noise is not None:
            scaled.add_(noise, alpha=2.0**-16)
            low, high = grid.code_range
            scaled.clamp_(low - whole, high - whole)
        rounded = scaled.round_().to(torch.int8 if grid.signed or grid.bits < 8 else torch.uint8)
        return rounded.add_(int(whole)) if whole else rounded

    def _decode(self, kept: tuple[Tensor, ...], out: Tensor) -> None:
        if runs_in_triton(out):
            self.decode_in_triton(kept, out)
            return
        codes, steps = kept
        group, grid = self.group, self.grid
        if runs_in_c(out, grid.bits, group):
            cpu_support.decode_absmax(codes, steps, out, group=group, bits=grid.bits, zero=int(grid.zero))
            return
        # An integer of 8 bits and a bf16 step are exact in bf16, so their bf16 product is rounded once.
        work = torch.bfloat16 if out.dtype == torch.bfloat16 else torch.float32
        planes = split_planes(codes, out.numel(), self.grid.bits)
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
        """`code - zero` of the elements `start` to `stop`, filled up to [rows, group]; int8, uint8 or `work`."""
        width, plane = planes[0]
        block = plane[start * width // 8 : -(-stop * width // 8)]
        filled = rows * self.group
        if len(planes) > 1:
            codes = unpack_planes(planes, start, stop)
            return F.pad(codes, (0, filled - len(codes))).to(work).sub_(self.grid.zero).view(rows, self.group)
        block = F.pad(block, (0, filled * width // 8 - len(block)))
        if width == 8:
            return block.view(rows, self.group)
        values = torch.empty(rows, self.group, dtype=work, device=plane.device)
        gather_bytes(block, self._table(plane.device, work), values.view(-1))
        return values

    def encode_in_triton(
        self,
        flat: Tensor,
        kept: tuple[Tensor, ...],
        generator: torch.Generator | None,
        channels: ChannelAffine | None = None,
    ) -> None:
        from slimfit_ds.activations.codecs.triton_absmax import encode_absmax

        codes, steps = kept
        noise = None
        if self.rounding == "stochastic":
            noise = self._random.draw(flat.numel(), flat.device, generator)
        grid = self.grid
        encode_absmax(
            flat,
            codes,
            steps,
            noise,
            channels,
            group=self.group,
            bits=grid.bits,
            zero=grid.zero,
            half_width=grid.half_width,
            tiny_peak=TINY_PEAK,
        )

    def decode_in_triton(
        self, kept: tuple[Tensor, ...], out: Tensor, channels: ChannelAffine | None = None
    ) -> None:
        from slimfit_ds.activations.codecs.triton_absmax import decode_absmax

        codes, steps = kept
        grid = self.grid
        decode_absmax(codes, steps, out, channels, group=self.group, bits=grid.bits, zero=grid.zero)

    def _table(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = device, dtype
        if key not in self._tables:
            levels = torch.arange(1 << self.grid.bits, device=device) - self.grid.zero
            self._tables[key] = byte_table(levels.to(dtype), self.grid.bits)
        return self._tables[key]


def _step_of(peak: Tensor, half_width: float) -> tuple[Tensor, Tensor]:
    """fp32 step (a bf16 value) and its inverse of each group's absmax `peak` [rows] >= 0."""
    raw = (peak * (1.0 / half_width)).view(torch.int32)
    step = raw.add_(0xFFFF).bitwise_and_(-0x10000).view(torch.float32)
    tiny = peak < TINY_PEAK
    inverse = step.reciprocal().masked_fill_(tiny, 0.0)
    step.masked_fill_(tiny, 0.0).masked_fill_(~(peak < torch.inf), torch.nan)
    return step, inverse
