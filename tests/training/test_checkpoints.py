"""Which checkpoint a run goes on from, which ones it removes, and that none of them runs code."""

from __future__ import annotations

import json
import os
import pickle
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from slimfit_ds.engine.checkpoint_files import CheckpointError
from slimfit_ds.training.checkpoints import damaged_checkpoints, last_checkpoint, remove_old


def write(folder: Path, step: int, *, latest: bool = True, world: int = 2) -> Path:
    """A whole checkpoint as far as files go."""
    path = folder / "checkpoints" / f"step_{step}"
    path.mkdir(parents=True)
    (path / "slimfit.json").write_text(json.dumps({"format": 1, "world_size": world}))
    save_file({"w": torch.arange(100.0)}, path / "model.safetensors")
    for rank in range(world):
        for kind in ("optimizer", "random"):
            save_file({"x": torch.arange(64.0)}, path / f"{kind}-{rank:05d}-of-{world:05d}.safetensors")
    if latest:
        (folder / "checkpoints" / "latest").write_text(f"step_{step}")
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


class TestWhichOneIsLast:
    def test_the_one_that_latest_names(self, tmp_path):
        for step in (2, 4):
            write(tmp_path, step)
        write(tmp_path, 6, latest=False)
        assert last_checkpoint(tmp_path).name == "step_4"

    @pytest.mark.parametrize(
        "file",
        ["model.safetensors", "optimizer-00001-of-00002.safetensors", "random-00000-of-00002.safetensors"],
    )
    @pytest.mark.parametrize("harm", ["cut", "gone", "empty"])
    def test_the_one_before_where_a_file_is_not_whole(self, tmp_path, file, harm):
        write(tmp_path, 2)
        path = write(tmp_path, 10) / file
        if harm == "gone":
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size - 1 if harm == "cut" else 0)
        assert last_checkpoint(tmp_path).name == "step_2"
        assert damaged_checkpoints(tmp_path) is None

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", '{"format": 1}', '{"format": 2, "world_size": 2}', "\ud800"]
    )
    def test_the_one_before_where_the_numbers_are_not_whole(self, tmp_path, text):
        write(tmp_path, 2)
        (write(tmp_path, 4) / "slimfit.json").write_bytes(text.encode(errors="surrogatepass"))
        assert last_checkpoint(tmp_path).name == "step_2"

    def test_temporary_ones_are_not_seen(self, tmp_path):
        write(tmp_path, 4).rename(tmp_path / "checkpoints" / ".step_4.part")
        assert last_checkpoint(tmp_path) is None
        write(tmp_path, 2, latest=False)
        assert last_checkpoint(tmp_path).name == "step_2", "latest names one that is not there"

    def test_none_whole_is_said(self, tmp_path):
        assert damaged_checkpoints(tmp_path) is None
        (write(tmp_path, 4) / "model.safetensors").unlink()
        assert last_checkpoint(tmp_path) is None
        assert "step_4: FileNotFoundError" in damaged_checkpoints(tmp_path)


class TestWhichOnesGo:
    @pytest.mark.parametrize(
        ("keep", "best", "expected"),
        [
            (1, None, ["step_8"]),
            (2, None, ["step_6", "step_8"]),
            (1, 2, ["step_2", "step_8"]),
            (1, 8, ["step_8"]),
            (2, 3, ["step_6", "step_8"]),
            (9, 2, ["step_2", "step_4", "step_6", "step_8"]),
        ],
    )
    def test_the_last_and_the_best_stay(self, tmp_path, keep, best, expected):
        for step in (2, 4, 6, 8):
            write(tmp_path, step)
        remove_old(tmp_path, 8, keep, best)
        assert names(tmp_path) == ["latest", *expected]

    def test_one_left_by_a_run_that_went_further_does_not_count_as_last(self, tmp_path):
        for step in (10, 4, 5):
            write(tmp_path, step)
        remove_old(tmp_path, 5, 1, None)
        assert names(tmp_path) == ["latest", "step_5"]

    def test_leftovers_go(self, tmp_path):
        write(tmp_path, 2).rename(tmp_path / "checkpoints" / ".step_2.part")
        write(tmp_path, 4)
        remove_old(tmp_path, 4, 1, None)
        assert names(tmp_path) == ["latest", "step_4"]


