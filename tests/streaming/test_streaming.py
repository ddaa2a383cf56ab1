"""Streamed training against resident training, bit for bit, with copies that are late and out of order."""

from __future__ import annotations

import copy
import gc
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import slimfit_ds
from slimfit_ds.errors import ConfigError
from slimfit_ds.memory.tracker import MemoryTracker
from slimfit_ds.streaming import copies, find, streaming
from slimfit_ds.streaming.copies import Copies

HOST = {"frozen_weights": {"live": "host"}}


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 60,
}
# An output layer larger than any layer of a block does not train.
DECODER = {
    **SIZES,
    "vocab_size": 100,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 32,
}
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)),
    "tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "gemma": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**DECODER, head_dim=8)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, head_dim=8)),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**DECODER, num_local_experts=3, num_experts_per_tok=2)
    ),
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZES, pad_token_id=0, num_labels=3)),
    "vit": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(**SIZES, image_size=16, patch_size=4, num_labels=3)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0)),
}


def build(name: str) -> nn.Module:
    """A tiny model of four blocks (T5: two and two), with the dropout of its family."""
    torch.manual_seed(0)
    return MODELS[name]().train()


def inputs(name: str, seed: int) -> dict[str, Tensor]:
    """A batch of four, with padding and labels."""
    random = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(4, 3, 16, 16, generator=random), "labels": torch.arange(4) % 3}
    ids = torch.randint(2, 60, (4, 10), generator=random)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.arange(4) % 3 if name == "bert" else ids,
    }


class LateCopies(Copies):
    """Copies that spoil the buffer at once and arrive when they are waited for, not in the order of their start.

    A stream may overwrite from the moment a copy is started: nothing that is still needed may stand there, and nobody
    may hold a view of it.
    """

    started = 0
    blocks: Sequence[Any] = ()

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._pending: dict[int, tuple[Tensor, Tensor]] = {}
        self._holders: dict[int, int] = {}

    def start(self, target: Tensor, source: Tensor) -> int:
        # A copy that nobody has waited for is overwritten in the stream's order.
        self._pending.pop(target.data_ptr(), None)
        storage = target.untyped_storage()
        # All buffers are of one storage, so views are counted where nobody needs one: between two blocks' forward passes.
        if torch._C._current_graph_task_id() == -1 and not any(block.on_device for block in self.blocks):
            holders = torch._C._storage_Use_Count(storage._cdata) - len(self._pending)
            assert holders == self._holders.setdefault(storage._cdata, holders), "a view is still held"
        target.fill_(255)  # NaN in every format
        LateCopies.started += 1
        self._pending[target.data_ptr()] = (target, source)
        return target.data_ptr()

    def wait(self, started: int | None) -> None:
        if started is not None:
            target, source = self._pending.pop(started)
            target.copy_(source)


@pytest.fixture
def late(monkeypatch) -> None:
    make = streaming.Streaming._make_buffers

    def making(self: streaming.Streaming) -> None:
        make(self)
        self._copies.blocks = self.blocks

    monkeypatch.setattr(streaming, "Copies", LateCopies)
    monkeypatch.setattr(streaming.Streaming, "_make_buffers", making)
    LateCopies.started = 0


