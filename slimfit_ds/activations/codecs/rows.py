"""Parts of a tensor `[rows, width]` that a codec may take one after another, to the same bits as the whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from slimfit_ds.activations.codecs.absmax import AbsmaxCodec
from slimfit_ds.activations.codecs.base import Codec, Encoded

__all__ = ["Divisible", "row_bounds"]

# Elements of a part: 8 MiB in fp32. A few such temporaries stay in a CPU's last-level cache.
_ELEMENTS = 1 << 21


class Divisible(Protocol):
    """A codec whose payload of a contiguous tensor can be read in parts."""

    def part(self, e: Encoded, start: int, stop: int) -> Encoded:
        """The payload of the elements `start` to `stop`, whole rows."""


@runtime_checkable
class _Wraps(Protocol):
    inner: Codec


def row_bounds(codec: Codec, rows: int, width: int) -> Iterator[tuple[int, int]]:
    """First row and end of each part; one part where groups of the codec cross rows or it draws random bits.

    Where there are several, `codec` is `Divisible`.
    """
    inner = codec.inner if isinstance(codec, _Wraps) else codec
    divides = isinstance(inner, AbsmaxCodec) and inner.rounding == "nearest" and width % inner.group == 0
    size = max(1, _ELEMENTS // max(width, 1)) if divides else max(rows, 1)
    for start in range(0, max(rows, 1), size):
        yield start, min(start + size, rows)
