"""`slimfit-ds adapter`: a delta as a standard LoRA adapter of PEFT, exact, or cut to a rank by SVD.

A weight whose columns `c` have trained is `W + B A` with `B = W'[:, c] - W[:, c]` and one-hot rows in `A`: its rank is the
number of trained columns. What is no product of two matrices (norms, heads, layers that trained whole) goes into PEFT's
`modules_to_save`, biases of linear layers into its `lora_bias`.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from slimfit_ds.deltas.base import DeltaError, find_base, whole_name
from slimfit_ds.deltas.delta import Delta, filled, read_delta
from slimfit_ds.deltas.load import load_base
from slimfit_ds.files import new_folder
from slimfit_ds.trainable.split import Split
from slimfit_ds.trainable.units import COLUMNS

__all__ = ["export_adapter", "main"]


@dataclass
class _Parts:
    """A delta as PEFT holds it: all by name of a module."""

    products: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """A `[rank, in]` and B `[out, rank]`, float32."""
    lookups: set[str] = field(default_factory=set)
    """Those of `products` that are embeddings: there B is one-hot, and A `[rank, words]` what was added."""
    biases: dict[str, Tensor] = field(default_factory=dict)
    """What is added to the bias, `[out]`."""
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Whole values, by the parameter's name in the module."""
    tokens: dict[str, Tensor] = field(default_factory=dict)
    """Vectors of the first words of an embedding, `[words, width]`."""


def export_adapter(
    base: str | Path, delta: Delta, output: str | Path, rank: int | None = None
) -> tuple[float, float]:
    """Write a delta as an adapter that plain `peft` loads on the base.

    Args:
        base: folder or hub id.
        delta: of this base.
        output: a folder that is not there yet; it is there whole or not at all.
        rank: the largest that the adapter's layers may have; None: exact.

    Returns:
        What the cut to `rank` loses: the Frobenius norm of all that is left out over that of all updates of linear layers,
        and the same of the worst layer. 0 and 0 without a cut.

    Raises:
        DeltaError: another base, a part that PEFT cannot hold (named), or the output exists.
        OSError: the output cannot be written.
    """
    try:
        import peft
    except ImportError:
        raise DeltaError("adapters need peft: pip install peft") from None
    output = Path(output)
    if output.exists():
        raise DeltaError(f"{output} exists; choose another name")
    with new_folder(output) as part:
        folder, found = find_base(base)
        delta.base.require(found, "the delta")
        model, made = load_base(folder, delta)
        parts = _take_apart(model.float(), delta, made, cut=rank is not None)
        _say_if_resized(model, made)
        loss = _cut(parts, rank) if rank is not None else (0.0, 0.0)
        if not parts.products:
            raise DeltaError(
                "no linear layer has trained in part, so there is nothing for LoRA: use slimfit-ds merge, or cut whole layers to a "
                "rank"
            )
        ranks = {name: len(a) for name, (a, _) in parts.products.items()}
        largest = max(ranks.values())
        others = {name: each for name, each in ranks.items() if each != largest}
        causal = delta.architecture is not None and delta.architecture.endswith(
            ("ForCausalLM", "LMHeadModel")
        )
        config = peft.LoraConfig(
            r=largest,
            lora_alpha=largest,
            rank_pattern=others,
            alpha_pattern=dict(others),
            target_modules=sorted(ranks),
            modules_to_save=sorted(parts.saved) or None,
            trainable_token_indices={n: list(range(len(v))) for n, v in parts.tokens.items()} or None,
            lora_bias=bool(parts.biases),
            fan_in_fan_out=any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in ranks),
            init_lora_weights=False,
            task_type="CAUSAL_LM" if causal else None,
            base_model_name_or_path=found.name,
            revision=delta.base.revision if found.name == delta.base.name else None,
        )
        adapted: Any = peft.get_peft_model(model, config)
        _fill(adapted, parts)
        adapted.peft_config["default"].base_model_name_or_path = found.name
        with warnings.catch_warnings():
            # It takes biases of LoRA layers, which are vectors, for pieces of matrices.
            warnings.filterwarnings("ignore", message=".*LoRA tensor.*have invalid shape")
            adapted.save_pretrained(part, save_embedding_layers=False)
    return loss


