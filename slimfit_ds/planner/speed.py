"""How fast a step could be: its matrix products at an assumed rate against its bytes over an assumed link.

An estimate beside the estimate of memory, and no measurement: kernels, collectives, the data and the optimizer's arithmetic
take time of their own, which the efficiencies stand for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["CARDS", "Card", "ProductCounter", "Speed", "card_for", "card_here", "card_named", "speed"]


@dataclass(frozen=True)
class Card:
    """An accelerator and its link to the host, as a plan assumes them.

    Attributes:
        name: for tables.
        memory: bytes.
        flops: peak per second of dense bf16 matrix products that are summed in fp32.
        link: peak bytes per second from host to device, one direction.
        efficiency: share of the peak that the products of a step reach; assumed.
        link_efficiency: share of the link's peak that copies of page-locked memory reach; assumed.
    """

    name: str
    memory: float
    flops: float
    link: float
    efficiency: float = 0.5
    link_efficiency: float = 0.8

    def with_(self, **changes: float | None) -> Card:
        """Return a copy with some values changed; None leaves one as it is."""
        stated: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
        return replace(self, **stated)


# From the vendor's data sheets (dense, one direction; they state PCIe in both together, and some products with sparsity).
CARDS: Mapping[str, Card] = {
    "4090": Card("RTX 4090", 24e9, 165.2e12, 32e9),
    "3090": Card("RTX 3090", 24e9, 71e12, 32e9),
    "5090": Card("RTX 5090", 32e9, 209.5e12, 64e9),
    "L4": Card("L4", 24e9, 121e12, 32e9),
    "L40S": Card("L40S", 48e9, 362e12, 32e9),
    "A100-40": Card("A100 40GB", 40e9, 312e12, 32e9),
    "A100": Card("A100 80GB", 80e9, 312e12, 32e9),
    "H100": Card("H100 SXM", 80e9, 989e12, 64e9),
    "H200": Card("H200 SXM", 141e9, 989e12, 64e9),
}


def card_for(memory: float) -> Card:
    """Return the smallest card of so many bytes or more; the largest if there is none."""
    enough = [card for card in CARDS.values() if card.memory >= memory]
    return min(enough, key=lambda card: card.memory) if enough else CARDS["H200"]


def card_named(name: str) -> Card | None:
    """Return the card whose name is a word or two words of this one, such as `h100` or `NVIDIA H100 80GB HBM3`; or None."""
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    found = [key for key in CARDS if set(key.split("-")) <= words]
    found += ["A100-40"] if {"A100", "40GB"} <= words else []
    return CARDS[max(found, key=len)] if found else None


def card_here() -> Card | None:
    """Return the GPU of this machine with its own memory, and an H200's speed if its name is not known; None: no GPU."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    known = card_named(properties.name)
    named = known.name if known is not None else f"{properties.name}, speed of an H200"
    return replace(known or CARDS["H200"], name=named, memory=float(properties.total_memory))


@dataclass(frozen=True)
class Speed:
    """What a step would take.

    Attributes:
        compute: seconds of matrix products.
        link: seconds of copies from the host.
        tokens: of a step, on one rank.
    """

    compute: float
    link: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Of one rank, if copies run beside the computation."""
        return self.tokens / max(self.compute, self.link)

    @property
    def bound(self) -> str:
        """What the step waits for: `compute` or `link`."""
        return "link" if self.link > self.compute else "compute"

    def __str__(self) -> str:
        return f"about {self.tokens_per_second:,.0f} tokens/s, bound by {self.bound}"


def speed(flops: float, copied: float, tokens: int, card: Card) -> Speed:
    """Return what a step would take.

    Args:
        flops: of its matrix products.
        copied: bytes from host to device.
        tokens: of the step, on one rank.
        card: where it runs.

    Raises:
        ValueError: no matrix product was counted, or an efficiency is not in (0, 1].
    """
    if flops <= 0:
        raise ValueError(f"a step without matrix products has no speed, got {flops!r} FLOPs")
    for name in ("efficiency", "link_efficiency"):
        if not 0 < getattr(card, name) <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {getattr(card, name)!r}")
    return Speed(flops / (card.flops * card.efficiency), copied / (card.link * card.link_efficiency), tokens)


class ProductCounter(TorchDispatchMode):
    """Counts the FLOPs of matrix products and attention while the mode is active, by torch's own formulas.

    Attributes:
        flops: so far; a multiplication and an addition are two.
    """

    _active: ClassVar[list[ProductCounter]] = []
    _times: ClassVar[int] = 1

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    @classmethod
    def add(cls, flops: float) -> None:
        """Count what stands for a kernel without being one: to the counters that are active."""
        for counter in cls._active:
            counter.flops += int(flops) * cls._times

    @classmethod
    @contextmanager
    def times(cls, number: int) -> Iterator[None]:
        """Count what is done within so many times."""
        cls._times = number
        try:
            yield
        finally:
            cls._times = 1

    def __enter__(self) -> ProductCounter:
        self._active.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._active.remove(self)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result) * self._times
        return result
