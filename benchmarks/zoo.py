"""Every model type of transformers that can be built small and trained, under four settings, against plain PyTorch.

python benchmarks/zoo.py                      # all types that the CSV lacks; half a day of one slow core, or an hour of a fast one
python benchmarks/zoo.py --types bert llama   # these
python benchmarks/zoo.py --proof on           # with the proof on the first batch; off shows what it has to catch
python benchmarks/zoo.py --out /tmp/zoo.csv   # another file

For each type and setting: the loss, the gradient of every part that trains (exact where the setting is exact, and within the class
of its error where activations are compressed), what trains at all, and whether `remove()` gives the model back. The models are
made from configurations (benchmarks/small_models.py), without dropout, in fp32, seed 0; blocks run in chunks of half the batch.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from common import Study, machine, markdown
from small_models import build, types
from torch import Tensor, nn

import slimfit_ds
from slimfit_ds.errors import ConfigError
from slimfit_ds.trainable.split import SplitModule

CHUNK = 32
"""Tokens of a chunk: half of a batch of text."""
SETTINGS: dict[str, dict[str, Any]] = {
    "{}": {},
    "minimal": {"freeze": {"policy": "none"}, "activations": {"preset": "minimal", "chunk_tokens": CHUNK}},
    "balanced": {"freeze": {"policy": "none"}, "activations": {"preset": "balanced", "chunk_tokens": CHUNK}},
    "ils": {"freeze": {"policy": "ils", "rate": 0.7}},
}
ERRORS = {"{}": 1e-3, "ils": 1e-3, "minimal": 0.1, "balanced": 0.15}
"""Largest relative error of the whole gradient: of sums in another order, or of the preset's codecs on untrained models."""
RATES = (None, 0.8, 0.6, 0.4)
"""Of the recommended setting: on models this narrow 0.9 may leave no column, which is refused."""
STUDY = Study("zoo", ("type", "setting", "proof"))


