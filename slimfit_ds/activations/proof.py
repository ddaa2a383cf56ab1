"""The proof on the first batch: each changed part of a model is compared with itself unchanged, on the user's own data.

Before a part (a block, or a changed module outside of the blocks) runs in training for the first time, it runs twice more: as it is,
and as it was changed. Results, gradients, buffers and caches must agree. What does not agree is left as it is for the whole run, and
a line says so. Whether rows of the batch may be cut into chunks is tried where a function is about to be cut for the first time
(`checkpoint` asks). One part at a time is kept uncompressed, for some rows of the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from slimfit_ds.activations import autograd_graph as graph
from slimfit_ds.activations import replay
from slimfit_ds.activations.apply import CompressionHandle, Row
from slimfit_ds.activations.checkpoint import CHANGED, ROWS, SEAM, compresses
from slimfit_ds.activations.config import ActivationsConfig
from slimfit_ds.activations.recognise import find_blocks, inside
from slimfit_ds.activations.replay import Chunks, Merged
from slimfit_ds.activations.twin import (
    Arguments,
    NothingRandom,
    Outcome,
    difference,
    relative_error,
    rounding,
    run,
    undisturbed,
)
from slimfit_ds.errors import ConfigError
from slimfit_ds.trainable.split import SplitModule

__all__ = ["Failure", "Proof"]

_log = logging.getLogger(__name__)

_TOKENS = 4096
"""About so many tokens are compared where nothing is cut into chunks."""

_EXACT: None = None
_EXACT_INPUT = {"codec": None}
_Problem = tuple[str, str]


@dataclass(frozen=True)
class Failure:
    """What the proof found wrong.

    Attributes:
        module: its name.
        check: forward, gradient, buffers, caches, rows, tokens, or read (a weight that trains gets no gradient).
        measured: in words, with the limit.
        remedy: what became of it.
        bytes: what that costs, kept for the backward pass of the whole batch.
    """

    module: str
    check: str
    measured: str
    remedy: str
    bytes: int = 0

    def __str__(self) -> str:
        cost = f" (+{self.bytes / 2**20:.2f} MiB kept for the backward pass)" if self.bytes else ""
        return f"{self.module or 'the model'}: {self.check} {self.measured}; {self.remedy}{cost}"


class Proof:
    """Compares the changed parts of a model with themselves unchanged, each when it first runs in training.

    Args:
        model: compressed, and split if it is; every parameter that will ever train requires grad.
        compression: what `compress` did.
        config: by which settings.

    Attributes:
        failures: what was found wrong so far.
        settled: whether the verdicts are those of all ranks, or nothing is to be proven.
    """

    def __init__(self, model: nn.Module, compression: CompressionHandle, config: ActivationsConfig):
        self.failures: list[Failure] = []
        self._model, self._compression, self._config = model, compression, config
        self._trains = {p for p in model.parameters() if p.requires_grad}
        self._names = {module: name for name, module in model.named_modules()}
        self._changed = {
            r.module: model.get_submodule(r.module) for r in compression.rows if r.codec != "exact"
        }
        self._handles: dict[str, Any] = {}
        self._unread: set[str] | None = None
        parameters = [*model.parameters()]
        self.settled = True
        if any(isinstance(p, FakeTensor) or p.is_meta for p in parameters):
            return
        if any(hasattr(p, "ds_id") for p in parameters):
            _log.warning(
                "no proof on the first batch under ZeRO 3, which has whole weights only while they are used"
            )
            return
        self.settled = False
        blocks = find_blocks(model)
        for module, name in self._names.items():
            if name in blocks or name in self._changed or isinstance(module, SplitModule):
                self._handles[name] = module.register_forward_pre_hook(self._before, with_kwargs=True)
        for module in self._changed.values():
            module.__dict__[ROWS] = self._rows
            if (seam := module.__dict__.get(SEAM)) is not None:
                seam.report = self._not_cut

    def remove(self) -> None:
        """Take everything of the proof, and its verdicts, out of the model."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}
        for module in self._changed.values():
            for name in (ROWS, CHANGED):
                module.__dict__.pop(name, None)

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Prove a part before it runs in training for the first time."""
        if not compresses(module):
            return
        # What lies inside of a part is proven with it.
        name = self._names[module]
        for other in [n for n in self._handles if n == name or inside(n, {name: module})]:
            self._handles.pop(other).remove()
        arguments = Arguments(args, kwargs, self._config.chunk_tokens or _TOKENS)
        if arguments.tensors and not any(isinstance(t, FakeTensor) for t in arguments.tensors):
            _Part(self, name, module, arguments).prove()

    def _rows(self, call: Any, plan: Chunks) -> bool:
        """Find out whether the rows of a function's batch are independent; `checkpoint` asks before it cuts."""
        module: nn.Module = call.owner
        if any(isinstance(t, FakeTensor) for t in call.tensors):
            return True
        try:
            measured = _dependence(call, plan)
        except Exception as error:
            measured = f"a part of the batch alone raises {_first_line(error)}"
        module.__dict__[ROWS] = measured is None
        if measured is not None:
            self.fail(Failure(self._names[module], "rows", measured, "not cut into chunks"))
        return measured is None

    def _not_cut(self, module: nn.Module, measured: str) -> None:
        self.fail(Failure(self._names[module], "tokens", measured, "not cut into tiles"))

    def fail(self, failure: Failure) -> None:
        """Report what was found wrong."""
        self.failures.append(failure)
        _log.warning("proof on the first batch: %s", failure)
        if failure.remedy == "left exact":
            rows = self._compression.rows
            rows[:] = [
                Row(r.module, r.kind, "exact", str(failure)) if r.module == failure.module else r
                for r in rows
            ]

    def see_gradients(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Note which weights that train have a gradient; called at the end of a backward pass until `settle`."""
        missing = {name for name, p in trained.items() if p.grad is None}
        self._unread = missing if self._unread is None else self._unread & missing

    def settle(self, total: Callable[[Tensor], Tensor] = lambda flags: flags) -> None:
        """Make the verdicts of all ranks one, before the first optimizer step.

        Args:
            total: makes the flags `[n]`, float32, of this process the sum (or mean) of those of all processes.

        Raises:
            ConfigError: something failed on any rank, and `strict` is set.
        """
        self.settled = True
        if self._unread:
            names = sorted(self._unread)
            _log.warning(
                "%d of the layers that train got no gradient in the first step: %s; the model does not use them, reads their "
                "weight without calling them, or had no need of them for this batch",
                len(names),
                ", ".join(names[:8]) + (", ..." if len(names) > 8 else ""),
            )
        mine = [f for module in self._changed.values() for f in _verdict(module)]
        device = next(iter(self._trains)).device if self._trains else None
        flags = torch.tensor([*mine, float(bool(self.failures))], dtype=torch.float32, device=device)
        everyone = [value > 0 for value in total(flags).tolist()]
        for i, (name, module) in enumerate(self._changed.items()):
            exact, exact_input, whole = everyone[3 * i : 3 * i + 3]
            if [exact, exact_input, whole] == [bool(f) for f in mine[3 * i : 3 * i + 3]]:
                continue
            if exact or exact_input:
                module.__dict__[CHANGED] = _EXACT if exact else _EXACT_INPUT
            if whole:
                module.__dict__[ROWS] = False
            _log.warning("proof on the first batch: %s failed on another rank and is treated as there", name)
        if everyone[-1] and self._config.strict:
            raise ConfigError(
                [f"proof on the first batch: {f}" for f in self.failures]
                or ["proof on the first batch: see the other ranks"]
            )

    def is_recomputed(self, name: str) -> bool:
        """Return whether the module of that name is a block that runs again from its input."""
        return any(row.module == name and row.kind == "block" for row in self._compression.rows)


class _Part:
    """One part of a model on its way through the proof."""

    def __init__(self, proof: Proof, name: str, module: nn.Module, arguments: Arguments):
        self._proof, self._name, self._module, self._arguments = proof, name, module, arguments
        self._state = replay.capture(arguments.tensors)
        tensors = [*arguments.tensors, *module.parameters()]
        self._rounding = rounding(tensors)
        self._limit = proof._config.largest_error + self._rounding
        changed = proof._changed
        self._changed = {n: m for n, m in changed.items() if n == name or inside(n, {name: module})}

    def prove(self) -> None:
        """Run the part as it is and as it was changed, and leave what differs as it is."""
        try:
            self._plain = self._run(plain=True)
        except Exception:
            # The model will raise it itself.
            return
        problem, first = self._compare()
        if first is not None:
            self._find_unread(first)
        if problem is None:
            return
        fallbacks = self._fall_back(problem)
        problem_left, last = self._compare()
        if problem_left is not None:
            # What is wrong is not in what is kept.
            self._proof.fail(
                Failure(
                    self._name,
                    *problem_left,
                    "differs also with everything kept exactly; let its layers train whole",
                )
            )
            return
        cost = 0
        if first is not None and last is not None:
            cost = max(0, int((last.bytes - first.bytes) / self._arguments.share))
        for i, (name, found, remedy) in enumerate(fallbacks):
            self._proof.fail(Failure(name, *found, remedy, 0 if i else cost))

    def _fall_back(self, problem: _Problem) -> list[tuple[str, _Problem, str]]:
        """Leave as little as possible exact: the input of a recomputed block, single modules, all of them."""
        if self._proof.is_recomputed(self._name):
            self._leave(_EXACT_INPUT, self._name)
            if self._compare()[0] is None:
                return [(self._name, problem, "its input is kept exactly")]
            self._leave(_EXACT, self._name)
            return [(self._name, problem, "left exact")]
        self._leave(_EXACT, *self._changed)
        wanting: dict[str, _Problem] = {}
        for name, module in self._changed.items():
            del module.__dict__[CHANGED]
            if (found := self._compare()[0]) is not None:
                wanting[name] = found
                self._leave(_EXACT, name)
        return [(name, found, "left exact") for name, found in wanting.items()]

    def _leave(self, how: dict[str, None] | None, *names: str) -> None:
        for name in names:
            self._changed[name].__dict__[CHANGED] = how

    def _run(self, plain: bool) -> Outcome:
        try:
            return run(self._module, self._arguments, self._proof._trains, plain, self._state)
        except Exception:
            if not plain or not self._arguments.is_part:
                raise
            # Not every batch can be taken apart.
            self._arguments.take_whole()
            return run(self._module, self._arguments, self._proof._trains, plain, self._state)

    def _compare(self) -> tuple[_Problem | None, Outcome | None]:
        try:
            found = self._run(plain=False)
        except Exception as error:
            return ("forward", f"raises {_first_line(error)}"), None
        # Of a block that runs again from its input, exact inputs cost little.
        rows = self._proof.is_recomputed(self._name)
        return difference(self._plain, found, self._rounding, self._limit, rows), found

    def _find_unread(self, ours: Outcome) -> None:
        names = [
            name
            for name, gradient in self._plain.parameters.items()
            if ours.parameters[name] is None and gradient is not None and bool(gradient.count_nonzero())
        ]
        if names:
            self._proof.fail(
                Failure(
                    self._name,
                    "read",
                    f"no gradient reaches {', '.join(names)}, but in the plain model one does",
                    "these weights do not train; name their layers in freeze.always_active",
                )
            )


def _verdict(module: nn.Module) -> list[float]:
    changed = module.__dict__.get(CHANGED, {})
    return [float(changed is None), float(bool(changed)), float(module.__dict__.get(ROWS) is False)]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"


@torch.no_grad()
def _dependence(call: Any, plan: Chunks) -> str | None:
    """Return how rows depend on each other, tried on the first two chunks: in words, or `None`."""
    (_, half), (_, rows) = plan.bounds[:2]
    part = Chunks(rows, plan.bounds[:2], plan.divided)
    tensors = [t[:rows] if split else t for t, split in zip(call.tensors, plan.divided, strict=True)]
    others = torch.tensor([rows - 1] * half + [*range(half, rows)], device=tensors[0].device)

    def results(some: list[Tensor]) -> list[Any]:
        with graph.recomputed_part():
            return pytree.tree_leaves(call.run(some))

    with replay.replayed(replay.capture(tensors)), undisturbed(call.owner), NothingRandom():
        whole = results(tensors)
        cut = Merged(part)
        for index in range(2):
            cut.add(index, results(part.slice(tensors, index)))
        beside = results(
            [t[others.to(t.device)] if split else t for t, split in zip(tensors, plan.divided, strict=True)]
        )
    parameters: Iterable[Tensor] = call.owner.parameters()
    loose = rounding([*tensors, *parameters])
    for value, joined, other in zip(whole, cut.values, beside, strict=True):
        if not isinstance(value, Tensor) or not part.is_batched(value) or not value.is_floating_point():
            continue
        # The same shapes: next to nothing but a mixture of experts rounds differently.
        if (error := relative_error([other[half:]], [value[half:]])) > loose / 10:
            return f"of the batch depend on each other: they differ by {error:.2g} beside other rows"
        if (error := relative_error([joined], [value])) > loose:
            return f"of the batch depend on each other: they differ by {error:.2g} if it is cut"
    return None
