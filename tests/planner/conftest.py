"""Simulations run in child processes that take seconds to start: the tests of this room share three."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from slimfit_ds.planner.simulate import Simulator


@pytest.fixture(scope="session")
def fake() -> Iterator[Simulator]:
    """Return a simulator of one rank on fake tensors."""
    with Simulator() as simulator:
        yield simulator


@pytest.fixture(scope="session")
def fake_of_four() -> Iterator[Simulator]:
    """Return a simulator of one of four ranks."""
    with Simulator(4) as simulator:
        yield simulator


@pytest.fixture(scope="session")
def real() -> Iterator[Simulator]:
    """Return a simulator that measures on real CPU tensors."""
    with Simulator(real=True) as simulator:
        yield simulator