def loss_and_gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a step and the gradients by name, with the same random numbers at every call."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002 (wav2vec2 and others draw their masks from it)
    # Running statistics, which training changes.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    loss = model(**batch).loss
    loss.backward()
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def expected_of(model: nn.Module, plain: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the plain gradients of what trains in a model now, by the names of its parameters."""
    found = {}
    for name, module in model.named_modules():
        for local, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{local}" if name else local
            whole = plain.get(f"{name}.weight" if local == "weight_columns" else full)
            if parameter.requires_grad and whole is not None:
                found[full] = module.split.of_weight(whole) if local == "weight_columns" else whole
    return found


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str, float]:
    """Return the relative error of all gradients, and the tensor with the largest share of it, with its own error."""
    zero = torch.zeros(())
    apart = {
        n: float((found.get(n, zero) - expected.get(n, zero)).double().square().sum())
        for n in {**found, **expected}
    }
    total = sum(float(g.double().square().sum()) for g in expected.values())
    worst = max(apart, key=lambda n: apart[n], default="")
    own = float(expected.get(worst, zero).double().square().sum())
    return (
        (sum(apart.values()) / max(total, 1e-30)) ** 0.5,
        worst,
        (apart.get(worst, 0.0) / max(own, 1e-30)) ** 0.5,
    )


def state_of(model: nn.Module) -> list[Any]:
    """Return what `remove()` must give back."""
    return [
        [
            (n, type(m), sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks))
            for n, m in model.named_modules()
        ],
        [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
    ]


def try_setting(
    model: nn.Module, batch: dict[str, Tensor], name: str, plain: Any, proof: bool
) -> dict[str, Any]:
    """Return `verdict` and measurements of one setting; the model is given back as it was, or the verdict says so."""
    loss, gradients = plain
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    before = state_of(model)
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught, _logged() as logged:
        warnings.simplefilter("always")
        try:
            handle, rate = slim(model, name, proof)
        except ConfigError as refusal:
            return {"verdict": "refused", "reason": _line(refusal.problems[0])}
        try:
            found_loss, found = loss_and_gradients(model, batch)
            expected = expected_of(model, gradients)
            parts = sum(isinstance(m, SplitModule) for m in model.modules())
        finally:
            handle.remove()
        said = [str(w.message) for w in caught if "slimfit" in f"{w.filename} {w.message}"]
        said = [_line(text) for text in (*said, *logged)]
    error, worst, own = difference(found, expected)
    row = {
        "rate": rate,
        "trains": len(expected),
        "parts": parts,
        "loss_error": f"{abs(float(found_loss - loss)) / max(abs(float(loss)), 1e-6):.2e}",
        "gradient_error": f"{error:.2e}",
        "worst": worst,
        "worst_error": f"{own:.2e}",
        "reason": "; ".join(dict.fromkeys(said)),
    }
    # A parameter whose gradient is zero for plain PyTorch may as well have none.
    lost = [n for n, g in expected.items() if n not in found and float(g.abs().max()) > 0]
    after = state_of(model)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, weights[n])]
    wrong = []
    if float(row["loss_error"]) > 1e-4:
        wrong.append("another loss")
    if lost:
        wrong.append(f"no gradient of {lost[0]}" + (f" and {len(lost) - 1} more" if len(lost) > 1 else ""))
    elif not error <= ERRORS[name]:
        wrong.append(f"another gradient of {worst}")
    if after != before or changed:
        wrong.append("not restored")
    row["verdict"] = "wrong" if wrong else "falls back" if said else "agrees"
    if wrong:
        row["reason"] = "; ".join([*wrong, *said])
    return row


@contextlib.contextmanager
def _logged() -> Iterator[list[str]]:
    """Collect what the package warns of by its loggers."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("slimfit_ds")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def slim(model: nn.Module, name: str, proof: bool) -> tuple[Any, Any]:
    """Return a handle under a setting, and the rate that was possible."""
    block = SETTINGS[name]
    if block:
        block = {**block, "activations": {**block.get("activations", {}), "proof": proof}}
    if block:
        return slimfit_ds.slim(model, block), block["freeze"].get("rate")
    for rate in RATES:
        try:
            freeze = {} if rate is None else {"freeze": {"rate": rate}}
            return slimfit_ds.slim(model, {**freeze, "activations": {"proof": proof}}), rate
        except ConfigError as error:
            if rate == RATES[-1] or "can train within" not in str(error):
                raise
    raise AssertionError


def _line(text: str) -> str:
    """Return the first line of a message."""
    return text.strip().splitlines()[0][:160] if text.strip() else ""


def rows_of(model_type: str, settings: list[str], proof: bool = True) -> Iterator[dict[str, Any]]:
    """Yield a row for each setting of a model type; one in all, if no model can be built."""
    try:
        model, batch, head = build(model_type)
        plain = loss_and_gradients(model, batch)
        again = loss_and_gradients(model, batch)
    except Exception as error:
        yield {"type": model_type, "setting": "", "verdict": "not built", "reason": _line(str(error))}
        return
    common = {"type": model_type, "class": type(model).__name__, "head": head}
    noise = difference(again[1], plain[1])[0]
    if noise > 1e-4 or not all(g.isfinite().all() for g in plain[1].values()):
        yield {
            **common,
            "setting": "",
            "verdict": "not built",
            "reason": f"two plain steps differ by {noise:.1e}",
        }
        return
    for name in settings:
        try:
            row = try_setting(model, batch, name, plain, proof)
        except Exception as error:
            row = {"verdict": "error", "reason": f"{type(error).__name__}: {_line(str(error))}"}
            model, batch, _ = build(model_type, head)
            plain = loss_and_gradients(model, batch)
        yield {**common, "setting": name, **row}


class _TookTooLong(BaseException):
    pass


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise `_TookTooLong` after so many seconds."""

    def stop(*_: Any) -> None:
        raise _TookTooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


_VERDICTS = ("agrees", "falls back", "refused", "error", "wrong")


def tables() -> dict[str, str]:
    """Return the tables of the documents by mark."""
    built = [row for row in STUDY.rows() if row["verdict"] != "not built"]
    lines = []
    for proof in ("off", "on"):
        for name in SETTINGS:
            verdicts = Counter(r["verdict"] for r in built if (r["setting"], r["proof"]) == (name, proof))
            lines.append([proof, f"`{name}`", sum(verdicts.values()), *(verdicts[v] for v in _VERDICTS)])
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for row in built:
        if row["verdict"] != "agrees":
            kinds.setdefault((row["proof"], row["verdict"], _kind(row["reason"] or "")), []).append(
                f"{row['type']} ({row['setting']})"
            )
    details = [
        [*key, len(of), ", ".join(of[:5]) + (", ..." if len(of) > 5 else "")]
        for key, of in sorted(
            kinds.items(), key=lambda kind: (kind[0][0], _VERDICTS.index(kind[0][1]), kind[0][2])
        )
    ]
    return {
        "zoo": markdown(["proof", "setting", "types", *_VERDICTS], lines),
        "zoo-reasons": markdown(["proof", "verdict", "why", "cells", "such as"], details),
    }


def _kind(reason: str) -> str:
    """Return what a line says without names and numbers, which differ from model to model."""
    first = reason.removeprefix("proof on the first batch: ").split("; proof on")[0]
    found = re.match(r"\S+: (rows|gradient|forward|buffers|caches|read)\b.*?(?:; ([a-z ]+))?(\(|$)", first)
    if found:
        # Lines are cut off.
        remedies = ("left exact", "its input is kept exactly", "not cut into chunks")
        said = next((r for r in remedies if r.startswith((found[2] or "-").strip())), "")
        remedy = "not cut into chunks" if found[1] == "rows" else said
        return f"proof: {found[1]}" + (f"; {remedy}" if remedy else "")
    words = first.removeprefix("slimfit.freeze: ").partition(":")[0]
    return re.sub(r"\S+[._]\S+|\d\S*", "...", words).replace("|", "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--types", nargs="*", help="model types; default: all")
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--proof", choices=["on", "off"], default="on")
    parser.add_argument("--out", default="zoo", help="a study, or a path that ends in .csv")
    parser.add_argument("--seconds", type=int, default=240, help="for one model type")
    arguments = parser.parse_args()
    import transformers

    transformers.logging.set_verbosity_error()
    study = Study(arguments.out, STUDY.keys)
    known = {row["type"] for row in study.rows(proof=arguments.proof)}
    for name in arguments.types or types():
        if name in known:
            continue
        rows: list[dict[str, Any]] = []
        try:
            with at_most(arguments.seconds):
                for row in rows_of(name, arguments.settings, arguments.proof == "on"):
                    rows.append(row)
        except _TookTooLong:
            rows.append({"type": name, "setting": "", "verdict": "not built", "reason": "took too long"})
        study.add(*({**row, "proof": arguments.proof, **machine()} for row in rows))
        print(
            name,
            *(f"{row['setting']}: {row['verdict']} ({row.get('reason') or ''})" for row in rows),
            sep="\n    ",
            flush=True,
        )
    print(tables()["zoo-reasons"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
