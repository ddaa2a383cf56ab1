"""kill -9 of any rank at any moment, inside a save included: nothing but the work since the last checkpoint is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from slimfit_ds.training.checkpoints import last_checkpoint
from slimfit_ds.training.history import read_history

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(120)]

SAVE_STEPS = 2

# The run on each rank makes these calls; `last` or a number picks one of them.
KILLS = [
    *((0, kind, "last") for kind in ("step", "update", "evaluate")),
    *((1, "step", which) for which in (1, 4)),
    (1, "backward", 4),
    (1, "update", 1),
    (1, "evaluate", 1),
    (0, "all_reduce", 6),
    (1, "all_reduce", 9),
    (0, "write_shards", 2),
    (1, "write_shards", 2),
    (0, "write_weights", 1),
    (0, "write_weights", 4),
    (1, "write_weights", 2),
    *((0, "fsync", which) for which in (1, 4, 8, 11, 17, "last")),
    (1, "fsync", 3),
    *((0, "replace", which) for which in (1, 3, "last")),
    *((0, "rename", which) for which in (1, 2, "last")),
    *((0, "rmtree", which) for which in (2, 5, "last")),
    (1, "result", 1),
]
TORN = [(0, "write_shards", 2), (1, "write_shards", 3), (0, "write_weights", 4)]


def tensors(path: Path) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in sorted(load_file(path).items())}


def contents(folder: Path) -> dict:
    """What a run has come to, without its times and places."""
    step = folder / "checkpoints" / "step_6"
    metadata = json.loads((step / "slimfit.json").read_text())
    del metadata["client_state"]["seconds"]
    keys = ("step", "epoch", "loss", "lr", "gradient_norm", "active_layers", "statistics", "evaluation")
    metrics = json.loads((folder / "metrics.json").read_text())
    return {
        "history": [{key: line.get(key) for key in keys} for line in read_history(folder / "history.jsonl")],
        "metadata": metadata,
        "latest": (folder / "checkpoints" / "latest").read_text(),
        "weights": {path.name: tensors(path) for path in step.glob("[mo]*.safetensors")},
        "model": tensors(folder / "model" / "model.safetensors"),
        "best": tensors(folder / "best" / "model.safetensors"),
        "metrics": metrics["metrics"],
        "best_metric": metrics["best"],
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()),
    }


@pytest.mark.parametrize(
    ("rank", "kind", "which", "how"),
    [(*kill, "kill") for kill in KILLS] + [(*kill, "kill_torn") for kill in TORN],
)
def test_a_run_killed_anywhere_goes_on_to_the_same_result(server, whole, rank, kind, which, how):
    calls = whole.events[rank].count(kind)
    number = {"last": calls}.get(which, which)
    assert number <= calls, f"rank {rank} calls {kind} {calls} times only: this kill would hit nothing"
    name = f"{how}-{rank}-{kind}-{which}"
    arguments = ("--config", "recipe.yaml", f"output_dir={name}")
    fault = {"rank": rank, "kind": kind, "number": number, "how": how}
    cut = server.launch(*arguments, fault=fault)
    other = 1 - rank
    assert cut.codes[rank] == -9
    assert not cut.hung
    folder = server.folder / name
    finished = (folder / "metrics.json").exists()
    if finished:
        # Rank 0 had nothing left to do; the other one may have noticed or be through.
        assert cut.codes[other] in (0, 3)
    else:
        assert cut.codes[other] == 3, cut.logs[other]
        assert f"rank {other} ends: rank {rank} was lost" in cut.logs[other]
        assert "to go on: " in cut.logs[other]
        assert "Traceback" not in cut.logs[other]
        # `rank_timeout` is 2 s here, but the processes of the own machine are looked at four times as often.
        assert cut.ended[other] < 10
    last = last_checkpoint(folder)
    done = len(read_history(folder / "history.jsonl")) if (folder / "history.jsonl").exists() else 0
    kept = int(last.name.removeprefix("step_")) if last else 0
    # A kill inside a save loses that save, and no earlier one.
    assert kept >= (done - 1) // SAVE_STEPS * SAVE_STEPS
    assert kept >= done // SAVE_STEPS * SAVE_STEPS or done % SAVE_STEPS == 0
    resumed = server.launch(*arguments)
    assert resumed.codes == [0, 0], resumed.logs
    if not finished:
        assert resumed.events[0].count("step") == 6 - kept
    assert contents(folder) == contents(server.folder / "whole")


def test_there_are_at_least_twenty_kill_points():
    assert len(set(KILLS)) >= 20
    assert {kind for _, kind, _ in KILLS} >= {"step", "backward", "update", "all_reduce", "evaluate", "fsync"}
    assert {rank for rank, _, _ in KILLS} == {0, 1}
