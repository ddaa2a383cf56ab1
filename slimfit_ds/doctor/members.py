"""What the ranks of a run tell about themselves, compared; no process group here."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from slimfit_ds.doctor.findings import Finding, ok, problem

__all__ = ["Member", "compare_members", "list_ranks"]


@dataclass(frozen=True)
class Member:
    """What one rank tells the first one.

    Args:
        rank: its number.
        host: its machine's name.
        device: what it would train on, `cpu` or `cuda:1`.
        versions: of the packages that must agree.
        findings: of the checks of its machine; only the first rank of each machine makes them.
        seconds: of the all-reduce; None: it failed.
        failure: why.
    """

    rank: int
    host: str
    device: str
    versions: Mapping[str, str]
    findings: Sequence[Finding] = ()
    seconds: float | None = None
    failure: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Member:
        values = json.loads(text)
        values["findings"] = tuple(Finding(**finding) for finding in values["findings"])
        return cls(**values)


def compare_members(members: Sequence[Member], world_size: int, backend: str) -> list[Finding]:
    """What is wrong with the ranks together."""
    present = {member.rank for member in members}
    findings = []
    if lost := [rank for rank in range(world_size) if rank not in present]:
        findings.append(
            problem(
                "ranks",
                f"{len(lost)} of {world_size} ranks did not report: {list_ranks(lost)}",
                "look at their output; are their machines up, and do the ports between the machines let them through?",
            )
        )
    hosts = defaultdict(list)
    for member in members:
        hosts[member.host].append(member.rank)
    where = ", ".join(f"{host} ({list_ranks(ranks)})" for host, ranks in hosts.items())
    findings.append(
        ok("ranks", f"{len(members)} ranks on {len(hosts)} machine{'s'[: len(hosts) != 1]}: {where}")
    )
    findings += _versions(members) + _devices(members) + _reduction(members, backend)
    return findings


def _versions(members: Sequence[Member]) -> list[Finding]:
    findings = []
    for package in sorted({name for member in members for name in member.versions}):
        having: dict[str, list[Member]] = defaultdict(list)
        for member in members:
            having[member.versions.get(package, "not installed")].append(member)
        if len(having) > 1:
            text = "; ".join(
                f"{version} on {', '.join(sorted({member.host for member in group}))} ({list_ranks([m.rank for m in group])})"
                for version, group in having.items()
            )
            findings.append(
                problem(
                    "versions of ranks", f"{package} differs: {text}", "install the same versions everywhere"
                )
            )
    return findings or [ok("versions of ranks", "the same on all of them")]


def _devices(members: Sequence[Member]) -> list[Finding]:
    kinds: dict[str, list[int]] = defaultdict(list)
    for member in members:
        kinds[member.device.partition(":")[0]].append(member.rank)
    if len(kinds) > 1:
        text = "; ".join(f"{kind}: {list_ranks(ranks)}" for kind, ranks in kinds.items())
        return [
            problem(
                "devices of ranks",
                f"not of one kind: {text}",
                "see devices and DS_ACCELERATOR of the odd ones",
            )
        ]
    return []


def _reduction(members: Sequence[Member], backend: str) -> list[Finding]:
    failed: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        if member.seconds is None:
            failed[member.failure].append(member)
    if failed:
        text = "; ".join(
            f"{reason} ({', '.join(f'rank {m.rank} on {m.host}' for m in group)})"
            for reason, group in failed.items()
        )
        name = "NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
        return [
            problem(
                "all-reduce",
                f"{backend} fails: {text}",
                f"ranks need open TCP ports between each other, on an interface that leads there: {name}",
            )
        ]
    slowest = max((member.seconds or 0.0 for member in members), default=0.0)
    return [ok("all-reduce", f"{backend}, {len(members)} ranks, 1 MiB in {1000 * slowest:.1f} ms")]


def list_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][-1] + 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    text = ", ".join("-".join(map(str, span)) for span in spans)
    return f"rank{'s' if len(ranks) != 1 else ''} {text}"