def train(
    model: nn.Module,
    name: str,
    block: Mapping[str, Any],
    steps: int = 10,
    micro: int = 1,
    between: Callable[[nn.Module, int], None] = lambda model, step: None,
) -> list[dict[str, Tensor]]:
    """Losses, gradients and weights of each step, by name."""
    torch.manual_seed(1)
    handle = slimfit_ds.slim(model, block)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    handle.follow(optimizer)
    seen = []
    for step in range(steps):
        found: dict[str, Tensor] = {}
        for part in range(micro):
            loss = model(**inputs(name, seed=step * micro + part)).loss
            loss.backward()
            found[f"loss {part}"] = loss.detach().clone()
        found |= {f"gradient {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        found |= {n: t.clone() for n, t in model.state_dict().items()}
        found["proof"] = torch.tensor(len(handle.proof.failures))
        seen.append(found)
        between(model, step)
    return seen


def assert_equal_runs(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    assert len(found) == len(expected)
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        assert not different, f"step {step}: {different[:4]}"


CASES = [
    ("llama", "exact"), ("llama", "balanced"), ("llama", "minimal"), ("llama", "ultra"),
    ("qwen3", "minimal"), ("qwen3", "exact"), ("bert", "exact"), ("bert", "balanced"), ("bert", "minimal"),
    ("vit", "balanced"), ("t5", "exact"), ("t5", "minimal"), ("tied", "exact"), ("tied", "minimal"), ("gemma", "minimal"), ("mixtral", "exact"), ("mixtral", "minimal"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "preset"), CASES)
def test_streamed_is_resident_bit_for_bit(name, preset, late):
    block = {"freeze": {"rate": 0.8}, "activations": {"preset": preset, "chunk_tokens": 20}}
    micro = 2 if name in ("bert", "llama") else 1
    expected = train(build(name), name, block, micro=micro)
    found = train(build(name), name, {**block, **HOST}, micro=micro)
    assert LateCopies.started > 10
    assert_equal_runs(found, expected)


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_the_output_layer_with_the_loss_in_chunks(name, late):
    block = {"freeze": {"rate": 0.8}, "activations": {"preset": "minimal", "chunk_loss_tokens": 16}}
    expected = train(build(name), name, block, steps=3, micro=2)
    model = build(name)
    assert_equal_runs(train(model, name, {**block, **HOST}, steps=3, micro=2), expected)
    assert streaming.streaming_of(model).blocks[-1].name == "lm_head"


def streamed(name: str = "llama", **more: Any) -> tuple[nn.Module, Any]:
    model = build(name)
    return model, slimfit_ds.slim(model, {"freeze": {"rate": 0.8}, **HOST, **more})


def buffers_of(model: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in streaming.streaming_of(model).device_tensors}


def test_a_choosing_policy_over_narrow_units_streams_too(late):
    block = {"freeze": {"policy": "ils", "rate": 0.9, "width": 0.2}, "activations": "balanced"}
    expected = train(build("llama"), "llama", block)
    assert_equal_runs(train(build("llama"), "llama", {**block, **HOST}), expected)
    assert LateCopies.started > 10


@pytest.mark.parametrize("preset", ["exact", "minimal"])
def test_blocks_below_the_front_stream_too(preset, late):
    block = {"freeze": {"rate": 0.8, "front": "half"}, "activations": preset}
    expected = train(build("llama"), "llama", block, steps=6)
    assert_equal_runs(train(build("llama"), "llama", {**block, **HOST}, steps=6), expected)
    assert LateCopies.started > 10


def test_weights_that_the_user_froze_stream_under_any_policy(late):
    """Plain frozen layers, whose weight autograd itself saves, also under torch's checkpointing."""

    def frozen_base(checkpointing: bool) -> nn.Module:
        model = build("llama")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("q_proj" in name or "norm" in name)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    block = {"freeze": {"policy": "none"}}
    for checkpointing in (False, True):
        expected = train(frozen_base(checkpointing), "llama", block, steps=3)
        assert_equal_runs(train(frozen_base(checkpointing), "llama", {**block, **HOST}, steps=3), expected)


def test_what_happens_between_steps_is_right(late, tmp_path):
    """Evaluation, generation, state dicts, saving, loading other weights, a backward pass from an old graph."""
    block = {"freeze": {"rate": 0.8}, "activations": "exact"}
    other = {n: t + 0.01 for n, t in build("llama").state_dict().items()}
    seen: dict[str, list[Any]] = {"resident": [], "streamed": []}

    def between(key: str) -> Callable[[nn.Module, int], None]:
        def work(model: nn.Module, step: int) -> None:
            model.eval()
            with torch.no_grad():
                ids = inputs("llama", 90 + step)["input_ids"]
                seen[key].append(model(input_ids=ids).logits)
                seen[key].append(model.generate(ids, max_new_tokens=3, do_sample=False))
            model.train()
            model.save_pretrained(tmp_path / key)
            again = hf.LlamaForCausalLM.from_pretrained(tmp_path / key)
            seen[key].append(torch.cat([t.flatten() for t in again.state_dict().values()]))
            if step == 1:
                model.load_state_dict(other)

        return work

    expected = train(build("llama"), "llama", block, steps=3, between=between("resident"))
    found = train(build("llama"), "llama", {**block, **HOST}, steps=3, between=between("streamed"))
    assert_equal_runs(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))


def test_a_backward_pass_may_come_late_and_twice(late):
    def gradients(model: nn.Module) -> list[Tensor]:
        first = model(**inputs("llama", 1)).loss
        second = model(**inputs("llama", 2)).loss
        first.backward(retain_graph=True)
        second.backward()
        first.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    resident = build("llama")
    slimfit_ds.slim(resident, {"freeze": {"rate": 0.8}})
    model, _ = streamed()
    pairs = list(zip(gradients(model), gradients(resident), strict=True))
    assert len(pairs) > 20
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_model_says_that_it_is_where_it_computes(late):
    """Its first parameter is on the host; `generate` moves what it is given to where the model says it is."""
    model, handle = streamed("tied")
    plain = type(model).whole_class
    assert (plain, isinstance(model, hf.LlamaForCausalLM)) == (hf.LlamaForCausalLM, True)
    handle.streaming.device = torch.device("meta")
    assert model.device == model.model.device == torch.device("meta")
    again = copy.deepcopy(model)
    assert (type(again), again.device) == (plain, torch.device("cpu"))
    handle.streaming.device = torch.device("cpu")
    handle.remove()
    assert type(model) is plain
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_embedding_that_does_more_than_look_up_stays(late):
    """Nobody else may read its weight, and rows in place of the weight must give the same."""

    class Normed(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) - self.weight.mean(0)

    model = build("tied")
    model.model.embed_tokens.__class__ = Normed
    handle = slimfit_ds.slim(model, {"freeze": {"rate": 0.8}, **HOST})
    assert handle.streaming.tables == []
    assert [block.name for block in handle.streaming.blocks] == [f"model.layers.{i}" for i in range(4)]


def test_an_id_outside_of_the_vocabulary_is_an_error_that_leaves_everything_in_order(late):
    model, _ = streamed("tied")
    before = model.model.embed_tokens.weight.data_ptr()
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[5, 100]]))
    assert model.model.embed_tokens.weight.data_ptr() == before
    assert model.model.embed_tokens.padding_idx == 0
    model(**inputs("tied", 0))