def _say_if_resized(model: Any, made: Collection[str]) -> None:
    words = None
    with suppress(NotImplementedError):  # Of pictures.
        words = getattr(model.get_input_embeddings(), "weight", None)
    if words is not None and any(p is words for n, p in model.named_parameters() if n in made):
        warnings.warn(
            f"the vocabulary was resized: call resize_token_embeddings({len(words)}) on the base before peft loads the adapter",
            stacklevel=3,
        )


def _take_apart(model: nn.Module, delta: Delta, made: Collection[str], cut: bool) -> _Parts:
    """What changed against the base, sorted by where PEFT holds it."""
    parts, problems = _Parts(), []
    tied = _tied(model)
    owned: dict[str, dict[str, Tensor]] = {}
    for name, values in filled(delta).items():
        if not _is_the_bases(model, delta, made, name, values):
            owner, _, local = name.rpartition(".")
            owned.setdefault(owner, {})[local] = values.float() if values.is_floating_point() else values
    # What the base lacks, or has in another shape, has nothing that an update could be taken against.
    products = {
        owner
        for owner, tensors in owned.items()
        if _is_linear(module := model.get_submodule(owner))
        and (cut or "weight" not in tensors)
        and not any(f"{owner}.{local}" in made for local, _ in module.named_parameters())
    }
    linear_bias = any("bias" in owned[owner] for owner in products)
    for owner, tensors in owned.items():
        module = model.get_submodule(owner)
        place = delta.places.get(f"{owner}.weight")
        if owner in tied:
            problems.append(f"{owner}.weight, which {' and '.join(sorted(tied[owner]))} share")
        elif any(True for _ in module.children()) or not owner:
            problems += [f"{owner}.{local}".lstrip(".") for local in tensors]
        elif place is not None and COLUMNS in tensors and isinstance(module, nn.Embedding):
            _take_embedding(parts, owner, module, place, tensors[COLUMNS], linear_bias)
        elif owner in products and "weight" in tensors:
            _take_whole(parts, owner, module, tensors)
        elif owner in products:
            _take_columns(parts, owner, module, place, tensors)
        else:
            parts.saved[owner] = _whole(module, place, tensors)
    if problems:
        raise DeltaError(
            f"PEFT cannot hold {', '.join(problems[:5])}{', ...' if len(problems) > 5 else ''}: use slimfit-ds merge"
        )
    return parts


def _is_the_bases(model: nn.Module, delta: Delta, made: Collection[str], name: str, values: Tensor) -> bool:
    whole = whole_name(name)
    owner, _, local = whole.rpartition(".")
    own = getattr(model.get_submodule(owner), local)
    if name in made and isinstance(own, nn.Parameter):
        return False
    own = delta.places[whole].of_weight(own) if whole != name else own
    return torch.equal(own, values.to(own.dtype))


