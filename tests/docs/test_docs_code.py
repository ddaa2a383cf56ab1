"""The code of docs/extending.md works as it stands: the policy, the codec, the task."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from slimfit_ds.activations import codecs
from slimfit_ds.activations.codecs import get_codec
from slimfit_ds.schedule.config import FreezeConfig
from slimfit_ds.schedule.policies import POLICIES, Policy
from slimfit_ds.schedule.schedule import FreezeSchedule
from slimfit_ds.tasks.sequences import SequenceClassification
from slimfit_ds.trainable.units import discover

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def names():
    """What the blocks of the page define."""
    found: dict = {"__name__": "docs.extending"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, found)
    yield found
    codecs._CODECS.pop("half", None)


def test_the_policy_takes_layers_in_turns(names, monkeypatch):
    assert issubclass(names["RoundRobin"], Policy)
    monkeypatch.setitem(POLICIES, "round_robin", names["RoundRobin"]())
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(6)))
    schedule = FreezeSchedule(discover(model), FreezeConfig(policy="round_robin", rate=0.6))
    seen = []
    for _ in range(4):
        seen.append(sorted(schedule.active))
        schedule.advance(dict.fromkeys(schedule.active, 0.1))
    assert seen == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]
    json.dumps(schedule.state_dict())


def test_the_codec_keeps_sixteen_bits(names):
    codec = get_codec("half")
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    kept = codec.encode(x)
    assert kept.nbytes == codec.nbytes(x.shape, x.dtype) == 30
    assert torch.equal(codec.decode(kept), x.half().float())


def test_the_task_is_one(names):
    task = names["RareEvents"]
    assert issubclass(task, SequenceClassification)
    logits = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    found = task(task.options_class()).compute_metrics(logits, np.array([1, 0, 0]))
    assert found == {"balanced_accuracy": 0.75}
