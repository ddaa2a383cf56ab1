"""Turns with full fine-tuning: ratios that survive drift, processes that fail, runs that are interrupted."""

from __future__ import annotations

import json
import sys
import textwrap
import time

import pytest

PRETENDER = """
import json, os, sys
arguments = sys.argv[1:]
out = os.fdopen(int(arguments[arguments.index("--answers") + 1]), "w")
case, method, kind = arguments[arguments.index("--cell") + 1].split("__")
print("starting", flush=True)
with open("started", "a") as started:
    started.write(f"{case}__{method}__{kind}\\n")
rules = json.load(open("rules.json"))
def answer(order, options):
    rule = rules.get(f"{method}/{kind}/{order}")
    if rule == "die":
        os._exit(3)
    if rule == "once beside" :
        if os.path.exists("beside"):
            os.remove("beside")
            return {"status": "out of memory", "error": "no room"}
    elif rule:
        return rule
    if order == "turn":
        step = {"full": 2.0, "minimal": 3.0}[method]
        return {"seconds": [step] * options["steps"], "cpu_seconds": [step / 2] * options["steps"]}
    return {"build": {"seconds": 1.0}, "finish": {"peak": 2**20}, "fit": {"largest": {"24 GB": 7}}}[order]
for line in sys.stdin:
    out.write(json.dumps(answer(*json.loads(line))) + "\\n")
    out.flush()
"""


class Drifting:
    """A pretended method on a machine that everybody slows down, by the same amount at the same time."""

    def __init__(self, machine, seconds, log):
        self.machine, self.seconds, self.log = machine, seconds, log

    def turn(self, steps):
        times = []
        for _ in range(steps):
            self.machine["load"] += self.machine["slope"]
            times.append(self.seconds * self.machine["load"])
        self.log.append(self)
        return {"seconds": times, "cpu_seconds": times}


def test_drift_does_not_move_the_ratio():
    from peers_methods.turns import Turns, compare, take_turns

    machine, log = {"load": 1.0, "slope": 0.05}, []
    own, full = Drifting(machine, 3.0, log), Drifting(machine, 2.0, log)
    rounds = take_turns(own, full, Turns(rounds=6, steps=2, seconds=1000))
    found = compare(rounds)
    assert machine["load"] > 2
    assert found["of_full"]["seconds"] == pytest.approx(1.5, rel=0.03)
    # Either begins as often: a steady drift cancels out.
    assert [one is own for one in log] == [True, False, False, True] * 3
    one_after_the_other = own.turn(12)["seconds"], full.turn(12)["seconds"]
    assert sorted(one_after_the_other[0])[6] / sorted(one_after_the_other[1])[6] < 1.3


def test_medians_quartiles_and_ratios():
    from peers_methods.turns import compare, noise

    def times(*seconds):
        return {"seconds": list(seconds), "cpu_seconds": [s / 10 for s in seconds]}

    rounds = [
        {"own": times(1, 2), "full": times(4, 4)},
        {"own": times(3, 3), "full": times(2, 2)},
        {"own": times(9, 1), "full": times(5, 5)},
    ]
    found = compare(rounds)
    assert found["seconds"] == 2.5
    assert found["full_meanwhile"] == {"seconds": 4, "cpu_seconds": pytest.approx(0.4)}
    assert found["of_full"]["seconds"] == 2.5 / 4
    # Ratios of the rounds: 1.5 / 4, 3 / 2, 5 / 5.
    assert found["of_full_quartiles"]["seconds"] == pytest.approx([(0.375 + 1) / 2, 1.25])
    alone = compare([{"own": times(1, 2)}])
    assert "of_full" not in alone
    cells = [{"of_full": {"seconds": 0.8}}, {"of_full": {"seconds": 1.1}}, {}]
    assert noise(cells, "seconds") == pytest.approx(0.25)
    assert noise([{}], "seconds") is None


def test_rounds_end_when_their_time_is_spent():
    from peers_methods.turns import Turns, take_turns

    class Slow:
        def turn(self, steps):
            time.sleep(0.01)
            return {"seconds": [1.0], "cpu_seconds": [1.0]}

    assert len(take_turns(Slow(), None, Turns(rounds=9, steps=1, seconds=0.0))) == 3
    assert len(take_turns(Slow(), None, Turns(rounds=2, steps=1, seconds=9.0))) == 2


