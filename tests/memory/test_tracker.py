"""The tracker against torch's allocator (profiler) and against element counts."""

import gc

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertForSequenceClassification

from slimfit_ds.memory.tracker import MemoryTracker, optimizer_tensors


def build(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = BertConfig(
        num_hidden_layers=3, hidden_size=64, num_attention_heads=4, intermediate_size=256, vocab_size=500
    )
    return BertForSequenceClassification(config).train()


def batch() -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.zeros(8, 64, dtype=torch.long),
        "attention_mask": torch.ones(8, 64, dtype=torch.long),
        "labels": torch.zeros(8, dtype=torch.long),
    }


def freeze(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.requires_grad_("layer.1.intermediate" in name or "classifier" in name)


def train(model: nn.Module, steps: int = 2) -> MemoryTracker:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, foreach=True)
    data = batch()
    with MemoryTracker(model, {"optimizer": lambda: optimizer_tensors(optimizer)}) as tracker:
        for _ in range(steps):
            model(**data).loss.backward()
            with tracker.phase("step"):
                optimizer.step()
                optimizer.zero_grad()
    return tracker


def allocator_peak(work) -> int:
    """Highest sum of what torch's CPU allocator gave out during `work`, above the start."""
    gc.collect()  # garbage of earlier tests, freed while the profiler runs, would count as freed here
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_equals_the_allocators(frozen, checkpointing):
    model = build()
    if frozen:
        freeze(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trackers = []
    above_start = allocator_peak(lambda: trackers.append(train(model)))
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    batch_bytes = sum(t.nbytes for t in batch().values())  # made inside, before the tracker starts
    assert trackers[0].report().peak == pytest.approx(above_start - batch_bytes + weights, rel=0.01)


@pytest.mark.parametrize("frozen", [False, True])
def test_fake_tensors_give_the_same_peak(frozen):
    def run():
        model = build()
        if frozen:
            freeze(model)
        return train(model).report()

    real = run()
    with FakeTensorMode():
        fake = run()
    assert fake.peak == pytest.approx(real.peak, rel=0.005)
    assert fake.parameters == real.parameters
    assert fake.gradients == real.gradients
    assert fake.optimizer == real.optimizer
    assert fake.saved_activations_dynamic == real.saved_activations_dynamic
    assert fake.saved_activations_static == real.saved_activations_static


def test_model_states_are_the_element_counts():
    model = build()
    freeze(model)
    report = train(model).report()
    active = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tensors = sum(1 for p in model.parameters() if p.requires_grad)
    assert report.gradients == 4 * active
    assert report.optimizer == 8 * active + 4 * tensors  # m, v and a step count each
    assert report.parameters == sum(
        t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]
    )
    assert report.peak == sum(report.at_peak.values())


def test_tensors_kept_on_ctx_by_attribute_are_saved_activations():
    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.kept = x.clone()
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000))

        def forward(self):
            return Keep.apply(self.weight).sum()

    model = Model()
    with MemoryTracker(model) as tracker:
        model().backward()
    assert tracker.report().saved_activations_static == pytest.approx(4000, abs=8)


def test_phase_and_module_of_the_peak():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.wide = nn.Linear(8, 8), nn.Linear(8, 4096)

        def forward(self, x):
            return self.wide(self.small(x)).exp().sum()

    model = Wide()
    with MemoryTracker(model, timeline=True) as tracker:
        loss = model(torch.randn(512, 8))
        forward_peak = tracker.report()
        loss.backward()
    assert forward_peak.peak_phase == "forward"
    report = tracker.report()
    assert report.peak_phase == "backward"
    assert {phase for phase, _, _ in tracker.timeline} >= {"forward", "backward"}
    assert any(module == "wide" for phase, module, _ in tracker.timeline if phase == "backward")


def test_host_roots_do_not_count_as_device_memory():
    model = nn.Linear(8, 8)
    host = [torch.zeros(1000)]
    with MemoryTracker(model, {"optimizer_host": lambda: host}) as tracker:
        model(torch.randn(2, 8)).sum().backward()
    report = tracker.report()
    assert report.optimizer_host == 4000
    assert report.peak < 4000


def test_unknown_root_is_refused():
    with pytest.raises(ValueError, match="optimiser"):
        MemoryTracker(nn.Linear(2, 2), {"optimiser": list})


def test_snapshot_needs_cuda(tmp_path):
    with pytest.raises(ValueError, match="CUDA"):
        MemoryTracker(nn.Linear(2, 2), snapshot=tmp_path / "s.pickle")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_on_a_gpu_is_near_the_allocators(tmp_path):
    model = build().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    data = {name: values.cuda() for name, values in batch().items()}
    roots = {"optimizer": lambda: optimizer_tensors(optimizer)}
    with MemoryTracker(model, roots, snapshot=tmp_path / "snapshot.pickle") as tracker:
        for _ in range(2):
            model(**data).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    report = tracker.report()
    # The allocator rounds to 512 bytes and counts the batch and cuBLAS' workspace; the model is small.
    assert report.cuda_peak_allocated == pytest.approx(report.peak, rel=0.07, abs=2**25)
    assert (tmp_path / "snapshot.pickle").stat().st_size > 0


def test_what_is_saved_while_recomputing_is_working_memory():
    """A checkpoint's own saves live within backward; the kept input is all that counts as saved."""
    from torch.utils.checkpoint import checkpoint

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])

        def forward(self, x):
            return checkpoint(self.layers, x * 1.0, use_reentrant=False).sum()

    model = Block()
    with MemoryTracker(model) as tracker:
        model(torch.randn(128, 64)).backward()
    report = tracker.report()
    one = 128 * 64 * 4
    assert report.saved_activations <= one + 4096 + 8
    assert report.working >= 3 * one


def test_gradients_in_a_bucket_are_communication():
    model = nn.Linear(16, 16, bias=False)
    bucket = torch.zeros(10_000)

    def into_bucket(parameter):
        view = bucket[:256].view(16, 16)
        view.copy_(parameter.grad)
        parameter.grad = view

    model.weight.register_post_accumulate_grad_hook(into_bucket)
    with MemoryTracker(model, {"communication": lambda: [bucket]}) as tracker:
        model(torch.randn(4, 16)).sum().backward()
    report = tracker.report()
    assert report.communication == 40_000
    assert report.gradients <= 1024
