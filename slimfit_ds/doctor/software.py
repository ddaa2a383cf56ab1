"""Versions of Python and of packages, against `pyproject.toml`'s ranges and the tested ones of `constraints.txt`."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

from slimfit_ds.doctor.findings import Finding, Subject, ok, problem, warning

__all__ = [
    "DECISIVE",
    "constraints_file",
    "packages",
    "python",
    "tested_versions",
    "versions_of_this_process",
]

DISTRIBUTION = "slimfit_ds"
DECISIVE = ("slimfit_ds", "torch", "deepspeed", "transformers", "datasets", "numpy")
"""Packages that must be the same on every rank."""


def python(subject: Subject) -> list[Finding]:
    """The interpreter against `requires-python`."""
    wanted, found = metadata(DISTRIBUTION)["Requires-Python"], platform.python_version()
    if not SpecifierSet(wanted).contains(found, prereleases=True):
        return [
            problem("python", f"{found}, and {wanted} is needed", f"make an environment of Python {wanted}")
        ]
    return [ok("python", found)]


def packages(subject: Subject) -> list[Finding]:
    """Every requirement; those of extras only where the package is installed."""
    missing, wrong = [], []
    needed = [Requirement(text) for text in requires(DISTRIBUTION) or ()]
    for requirement in needed:
        is_extra = requirement.marker is not None and "extra" in str(requirement.marker)
        if requirement.marker is not None and not is_extra and not requirement.marker.evaluate():
            continue
        found = _installed(requirement.name)
        if found is None:
            if not is_extra:
                missing.append(f"{requirement.name}{requirement.specifier}")
        elif not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} (needs {requirement.specifier})")
    findings = []
    if missing:
        findings.append(
            problem("packages", f"not installed: {', '.join(missing)}", f"pip install {_quoted(missing)}")
        )
    if wrong:
        findings.append(
            problem(
                "packages",
                f"wrong versions: {', '.join(wrong)}",
                "pip install -c constraints.txt slimfit_ds",
            )
        )
    decisive = ", ".join(f"{name} {_installed(name)}" for name in DECISIVE if _installed(name))
    return findings or [ok("packages", decisive)]


def tested_versions(subject: Subject) -> list[Finding]:
    """Installed versions that differ from the tested ones."""
    if subject.constraints is None:
        return []
    try:
        lines = subject.constraints.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        return [
            warning("tested versions", f"cannot read {subject.constraints}: {error}", "name another file")
        ]
    differing, same = [], 0
    for line in lines:
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue  # an option of pip, such as a link to another index
        found = _installed(requirement.name)
        if found is None:
            continue
        if requirement.specifier.contains(found, prereleases=True):
            same += 1
        else:
            differing.append(f"{requirement.name} {found} (tested {requirement.specifier})")
    if differing:
        return [
            warning(
                "tested versions",
                f"{len(differing)} of {len(differing) + same} differ: {', '.join(differing)}",
                f"pip install -c {subject.constraints} slimfit_ds, if something misbehaves",
            )
        ]
    return [ok("tested versions", f"{same} packages as in {subject.constraints.name}")]


def versions_of_this_process() -> dict[str, str]:
    """Versions that must agree between ranks."""
    found = {name: _installed(name) or "not installed" for name in DECISIVE}
    return {"python": platform.python_version(), **found}


def constraints_file() -> Path | None:
    """`constraints.txt` of the working directory or of the checkout this package runs from."""
    places = (Path.cwd(), Path(__file__).resolve().parents[2])
    return next(
        (place / "constraints.txt" for place in places if (place / "constraints.txt").is_file()), None
    )


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _quoted(requirements: list[str]) -> str:
    return " ".join(f"'{requirement}'" for requirement in requirements)
