"""DeepSpeed's own unit tests, on stock and with `deepspeed.initialize` replaced by ours, on a CPU with gloo ranks.

    git clone https://github.com/deepspeedai/DeepSpeed /tmp/DeepSpeed && git -C /tmp/DeepSpeed checkout edaa722
    python benchmarks/deepspeed_tests.py --tests /tmp/DeepSpeed/tests

Ours is `slimfit_ds.integrations.enable_deepspeed` with the block `{"freeze": {"policy": "none"}, "activations": "exact"}`: everything
trains, so every value must be DeepSpeed's own. Each test of `SAMPLE` runs twice in fresh ranks, on stock and, where that
passes, on ours; of a test with parameters the first `--variants` (0: all) are taken. DeepSpeed's FusedAdam is torch's,
because its build for a CPU takes longer than a test may. Adds what `benchmarks/results/deepspeed_tests.csv` (`--csv`) lacks.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import Study, machine, markdown

STUDY = "deepspeed_tests"
SAMPLE = [
    "runtime/test_ds_initialize.py",
    "runtime/zero/test_zero_tensor_fragment.py",
    "v1/zero/test_zero.py",
    "checkpoint/test_zero_optimizer.py",
    "checkpoint/test_lr_scheduler.py",
    "checkpoint/test_latest_checkpoint.py",
    "runtime/zero/test_ignore_unused_parameters.py",
    "runtime/zero/test_zero_grad_clip.py",
    "v1/half_precision/test_bf16.py",
    "runtime/half_precision",
    "runtime/test_lr_schedulers.py",
    "checkpoint/test_other_optimizer.py",
    "checkpoint/test_shared_weights.py",
    "checkpoint/test_tag_validation.py",
    "runtime/test_ds_config_dict.py",
    "runtime/test_multi_output_model.py",
    "runtime/test_no_sync_ctxt.py",
    "v1/half_precision",
    "v1/zero",
    "runtime/zero",
    "runtime/activation_checkpointing",
    "runtime/test_multiple_models.py",
    "checkpoint",
]
NOT_OURS = [
    "test_zeropp",
    "test_nvme",
    "test_mics",
    "test_zero_tiled",
    "test_zero_config",
    "test_zero_context",
    "test_fp8",
    "onebit",
    "offloadpp",
    "test_zero2_offload",
    "test_zero_cpu_offload",
    "test_offload_states",
    "test_moe_checkpoint",
    "test_pipeline",
    "test_autotp",
    "test_convert_checkpoint",
]
"""Of these folders: ZeRO++, NVMe, quantised states and what makes no engine; docs/composability.md names what is refused."""
BLOCK = {"freeze": {"policy": "none"}, "activations": "exact"}
_INTERNALS = "no value: reads internals of DeepSpeed's optimizer"
REASONS = {
    **dict.fromkeys(
        ("TestClientOptimizer", "TestConfigOptimizer"),
        "no value: asserts the class of the returned optimizer, which is ours at every stage",
    ),
    **dict.fromkeys(
        (
            "TestStage2FlattenOnGPU",
            "TestPartitionNcclAlignment",
            "TestHookCountRegression",
            "TestBF16OptimizerGradReduction",
        ),
        _INTERNALS,
    ),
    **dict.fromkeys(
        ("test_reused_checkpointed_module", "test_wrapper_and_parameter_storage_lifecycle"),
        "no value: asserts that `F.linear` is replaced for good, which ours does not do",
    ),
    **dict.fromkeys(
        ("TestZeroToFP32", "TestCheckpointSharedWeights"),
        "DeepSpeed's reader of its own checkpoint format: `zero_to_fp32.py` in the folder reads ours",
    ),
    **dict.fromkeys(
        ("TestZeroUserBackwardGradAccumulation", "test_scale_with_gradient_accumulation"),
        "in bf16 micro-batches are summed in float32 here, and those sums are met exactly; DDP and DeepSpeed sum in bf16, "
        "3e-3 off",
    ),
    "test_save_exclude": "no value: opens files of DeepSpeed's own checkpoint format",
    "test_zero_grad[True]": "`optimizer.zero_grad()` just before `step()`: nothing steps here, as in torch; DeepSpeed steps",
    "TestZero0DirectBackwardStillRaises": "no value: `loss.backward()` works here at stage 0 too, with the same weights",
}
"""What a test of another outcome asks for, where its error does not say so."""
OUTCOMES = ("passed", "refused", "differs")


# In the processes of the tests: `unit/common.py` of the copy ends with a call of `prepare`.


def prepare(executor: type) -> None:
    """Start the ranks of each test twice, so that one that fails or hangs ends its test and not the run."""
    import deepspeed

    # Ranks are forked with what would take each of them seconds to import.
    for module in ("torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer", "slimfit_ds.engine.engine"):
        importlib.import_module(module)
    # Takes half a minute to build, and serves inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    executor._launch_daemonic_procs = _launch  # type: ignore[attr-defined]
    _use_torch_adam()


def _use_torch_adam() -> None:
    import deepspeed
    import torch
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    class FusedAdam(torch.optim.AdamW):
        def __init__(self, params, adam_w_mode=True, bias_correction=True, **options):
            super().__init__(params, **options)
            for group in self.param_groups:
                group["decoupled_weight_decay"] = adam_w_mode

    deepspeed.ops.adam.FusedAdam = FusedAdam
    deepspeed.runtime.engine.FusedAdam = FusedAdam
    ZERO_SUPPORTED_OPTIMIZERS.append(FusedAdam)


def _use_ours() -> None:
    import inspect

    import deepspeed

    from slimfit_ds.engine.initialize import read_config
    from slimfit_ds.engine.zero3 import FreezeZero3Optimizer
    from slimfit_ds.integrations import enable_deepspeed

    # Where tests look for the reduced gradients of ZeRO 3.
    FreezeZero3Optimizer.averaged_gradients = property(
        lambda self: {
            group: [*found.values()] for group, found in self.get_fp32_grad_partitions().items() if found
        },
        lambda self, value: None,
    )
    signature = inspect.signature(deepspeed.initialize)
    enable_deepspeed()
    ours = deepspeed.initialize

    def with_block(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        config = given.pop("config_params", None) if given.get("config") is None else given["config"]
        config, given["args"] = read_config(config, given.get("args"))
        return ours(**{**given, "config": {"slimfit": BLOCK, **config}})

    deepspeed.initialize = with_block


def _rank(mode: str, test: Any, *arguments: Any) -> Any:
    if mode == "ours":
        _use_ours()
    try:
        return test._dist_run(*arguments)
    except Exception:
        raise
    except BaseException as error:
        # What pytest raises where nothing was raised: it would end the process, and nobody would hear of it.
        raise AssertionError(str(error)) from None


def compare_masters(saved: Any, loaded: Any) -> bool:
    """Compare the most exact weights of two of our engines; return whether they are ours."""
    import torch

    from slimfit_ds.engine.full_values import FullValues

    if not isinstance(saved.optimizer, FullValues):
        return False
    for pair in zip(saved.module.parameters(), loaded.module.parameters(), strict=True):
        engines = zip((saved, loaded), pair, strict=True)
        masters = [engine.optimizer.get_full_hp_param(parameter) for engine, parameter in engines]
        if any(master is not None for master in masters):
            assert torch.equal(*masters), "masters differ"
    return True


class _Skipped(Exception):
    """By the test itself."""


def _launch(test: Any, ranks: int, init_method: str) -> None:
    """Run one test on stock, then on ours, and write what became of it."""
    row: dict[str, str | None] = {"test": os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]}
    for mode in ("stock", "ours"):
        outcome, error = _outcome(mode, test, ranks, f"{init_method}-{mode}")
        kind = type(error).__name__ if error else None
        message = " ".join(str(error).split())[:300] if error else None
        if mode == "stock":
            row |= {"stock": outcome}
            if outcome != "passed":
                row |= {"ours": None, "error": kind, "message": message}
                break
        else:
            if kind in ("ConfigError", "CheckpointError", "NotImplementedError"):
                outcome = "refused"
            row |= {"ours": "differs" if outcome == "failed" else outcome, "error": kind, "message": message}
    csv, run_by = json.loads(os.environ["DEEPSPEED_TESTS_OUT"])
    Study(csv, ("test",)).add({**row, **run_by})


def _outcome(mode: str, test: Any, ranks: int, init_method: str) -> tuple[str, BaseException | None]:
    import torch.multiprocessing as mp

    pool = mp.Pool(processes=ranks)
    try:
        port = str(20000 + os.getpid() % 20000)
        calls = [
            pool.apply_async(_rank, (mode, test, rank, ranks, port, init_method)) for rank in range(ranks)
        ]
        end = time.monotonic() + test.exec_timeout
        while not all(call.ready() for call in calls):
            for call in calls:
                if call.ready():
                    call.get()
            if time.monotonic() > end:
                raise TimeoutError(f"no end within {test.exec_timeout} s")
            time.sleep(0.05)
        said = [call.get() for call in calls]
        return ("skipped", _Skipped(said[0])) if any(said) else ("passed", None)
    except Exception as error:
        return "failed", error
    finally:
        pool.terminate()
        pool.join()


# In the process of pytest, as its plugin.


class Chosen:
    """Runs the first tests of each function that start ranks.

    Args:
        known: names that are left out.
        variants: of a test with parameters; 0: all.
        until: no test starts after this time of the clock.
    """

    def __init__(self, known: list[str], variants: int, until: float):
        self.known, self.variants, self.until = set(known), variants, until

    def pytest_collection_modifyitems(self, items):
        seen: Counter[str] = Counter()
        kept = []
        for item in items:
            function = item.nodeid.partition("[")[0]
            makes_ranks = getattr(item.cls, "is_dist_test", False)
            if not makes_ranks or any(name in item.nodeid for name in NOT_OURS):
                continue
            seen[function] += 1
            if item.nodeid not in self.known and (not self.variants or seen[function] <= self.variants):
                kept.append(item)
        items[:] = kept

    def pytest_runtest_setup(self, item):
        import pytest

        if time.time() > self.until:
            pytest.exit("the time of the run is over", returncode=0)


def _pytest(setting: str) -> int:
    import multiprocessing

    import pytest

    options = json.loads(setting)
    # Ranks are forked from a process that has imported what all of them need.
    multiprocessing.set_forkserver_preload(["unit.common"])
    plugin = Chosen(options["known"], options["variants"], options["until"])
    return pytest.main(
        ["-q", "--tb=no", "--continue-on-collection-errors", "-p", "no:cacheprovider", *options["files"]],
        plugins=[plugin],
    )


# The program.


def run(tests: Path, options: Any) -> None:
    """Run the tests of a copy of DeepSpeed's folder."""
    study = Study(options.csv, ("test",))
    environment = {
        **os.environ,
        "DEEPSPEED_TESTS_OUT": json.dumps([str(study.path), machine()]),
        "DS_ACCELERATOR": "cpu",
        "DS_UNITTEST_TIMEOUT": str(options.seconds),
        "DS_DISABLE_REUSE_DIST_ENV": "1",
        "LOCAL_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(tests), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        ),
    }
    setting = {
        "known": [row["test"] for row in study.rows()],
        "variants": options.variants,
        "until": time.time() + 60 * options.minutes,
        "files": [f"unit/{name}" for name in options.only or SAMPLE],
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--pytest", json.dumps(setting)]
    subprocess.run(command, cwd=tests, env=environment, check=False)


def _adapt(tests: Path) -> None:
    """Make a copy of the tests fit the installed DeepSpeed, a CPU, and two runs of each."""
    for file in tests.rglob("*.py"):
        text = file.read_text()
        # A CPU has no number, and DistributedDataParallel wants none; gloo gathers no scalars.
        text = text.replace("current_device()", "current_device_name()")
        text = re.sub(r", device_ids=\[\w+\], output_device=\w+", "", text)
        file.write_text(text.replace("torch.tensor(1 if flag else 0,", "torch.tensor([1 if flag else 0],"))
    states = tests / "unit" / "checkpoint" / "common.py"
    # An attribute that the installed engine has no more.
    kept = [line for line in states.read_text().splitlines() if "sparse_tensor_module_names" not in line]
    text = "\n".join(kept) + "\n"
    # It compares masters by the class of the optimizer.
    known = "    if DeepSpeedZeroOptimizer_Stage3 is not None"
    assert known in text
    ours = "    import deepspeed_tests\n    if deepspeed_tests.compare_masters(saved_model, loaded_model):\n        return\n\n"
    states.write_text(text.replace(known, ours + known, 1))
    with (tests / "unit" / "common.py").open("a") as common:
        common.write("\n\nimport deepspeed_tests\n\ndeepspeed_tests.prepare(DistributedExec)\n")


def _why(row: dict[str, Any]) -> str:
    known = next((why for name, why in REASONS.items() if name in row["test"]), None)
    return known or f"`{row['error']}: {textwrap.shorten(row['message'] or '', 150, placeholder=' ...')}`"


def tables() -> dict[str, str]:
    """Return the outcomes by file, and the refusals and differences by their reason."""
    rows = [row for row in Study(STUDY, ()).rows() if row["stock"] == "passed"]
    files: dict[str, Counter[str]] = {}
    others: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        file, _, test = row["test"].removeprefix("unit/").partition("::")
        files.setdefault(file.removesuffix(".py"), Counter()).update(["all", row["ours"]])
        if row["ours"] != "passed":
            others.setdefault((row["ours"], _why(row)), []).append(test.partition("::")[0])
    columns = ["all", *OUTCOMES]
    lines = [
        [name, *(str(count[column] or "") for column in columns)] for name, count in sorted(files.items())
    ]
    total = sum(files.values(), Counter[str]())
    lines.append(["all", *(f"**{total[column]}**" for column in columns)])
    reasons = [
        [why, outcome, str(len(tests)), ", ".join(sorted({*tests}))]
        for (outcome, why), tests in sorted(others.items())
    ]
    return {
        "deepspeed-tests": markdown(
            ["file", "stock passed", *(f"ours {outcome}" for outcome in OUTCOMES)], lines
        ),
        "deepspeed-tests-others": markdown(["why", "ours", "tests", "of"], reasons),
    }


def main() -> int:
    if sys.argv[1:2] == ["--pytest"]:
        return _pytest(sys.argv[2])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--tests", type=Path, required=True, help="the folder `tests` of a checkout of DeepSpeed"
    )
    parser.add_argument("--only", nargs="+", help="files or folders below tests/unit instead of the sample")
    parser.add_argument("--variants", type=int, default=1, help="of a test with parameters; 0: all")
    parser.add_argument("--seconds", type=int, default=120, help="time limit of a test")
    parser.add_argument("--minutes", type=float, default=600, help="no test starts after them")
    parser.add_argument("--csv", default=STUDY)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tests = Path(shutil.copytree(arguments.tests, Path(scratch) / "tests"))
        _adapt(tests)
        run(tests, arguments)
    print("\n\n".join(tables().values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
