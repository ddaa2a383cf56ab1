"""Blocks at rest run compiled: the same numbers, and no graph for a new active set."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Iterator

import pytest
import torch
from tiny_models import batch_for, build, gradients, relative_error, without_dropout
from torch import Tensor, nn
from torch._dynamo.utils import counters

import slimfit_ds
from slimfit_ds.activations import compiled
from slimfit_ds.activations.apply import compress
from slimfit_ds.activations.compiled import at_rest
from slimfit_ds.activations.config import ActivationsConfig
from slimfit_ds.activations.recognise import find_blocks
from slimfit_ds.errors import ConfigError
from slimfit_ds.memory.tracker import MemoryTracker


@pytest.fixture(autouse=True)
def fresh_graphs(request, monkeypatch) -> Iterator[None]:
    """Graphs of PyTorch's own kernels, where a test does not ask for compiled ones (seconds each)."""
    torch._dynamo.reset()
    counters.clear()
    compiled._graph_of.cache_clear()
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()
    compiled._graph_of.cache_clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


class Block(nn.Module):
    """A block of no known class, with dropout."""

    def __init__(self, p: float):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.norm(x)))))


class Stack(nn.Module):
    def __init__(self, p: float = 0.0, blocks: int = 3):
        super().__init__()
        self.blocks = nn.ModuleList(Block(p) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class GradientCheckpointingLayer(nn.Module):
    """The seam as transformers 5.17 has it: around the call of the module, not around its forward."""

    gradient_checkpointing = False

    def __call__(self, *args, **kwargs):
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(functools.partial(super().__call__, **kwargs), *args)
        return super().__call__(*args, **kwargs)


class OldSeamBlock(GradientCheckpointingLayer, Block):
    pass


def freeze_weights(model: nn.Module, but: str = "") -> None:
    """Freeze every weight of the blocks, norms included, except that of this name."""
    for prefix, block in find_blocks(model).items():
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(f"{prefix}.{name}" == but or not name.endswith("weight"))


def lossless(preset: str) -> ActivationsConfig:
    """Blocks as the preset runs them, without loss."""
    return ActivationsConfig(operations={"block": "recompute"} if preset == "minimal" else {}, compile=True)


PRESETS = ["exact", "minimal"]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_gradients_are_those_of_the_plain_model(name, preset):
    model = without_dropout(build(name))
    freeze_weights(model)
    batch = batch_for(name)
    loss, expected = gradients(model, batch)
    handle = compress(model, lossless(preset))
    found_loss, found = gradients(model, batch)
    # Both blocks run through the same graph.
    assert graphs() == 1
    handle.remove()
    assert torch.allclose(found_loss, loss, rtol=1e-5)
    assert relative_error(found, expected) < 1e-5


def test_a_block_with_an_active_weight_runs_as_it_is():
    model = Stack(blocks=1).double()
    freeze_weights(model, but="blocks.0.norm.weight")
    handle = compress(model, ActivationsConfig(compile=True))
    assert not at_rest(model.blocks[0])
    model(torch.randn(2, 8, dtype=torch.float64)).sum().backward()
    assert graphs() == 0
    freeze_weights(model)
    assert at_rest(model.blocks[0])
    model(torch.randn(2, 8, dtype=torch.float64)).sum().backward()
    assert graphs() == 1
    handle.remove()
    assert "forward" not in model.blocks[0].__dict__


@pytest.mark.parametrize("preset", PRESETS)
def test_changing_sets_make_no_new_graphs(preset):
    model = build("bert")
    config = {
        "freeze": {"rate": 0.9, "policy": "random"},
        "activations": {"preset": preset, "compile": True},
    }
    handle = slimfit_ds.slim(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    handle.follow(optimizer)
    sets, made = set(), []
    for _ in range(30):
        sets.add(handle.active_layers)
        optimizer.zero_grad()
        model(**batch_for("bert")).loss.backward()
        optimizer.step()
        made.append(graphs())
    assert len(sets) > 10
    assert made[-1] == made[len(made) // 2] == 1


@pytest.mark.parametrize("seam", [False, pytest.param(False, marks=pytest.mark.slow, id="inductor"), True])
def test_the_repetition_draws_the_masks_of_the_forward_pass(seam):
    """Against differences of the function itself, which draws from the same seed each time."""
    model = Stack(p=0.4)
    if seam:
        model.blocks = nn.ModuleList(OldSeamBlock(0.4) for _ in range(3))
    model = model.double()
    freeze_weights(model)
    compress(model, ActivationsConfig(operations={"block": "recompute"}, compile=True))
    torch.manual_seed(0)
    x = torch.randn(4, 5, 8, dtype=torch.float64, requires_grad=True)
    direction, weights = torch.randn_like(x), torch.randn_like(x)

    def value(at: Tensor) -> Tensor:
        torch.manual_seed(7)
        return (model(at) * weights).sum()

    value(x).backward()
    assert graphs() == 1
    step = 1e-5
    ahead, behind = (value((x + sign * step * direction).detach().requires_grad_()) for sign in (1, -1))
    difference = (ahead - behind).item() / (2 * step)
    assert float((x.grad * direction).sum()) == pytest.approx(difference, rel=1e-6)
    torch.manual_seed(8)
    assert not torch.equal((model(x) * weights).sum(), value(x))


def test_a_watched_step_runs_as_it_is_and_spoils_nothing():
    model = build("bert")
    freeze_weights(model)
    compress(model, ActivationsConfig(preset="minimal", compile=True))
    with MemoryTracker(model):
        expected, watched = gradients(model, batch_for("bert"))
    assert graphs() == 0
    loss, found = gradients(model, batch_for("bert"))
    assert graphs() == 1
    assert torch.allclose(loss, expected)
    assert relative_error(found, watched) < 1e-5


@pytest.mark.parametrize("freeze", [{"policy": "ils", "rate": 0.9}, {"policy": "static", "width": 0.25}])
def test_the_engine_trains_as_without(one_rank, freeze):
    weights = []
    for compile_blocks in (False, True):
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": 1},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "steps_per_print": None,
            "slimfit": {
                "freeze": freeze,
                "activations": {"preset": "minimal", "compile": compile_blocks},
            },
        }
        engine, *_ = slimfit_ds.initialize(model=without_dropout(build("bert")), config=config)
        made = []
        for _ in range(12):
            engine.backward(engine(**batch_for("bert")).loss)
            engine.step()
            made.append(graphs())
        weights.append(torch.cat([p.detach().flatten() for p in engine.module.parameters()]))
    assert made[-1] == made[5] == 1
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_runs_its_own_weights(copied):
    model = Stack(blocks=1).double()
    freeze_weights(model)
    compress(model, ActivationsConfig(compile=True))
    x = torch.randn(2, 8, dtype=torch.float64)
    twin = copied(model)
    with torch.no_grad():
        twin.blocks[0].down.bias.add_(1.0)
    assert torch.allclose(twin(x), model(x) + 1.0)


@pytest.mark.parametrize("preset", ["balanced", "paper"])
def test_nothing_to_compile_is_refused(preset):
    with pytest.raises(ConfigError, match=r"activations\.compile is true, but no block is compiled"):
        compress(build("bert"), ActivationsConfig(preset=preset, compile=True))


COLUMNS = {"policy": "static", "width": 0.25}


def with_columns(name: str, preset: str, compile_blocks: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of which some columns train, its blocks run as the preset runs them, without loss."""
    model = without_dropout(build(name))
    activations = {**lossless(preset).model_dump(mode="json"), "compile": compile_blocks}
    handle = slimfit_ds.slim(model, {"freeze": COLUMNS, "activations": activations})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    handle.follow(optimizer)
    return model, optimizer


# The first block of GPT-2 has a graph of its own: none of the word embedding trains, which is the output layer too, so no
# gradient of its input is wanted.
@pytest.mark.parametrize(
    ("name", "preset", "expected_graphs"),
    [("bert", "exact", 1), ("llama", "minimal", 1), ("gpt2", "minimal", 2)],
)
def test_with_columns_all_blocks_of_a_class_train_through_one_graph(name, preset, expected_graphs):
    plain, compiled_ = (with_columns(name, preset, compile_blocks) for compile_blocks in (False, True))
    made = []
    for step in range(20):
        batch = batch_for(name, seed=step)
        (loss, expected), (found_loss, found) = (gradients(model, batch) for model, _ in (plain, compiled_))
        torch.testing.assert_close(found_loss, loss, rtol=1e-4, atol=1e-6)
        # Adam makes much of small differences of gradients.
        assert relative_error(found, expected) < (1e-5 if step == 0 else 1e-2)
        for _, optimizer in (plain, compiled_):
            optimizer.step()
        made.append(graphs())
    assert made[0] == made[-1] == expected_graphs
    assert not counters["graph_break"]


def test_other_columns_after_a_removal_get_their_own_gradients():
    models = [without_dropout(build("llama")) for _ in range(2)]
    found = []
    for model, compile_blocks in zip(models, (False, True), strict=True):
        for seed in (0, 1):
            block = {
                "freeze": {**COLUMNS, "seed": seed},
                "activations": {"preset": "exact", "compile": compile_blocks},
            }
            handle = slimfit_ds.slim(model, block)
            _, last = gradients(model, batch_for("llama"))
            handle.remove()
            model.zero_grad(set_to_none=True)
        found.append(last)
    assert relative_error(found[1], found[0]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_columns_through_kernels_of_inductor(preset):
    plain, compiled_ = (with_columns("llama", preset, compile_blocks) for compile_blocks in (False, True))
    for step in range(3):
        batch = batch_for("llama", seed=step)
        (loss, expected), (found_loss, found) = (gradients(model, batch) for model, _ in (plain, compiled_))
        torch.testing.assert_close(found_loss, loss, rtol=1e-4, atol=1e-6)
        assert relative_error(found, expected) < (1e-5 if step == 0 else 1e-2)
        for _, optimizer in (plain, compiled_):
            optimizer.step()
    assert graphs() == 1


def test_a_graph_that_kept_older_columns_says_so():
    model, optimizer = with_columns("llama", "exact", True)
    loss = model(**batch_for("llama")).loss
    loss.backward(retain_graph=True)
    optimizer.step()
    model(**batch_for("llama"))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_model_that_is_compiled_once_more_trains_as_without():
    plain, compiled_ = (with_columns("bert", "minimal", compile_blocks) for compile_blocks in (False, True))
    whole = torch.compile(compiled_[0])
    for step in range(3):
        loss, expected = gradients(plain[0], batch_for("bert"))
        found_loss, found = gradients(whole, batch_for("bert"))
        torch.testing.assert_close(found_loss, loss, rtol=1e-4, atol=1e-6)
        found = {name.removeprefix("_orig_mod."): gradient for name, gradient in found.items()}
        assert relative_error(found, expected) < (1e-5 if step == 0 else 1e-2)
        for _, optimizer in (plain, compiled_):
            optimizer.step()


def test_a_policy_that_trains_other_columns_at_each_step_is_refused():
    config = {
        "freeze": {"policy": "ils", "width": 0.5},
        "activations": {"preset": "minimal", "compile": True},
    }
    with pytest.raises(ConfigError, match=r"freeze\.policy 'ils' trains other columns"):
        slimfit_ds.slim(build("bert"), config)
