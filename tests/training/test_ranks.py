"""Reading the launcher's environment (`training/distributed.py`)."""

from __future__ import annotations

import pytest

from slimfit_ds.training import distributed
from slimfit_ds.training.distributed import Ranks, export, first_slurm_host, read_ranks


def test_plain_python_is_one_rank():
    assert read_ranks({}) == Ranks(0, 0, 1, "python")


def test_torchrun_and_deepspeed():
    environment = {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "2950",
    }
    assert read_ranks(environment) == Ranks(5, 1, 8, "torchrun", "a", 2950)


def test_srun():
    environment = {
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "9",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NODELIST": "gpu[07-08]",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_ID": "123456",
    }
    ranks = read_ranks(environment)
    assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.launcher) == (3, 1, 4, "srun")
    assert ranks.address == "gpu07"
    others = read_ranks({**environment, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert (others.address, others.port) == (ranks.address, ranks.port)
    assert 1024 < ranks.port < 65536


def test_the_address_of_the_user_wins_under_srun():
    environment = {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}
    environment |= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
    ranks = read_ranks(environment)
    assert (ranks.address, ranks.port) == ("10.0.0.1", 4000)


def test_one_task_of_slurm_is_plain_python():
    environment = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"}
    assert read_ranks(environment).launcher == "python"


# As printed by Slurm 22.05 on two nodes, `#SBATCH -N2 --ntasks-per-node=2`.
IN_THE_SCRIPT = {
    "SLURM_JOB_ID": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_LOCALID": "0", "SLURM_NNODES": "2",
    "SLURM_NODEID": "0", "SLURM_NODELIST": "n[1-2]", "SLURM_NTASKS": "4", "SLURM_PROCID": "0",
}  # fmt: skip
IN_A_STEP = {
    **IN_THE_SCRIPT, "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
}  # fmt: skip
# What MPICH's Hydra, started in that script, puts on top of the step of one task for each node that it makes.
BY_HYDRA = {
    **IN_A_STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
    "PMI_RANK": "3", "PMI_SIZE": "4", "PMI_FD": "6", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1",
}  # fmt: skip


def test_the_script_of_sbatch_itself_is_plain_python():
    """It has SLURM_PROCID and the number of tasks, but nobody started the other ones."""
    assert read_ranks(IN_THE_SCRIPT) == Ranks()


@pytest.mark.parametrize("more", [{}, {"PMI_RANK": "3", "PMI_SIZE": "4"}, {"PMIX_RANK": "3"}])
def test_srun_with_any_mpi_plugin(more):
    ranks = read_ranks(IN_A_STEP | more)
    assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.launcher) == (3, 1, 4, "srun")
    assert ranks.address == "n1"


def test_srun_on_one_machine_needs_no_name():
    assert read_ranks(IN_A_STEP | {"SLURM_STEP_NUM_NODES": "1"}).address == "127.0.0.1"


def test_a_requeued_job_takes_another_port():
    ports = {
        read_ranks(
            IN_A_STEP | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step, "SLURM_RESTART_COUNT": again}
        ).port
        for job in ("2", "99999")
        for step in ("0", "1")
        for again in ("0", "2")
    }
    assert len(ports) == 8  # job, step and start each count
    assert all(20000 <= port < 32000 for port in ports)


class World:
    """The communicator of one of several MPI processes, on one machine or with a machine for each."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    def Get_rank(self):
        return self.rank

    def Get_size(self):
        return self.size


OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
HYDRA = {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}


@pytest.mark.parametrize(
    "environment",
    [
        OPEN_MPI,
        HYDRA,
        {"MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_RANK": "3"},
        BY_HYDRA,
        OPEN_MPI | IN_A_STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
        OPEN_MPI | IN_THE_SCRIPT,
    ],
    ids=[
        "Open MPI",
        "Hydra",
        "MVAPICH",
        "Hydra in a Slurm job",
        "Open MPI in a Slurm job",
        "mpirun on node 0",
    ],
)
def test_every_mpirun_is_asked_by_mpi(environment, monkeypatch):
    monkeypatch.setattr(distributed, "mpi_world", lambda environment: World(3, 4))
    monkeypatch.setattr(distributed, "local_rank", lambda world: (1, 2))
    monkeypatch.setattr(distributed, "meeting_place", lambda *given: ("10.0.0.5", 4321))
    assert read_ranks(environment) == Ranks(3, 1, 4, "mpi", "10.0.0.5", 4321)
    asked_for = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
    assert read_ranks(environment | asked_for) == Ranks(3, 1, 4, "mpi", "node0", 29500)
    assert read_ranks(environment | {"MASTER_PORT": "29500"}) == Ranks(3, 1, 4, "mpi", "10.0.0.5", 29500)


def test_deepspeed_s_mpich_runner_and_its_helper():
    """`launcher_helper.py` turns Hydra's numbers into these; MPI is not asked."""
    environment = HYDRA | {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}
    environment |= {"MASTER_ADDR": "10.0.0.5", "MASTER_PORT": "29500"}
    assert read_ranks(environment) == Ranks(3, 1, 4, "torchrun", "10.0.0.5", 29500)


def test_torchrun_inside_of_srun():
    """One torchrun for each node by srun: torchrun's numbers count."""
    environment = IN_A_STEP | {"RANK": "7", "LOCAL_RANK": "3", "WORLD_SIZE": "8"}
    environment |= {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
    assert read_ranks(environment) == Ranks(7, 3, 8, "torchrun", "n1", 29500)


def test_a_pod_of_pytorchjob_without_torchrun():
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
    environment |= {"PET_NNODES": "2", "PET_NODE_RANK": "1"}
    assert read_ranks(environment) == Ranks(1, 0, 2, "torchrun", "job-master-0", 23456)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[03-05,9],login", "gpu03"),
        ("rack[1,4]-ib", "rack1-ib"),
        ("a-b-12", "a-b-12"),
    ],
)
def test_first_slurm_host(nodes, host):
    assert first_slurm_host(nodes) == host


def test_a_malformed_variable_is_named():
    with pytest.raises(ValueError, match=r"WORLD_SIZE.*'many'"):
        read_ranks({"RANK": "0", "WORLD_SIZE": "many"})


def test_export_gives_what_torch_reads():
    environment: dict[str, str] = {"PATH": "/usr/bin"}
    export(Ranks(1, 1, 2, "mpi", "host", 1234), environment)
    assert {
        key: environment[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    } == {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "host",
        "MASTER_PORT": "1234",
    }
    assert environment["PATH"].startswith("/usr/bin")
