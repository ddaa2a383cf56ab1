"""Checkpoints that are whole, and steps that are not finite, in a Trainer on one process; see also tests/survival."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from slimfit_ds.integrations.survival import (
    MARK,
    NonFiniteError,
    NonFiniteSteps,
    StopTogether,
    WholeCheckpoints,
    last_checkpoint,
    name_last_checkpoint,
)


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(2, 1)

    def forward(self, x, labels):
        return {"loss": ((self.line(x) - labels) ** 2).mean()}


def rows(broken: tuple[int, ...] = (), count: int = 16):
    """Row `n` is batch `n` in order; a broken one has a NaN in it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 2, generator=generator)
    for row in broken:
        x[row, 0] = float("nan")
    return [{"x": values, "labels": values.sum(dim=0, keepdim=True)} for values in x]


def trainer(folder, *callbacks: TrainerCallback, broken=(), **arguments) -> Trainer:
    torch.manual_seed(0)
    settings = {
        "max_steps": 6,
        "save_steps": 2,
        "per_device_train_batch_size": 1,
        "report_to": "none",
    } | arguments
    args = TrainingArguments(
        folder, use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential", **settings
    )
    return Trainer(Line(), args, train_dataset=rows(broken), callbacks=list(callbacks))


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def weights(made: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in made.model.parameters()])


def test_only_marked_checkpoints_of_the_right_sizes_are_resumed_from(tmp_path, capsys):
    trainer(tmp_path, WholeCheckpoints()).train()
    assert last_checkpoint(tmp_path).name == "checkpoint-6"
    listed = json.loads((tmp_path / "checkpoint-6" / MARK).read_text())
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"} <= listed.keys()
    (tmp_path / "checkpoint-6" / "optimizer.pt").write_bytes(b"torn")
    assert last_checkpoint(tmp_path).name == "checkpoint-4"
    (tmp_path / "checkpoint-4" / MARK).unlink()
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path) is None
    said = capsys.readouterr().err
    assert "checkpoint-6 is passed over: optimizer.pt has another size" in said
    assert "checkpoint-4 is passed over: the run ended while it was written" in said


def test_the_limit_counts_whole_checkpoints_and_is_given_back(tmp_path):
    (tmp_path / "checkpoint-3").mkdir(parents=True)  # a killed run left it
    made = trainer(tmp_path, WholeCheckpoints(), save_total_limit=2)
    made.train()
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    assert made.args.save_total_limit == 2


def test_a_run_resumed_from_an_earlier_point_trusts_no_later_checkpoint(tmp_path):
    trainer(tmp_path, WholeCheckpoints()).train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            assert last_checkpoint(tmp_path).name == "checkpoint-2", "later ones are being overwritten"
            control.should_training_stop = True

    trainer(tmp_path, WholeCheckpoints(), Stop()).train(str(tmp_path / "checkpoint-2"))


def test_a_resumed_run_ends_where_the_whole_run_does(tmp_path):
    whole = trainer(tmp_path / "whole", WholeCheckpoints())
    whole.train()
    trainer(tmp_path / "cut", WholeCheckpoints()).train()
    shutil.rmtree(tmp_path / "cut" / "checkpoint-6")
    resumed = trainer(tmp_path / "cut", WholeCheckpoints())
    resumed.train(str(last_checkpoint(tmp_path / "cut")))
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_after_the_step_and_handlers_come_back(tmp_path, name):
    class Ask(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                signal.raise_signal(signal.Signals[name])

    before = {number: signal.getsignal(number) for number in StopTogether.SIGNALS}
    stop = StopTogether()
    try:
        trainer(tmp_path, Ask(), stop, WholeCheckpoints(), save_strategy="no").train()
        assert stop.reason == f"stopped on request ({name}) after step 3 of 6"
        assert last_checkpoint(tmp_path).name == "checkpoint-3"
        # Whoever asked may ask again while the process ends.
        assert signal.getsignal(signal.SIGTERM) == stop._note
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    trainer(tmp_path / "other", StopTogether()).train()
    assert {number: signal.getsignal(number) for number in StopTogether.SIGNALS} == before


def test_a_broken_step_stops_the_run_before_a_checkpoint_is_made_of_it(tmp_path, capsys):
    made = trainer(tmp_path, NonFiniteSteps("stop"), WholeCheckpoints(), broken=(3,))
    with pytest.raises(NonFiniteError, match="step 4"), name_last_checkpoint(tmp_path):
        made.train()
    assert weights(made).isfinite().all()
    said = capsys.readouterr().err
    assert "rank 0 ends: NonFiniteError: step 4" in said
    assert f"the last checkpoint is {tmp_path}/checkpoint-2" in said


def test_a_skipped_step_changes_nothing(tmp_path):
    skipping = NonFiniteSteps("skip")
    made = trainer(tmp_path / "skip", skipping, broken=(1,), max_steps=2, save_strategy="no")
    made.train()
    alone = trainer(tmp_path / "one", max_steps=1, save_strategy="no", lr_scheduler_type="constant")
    alone.train()
    assert skipping.skipped == 1
    torch.testing.assert_close(weights(made), weights(alone), rtol=1e-6, atol=1e-6)


def test_too_many_broken_steps_in_a_row_stop_the_run(tmp_path):
    made = trainer(tmp_path, NonFiniteSteps("skip", most=2), broken=(0, 2, 3, 4))
    with pytest.raises(NonFiniteError, match=r"step 5.*max_nonfinite: 2"):
        made.train()
