"""Write docs/api.md from the docstrings and fields of the public names: python docs/make_api.py

A test compares the file with what this script would write.
"""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

from pydantic import BaseModel

TARGET = Path(__file__).parent / "api.md"

HEAD = """# API

Written by `docs/make_api.py` from the docstrings; do not edit.
"""

PARTS: list[tuple[str, str, list[str]]] = [
    (
        "Training",
        "Everything here is imported from `slimfit_ds` at first use, so that `import slimfit_ds` costs nothing.",
        ["slimfit_ds:initialize", "slimfit_ds:slim", "slimfit_ds.integrations.plain_loop:SlimHandle"],
    ),
    (
        "The engine",
        "What `initialize` returns first; everything else is DeepSpeed's.",
        ["slimfit_ds.engine.engine:SlimFitEngine"],
    ),
    (
        "Hugging Face Trainer",
        "See [trainer.md](trainer.md).",
        [
            "slimfit_ds:SlimFitCallback",
            "slimfit_ds.integrations:enable_deepspeed",
            "slimfit_ds.integrations:disable_deepspeed",
        ],
    ),
    (
        'The `"slimfit"` block',
        "A mapping under this key of a DeepSpeed JSON, or the argument of `slim` and `SlimFitCallback`.",
        [
            "slimfit_ds:SlimFitConfig",
            "slimfit_ds.config:FreezeConfig",
            "slimfit_ds.config:RateSchedule",
            "slimfit_ds.activations.config:ActivationsConfig",
            "slimfit_ds.config:OptimizerStatesConfig",
            "slimfit_ds.config:ConfigError",
        ],
    ),
    (
        "Memory and comparison",
        "See [memory.md](memory.md).",
        ["slimfit_ds:estimate", "slimfit_ds:compare"],
    ),
    (
        "To extend it",
        "See [extending.md](extending.md).",
        [
            "slimfit_ds.schedule.policies.base:Policy",
            "slimfit_ds.schedule.policies.base:Selection",
            "slimfit_ds.schedule.statistics:Statistic",
            "slimfit_ds.schedule.schedule:FreezeSchedule",
            "slimfit_ds.activations.codecs.base:Codec",
            "slimfit_ds.training.tasks.base:Task",
        ],
    ),
]
"""Heading, a line under it, and the objects as `module:name`."""

_HOOKS = {"zero_force_ds_cpu_optimizer", "clip_fp32_gradients", "record_memory", "state"}
"""Public only because DeepSpeed, transformers or a tool of this package calls them under these names."""

_SECTIONS = ("Args", "Returns", "Raises", "Attributes", "Example", "Yields")


def render() -> str:
    """The whole page."""
    lines = [HEAD]
    for heading, note, names in PARTS:
        lines += [f"## {heading}\n", f"{note}\n"]
        for place in names:
            module, _, name = place.partition(":")
            lines.append(_object(getattr(importlib.import_module(module), name), name, module))
    return "\n".join(lines).rstrip() + "\n"


def _object(item: Any, name: str, module: str) -> str:
    kind = "class" if inspect.isclass(item) else "function"
    parts = [f"### `{name}`\n", f"*{kind} of `{module}`*\n"]
    if inspect.isclass(item) and issubclass(item, BaseModel):
        return "\n".join([*parts, _text(item), _fields(item)])
    parts += [_signature(item, name), _text(item)]
    if inspect.isclass(item):
        parts += [_member(name, key, member) for key, member in _own_members(item)]
    return "\n".join(part for part in parts if part)


def _own_members(cls: type) -> list[tuple[str, Any]]:
    """Public methods and properties with a docstring, in the order of the source."""
    members = []
    for key, member in vars(cls).items():
        plain = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        function = plain.fget if isinstance(plain, property) else plain
        hidden = key.startswith(("_", "on_")) or key in _HOOKS
        if not hidden and inspect.isfunction(function) and function.__doc__:
            members.append((key, member))
    return members