def test_weights_are_on_the_device_only_while_their_block_computes():
    model, _ = streamed()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    weight, seen = model.model.layers[1].mlp.up_proj.weight, []

    def look(*_: Any) -> None:
        seen.append(weight.untyped_storage().data_ptr() in buffers_of(model))

    model.model.layers[1].mlp.up_proj.register_forward_hook(look)
    model(**inputs("llama", 0)).loss.backward()
    assert seen == [True]
    assert weight.untyped_storage().data_ptr() not in buffers_of(model)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_an_exception_in_a_block_leaves_everything_in_order(late):
    model, _ = streamed()
    expected = model(**inputs("llama", 0)).loss

    def fail(*_: Any) -> None:
        raise OSError("no")

    handle = model.model.layers[2].mlp.act_fn.register_forward_hook(fail)
    with pytest.raises(OSError, match="no"):
        model(**inputs("llama", 0))
    handle.remove()
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    assert not any(p.untyped_storage().data_ptr() in buffers_of(model) for p in model.parameters())
    assert torch.equal(model(**inputs("llama", 0)).loss, expected)


def test_an_exception_in_a_backward_pass_leaves_everything_in_order(late):
    """The graph that is left behind and the next step's are right."""
    model, _ = streamed()
    expected = build("llama")
    slimfit_ds.slim(expected, {"freeze": {"rate": 0.8}})

    def fail(*_: Any) -> None:
        raise OSError("no")

    handle = model.model.layers[1].mlp.register_full_backward_pre_hook(fail)
    with pytest.raises(OSError, match="no"):
        model(**inputs("llama", 0)).loss.backward()
    handle.remove()
    model.zero_grad()
    assert not any(p.untyped_storage().data_ptr() in buffers_of(model) for p in model.parameters())
    for each in (model, expected):
        each(**inputs("llama", 1)).loss.backward()
    pairs = [
        (p.grad, q.grad)
        for p, q in zip(model.parameters(), expected.parameters(), strict=True)
        if q.grad is not None
    ]
    assert len(pairs) > 20
    assert all(p is not None and torch.equal(p, q) for p, q in pairs)


def test_copies_pickles_casts_and_removal(late):
    model, handle = streamed()
    expected = model(**inputs("llama", 0)).loss
    for plain in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert streaming.streaming_of(plain) is None
        assert torch.equal(plain(**inputs("llama", 0)).loss, expected)
        plain.to(torch.float64)
        assert {p.dtype for p in plain.parameters()} == {torch.float64}
    names = [name for name, _ in model.named_parameters()]
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert [name for name, _ in model.named_parameters()] == names
    reference = build("llama").to(torch.bfloat16)
    loss = model(**inputs("llama", 0)).loss
    assert torch.equal(loss, reference(**inputs("llama", 0)).loss)
    handle.remove()
    handle.remove()
    with pytest.raises(
        RuntimeError, match=r"put back \(remove\) between a forward pass and its backward pass"
    ):
        loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    storages = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(storages)) == len(storages)
    assert not any("_apply" in module.__dict__ or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(**inputs("llama", 0)).loss, reference(**inputs("llama", 0)).loss)


