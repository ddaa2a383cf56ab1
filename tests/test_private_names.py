"""The table of private names: true of the installed libraries, complete for the package, and a guard at start-up."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import nn

import slimfit_ds
from slimfit_ds import private_names
from slimfit_ds.engine.engine import SlimFitEngine
from slimfit_ds.engine.zero3 import FreezeZero3Optimizer
from slimfit_ds.private_names import SUPPORTED, TABLE, Name, changed_names

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "slimfit_ds"
# No library can take these away: a function of Python, an operator of torch.
ALLOWED = {"os._exit", "sys._getframe", "aten._local_scalar_dense", "torch.ops.aten._unsafe_view"}


@pytest.fixture(autouse=True)
def fresh():
    private_names._check.cache_clear()
    yield
    private_names._check.cache_clear()


def test_the_installed_libraries_have_every_name():
    assert changed_names(load=True) == []


def make_engine(stage: int = 1):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "slimfit": {"freeze": {"policy": "ils", "rate": 0.5}},
    }
    return slimfit_ds.initialize(model=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config=config)


def test_names_that_are_gone_are_told_together_before_an_engine_is_made(monkeypatch):
    monkeypatch.delattr(DeepSpeedEngine, "_take_model_step")
    monkeypatch.delattr(DeepSpeedZeroOptimizer_Stage3, "_pre_step")
    with pytest.raises(RuntimeError) as caught:
        make_engine()
    message = str(caught.value)
    assert "install deepspeed==0.19.* (found 0.19" in message
    assert "deepspeed.runtime.engine:DeepSpeedEngine has no _take_model_step" in message
    assert "DeepSpeedZeroOptimizer_Stage3 has no _pre_step" in message


@pytest.mark.parametrize(
    ("changed", "works"),
    [
        (lambda self, lr_kwargs, block_eigenvalue=None, *more, **options: None, True),
        (lambda self, rates: None, False),
        (lambda self, lr_kwargs, needed: None, False),
        (lambda self: None, False),
    ],
)
def test_a_signature_may_only_grow_by_what_is_optional(monkeypatch, changed, works):
    monkeypatch.setattr(DeepSpeedEngine, "_take_model_step", changed)
    if works:
        private_names.check()
        return
    with pytest.raises(RuntimeError, match=r"_take_model_step takes \(self.*\), not \(self, lr_kwargs\)"):
        private_names.check()


def test_the_plain_loop_is_guarded_too(monkeypatch):
    monkeypatch.delattr(torch.utils._pytree, "tree_iter")
    with pytest.raises(RuntimeError, match=r"install torch>=2\.11,<2\.14 .*\n.*_pytree has no tree_iter"):
        slimfit_ds.slim(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), {"freeze": {"policy": "none"}})


def test_what_is_set_on_instances_is_looked_for_in_the_source():
    assert Name("torch.optim.lr_scheduler", "_opt_called", (), "", in_source=True).problem() is None
    gone = Name("torch.optim.lr_scheduler", "_opt_was_called", (), "", in_source=True)
    assert gone.problem() == "torch.optim.lr_scheduler no longer knows _opt_was_called"


@pytest.mark.parametrize(
    ("ours", "stock"),
    [(SlimFitEngine, DeepSpeedEngine), (FreezeZero3Optimizer, DeepSpeedZeroOptimizer_Stage3)],
)
def test_every_overridden_method_stands_in_the_table(ours, stock):
    mine = {name for cls in ours.__mro__ if cls.__module__.startswith("slimfit_ds") for name in vars(cls)}
    public = {"destroy", "load_state_dict", "state_dict"}
    overridden = {name for name in mine & vars(stock).keys() if not name.startswith("__")} - public
    rows = {row.name: row for row in TABLE if row.owner.endswith(stock.__name__)}
    assert overridden <= rows.keys()
    assert all(rows[name].parameters is not None for name in overridden)


def parsed() -> dict[Path, ast.Module]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return {path: ast.parse(path.read_text()) for path in paths if "training" not in path.parts}


def own_names(trees: dict[Path, ast.Module]) -> set[str]:
    """Functions, classes, variables and attributes that the package makes itself."""
    names: set[str] = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) in ("self", "cls")
            ):
                names.add(node.attr)
    return names


def private_uses() -> dict[str, str]:
    """Private attributes and imports of other libraries -> where one of them stands."""
    trees = parsed()
    own = own_names(trees)
    found: dict[str, str] = {}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            uses: list[str] = []
            if isinstance(node, ast.Attribute) and ast.unparse(node) not in ALLOWED:
                uses = [node.attr]
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(
                ("slimfit_ds", "__")
            ):
                uses = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            for name in uses:
                if re.match(r"_[a-zA-Z]", name) and name not in own:
                    found[name] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return found


def test_every_private_name_in_the_package_stands_in_the_table():
    known = {row.name for row in TABLE}
    known |= {part for row in TABLE for part in re.split("[.:]", row.owner)}
    missing = {name: place for name, place in private_uses().items() if name not in known}
    assert len(private_uses()) > 30
    assert missing == {}


def test_every_row_is_used_where_it_says():
    rooms = {room for row in TABLE for room in row.rooms}
    texts = {room: "\n".join(p.read_text() for p in (PACKAGE / room).rglob("*.py")) for room in rooms}
    stale = [
        (row.name, room)
        for row in TABLE
        for room in row.rooms
        if not re.search(rf"(?<!\w){row.name}(?!\w)", texts[room])
    ]
    assert stale == []


def test_versions_follow_the_table():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = project["dependencies"] + [
        x for group in project["optional-dependencies"].values() for x in group
    ]
    bounds = {re.match(r"[\w-]+", line)[0]: line for line in listed}
    for library, versions in SUPPORTED.items():
        assert bounds[library] == library + versions
    for library in ("accelerate", "trl", "peft"):
        assert "<" in bounds[library]
    assert len(private_names._page().splitlines()) > len(TABLE)
