"""Names for the parts of a step that no operation's name tells: codecs, optimizer, schedule, communication."""

from __future__ import annotations

import functools
import importlib
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.profiler import record_function

__all__ = ["PREFIX", "SCHEDULE_RANGES", "timed", "wrapped"]

PREFIX = "part: "

# (module, class or "", attribute, part). What a version does not have is skipped: profiles of several versions are
# compared.
_PLACES = (
    ("slimfit_ds.activations.storing", "", "encode_shared", "codec pack"),
    ("slimfit_ds.activations.storing", "Payload", "decode", "codec unpack"),
    ("slimfit_ds.engine.optimizer", "FreezeOptimizer", "step", "optimizer"),
    ("slimfit_ds.engine.shard_update", "ShardUpdater", "move_states", "states to and from the host"),
    ("slimfit_ds.engine.sharding", "Sharding", "reduce", "communication"),
    ("slimfit_ds.engine.sharding", "Sharding", "gather", "communication"),
)

# What deciding and applying the next active set takes; `set_active` holds `move_states`, which moves data.
SCHEDULE_RANGES = (
    ("slimfit_ds.schedule.schedule", "FreezeSchedule", "advance", "schedule"),
    ("slimfit_ds.engine.engine", "SlimFitEngine", "_apply_active_set", "schedule"),
    ("slimfit_ds.integrations.plain_loop", "SlimHandle", "_apply", "schedule"),
    ("slimfit_ds.integrations.plain_loop", "SlimHandle", "_before_step", "statistic"),
    ("slimfit_ds.schedule.statistics", "Statistic", "of_update", "statistic"),
    ("slimfit_ds.schedule.statistics", "Statistic", "of_move", "statistic"),
    ("slimfit_ds.engine.shard_update", "ShardUpdater", "statistics", "statistic"),
)


def _owner(module: str, name: str) -> Any:
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:
        return None
    return getattr(found, name, None) if name else found


def _codec_methods() -> list[tuple[Any, str, str]]:
    from slimfit_ds.activations import channels as _registers  # noqa: F401
    from slimfit_ds.activations.codecs.base import Codec

    places, classes = [], [Codec]
    while classes:
        one = classes.pop()
        classes += one.__subclasses__()
        places += [(one, "encode", "codec pack")] if "encode" in vars(one) else []
        places += [(one, "decode", "codec unpack")] if "decode" in vars(one) else []
    return places


def _modules_that_hold(attribute: str, function: Any) -> list[Any]:
    """Modules that imported a function by name."""
    import sys

    return [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("slimfit_ds") and getattr(module, attribute, None) is function
    ]


@contextmanager
def wrapped() -> Iterator[None]:
    """While open, the parts of a step stand in the profile under their names."""
    undo = []
    places = [(_owner(module, owner), attribute, part) for module, owner, attribute, part in _places()]
    for owner, attribute, part in [*places, *_codec_methods()]:
        if owner is None or not hasattr(owner, attribute):
            continue
        original = getattr(owner, attribute)
        named = _named(original, part)
        holders = [owner] if isinstance(owner, type) else _modules_that_hold(attribute, original)
        for holder in holders:
            setattr(holder, attribute, named)
            undo.append((holder, attribute, original))
    try:
        yield
    finally:
        for holder, attribute, original in reversed(undo):
            setattr(holder, attribute, original)


def _places() -> list[tuple[str, str, str, str]]:
    return [*_PLACES, *SCHEDULE_RANGES]


def _named(function: Any, part: str) -> Any:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + part):
            return function(*args, **kwargs)

    return run


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """While open, seconds spent in the schedule's own functions, by `Class.attribute`; data movement apart.

    Yields:
        name -> seconds so far; `states moved` is inside of `_apply_active_set`.
    """
    seconds: dict[str, float] = defaultdict(float)
    undo = []
    moved = ("slimfit_ds.engine.shard_update", "ShardUpdater", "move_states", "")
    for module, owner_name, attribute, _ in (*SCHEDULE_RANGES, moved):
        owner = _owner(module, owner_name)
        if owner is None or not hasattr(owner, attribute):
            continue
        original = getattr(owner, attribute)
        setattr(owner, attribute, _clocked(original, seconds, f"{owner_name}.{attribute}"))
        undo.append((owner, attribute, original))
    try:
        yield seconds
    finally:
        for owner, attribute, original in undo:
            setattr(owner, attribute, original)


def _clocked(function: Any, seconds: dict[str, float], name: str) -> Any:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] += time.perf_counter() - begin

    return run
