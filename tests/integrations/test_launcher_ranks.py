"""Ranks from the launcher's variables (`integrations/ranks.py`); real launchers are in tests/launch."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from slimfit_ds.integrations.ranks import launched_by, set_rank_variables

SCRIPT_OF_SBATCH = {  # as printed by Slurm 22.05 on two nodes, `#SBATCH -N2 --ntasks-per-node=2`
    "SLURM_JOB_ID": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_LOCALID": "0", "SLURM_NNODES": "2",
    "SLURM_NODEID": "0", "SLURM_NODELIST": "n[1-2]", "SLURM_NTASKS": "4", "SLURM_PROCID": "0",
}  # fmt: skip
STEP = {
    **SCRIPT_OF_SBATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
}  # fmt: skip
HYDRA = {  # what MPICH's mpirun adds to the step of one task per node that it makes in such a script
    **STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
    "PMI_RANK": "3", "PMI_SIZE": "4", "PMI_FD": "6", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1",
}  # fmt: skip
TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "2950"}


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, "python"),
        (TORCHRUN, "torchrun"),
        (STEP | TORCHRUN, "torchrun"),
        (SCRIPT_OF_SBATCH, "python"),
        (STEP, "srun"),
        (STEP | {"PMI_RANK": "3", "PMI_SIZE": "4"}, "srun"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, "python"),
        (STEP | {"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun"),
        (HYDRA, "mpirun"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun"),
    ],
)
def test_launchers_are_told_apart(environment, launcher):
    assert launched_by(environment) == launcher


def test_variables_of_a_launcher_stay():
    environment = dict(TORCHRUN)
    assert set_rank_variables(environment) == "torchrun"
    assert environment == TORCHRUN


def test_srun():
    environment = dict(STEP)
    set_rank_variables(environment)
    assert [environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["3", "1", "4"]
    assert environment["MASTER_ADDR"] == "n1"
    first = STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    set_rank_variables(first)
    assert first["MASTER_PORT"] == environment["MASTER_PORT"]
    own = STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
    set_rank_variables(own)
    assert (own["MASTER_ADDR"], own["MASTER_PORT"]) == ("10.0.0.1", "4000")
    one = STEP | {"SLURM_STEP_NUM_NODES": "1"}
    set_rank_variables(one)
    assert one["MASTER_ADDR"] == "127.0.0.1", "a container's own name often does not resolve"


def test_srun_takes_another_port_for_each_job_step_and_restart():
    ports = set()
    for job in ("2", "99999"):
        for step in ("0", "1"):
            for restart in ("0", "2"):
                environment = STEP | {
                    "SLURM_JOB_ID": job,
                    "SLURM_STEP_ID": step,
                    "SLURM_RESTART_COUNT": restart,
                }
                set_rank_variables(environment)
                ports.add(int(environment["MASTER_PORT"]))
    assert len(ports) == 8
    assert all(20000 <= port < 32000 for port in ports)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[03-05,9],login", "gpu03"), ("a,b", "a"), ("rack1-n[7]", "rack1-n7"), ("n[1-2].site", "n1.site")],
)
def test_first_host_of_a_node_list(nodes, first):
    environment = STEP | {"SLURM_STEP_NODELIST": nodes}
    set_rank_variables(environment)
    assert environment["MASTER_ADDR"] == first


def test_a_single_process_gets_variables_only_if_asked():
    environment: dict[str, str] = {}
    assert set_rank_variables(environment, single=False) == "python"
    assert environment == {}
    set_rank_variables(environment)
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["MASTER_ADDR"]) == (
        "0",
        "1",
        "127.0.0.1",
    )


def test_another_mpi_than_the_launchers_is_refused(monkeypatch):
    """Each process would be alone in its world, and train alone."""
    world = SimpleNamespace(Get_size=lambda: 1)
    mpi = SimpleNamespace(COMM_WORLD=world, Get_library_version=lambda: "Open MPI v5.0\nmore")
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi))
    with pytest.raises(ValueError, match=r"started 4 processes \(PMI_SIZE\), mpi4py sees 1.*'Open MPI v5.0'"):
        set_rank_variables({"PMI_SIZE": "4"})


def test_a_missing_mpi_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ValueError, match=r"pip install 'slimfit_ds\[mpi\]'"):
        set_rank_variables({"OMPI_COMM_WORLD_SIZE": "2"})