def _tied(model: nn.Module) -> dict[str, set[str]]:
    """Modules whose parameter another module has too: name -> names of all of them."""
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name.rpartition(".")[0])
    return {name: names for names in owners.values() if len(names) > 1 for name in names}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _as_rows(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight as `[out, in]`."""
    return weight.T if type(module).__name__ == "Conv1D" else weight


def _one_hot(split: Split, width: int) -> Tensor:
    """Rows `[count, width]`, each of them 1 at a trained column."""
    return split.of_rows(torch.eye(width)).T.contiguous()


def _whole(module: Any, place: Split | None, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values by the names of the module's own parameters."""
    result = dict(tensors)
    if COLUMNS in result:
        assert place is not None
        result["weight"] = module.weight.detach().clone()
        place.of_weight(result["weight"]).copy_(result.pop(COLUMNS))
    return result


def _take_columns(
    parts: _Parts, owner: str, module: Any, place: Split | None, tensors: Mapping[str, Tensor]
) -> None:
    weight = module.weight.detach()
    outputs, inputs = _as_rows(module, weight).shape
    if COLUMNS in tensors:
        assert place is not None
        moved = _as_rows(module, tensors[COLUMNS] - place.of_weight(weight)).contiguous()
        parts.products[owner] = (_one_hot(place, inputs), moved)
    else:
        parts.products[owner] = (torch.zeros(1, inputs), torch.zeros(outputs, 1))
    if "bias" in tensors:
        parts.biases[owner] = tensors["bias"] - module.bias.detach()


def _take_whole(parts: _Parts, owner: str, module: Any, tensors: Mapping[str, Tensor]) -> None:
    moved = _as_rows(module, tensors["weight"] - module.weight.detach()).contiguous()
    parts.products[owner] = (torch.eye(moved.shape[1]), moved)
    if "bias" in tensors:
        parts.biases[owner] = tensors["bias"] - module.bias.detach()


def _take_embedding(
    parts: _Parts, owner: str, module: nn.Embedding, place: Split, values: Tensor, linear_bias: bool
) -> None:
    weight = module.weight.detach()
    words = len(values)
    if not linear_bias:
        first = torch.zeros(place.count, len(weight))
        first[:, :words] = (values - place.of_weight(weight)).T
        parts.lookups.add(owner)
        parts.products[owner] = (first, _one_hot(place, weight.shape[1]).T.contiguous())
        return
    # `lora_bias` is for all layers of an adapter or for none, and an embedding cannot have it.
    trained = _whole(module, place, {COLUMNS: values})["weight"]
    if words < len(weight):
        parts.tokens[owner] = trained[:words].clone()
    else:
        parts.saved[owner] = {"weight": trained}


def _cut(parts: _Parts, rank: int) -> tuple[float, float]:
    """Replace products of a larger rank by the nearest of this one; see `export_adapter` for what is returned."""
    if rank < 1:
        raise DeltaError(f"the rank must be at least 1, got {rank}")
    lost = total = worst = 0.0
    for name, (a, b) in parts.products.items():
        # The other factor is orthonormal, so the singular values are those of this one.
        thick = a if name in parts.lookups else b
        size = float(thick.square().sum(dtype=torch.float64))
        total += size
        if len(a) <= rank:
            continue
        u, s, v = torch.linalg.svd(thick.double(), full_matrices=False)
        u, v, scale = u[:, :rank], v[:rank], s[:rank]
        left = float(s[rank:].square().sum())
        if thick is b:
            parts.products[name] = ((v @ a.double()).float(), (u * scale).float())
        else:
            parts.products[name] = ((scale[:, None] * v).float(), (b.double() @ u).float())
        lost += left
        worst = max(worst, (left / size) ** 0.5 if size else 0.0)
    return (lost / total) ** 0.5 if total else 0.0, worst


@torch.no_grad()
def _fill(adapted: Any, parts: _Parts) -> None:
    model = adapted.get_base_model()
    for name, (a, b) in parts.products.items():
        layer = model.get_submodule(name)
        if name in parts.lookups:
            layer.lora_embedding_A["default"].copy_(a)
            layer.lora_embedding_B["default"].copy_(b)
            continue
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)
        if layer.lora_B["default"].bias is not None:
            layer.lora_B["default"].bias.zero_()
            if name in parts.biases:
                layer.lora_B["default"].bias.copy_(parts.biases[name])
    for name, tensors in parts.saved.items():
        saved = model.get_submodule(name).modules_to_save["default"]
        for local, values in tensors.items():
            getattr(saved, local).copy_(values)
    for name, values in parts.tokens.items():
        adapter = model.get_submodule(name).token_adapter
        adapter.trainable_tokens_delta["default"].copy_(values)


def main(argv: Sequence[str] | None = None) -> int:
    """Write what trained as a LoRA adapter that plain peft loads.

    Returns:
        0; 2 if base and delta do not belong together, PEFT cannot hold a part, or the output exists or cannot be written.
    """
    parser = argparse.ArgumentParser(prog="slimfit-ds adapter", description=main.__doc__)
    parser.add_argument("base", help="folder or hub id of the model that was fine-tuned")
    parser.add_argument("delta", type=Path, help="the delta, or a folder that holds one")
    parser.add_argument("output", type=Path, help="the folder to write; must not exist")
    parser.add_argument(
        "--rank", type=int, help="cut to this rank, for servers that have a limit; prints what is lost"
    )
    arguments = parser.parse_args(argv)
    try:
        all_lost, worst = export_adapter(
            arguments.base, read_delta(arguments.delta), arguments.output, arguments.rank
        )
    except (DeltaError, SafetensorError, OSError) as error:
        print(f"slimfit-ds adapter: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in arguments.output.glob("*.safetensors"))
    print(f"{size:,} bytes: {arguments.output}")
    if arguments.rank is not None:
        print(
            f"rank {arguments.rank} leaves out {all_lost:.2%} of the update of linear layers (Frobenius norm; worst layer {worst:.2%})"
        )
    return 0