def test_resident_blocks_and_more_buffers(late):
    expected = train(build("llama"), "llama", {"freeze": {"rate": 0.8}}, steps=3)
    weights = {"live": "host", "resident": 1, "buffers": 3}
    model = build("llama")
    found = train(model, "llama", {"freeze": {"rate": 0.8}, "frozen_weights": weights}, steps=3)
    assert_equal_runs(found, expected)
    handle = streaming.streaming_of(model)
    assert [len(handle.blocks), len(handle.buffers)] == [4, 3]  # three blocks and the output layer


def test_what_is_refused(monkeypatch):
    def problems(block: Mapping[str, Any]) -> str:
        with pytest.raises(ConfigError) as caught:
            slimfit_ds.slim(build("llama"), {**HOST, **block})
        return str(caught.value)

    assert "every layer of the blocks trains at some step" in problems({"freeze": {"policy": "ils"}})
    assert "resident 4 leaves none of the 4 blocks" in problems(
        {"frozen_weights": {"live": "host", "resident": 4}}
    )
    assert "buffers" in problems({"frozen_weights": {"live": "host", "buffers": 1}})
    assert "updates all layers at once" in problems({"optimizer_states": {"active": "host"}})
    columns = {"frozen_weights": {"live": "host", "columns": "host"}}
    assert "an optimizer of torch would update them on the host" in problems(columns)
    for name, more in (("live", {"live": "auto"}), ("resident", {"live": "host", "resident": "auto"})):
        text = problems({"frozen_weights": more})
        assert (
            f"frozen_weights.{name} 'auto': only slimfit_ds.initialize with training_data decides it" in text
        )
    assert "this freeze policy trains whole layers" in problems({"freeze": {"policy": "ils"}, **columns})
    assert "set activations.compile to false" in problems(
        {"activations": {"preset": "minimal", "compile": True}}
    )
    monkeypatch.setattr(find.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    text = problems({})
    assert (
        "frozen weights take 0.0 GiB of host memory for each rank, optimizer states 0.0 for each of 4 ranks"
        in text
    )
    assert "and 0.0 GiB are; keep more blocks on the device (resident)" in text
    with torch.device("meta"):
        model = MODELS["llama"]()
    with pytest.raises(ConfigError, match="meta device have no values"):
        slimfit_ds.slim(model, HOST)


def test_weights_stay_mapped_from_their_file_until_they_are_needed(tmp_path):
    """Loaded in the dtype of the file they take no memory of their own, and count as memory that is still to be had."""
    build("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    model = hf.LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto").train()
    weight = model.model.layers[0].mlp.up_proj.weight
    assert find._is_mapped(weight, find._mapped_ranges())
    assert not find._is_mapped(build("llama").model.layers[0].mlp.up_proj.weight, find._mapped_ranges())
    block = {"freeze": {"rate": 0.8}, "activations": {"preset": "exact", "proof": False}, **HOST}
    handle = slimfit_ds.slim(model, block)
    mapped = weight.data_ptr()
    assert find._is_mapped(weight, find._mapped_ranges())
    loss = model(**inputs("llama", 0)).loss
    assert weight.data_ptr() != mapped
    assert all(block.pieces for block in handle.streaming.blocks)
    plain = hf.LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto").train()
    slimfit_ds.slim(plain, {**block, "frozen_weights": {}})
    assert torch.equal(loss, plain(**inputs("llama", 0)).loss)


def test_memory_of_a_node_that_cannot_be_had(monkeypatch):
    """Every rank learns of it, and has a copy of its own."""

    def ranks(size: int, rank: int = 0) -> Any:
        return copies.node_memory(size, rank, lambda value: [value, value])

    memory, fills = ranks(100)
    assert (memory.nbytes, memory.is_shared(), fills) == (100, True, True)
    assert copies.node_memory(100, 0, lambda value: [value]) is None

    def no_room(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(copies.os, "posix_fallocate", no_room)
    with pytest.warns(UserWarning, match="cannot be shared .*No space left on device"):
        assert ranks(100) is None


@pytest.mark.parametrize("dies", ["the rank that fills", "another rank"])
def test_a_rank_that_dies_while_memory_is_shared_leaves_none_behind(dies):
    """No name under /dev/shm, no open file."""
    program = """if True:
        import os, signal, sys
        from slimfit_ds.streaming import copies
        calls, before = [], sorted(os.listdir("/proc/self/fd"))
        def exchange(value):
            calls.append(value)
            if len(calls) == 3:
                if sys.argv[1] == "the rank that fills":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("Connection closed by peer")
            return [value, value]
        try:
            copies.node_memory(1 << 20, 0, exchange)
        except RuntimeError:
            print(len(calls), sorted(os.listdir("/proc/self/fd")) == before)
    """
    before = sorted(Path("/dev/shm").glob("*slimfit*"))
    done = subprocess.run([sys.executable, "-c", program, dies], capture_output=True, text=True, timeout=200)
    assert sorted(Path("/dev/shm").glob("*slimfit*")) == before
    if dies == "another rank":
        assert done.stdout.split() == ["3", "True"], done.stderr
    else:
        assert done.returncode == -signal.SIGKILL


def test_memory_that_cannot_be_page_locked_is_used_as_it_is(monkeypatch):
    """One line says how much; what the failed call left behind is taken away; what is locked is unlocked at the end."""
    locked: list[int] = []

    def register(start: int, nbytes: int, flags: int) -> int:
        locked.append(start)
        return 0 if len(locked) == 1 else 2  # cudaErrorMemoryAllocation

    unlocked: list[int] = []
    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unlocked.append)
    monkeypatch.setattr(copies.torch.cuda, "cudart", lambda: runtime)
    launched: list[Any] = []

    def launch(*_: Any, device: str) -> None:
        launched.append(device)
        raise RuntimeError("CUDA error: out of memory")

    model, handle = streamed()
    with torch.no_grad():
        expected = model(**inputs("llama", 0)).loss
    with monkeypatch.context() as patch:
        patch.setattr(copies.torch, "ones", launch)
        with pytest.warns(UserWarning, match=r"0\.00 GiB of host memory could not be page-locked") as caught:
            handle.streaming._lock_pages()
    assert len(caught) == 1
    assert launched == ["cuda"] * 4
    assert len(locked) == 5
    with torch.no_grad():
        assert torch.equal(model(**inputs("llama", 0)).loss, expected)
    del model, handle, expected
    gc.collect()
    assert unlocked == locked[:1]


def test_the_tracker_tells_host_from_device():
    """Of four equal blocks two are on the device at a time, nothing of embedding and output layer; what is saved is no weight."""
    reports = []
    for more in ({}, HOST):
        model = build("llama")
        slimfit_ds.slim(model, {"freeze": {"rate": 0.8}, "activations": "minimal", **more})
        model(**inputs("llama", 0)).loss.backward()
        model.zero_grad()
        with MemoryTracker(model) as tracker:
            model(**inputs("llama", 0)).loss.backward()
        reports.append(tracker.report())
    resident, away = reports
    on_host = sum(t.nbytes for t in streaming.streaming_of(model).host_tensors)
    assert resident.parameters_host == 0
    assert away.parameters_host == on_host
    block = streaming.streaming_of(model).blocks[0].nbytes
    assert on_host == 4 * block + 2 * 100 * 32 * 4
    assert resident.parameters - away.parameters == on_host - 2 * block
    assert resident.peak - away.peak == resident.parameters - away.parameters
    assert away.saved_activations == resident.saved_activations


@pytest.mark.parametrize("preset", ["exact", "balanced", "minimal"])
def test_the_backward_pass_copies_blocks_too(preset, late):
    """On a CPU a weight on the host would do for it; on a GPU it would not."""
    model, _ = streamed(activations={"preset": preset, "proof": False})
    loss = model(**inputs("llama", 0)).loss
    # Four blocks and the output layer, which has taken all the room.
    assert LateCopies.started == 5
    loss.backward()
    assert LateCopies.started >= 9
    assert {buffer.block.name for buffer in streaming.streaming_of(model).buffers} == {
        "model.layers.0",
        "model.layers.1",
    }


class Reads(nn.Module):
    """A block that calls none of its layers: it reads their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(x @ self.up.weight.mT) @ self.down.weight.mT


def test_weights_that_a_block_reads_without_calling_their_layer(late):
    """What autograd keeps of them has the columns of now, in a buffer that came from the host meanwhile."""

    def gradients(block: Mapping[str, Any]) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential()
        model.blocks = nn.ModuleList(Reads() for _ in range(5))
        model.forward = lambda x: [x := block(x) for block in model.blocks][-1]
        handle = slimfit_ds.slim(model, {"freeze": {"rate": 0.8}, **block})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        handle.follow(optimizer)
        seen = []
        for step in range(4):
            model(torch.randn(3, 16, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
        return seen

    pairs = list(zip(gradients(HOST), gradients({}), strict=True))
    assert len(pairs) == 40
    assert all(torch.equal(a, b) for a, b in pairs)
