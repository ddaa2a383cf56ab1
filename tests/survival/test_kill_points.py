"""kill -9 of a rank at any moment, inside a save included: nothing but the work since the last checkpoint is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from slimfit_ds.integrations.survival import last_checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 24
LENGTH = (f"max_steps={STEPS}", "save_steps=2", "eval_steps=6")

# One run is killed again and again, each time by (rank, call, its number since the last start, how), and must stand at
# this step afterwards. Every second step is saved, so a kill in the second save keeps the first.
KILLS = [
    (1, "step", 1, "kill", 0),
    (0, "write_weights", 4, "kill_torn", 2),
    (1, "write_shards", 2, "kill_torn", 4),
    (0, "rename", 2, "kill", 6),
    (1, "save_random_state", 2, "kill", 8),
    (0, "save_state", 2, "kill", 10),
    (0, "mark", 2, "kill", 12),
    (0, "write_mark", 2, "kill", 14),
    (0, "remove_folder", 1, "kill", 16),
    (1, "backward", 3, "kill", 18),
    (0, "all_reduce", 6, "kill", 20),
    (1, "evaluate", 1, "kill", 22),
    (0, "save_model", 2, "kill", 24),
    (0, "write_result", 2, "kill", 24),
]

# Of a run whose checkpoints hold what trained.
DELTA_KILLS = [
    (1, "step", 1, "kill", 0),
    (0, "write_delta", 2, "kill_torn", 2),
    (0, "write_delta", 2, "kill", 4),
    (1, "write_shards", 2, "kill_torn", 6),
    (0, "rename", 2, "kill", 8),
    (1, "save_random_state", 2, "kill", 10),
    (0, "save_state", 2, "kill", 12),
    (0, "mark", 2, "kill", 14),
    (0, "remove_folder", 1, "kill", 16),
    (1, "backward", 3, "kill", 18),
]


def tensors(path: Path) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in sorted(load_file(path).items())}


def history(folder: Path) -> list[dict]:
    keys = ("step", "epoch", "loss", "lr", "gradient_norm", "active_layers", "statistics")
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{key: line.get(key) for key in keys} for line in lines]


def contents(folder: Path) -> dict:
    """Return what a run has come to, without its times and places."""
    last = last_checkpoint(folder)
    assert last is not None
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    return {
        "history": history(folder),
        "last": last.name,
        "states": {path.name: tensors(path) for path in last.rglob("*.safetensors")},
        "model": tensors(folder / "model" / "model.safetensors"),
        "metrics": {
            key: value for key, value in metrics.items() if "second" not in key and "runtime" not in key
        },
        "checkpoints": sorted(path.name for path in folder.glob("checkpoint-*")),
    }


def step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))


@pytest.mark.parametrize(("checkpoints", "kills"), [("whole", KILLS), ("delta", DELTA_KILLS)])
def test_a_run_killed_again_and_again_ends_where_the_whole_run_does(runs, whole, checkpoints, kills):
    more = (*LENGTH, f"slimfit.checkpoints={checkpoints}")
    if checkpoints == "delta":
        more = (*more, f"model={whole / 'model'}")
    unharmed = runs.launch(f"output_dir=long_{checkpoints}", *more)
    assert unharmed.codes == [0, 0], unharmed.logs
    arguments = (f"output_dir=killed_{checkpoints}", *more)
    folder = runs.folder / f"killed_{checkpoints}"
    for rank, kind, number, how, kept in kills:
        fault = {"rank": rank, "kind": kind, "number": number, "how": how}
        cut = runs.launch(*arguments, fault=fault)
        what = f"{fault}: {cut.codes}\n{cut.logs[0][-3000:]}\n{cut.logs[1][-3000:]}"
        assert cut.codes[rank] == -9, what
        assert not cut.hung, what
        other = 1 - rank
        if kept < STEPS:
            assert cut.codes[other] == 1, what
            assert cut.ended[other] < 20, what
            assert f"rank {other} ends: " in cut.logs[other], what
            assert "the same command goes on from there" in cut.logs[other], what
        assert step_of(last_checkpoint(folder)) == kept, what
        assert not (folder / "metrics.json").exists(), what
    end = runs.launch(*arguments)
    assert end.codes == [0, 0], end.logs
    assert end.events[0].count("step") == STEPS - kills[-1][-1]
    assert contents(folder) == contents(runs.folder / f"long_{checkpoints}")
    held = {path.name for path in last_checkpoint(folder).rglob("*.safetensors") if "0000" not in path.name}
    assert held == {"delta.safetensors" if checkpoints == "delta" else "model.safetensors"}


def test_kill_points_are_many_and_of_both_ranks():
    for kills in (KILLS, DELTA_KILLS):
        assert len(set(kills)) >= 10
        assert {rank for rank, *_ in kills} == {0, 1}
