"""The fidelity study: its arithmetic by hand, its queue, and one run of a few steps on a model made for the test."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "fidelity"))

import study
import summary
import training
from contenders import CONTENDERS, LEVERS
from training import Run

from slimfit_ds.config import SlimFitConfig
from slimfit_ds.schedule.policies import POLICIES


def outcome(name: str, lr: float, seed: int, value: float, loss: float = 0.5) -> dict:
    return {
        "run": {"problem": "sst2", "contender": name, "lr": lr, "seed": seed, "steps": 300},
        "value": value,
        "metrics": {"loss": loss},
        "seconds": 30.0,
        "curve": [],
    }


FOUND = [
    outcome("full", 1e-4, 0, 0.80),
    outcome("full", 3e-4, 0, 0.84),
    outcome("full", 3e-4, 1, 0.86),
    outcome("full", 3e-4, 2, 0.88),
    outcome("full", 1e-4, 1, 0.99),
    outcome("ils-90", 6e-4, 0, 0.83),
    outcome("ils-90", 6e-4, 1, 0.86),
]


def test_the_best_rate_is_that_of_the_tuning_seed():
    # 1e-4 was better on seed 1, which must not be looked at.
    assert study.best_rates(FOUND, 300) == {("sst2", "full"): 3e-4, ("sst2", "ils-90"): 6e-4}


def test_a_refined_rate_is_the_best_mean_once_all_its_runs_are_there():
    """Of 6e-4, 1.5e-3 and 1e-3 on seeds 0 to 2; 2.5e-4, better than all on seed 1, was third on the tuning seed."""
    values = {6e-4: (0.83, 0.70, 0.70), 1e-3: (0.80, 0.80, 0.71), 1.5e-3: (0.82, 0.65, 0.65)}
    found = [outcome("full", 2.5e-4, seed, v) for seed, v in enumerate((0.50, 0.99, 0.99))]
    found += [outcome("full", lr, seed, v) for lr, of in values.items() for seed, v in enumerate(of)]
    assert study.best_rates(found[:-1], 300) == {("sst2", "full"): 6e-4}
    assert study.best_rates(found, 300) == {("sst2", "full"): 1e-3}
    # The mean of the three counts, not a fourth seed.
    assert study.best_rates([*found, outcome("full", 1.5e-3, 3, 1.0)], 300) == {("sst2", "full"): 1e-3}


def test_refining_runs_the_two_best_rates_and_the_one_between_them(tmp_path):
    found = [outcome("full", lr, 0, v) for lr, v in ((2.5e-4, 0.7), (6e-4, 0.83), (1.5e-3, 0.8), (4e-4, 0.9))]
    for i, each in enumerate(found):
        (tmp_path / f"{i}.json").write_text(json.dumps(each))
    runs = list(study.refinement("sst2", ["full", "lora8"], 300, tmp_path))
    assert [(r.contender, r.seed, r.lr) for r in runs] == [
        ("full", seed, lr) for seed in (0, 1, 2) for lr in (6e-4, 1.5e-3, 1e-3)
    ]
    # The search on the ladder does not mind what lies between.
    assert not list(study.tuning("sst2", ["full"], 300, tmp_path))


def test_every_two_neighbours_of_the_ladder_have_one_rate_between_them():
    assert all(a < b < c for a, b, c in zip(study.LADDER, study.BETWEEN, study.LADDER[1:], strict=False))
    assert len(study.BETWEEN) == len(study.LADDER) - 1
    assert study.contested({}) == []
    assert study.contested({6e-4: (1.0,)}) == [6e-4]


@pytest.mark.parametrize("best", range(len(study.LADDER)))
def test_the_search_ends_at_the_best_rate_of_a_hill(best):
    tried: dict[float, tuple[float, ...]] = {}
    while (lr := study.next_rate(tried)) is not None:
        assert lr not in tried
        tried[lr] = (-abs(study.LADDER.index(lr) - best), 0.0)
    assert max(tried, key=tried.get) == study.LADDER[best]
    # Its neighbours were looked at.
    assert {*study.LADDER[max(best - 1, 0) : best + 2]} <= tried.keys()


@pytest.mark.parametrize("best", range(len(study.LADDER)))
def test_the_search_goes_both_ways_where_nothing_was_learned(best):
    # The loss of a model that has learned nothing leads away from the one rate that works.
    tried: dict[float, tuple[float, ...]] = {}
    while (lr := study.next_rate(tried)) is not None:
        at = study.LADDER.index(lr)
        tried[lr] = (float(at == best), abs(at - best))
    assert max(tried, key=tried.get) == study.LADDER[best]


def test_equal_metrics_are_told_apart_by_the_loss():
    found = [outcome("full", 1e-4, 0, 0.0, loss=0.7), outcome("full", 3e-4, 0, 0.0, loss=0.6)]
    assert study.best_rates(found, 300) == {("sst2", "full"): 3e-4}


def test_mean_spread_and_paired_difference_by_hand():
    table = summary.rows(FOUND, "sst2", 300)
    full, ils = table["full"], table["ils-90"]
    assert (full.mean, full.spread) == pytest.approx((86.0, 2.0))
    assert full.rates_tried == 2
    # Seeds 0 and 1: -1 and 0 points.
    mean, error, pairs = ils.against(full)
    assert (mean, error, pairs) == pytest.approx((-0.5, math.sqrt(0.5) / math.sqrt(2), 2))
    assert full.time_of_full == pytest.approx(1.0)


def test_times_are_compared_on_one_processor_only():
    fast = {"cpu": "fast", "seconds": 6.0}
    found = [*FOUND, {**outcome("ils-90", 6e-4, 2, 0.9), **fast}]
    # Nothing on the fast processor tells what full fine-tuning takes there.
    assert summary.rows(found, "sst2", 300)["ils-90"].time_of_full == pytest.approx(1.0)
    found.append({**outcome("full", 1e-4, 2, 0.9), **fast, "seconds": 12.0})
    assert summary.rows(found, "sst2", 300)["ils-90"].time_of_full == pytest.approx((1 + 1 + 0.5) / 3)


def test_runs_from_other_weights_are_not_compared():
    found = [{**FOUND[0], "pretrained": "aa"}, {**FOUND[5], "pretrained": "bb"}, FOUND[1]]
    with pytest.raises(SystemExit, match="sst2: runs start from different pretrained weights: aa, bb"):
        summary.rows(found, "sst2", 300)
    summary.rows(found[::2], "sst2", 300)


def test_the_overview_has_what_was_run_everywhere():
    cola = [{**r, "run": {**r["run"], "problem": "cola"}} for r in FOUND if r["run"]["contender"] == "full"]
    steps = {"sst2": 300, "cola": 300}
    assert len(summary.overview(FOUND + cola, steps).splitlines()) == 2
    ours = outcome("ils-90", 6e-4, 0, 0.85)
    cola.append({**ours, "run": {**ours["run"], "problem": "cola"}})
    *_, line = summary.overview(FOUND + cola, steps).splitlines()
    assert line == "| ils-90 (seeds: 1, 2) | -0.50 ± 0.50 | +1.00 | +0.25 |"


def test_every_contender_is_a_valid_setting():
    for name, fields in {**CONTENDERS, **LEVERS}.items():
        block = SlimFitConfig.parse(fields.get("slimfit") or {})
        assert block.freeze.policy in POLICIES, name
        Run("sst2", name, 1e-4, **fields)


def test_batches_of_like_length_use_each_example_once():
    lengths = np.random.default_rng(0).integers(5, 60, 160)
    order = training.batches_of_like_length(lengths, 16, 10, seed=3)
    assert sorted(np.concatenate(order).tolist()) == list(range(160))
    widths = [lengths[batch].max() - lengths[batch].min() for batch in order]
    assert np.mean(widths) < 0.4 * (lengths.max() - lengths.min())
    again = training.batches_of_like_length(lengths, 16, 10, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(order, again, strict=True))


class Head(nn.Module):
    """Two linear layers with the interface of a transformers classifier."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.classifier = nn.Linear(8, 2)

    def forward(self, x, labels):
        from types import SimpleNamespace

        logits = self.classifier(torch.tanh(self.body(x)))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


