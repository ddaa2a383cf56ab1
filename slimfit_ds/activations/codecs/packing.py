"""Small integer codes side by side in bytes, and tables that turn a packed byte into its values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "PLANES",
    "byte_table",
    "gather_bytes",
    "low_and_high",
    "pack",
    "pack_planes",
    "packed_bytes",
    "split_planes",
    "unpack_planes",
]

# Widths that do not divide a byte are stored as two planes, the low bits of all codes and then the high bits.
PLANES: dict[int, tuple[int, ...]] = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,), 1: (1,)}

# Per width: the integer that spans the codes of one byte, and the multiplier that gathers them in the top
# byte of that integer. For 2 bits, codes c0..c3 lie in bytes 0..3; the sum of shifts by 24, 18, 12 and 6
# puts c_k at bit 24 + 2k, and everything above bit 31 falls off.
_GATHER: dict[int, tuple[torch.dtype, int]] = {
    4: (torch.int16, (1 << 8) + (1 << 4)),
    2: (torch.int32, sum(1 << (24 - 6 * k) for k in range(4))),
    1: (torch.int64, sum(1 << (56 - 7 * k) for k in range(8))),
}
# By device, width and shift: the codes that a packed byte of a plane stands for.
_PLANE_TABLES: dict[tuple[torch.device, int, int], Tensor] = {}
# Widest first: gathering few wide items costs less than many narrow ones.
_WIDE = (torch.complex128, torch.int64, torch.int32, torch.int16)


def packed_bytes(numel: int, bits: int) -> int:
    """Bytes that `numel` codes of `bits` bits take."""
    return sum(-(-numel * width // 8) for width in PLANES[bits])


def split_planes(stored: Tensor, numel: int, bits: int) -> tuple[tuple[int, Tensor], ...]:
    """Width and bytes of each plane, views of what is stored for `numel` codes of `bits` bits."""
    widths = PLANES[bits]
    sizes = [-(-numel * width // 8) for width in widths]
    return tuple(zip(widths, stored.split(sizes), strict=True))


def low_and_high(stored: Tensor, numel: int, bits: int) -> tuple[tuple[int, Tensor], tuple[int, Tensor]]:
    """The two planes of `split_planes`; the high one has width 0 where there is none."""
    planes = split_planes(stored, numel, bits)
    return planes[0], planes[1] if len(planes) > 1 else (0, stored)


def pack_planes(codes: Tensor, start: int, stop: int, planes: tuple[tuple[int, Tensor], ...]) -> None:
    """Pack the codes of the elements `start` to `stop` into their place in all planes.

    Args:
        codes: uint8 or (8 bits only) int8 [n], contiguous, at least `stop - start`; what follows fills up bytes.
        start: a multiple of 8.
        stop: end of the elements.
        planes: from `split_planes`.
    """
    for position, (width, plane) in enumerate(planes):
        part = plane[start * width // 8 : -(-stop * width // 8)]
        low = codes & ((1 << width) - 1) if position + 1 < len(planes) else codes
        pack(low[: len(part) * 8 // width], width, part)
        if position + 1 < len(planes):
            codes = codes >> width


def unpack_planes(planes: tuple[tuple[int, Tensor], ...], start: int, stop: int) -> Tensor:
    """The codes of the elements `start` (a multiple of 8) to `stop`: uint8 [n], n rounded up to a multiple of 8."""
    numel = -(-(stop - start) // 8) * 8
    codes = torch.zeros(numel, dtype=torch.uint8, device=planes[0][1].device)
    shift = 0
    for width, plane in planes:
        part = plane[start * width // 8 : -(-stop * width // 8)]
        key = plane.device, width, shift
        if key not in _PLANE_TABLES:
            values = torch.arange(1 << width, dtype=torch.uint8, device=plane.device) << shift
            _PLANE_TABLES[key] = byte_table(values, width)
        own = codes.new_empty(len(part) * 8 // width)
        gather_bytes(part, _PLANE_TABLES[key], own)
        codes[: len(own)].bitwise_or_(own)
        shift += width
    return codes


def pack(codes: Tensor, bits: int, out: Tensor) -> None:
    """Pack codes below 2^bits; the first code of a byte takes its lowest bits.

    Args:
        codes: uint8 [n], contiguous.
        bits: 1, 2, 4 or 8.
        out: uint8 [ceil(n * bits / 8)], filled; the bits after the last code become zero.
    """
    if bits == 8:
        out.copy_(codes)
        return
    per_byte = 8 // bits
    if codes.numel() % per_byte:
        codes = F.pad(codes, (0, -codes.numel() % per_byte))
    wide, multiplier = _GATHER[bits]
    # Slices of a larger tensor may start anywhere, but a view as a wider integer needs its alignment.
    if codes.storage_offset() % wide.itemsize:
        codes = codes.clone()
    gathered = codes.view(wide) * multiplier
    out.copy_(gathered.bitwise_right_shift_(8 * (wide.itemsize - 1)))


def byte_table(levels: Tensor, bits: int) -> Tensor:
    """The values of each of the 256 packed bytes: [256, 8 / bits] from levels [2^bits], in their dtype."""
    byte = torch.arange(256, device=levels.device)
    shifts = torch.arange(0, 8, bits, device=levels.device)
    return levels[(byte[:, None] >> shifts) & ((1 << bits) - 1)].contiguous()


def gather_bytes(packed: Tensor, table: Tensor, out: Tensor) -> None:
    """Replace each packed byte by its values.

    Args:
        packed: uint8 [n].
        table: [256, per_byte], from `byte_table`.
        out: the dtype of `table` [n * per_byte], filled.
    """
    row_bytes = table.shape[1] * table.element_size()
    wide = next(w for w in _WIDE if row_bytes % w.itemsize == 0)
    if row_bytes == wide.itemsize and out.storage_offset() * out.element_size() % wide.itemsize == 0:
        torch.index_select(table.view(wide).view(-1), 0, packed.to(torch.int32), out=out.view(wide))
    else:
        torch.index_select(table, 0, packed.to(torch.int32), out=out.view(-1, table.shape[1]))
