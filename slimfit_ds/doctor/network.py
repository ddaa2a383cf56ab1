"""Names, interfaces and the model hub, as seen from this machine."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request

from slimfit_ds.doctor.findings import Finding, Subject, ok, problem, warning
from slimfit_ds.doctor.places import hub_cache
from slimfit_ds.training.rendezvous import own_addresses, own_name_is_local_only

__all__ = ["hub", "interfaces", "own_name"]

HUB = "https://huggingface.co"
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
TRUE = {"1", "on", "yes", "true"}


def hub(subject: Subject) -> list[Finding]:
    """Whether models and data can be fetched, unless the environment says that nothing will be."""
    offline = [name for name in OFFLINE if subject.environment.get(name, "").lower() in TRUE]
    if offline:
        cache = hub_cache(subject.environment)
        return [ok("hub", f"not asked: {', '.join(offline)} set; models come from disk or from {cache}")]
    place = subject.environment.get("HF_ENDPOINT", HUB).rstrip("/")
    advice = (
        "name local folders in the recipe and set HF_HUB_OFFLINE=1, so that nothing waits for the hub; or set "
        "HTTPS_PROXY, or HF_ENDPOINT to a mirror"
    )
    try:
        request = urllib.request.Request(place, method="HEAD", headers={"User-Agent": "slimfit-ds doctor"})
        with urllib.request.urlopen(request, timeout=min(4.0, subject.seconds / 2)) as answer:
            return [ok("hub", f"{place} answers ({answer.status})")]
    except urllib.error.HTTPError as error:
        if error.code < 500 and error.code not in (401, 403, 407):
            return [ok("hub", f"{place} answers ({error.code})")]
        return [warning("hub", f"{place} refuses: {error.code} {error.reason}", advice)]
    except (OSError, ValueError) as error:
        return [warning("hub", f"{place} cannot be reached: {getattr(error, 'reason', error)}", advice)]


def own_name(subject: Subject) -> list[Finding]:
    """What this machine's own name resolves to, and which addresses others can use."""
    name, addresses = socket.gethostname(), own_addresses(subject.environment)
    reach = ", ".join(addresses) or "no address but loopback: one machine only"
    if own_name_is_local_only():
        text = (
            f"{name!r} resolves to no address that others could use; runs tell gloo its interface ({reach})"
        )
        return [ok("own name", text)]
    return [ok("own name", f"{name!r}; others reach {reach}")]


def interfaces(subject: Subject) -> list[Finding]:
    """Interfaces that the environment names."""
    there = [name for _, name in socket.if_nameindex()]
    findings = []
    for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        for word in filter(None, subject.environment.get(key, "").split(",")):
            if word.startswith("^"):
                continue
            # gloo wants whole names, NCCL takes beginnings of names unless there is a "=".
            exact = key.startswith("GLOO") or word.startswith("=")
            wanted = word.lstrip("=")
            if not any(name == wanted if exact else name.startswith(wanted) for name in there):
                findings.append(
                    problem(
                        "interfaces",
                        f"{key} names {wanted!r}, and this machine has {', '.join(there)}",
                        f"unset {key}, or name one of these",
                    )
                )
    return findings