def _member(owner: str, key: str, member: Any) -> str:
    if isinstance(member, property):
        return f"#### `{owner}.{key}`\n\n{_text(member.fget)}"
    plain = member.__func__ if isinstance(member, classmethod | staticmethod) else member
    return f"#### `{owner}.{key}`\n\n{_signature(plain, key)}\n{_text(plain)}"


def _signature(item: Any, name: str) -> str:
    try:
        signature = inspect.signature(item)
    except (TypeError, ValueError):
        return ""
    shown = [_parameter(p) for p in signature.parameters.values() if p.name not in {"self", "cls"}]
    returns = signature.return_annotation
    tail = "" if returns in (signature.empty, "None") or inspect.isclass(item) else f" -> {returns}"
    one_line = f"{name}({', '.join(shown)}){tail}"
    if len(one_line) > 100:
        one_line = f"{name}(\n    " + ",\n    ".join(shown) + f",\n){tail}"
    return f"```python\n{one_line}\n```\n"


def _parameter(parameter: inspect.Parameter) -> str:
    """`name: type = default`; annotations are texts, and a function as a default has no text worth showing."""
    default = "..." if callable(parameter.default) else repr(parameter.default)
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(
        parameter.kind, ""
    )
    hint = "" if parameter.annotation is parameter.empty else f": {parameter.annotation}"
    return f"{stars}{parameter.name}{hint}" + (
        "" if parameter.default is parameter.empty else f" = {default}"
    )


def _text(item: Any) -> str:
    """A docstring as Markdown: paragraphs as they are, sections as lists or code."""
    own = item.__doc__ if not inspect.isclass(item) else vars(item).get("__doc__")
    if not own:
        return ""
    blocks, section = [], ""
    for block in re.split(r"\n{2,}", inspect.cleandoc(own)):
        head, _, body = block.partition("\n")
        title = head.removesuffix(":").split(" (")[0]
        if head.endswith(":") and title in _SECTIONS:
            section = title
            blocks.append(_section(head.removesuffix(":"), title, textwrap.dedent(body)))
        elif section and block.startswith("    "):
            blocks.append(_section("", section, textwrap.dedent(block)))
        else:
            blocks.append(_paragraph(block))
    return "\n\n".join(blocks) + "\n"


def _paragraph(block: str) -> str:
    return f"```text\n{textwrap.dedent(block)}\n```" if block.startswith("    ") else block


def _section(head: str, title: str, body: str) -> str:
    if title == "Example":
        return f"```python\n{body}\n```"
    entries: list[str] = []
    for line in body.splitlines():
        if line.startswith(" ") and entries:
            entries[-1] += f" {line.strip()}"
        elif re.match(r"[\w, .*`\[\]]+: ", line) and title != "Returns":
            key, _, rest = line.partition(": ")
            entries.append(f"- `{key}`: {rest}")
        elif entries and not entries[-1].startswith("- `"):
            entries[-1] += f" {line.strip()}"
        else:
            entries.append(line)
    lead = f"{head}:" if head else ""
    gap = "\n\n" if lead and entries and entries[0].startswith("- ") else " "
    return f"{lead}{gap}".strip() + (gap if lead else "") + "\n".join(entries)


def _fields(model: type[BaseModel]) -> str:
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    hints = {
        key: str(value)
        for cls in reversed(model.__mro__)
        for key, value in vars(cls).get("__annotations__", {}).items()
    }
    for key, field in model.model_fields.items():
        hint = hints.get(key, "").replace("|", "\\|").replace("\n", " ")
        default = (
            "required"
            if field.is_required()
            else f"`{_default(field.get_default(call_default_factory=True))}`"
        )
        rows.append(f"| `{key}` | {hint} | {default} | {field.description or ''} |")
    return "\n".join(rows) + "\n"


def _default(value: Any) -> str:
    return "{}" if isinstance(value, BaseModel) else repr(value)


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
    print(TARGET)