@pytest.fixture
def run_plan(tmp_path):
    """Runs cells with pretended workers that follow rules: `METHOD/KIND/ORDER` -> answer."""
    from peers_methods.running import Cell, Plan, run_cells
    from peers_methods.turns import Turns

    (tmp_path / "worker.py").write_text(textwrap.dedent(PRETENDER))

    def run(names, device="cpu", prepare=False, cell_seconds=60, **rules):
        (tmp_path / "rules.json").write_text(json.dumps(rules))
        (tmp_path / "started").write_text("")
        plan = Plan(
            [Cell(*name.split("__")) for name in names],
            tmp_path / "out",
            [sys.executable, "worker.py"],
            {"device": device, "seed": 0},
            device,
            Turns(3, 2, 20.0),
            cell_seconds,
            600.0,
            prepare,
            tmp_path,
            {"commit": "abc"},
        )
        told = []
        results = run_cells(plan, told.append)
        return results, (tmp_path / "started").read_text().split(), told

    run.folder = tmp_path
    return run


STEPS = ["tiny__full__step", "tiny__minimal__step"]


def test_a_case_has_one_reference_and_every_cell_a_process(run_plan):
    results, started, _ = run_plan([*STEPS, "bert-small__minimal__step"])
    assert results["tiny__minimal__step"]["of_full"] == {"seconds": 1.5, "cpu_seconds": 1.5}
    assert results["tiny__full__step"]["of_full"]["seconds"] == 1.0
    assert sorted(started) == sorted(
        [*STEPS, "bert-small__minimal__step", "tiny__full__reference", "bert-small__full__reference"]
    )
    kept = json.loads((run_plan.folder / "out" / "cells" / "tiny__minimal__step.json").read_text())
    assert kept["measured"] == {"commit": "abc"}
    assert len(kept["rounds"]) == 3
    assert not list((run_plan.folder / "out" / "cells").glob("*.log"))


def test_an_interrupted_run_goes_on_where_it_was(run_plan):
    run_plan(STEPS[:1])
    cells = run_plan.folder / "out" / "cells"
    (cells / "tiny__minimal__step.part").write_text('{"status": "o')
    results, started, told = run_plan(STEPS)
    assert set(started) == {"tiny__minimal__step", "tiny__full__reference"}
    assert {result["status"] for result in results.values()} == {"ok"}
    assert "1 cells are there already" in told
    assert not list(cells.glob("*.part"))


def test_a_method_that_does_not_fit_beside_full_fine_tuning_is_measured_alone(run_plan):
    (run_plan.folder / "beside").touch()
    results, started, told = run_plan(STEPS, "cuda", **{"minimal/step/build": "once beside"})
    minimal = results["tiny__minimal__step"]
    assert minimal["status"] == "ok"
    assert minimal["seconds"] == 3.0
    assert "of_full" not in minimal
    assert started.count("tiny__minimal__step") == 2
    assert any("no room beside it" in line for line in told)


@pytest.mark.parametrize("rule", ["die", {"status": "unavailable", "error": "takes 90 % of the card"}])
def test_without_a_reference_the_method_is_measured_alone(run_plan, rule):
    results, started, _ = run_plan(STEPS, **{"full/reference/build": rule})
    assert {result["status"] for result in results.values()} == {"ok"}
    assert all("of_full" not in result for result in results.values())
    assert started.count("tiny__full__reference") == 1


def test_a_reference_that_dies_in_its_turn_is_not_the_methods_fault(run_plan):
    results, _, _ = run_plan(STEPS[1:], **{"full/reference/turn": "die"})
    assert results["tiny__minimal__step"]["status"] == "ok"


