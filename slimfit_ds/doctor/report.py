"""The report of the preflight, for people and as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence

from slimfit_ds.doctor.findings import Finding

__all__ = ["Located", "as_json", "as_text", "exit_code", "merge"]

Located = tuple[tuple[str, ...], Finding]
"""The machines that found it (none: it concerns all together), and the finding."""

WIDTH = 118


def merge(by_host: Mapping[str, Sequence[Finding]]) -> list[Located]:
    """Findings of several machines, each different one once, with the machines where it holds."""
    hosts: dict[Finding, list[str]] = {}
    for host, findings in by_host.items():
        for finding in findings:
            hosts.setdefault(finding, []).append(host)
    everywhere = len(by_host)
    merged = [
        ((() if len(where) == everywhere else tuple(where)), finding) for finding, where in hosts.items()
    ]
    order = {finding.check: number for number, finding in reversed(list(enumerate(hosts)))}
    return sorted(merged, key=lambda located: order[located[1].check])


def exit_code(findings: Sequence[Located]) -> int:
    """1 if there is a problem, else 0."""
    return int(any(finding.status == "problem" for _, finding in findings))


def as_text(title: str, findings: Sequence[Located]) -> str:
    """A line for each finding; below it what to do."""
    width = max((len(finding.check) for _, finding in findings), default=0)
    lines = [title]
    for hosts, finding in findings:
        where = f"[{', '.join(hosts)}] " if hosts else ""
        start = f"  {finding.status:8} {finding.check:{width}}  "
        lines.append(_wrapped(start, where + finding.message))
        if finding.advice:
            lines.append(_wrapped(" " * (len(start)) + "-> ", finding.advice))
    lines.append(_summary(findings))
    return "\n".join(lines)


def as_json(about: Mapping[str, object], findings: Sequence[Located]) -> str:
    """The same as one JSON object; `hosts` is empty where a finding holds for all."""
    rows = [{"hosts": list(hosts), **finding.as_dict()} for hosts, finding in findings]
    counts = {f"{status}s": _count(findings, status) for status in ("warning", "problem")}
    return json.dumps({**about, **counts, "findings": rows}, indent=2)


def _wrapped(start: str, text: str) -> str:
    # Paths and commands must stay whole, to be copied.
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _summary(findings: Sequence[Located]) -> str:
    counts = [(_count(findings, status), status) for status in ("problem", "warning")]
    return ", ".join(f"{count or 'no'} {status}{'s' if count != 1 else ''}" for count, status in counts)


def _count(findings: Sequence[Located], status: str) -> int:
    return sum(finding.status == status for _, finding in findings)
