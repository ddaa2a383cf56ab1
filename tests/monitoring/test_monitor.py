"""What is logged, when, and that a broken backend ends nothing."""

import statistics
import time

import numpy as np
import pytest
import torch
from torch import nn

from slimfit_ds.monitoring.frozen_share import FrozenShare
from slimfit_ds.monitoring.monitor import Monitor
from slimfit_ds.monitoring.pictures import schedule_image
from slimfit_ds.schedule.config import FreezeConfig
from slimfit_ds.schedule.schedule import FreezeSchedule
from slimfit_ds.trainable.units import discover


class Engine:
    """As much of an engine as the monitor asks for."""

    def __init__(self, freezes=True):
        self.module = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
        self.module[2].bias.requires_grad_(False)
        if freezes:
            self.schedule = FreezeSchedule(discover(self.module), FreezeConfig(policy="ils", rate=0.5))


class Master:
    """Stands in for DeepSpeed's `MonitorMaster`."""

    tb_monitor = wandb_monitor = None

    def __init__(self, fails_at=None):
        self.calls, self.fails_at = [], fails_at

    def write_events(self, events):
        self.calls.append(events)
        if len(self.calls) == self.fails_at:
            raise OSError(28, "No space left on device")


def line(step, **fields):
    return {
        "step": step,
        "epoch": step / 10,
        "loss": 2.0 - 0.1 * step,
        "lr": 0.1 / (step + 1),
        "gradient_norm": 1.0 + step,
        "active_layers": ["0.weight"] if step % 2 else ["2.weight", "1.weight"],
        "statistics": {"0.weight": 0.5} if step % 2 else {"2.weight": 0.1, "1.weight": None},
        "memory_bytes": 1000 + step,
        "seconds": 0.5,
        "times": {"forward": 0.1 * (step + 1)},
        "tokens": 10,
        "frozen_parameters": 0.5,
        **fields,
    }


def monitor(master, steps=7, every=3, engine=None):
    share = FrozenShare(engine or Engine())
    return Monitor(lambda: master, share, steps=steps, every=every, history=lambda: [line(0)])


def test_share_counts_biases_as_training_and_users_own_as_frozen():
    share = FrozenShare(Engine())
    # 24 + 6 (first linear), 6 + 6 (norm), 12 + 2 frozen by the user (second linear)
    assert share.total == 56
    assert share.of_parameters(["0.weight"]) == pytest.approx(1 - (24 + 6 + 6) / 56)
    assert share.of_layers(["0.weight"]) == pytest.approx(2 / 3)
    plain = FrozenShare(Engine(freezes=False))
    assert plain.of_parameters(None) == pytest.approx(2 / 56)
    assert plain.of_layers(None) == 0


def test_means_every_few_steps_and_the_rest_at_the_end():
    master = Master()
    logs = monitor(master)
    lines = [line(step) for step in range(7)]
    for one in lines:
        logs.log(one)
    logs.close()
    assert [events[0][2] for events in master.calls] == [3, 6, 7]
    for events, part in zip(master.calls, (lines[:3], lines[3:6], lines[6:]), strict=True):
        values = {name: value for name, value, _ in events}
        assert {step for _, _, step in events} == {part[-1]["step"] + 1}
        assert values["train/loss"] == pytest.approx(statistics.fmean(x["loss"] for x in part))
        assert values["train/learning_rate"] == part[-1]["lr"]
        assert values["train/gradient_norm"] == pytest.approx(
            statistics.fmean(x["gradient_norm"] for x in part)
        )
        assert values["time/forward_seconds"] == pytest.approx(
            statistics.fmean(x["times"]["forward"] for x in part)
        )
        assert values["train/tokens_per_second"] == 20
        layers = statistics.fmean(1 - len(x["active_layers"]) / 3 for x in part)
        assert values["freeze/frozen_layers"] == pytest.approx(layers)
        found = [v for x in part for v in x["statistics"].values() if v is not None]
        assert values["freeze/statistic_largest"] == max(found)
        assert values["freeze/statistic_median"] == statistics.median(found)
        assert values["memory/peak_bytes"] == part[-1]["memory_bytes"]


