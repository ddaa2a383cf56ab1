"""A base as a model, and with a delta in it, by transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimfit_ds.deltas.base import DeltaError, find_base, whole_name
from slimfit_ds.deltas.delta import Delta, check_fit, filled
from slimfit_ds.trainable.units import named_tensors

__all__ = ["load_base", "load_merged", "put_in"]


def load_base(folder: Path, delta: Delta) -> tuple[nn.Module, set[str]]:
    """Load the model that a delta is of, without the delta; its class and values of its config are the delta's.

    Returns:
        The model, and the names of its tensors that the base lacks or has in another shape: their values are random.

    Raises:
        DeltaError: the class is none of transformers, or the delta lacks what the base does not have.
    """
    import transformers

    kind = getattr(transformers, delta.architecture or "", None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise DeltaError(
            f"the delta is of a {delta.architecture or 'model of your own code'}, which is no model of transformers"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _lay_over(config, delta.config)
        loaded: Any = kind.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, delta.dtype),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # of malformed configs transformers and huggingface_hub raise many
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        raise DeltaError(f"{folder} does not load as {delta.architecture} ({reason})") from None
    model, report = loaded
    made = {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}
    lacking = sorted(made - set(delta.tensors))
    if lacking:
        raise DeltaError(f"neither the base nor the delta has {lacking[0]!r} ({len(lacking)} tensors)")
    check_fit(model, delta)
    return model, made


def _lay_over(config: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        own = getattr(config, name, None)
        if isinstance(value, Mapping) and hasattr(own, "to_dict"):
            _lay_over(own, value)
        elif name == "id2label" and isinstance(value, Mapping):
            config.id2label = {int(key): label for key, label in value.items()}
        elif name != "model_type":
            setattr(config, name, value)


@torch.no_grad()
def put_in(model: nn.Module, delta: Delta) -> None:
    """Write the values of a delta into a whole model; a weight takes the dtype of what trained in it."""
    present = dict(named_tensors(model))
    for name, values in filled(delta).items():
        whole = whole_name(name)
        tensor = present[whole]
        if tensor.is_floating_point() and tensor.dtype != values.dtype:
            tensor.data = tensor.data.to(values.dtype)
        target = tensor if whole == name else delta.places[whole].of_weight(tensor)
        target.copy_(values)


def load_merged(base: str | Path, delta: Delta, revision: str | None = None) -> nn.Module:
    """Load a base with a delta in it: the trained model, to the bit.

    Args:
        base: folder or hub id.
        revision: on the hub.

    Raises:
        DeltaError: the base is not the one that the delta was made from.
    """
    folder, found = find_base(base, revision)
    delta.base.require(found, "the delta")
    model, _ = load_base(folder, delta)
    put_in(model, delta)
    return model.eval()