class Malice:
    """Unpickled, it leaves a file behind."""

    def __init__(self, trace: Path):
        self._trace = str(trace)

    def __reduce__(self):
        return Path.touch, (Path(self._trace),)


def poisons(trace: Path) -> dict[str, bytes]:
    """A malicious pickle in the forms in which files may hold one."""
    beside = trace.with_name("poison.pt")
    torch.save({"module": Malice(trace)}, beside)
    zipped = beside.read_bytes()
    torch.save({"module": Malice(trace)}, beside, _use_new_zipfile_serialization=False)
    return {"bare": pickle.dumps(Malice(trace)), "zip": zipped, "legacy": beside.read_bytes()}


def engine_of(slimfit: dict | None):
    from torch import nn

    import slimfit_ds

    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        **({} if slimfit is None else {"slimfit": slimfit}),
    }
    engine = slimfit_ds.initialize(model=nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), config=config)[0]
    engine.backward(engine(torch.ones(2, 4)).square().mean())
    engine.step()
    return engine


@pytest.mark.usefixtures("one_rank")
class TestNoCode:
    @pytest.mark.parametrize(
        "slimfit", [{"freeze": {"policy": "ils", "rate": 0.5}}, None], ids=["slimfit", "stock"]
    )
    def test_a_malicious_pickle_in_any_file_does_not_run(self, tmp_path, slimfit):
        from slimfit_ds.training.checkpoints import load_checkpoint, save_checkpoint
        from slimfit_ds.training.distributed import Ranks

        engine = engine_of(slimfit)
        save_checkpoint(engine, tmp_path, 1, {"a": 1})
        assert load_checkpoint(engine, tmp_path, Ranks())["step"] == 1
        place = tmp_path / "checkpoints"
        files = [path for path in place.rglob("*") if path.is_file()]
        assert len(files) >= (5 if slimfit else 3)
        trace = tmp_path / "trace"
        for poison in poisons(trace).values():
            for path in files:
                good = path.read_bytes()
                path.write_bytes(poison)
                # A file that the run does not need (a script of DeepSpeed's, `latest`) may be anything.
                with suppress(RuntimeError, OSError, ValueError):
                    load_checkpoint(engine, tmp_path, Ranks())
                assert not trace.exists(), f"{path} ran code"
                path.write_bytes(good)
        # The poison is one: plain unpickling does leave the trace.
        pickle.loads(pickle.dumps(Malice(trace)))
        assert trace.exists()

    def test_a_stock_checkpoint_with_more_than_values_is_refused_by_name(self, tmp_path):
        from slimfit_ds.engine.stock_checkpoint import load_stock, save_stock

        engine = engine_of(None)
        save_stock(engine, tmp_path, "step_1", {"step": 1})
        path = tmp_path / "step_1" / "mp_rank_00_model_states.pt"
        torch.save({"module": Malice(tmp_path / "trace")}, path)
        with pytest.raises(
            CheckpointError, match="holds more than tensors and plain values, and is not loaded"
        ):
            load_stock(engine, tmp_path, "step_1")
        assert not (tmp_path / "trace").exists()

    def test_a_stock_checkpoint_that_cannot_be_written_leaves_the_one_before(self, tmp_path, monkeypatch):
        from slimfit_ds.engine.stock_checkpoint import save_stock

        engine = engine_of(None)
        save_stock(engine, tmp_path, "step_1", {"step": 1})
        before = sorted(path.name for path in tmp_path.iterdir())

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(engine.checkpoint_engine, "save", full)
        with pytest.raises(OSError, match="No space left"):
            save_stock(engine, tmp_path, "step_2", {"step": 2})
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        assert (tmp_path / "latest").read_text() == "step_1"