class Separable:
    name, metric, autocast = "separable", "accuracy", False
    steps, batch_size = 300, 16
    inputs = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    labels = (inputs[:, 0] > 0).long()

    def lengths(self):
        return np.ones(200, dtype=int)

    def batch(self, indices, chance):
        return {"x": self.inputs[indices], "labels": self.labels[indices]}

    def evaluation(self, size, part=1):
        places = np.arange(200, 400, part)
        return [(places - 200, {"x": self.inputs[places], "labels": self.labels[places]})]

    def model(self):
        return Head()


@pytest.fixture
def separable(monkeypatch):
    monkeypatch.setitem(training.PROBLEMS, "separable", Separable())


def test_a_run_learns_and_repeats(separable):
    run = Run("separable", "ils", 3e-2, slimfit={"freeze": {"rate": 0.5}}, steps=60, batch=16)
    first, second = training.train(run), training.train(run)
    assert first["value"] > 0.9
    assert first["value"] == second["value"]
    assert first["right"] == second["right"]
    assert first["right"].count("1") == round(200 * first["value"])
    # One of two layers in each of the 60 steps.
    assert sum(first["visits"].values()) == 60
    assert json.loads(json.dumps(first)) == first


def test_the_queue_skips_what_is_done_or_claimed(separable, tmp_path, capsys):
    runs = [Run("separable", name, 1e-2, steps=2, evaluations=1) for name in ("a", "b", "c")]
    (tmp_path / f"{study.key(runs[0])}.json").write_text("{}")
    (tmp_path / f"{study.key(runs[1])}.claim").touch()
    study.work(iter(runs), tmp_path, stale=60)
    assert "separable.c" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.json"))) == 2
    # A claim left by a worker that died is taken over.
    study.work(iter(runs), tmp_path, stale=-1)
    assert len(list(tmp_path.glob("*.json"))) == 3
    assert not list(tmp_path.glob("*.claim"))
