"""What the ranks find together (`doctor/{members,report}.py`), from records; `test_doctor.py` starts real ones."""

from __future__ import annotations

import json

import pytest

from slimfit_ds.doctor.findings import Finding, ok, problem, warning
from slimfit_ds.doctor.members import Member, compare_members, list_ranks
from slimfit_ds.doctor.report import as_json, as_text, exit_code, merge

VERSIONS = {"torch": "2.13.0", "numpy": "2.4.6"}


def members(**changes: dict) -> list[Member]:
    """Four ranks on two machines; `changes` by `r0` .. `r3`."""
    hosts = ("node1", "node1", "node2", "node2")
    return [
        Member(
            **({"rank": rank, "host": host, "device": "cpu", "versions": VERSIONS, "seconds": 0.001} | changes.get(f"r{rank}", {}))
        )
        for rank, host in enumerate(hosts)
    ]  # fmt: skip


def by_check(findings) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def test_all_is_well():
    found = by_check(compare_members(members(), 4, "gloo"))
    assert {finding.status for finding in found.values()} == {"ok"}
    assert found["ranks"].message == "4 ranks on 2 machines: node1 (ranks 0-1), node2 (ranks 2-3)"
    assert found["all-reduce"].message == "gloo, 4 ranks, 1 MiB in 1.0 ms"


def test_other_versions_are_named_with_ranks_and_machines():
    odd = {"versions": VERSIONS | {"torch": "2.11.0"}}
    found = by_check(compare_members(members(r1=odd, r3=odd), 4, "gloo"))["versions of ranks"]
    assert found.status == "problem"
    assert found.message == (
        "torch differs: 2.13.0 on node1, node2 (ranks 0, 2); 2.11.0 on node1, node2 (ranks 1, 3)"
    )


def test_a_package_that_only_some_have():
    odd = {"versions": {"torch": "2.13.0"}}
    assert "not installed on node2 (rank 3)" in by_check(compare_members(members(r3=odd), 4, "gloo"))[
        "versions of ranks"
    ].message  # fmt: skip


def test_ranks_that_did_not_come():
    findings = compare_members(members()[:2], 4, "gloo")
    assert findings[0].status == "problem"
    assert "2 of 4 ranks did not report: ranks 2-3" in findings[0].message


def test_a_failed_all_reduce_names_the_ranks():
    late = {"seconds": None, "failure": "TooLate: no answer within 20 s"}
    found = by_check(compare_members(members(r2=late), 4, "nccl"))["all-reduce"]
    assert found.status == "problem"
    assert "nccl fails: TooLate: no answer within 20 s (rank 2 on node2)" in found.message
    assert "NCCL_SOCKET_IFNAME" in found.advice


def test_one_rank_without_its_gpu():
    gpus = {f"r{rank}": {"device": f"cuda:{rank % 2}"} for rank in range(3)}
    found = by_check(compare_members(members(**gpus), 4, "nccl"))["devices of ranks"]
    assert found.message == "not of one kind: cuda: ranks 0-2; cpu: rank 3"


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([0, 1, 2, 3], "ranks 0-3"), ([7, 0, 1, 4, 5, 6], "ranks 0-1, 4-7"), ([1, 3], "ranks 1, 3")],
)  # fmt: skip
def test_list_ranks(ranks, text):
    assert list_ranks(ranks) == text


def test_a_member_travels_as_json():
    member = Member(1, "a", "cpu", VERSIONS, (warning("disk", "little", "more"),), None, "lost")
    assert Member.from_json(member.to_json()) == member


SMALL, FULL = warning("shared memory", "64 MiB", "more"), problem("disk", "full", "free some")


def test_what_all_machines_say_is_said_once():
    merged = merge({"a": [ok("python", "3.11"), SMALL], "b": [ok("python", "3.11"), FULL, SMALL]})
    assert merged == [((), ok("python", "3.11")), ((), SMALL), (("b",), FULL)]


def test_what_differs_stands_together():
    merged = merge({"a": [ok("disk", "7 GiB"), SMALL], "b": [ok("disk", "8 GiB"), SMALL]})
    assert [(hosts, finding.message) for hosts, finding in merged] == [
        (("a",), "7 GiB"),
        (("b",), "8 GiB"),
        ((), "64 MiB"),
    ]


def test_exit_codes():
    assert exit_code([((), ok("a", "")), ((), SMALL)]) == 0
    assert exit_code([((), ok("a", "")), (("b",), FULL)]) == 1


def test_the_report_as_lines():
    text = as_text("title", [((), ok("python", "3.11")), (("b",), FULL)])
    assert text.splitlines() == [
        "title",
        "  ok       python  3.11",
        "  problem  disk    [b] full",
        "                   -> free some",
        "1 problem, no warnings",
    ]


def test_paths_stay_whole():
    path = "/a/" + "x" * 150 + "/lock"
    assert path in as_text("", [((), problem("lock", "stale", f"rm {path}"))])


def test_the_report_as_json():
    found = json.loads(as_json({"ranks": 2}, [(("b",), FULL), ((), SMALL)]))
    assert (found["ranks"], found["problems"], found["warnings"]) == (2, 1, 1)
    assert found["findings"][0] == {
        "hosts": ["b"], "check": "disk", "status": "problem", "message": "full", "advice": "free some",
    }  # fmt: skip
