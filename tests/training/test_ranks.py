"""Reading the launcher's environment (`training/distributed.py`)."""

from __future__ import annotations

import pytest

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
        "SLURM_JOB_ID": "123456",
    }
    ranks = read_ranks(environment)
    assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.launcher) == (3, 1, 4, "srun")
    assert ranks.address == "gpu07"
    others = read_ranks({**environment, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert (others.address, others.port) == (ranks.address, ranks.port)
    assert 1024 < ranks.port < 65536


def test_the_address_of_the_user_wins_under_srun():
    environment = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
    ranks = read_ranks(environment)
    assert (ranks.address, ranks.port) == ("10.0.0.1", 4000)


def test_one_task_of_slurm_is_plain_python():
    assert read_ranks({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}).launcher == "python"


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