def test_what_cannot_run_says_why_and_is_not_tried_again(run_plan):
    rules = {"minimal/step/build": {"status": "unavailable", "error": "no such card"}}
    results, _, _ = run_plan(STEPS, **rules)
    assert results["tiny__minimal__step"]["status"] == "unavailable"
    assert results["tiny__minimal__step"]["error"] == "no such card"
    results, started, _ = run_plan(STEPS)
    assert started == []
    results, _, _ = run_plan(["tiny__lora__step"], **{"lora/step/build": "die"})
    assert results["tiny__lora__step"]["status"] == "failed"
    assert "exit code 3" in results["tiny__lora__step"]["error"]


def test_prepared_processes_are_the_ones_used(run_plan):
    cells = [*STEPS, "tiny__minimal__fit", "bert-small__full__step"]
    results, started, _ = run_plan(cells, "cuda", prepare=True)
    assert {result["status"] for result in results.values()} == {"ok"}
    assert sorted(started) == sorted([*cells, "tiny__full__reference", "bert-small__full__reference"])


def test_a_worker_that_takes_too_long_is_ended(tmp_path):
    from peers_methods.worker import Gone, Worker

    (tmp_path / "sleeper.py").write_text("import time; print('awake', flush=True); time.sleep(60)")
    worker = Worker([sys.executable, "sleeper.py"], tmp_path / "log", tmp_path)
    worker.deadline = time.monotonic() + 0.5
    with pytest.raises(Gone, match="timeout") as caught:
        worker.ask("build")
    assert caught.value.status == "timeout"
    with pytest.raises(Gone):
        worker.ask("build")


def test_a_worker_killed_by_the_kernel_ran_out_of_memory(tmp_path):
    from peers_methods.worker import Gone, Worker

    victim = "import os, sys; print(os.environ['MALLOC_TRIM_THRESHOLD_']); sys.stdin.readline(); os.kill(os.getpid(), 9)"
    (tmp_path / "victim.py").write_text(victim)
    worker = Worker([sys.executable, "victim.py"], tmp_path / "log", tmp_path)
    with pytest.raises(Gone) as caught:
        worker.ask("build")
    assert caught.value.status == "out of memory"
    # Freed memory stays with the process: see `_MALLOC`.
    assert int((tmp_path / "log").read_text()) >= 2**40


def test_orders_are_answered_and_errors_told(monkeypatch, tmp_path):
    import io

    import torch
    from peers_methods.building import Unavailable
    from peers_methods.worker import serve

    def fail(error):
        raise error

    actions = {
        "add": lambda a, b: {"sum": a + b},
        "unavailable": lambda: fail(Unavailable("not here")),
        "memory": lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried")),
        "broken": lambda: fail(ValueError("\nfirst line\nsecond")),
    }
    orders = [["add", {"a": 2, "b": 3}], ["unavailable", {}], ["memory", {}], ["broken", {}]]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(order) + "\n" for order in orders)))
    with (tmp_path / "answers").open("w") as out:
        import os

        serve(os.dup(out.fileno()), actions)
    answers = [json.loads(line) for line in (tmp_path / "answers").read_text().splitlines()]
    assert answers == [
        {"sum": 5},
        {"status": "unavailable", "error": "not here"},
        {"status": "out of memory", "error": "CUDA out of memory"},
        {"status": "failed", "error": "ValueError: first line"},
    ]


def test_the_plan_adds_up():
    from peers_methods.budget import Assumptions, cell_seconds, planned
    from peers_methods.running import Cell
    from peers_methods.turns import Turns

    turns = Turns(rounds=3, steps=2)

    def flops(case):
        return Assumptions.flops_per_second / 2  # Half a second per step.

    # 3 steps of warm-up, 2 looked into, 3 rounds of 3 steps of either.
    expected = Assumptions.start_seconds + 0.5 * (3 + 2 * Assumptions.slow + 2 * 9)
    cell = Cell("tiny", "full")
    assert cell_seconds(cell, turns, 3, False, flops) == pytest.approx(expected)
    first = cell_seconds(cell, turns, 3, True, flops)
    # The reference warms up and is looked into as well.
    assert first == pytest.approx(expected + Assumptions.start_seconds + 0.5 * (3 + 2 * Assumptions.slow))
    text = planned([cell] * 10, turns, 3, (first + 4.5 * expected) / 60, flops)
    assert "after 5 cells" in text