def test_evaluations_at_once_memory_when_measured_nothing_that_is_no_number():
    master = Master()
    logs = monitor(master)
    logs.log(line(0, evaluation={"accuracy": 0.5, "loss": float("nan")}))
    assert master.calls == [[("eval/accuracy", 0.5, 1)]]
    logs.log(line(1, memory={"parameters": 7, "optimizer_host": 9}, loss=float("nan")))
    logs.log(line(2, loss=None, gradient_norm=None))
    values = {name: value for name, value, _ in master.calls[1]}
    assert values["memory/parameters_bytes"] == 7
    assert values["memory/optimizer_host_bytes"] == 9
    assert values["train/loss"] == 2.0
    assert values["train/gradient_norm"] == 1.5


def test_a_full_disk_ends_the_monitoring_only(capsys):
    master = Master(fails_at=1)
    logs = monitor(master)
    for step in range(7):
        logs.log(line(step))
    logs.close()
    assert len(master.calls) == 1
    said = capsys.readouterr().err
    assert said.count("monitoring is off from here on: OSError") == 1


def test_a_backend_that_does_not_start_ends_nothing(capsys):
    def broken():
        raise RuntimeError("api_key not configured")

    logs = Monitor(broken, FrozenShare(Engine()), steps=2, every=1, history=list)
    logs.describe("lr: 1")
    logs.log(line(0))
    logs.close()
    assert "api_key not configured" in capsys.readouterr().err


def test_plain_engines_have_no_frozen_share():
    master = Master()
    logs = monitor(master, every=1, engine=Engine(freezes=False))
    logs.log(line(0, active_layers=None, statistics=None, tokens=None))
    names = {name for name, _, _ in master.calls[0]}
    assert "train/loss" in names
    assert not [name for name in names if name.startswith("freeze/")]
    assert "train/tokens_per_second" not in names


def test_picture_is_white_where_frozen():
    names = ["0.weight", "1.weight", "2.weight"]
    lines = [line(step) for step in range(5)]
    picture = schedule_image(lines, names, scale=4)
    assert picture.shape == (12, 20, 3)
    assert picture.dtype == np.uint8
    frozen = (picture == 255).all(axis=2)[::4, ::4]
    expected = [[name not in one["active_layers"] for one in lines] for name in names]
    assert frozen.tolist() == expected


@pytest.mark.usefixtures("one_rank")
def test_tensorboard_through_deepspeed(tmp_path):
    """Read back with TensorBoard's own reader."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from slimfit_ds.engine.monitors import make_monitors
    from slimfit_ds.monitoring.backends import monitor_blocks

    lines: list[dict] = []
    blocks = monitor_blocks(["tensorboard", "csv"], {}, tmp_path)
    share = FrozenShare(Engine())
    logs = Monitor(lambda: make_monitors(blocks), share, steps=20, every=5, history=lambda: lines)
    logs.describe("lr: 0.1")
    torch.manual_seed(0)
    for step in range(20):
        lines.append(line(step))
        logs.log(lines[-1])
    logs.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert scalars == [
        (done, pytest.approx(statistics.fmean(one["loss"] for one in lines[done - 5 : done]), rel=1e-6))
        for done in (5, 10, 15, 20)
    ]
    images = events.Images("freeze/schedule")
    assert [image.step for image in images][-1] == 20
    assert len(events.Images("freeze/schedule")) <= 5
    assert events.Histograms("freeze/log10_statistic")
    csv = (tmp_path / "csv" / "freeze_frozen_layers.csv").read_text().splitlines()
    assert csv[0] == "step,frozen_layers"
    assert [row.split(",")[0] for row in csv[1:]] == ["5", "10", "15", "20"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_rank")
def test_wandb_offline(tmp_path, monkeypatch):
    """A whole run without a network: its record and the pictures lie in the run's folder."""
    pytest.importorskip("wandb", reason="pip install wandb")
    from slimfit_ds.engine.monitors import make_monitors
    from slimfit_ds.monitoring.backends import monitor_blocks, settle_wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DIR", "WANDB_NAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    settle_wandb(tmp_path)
    lines: list[dict] = []
    blocks = monitor_blocks(["wandb"], {}, tmp_path)
    share = FrozenShare(Engine())
    logs = Monitor(lambda: make_monitors(blocks), share, steps=20, every=5, history=lambda: lines)
    for step in range(20):
        lines.append(line(step))
        logs.log(lines[-1])
    logs.close()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (record,) = run.glob("run-*.wandb")
    # Its own process writes the record, a moment after `finish` has returned.
    until = time.monotonic() + 20
    while b"train/loss" not in record.read_bytes() and time.monotonic() < until:
        time.sleep(0.1)
    assert b"train/loss" in record.read_bytes()
    assert 1 <= len(list(run.rglob("schedule_*.png"))) <= 5
