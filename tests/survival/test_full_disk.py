"""A disk that is too small is refused at the start; one that fills up on the way leaves the last checkpoint whole."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from test_kill_points import contents

from slimfit_ds.training.checkpoints import last_checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture
def small_disk(tmp_path: Path):
    """Mounts a file system of a size in KiB; a skip where that is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: int) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(server, small_disk):
    place = small_disk(64)
    done = server.launch("--config", "recipe.yaml", f"output_dir={place}/run")
    assert done.codes == [2, 2], done.logs
    assert "is on a disk with 6.1e-05 GiB free, and this run writes up to" in done.logs[0]
    assert "3 checkpoints of" in done.logs[0]
    assert "Traceback" not in done.logs[0]
    assert list(place.iterdir()) == []


def test_a_disk_that_fills_up_inside_a_save_leaves_the_last_checkpoint(server, whole, small_disk):
    place = small_disk(4096)
    arguments = ("--config", "recipe.yaml", f"output_dir={place}/run")
    fault = {"rank": 0, "kind": "write_shards", "number": 2, "how": "fill_disk", "file": str(place / "other")}
    done = server.launch(*arguments, fault=fault)
    assert done.codes == [5, 5], done.logs
    folder = place / "run"
    assert "step_4 could not be written: rank 0" in done.logs[0]
    assert "No space left on device" in done.logs[0]
    assert f"{folder}/checkpoints/step_2 is whole, and the run can go on from it" in done.logs[0]
    assert "Traceback" not in done.logs[0] + done.logs[1]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["latest", "step_2"]
    assert last_checkpoint(folder).name == "step_2"
    (place / "other").unlink()
    assert server.launch(*arguments).codes == [0, 0]
    assert contents(folder) == contents(server.folder / "whole")


def test_a_disk_that_fills_up_between_saves_names_the_rank_that_noticed(server, whole, small_disk):
    place = small_disk(4096)
    arguments = ("--config", "recipe.yaml", f"output_dir={place}/run")
    fault = {"rank": 0, "kind": "step", "number": 4, "how": "fill_disk", "file": str(place / "other")}
    done = server.launch(*arguments, fault=fault)
    (place / "other").unlink()
    assert last_checkpoint(place / "run").name == "step_2"
    # The history's page may have had room for the line; then the save of this step is the first to notice.
    if done.codes != [5, 5]:
        assert done.codes == [1, 3], done.logs
        assert "rank 1 ends: rank 0 failed: OSError: [Errno 28] No space left on device" in done.logs[1]
    assert server.launch(*arguments).codes == [0, 0]
    assert contents(place / "run") == contents(server.folder / "whole")
