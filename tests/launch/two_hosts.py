"""Two hosts on one machine: network namespaces with their own name, address, shared memory and IPC, joined by a cable.

A command on a host sees the host's name in its UTS namespace, an `/etc/hosts` of its own as Debian writes it (where its
own name is a loopback address), an empty `/dev/shm`, and no interface but loopback and its end of the cable. `ssh` and a clean environment are played by a script.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CABLE", "TwoHosts", "missing", "two_hosts"]

CABLE = "cable0"
"""Name of the interface between the hosts, on both of them."""

PREFIX = "slimfit-two-hosts"


def missing() -> str | None:
    """Why this machine cannot play two hosts; None if it can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "two hosts need root: network namespaces are made with `ip netns`"
    absent = [program for program in ("ip", "unshare", "mount") if shutil.which(program) is None]
    if absent:
        return f"two hosts need {', '.join(absent)}: apt-get install -y iproute2 util-linux mount"
    probe = f"{PREFIX}-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode == 0:
        inside = ["ip", "netns", "exec", probe, "unshare", "--uts", "--ipc", "--mount", "true"]
        made = subprocess.run(inside, capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return None if made.returncode == 0 else f"two hosts need namespaces, refused here: {made.stderr.strip()}"


@dataclass(frozen=True)
class TwoHosts:
    """The two hosts while they exist.

    Args:
        names: host names.
        addresses: IPv4 address of each host on the cable.
        on: script `on HOST COMMAND...`: run there, with this environment.
        ssh: script with the arguments and the name of ssh, alone in its folder: run there, in a login's bare
            environment.
    """

    names: tuple[str, str]
    addresses: tuple[str, str]
    on: Path
    ssh: Path

    def received_bytes(self) -> dict[str, int]:
        """What has arrived over the cable at each host until now."""
        counter = f"/sys/class/net/{CABLE}/statistics/rx_bytes"
        return {
            name: int(subprocess.check_output([self.on, name, "cat", counter], text=True))
            for name in self.names
        }


@contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Make the hosts, and remove them with whatever still runs on them.

    Args:
        folder: where the scripts and `/etc/hosts` are written.
    """
    _remove_leftovers()
    names, addresses = ("host-a", "host-b"), ("10.77.0.1", "10.77.0.2")
    spaces = [f"{PREFIX}-{os.getpid()}-{name}" for name in names]
    try:
        for space in spaces:
            _ip("netns", "add", space)
        _ip("-n", spaces[0], "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", spaces[1])
        for space, address in zip(spaces, addresses, strict=True):
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", CABLE)
            _ip("-n", space, "link", "set", CABLE, "up")
            _ip("-n", space, "link", "set", "lo", "up")
        _wait_for_the_cable(spaces)
        yield _scripts(folder, names, addresses)
    finally:
        for space in spaces:
            _remove(space)


def _scripts(folder: Path, names: tuple[str, str], addresses: tuple[str, str]) -> TwoHosts:
    for own in names:
        # As Debian's installer writes it: the own name is a loopback address.
        lines = [
            f"{'127.0.1.1' if name == own else address} {name}"
            for name, address in zip(names, addresses, strict=True)
        ]
        (folder / f"hosts-{own}").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
    on, ssh = folder / "on", folder / "bin" / "ssh"
    ssh.parent.mkdir()
    inside = (
        'echo "$0" > /proc/sys/kernel/hostname; '
        f"mount --bind {folder}/hosts-$0 /etc/hosts; mount -t tmpfs none /dev/shm; "
        'exec "$@"'
    )
    on.write_text(
        textwrap.dedent(
            f"""\
            #!/bin/sh
            host=$1; shift
            case $host in
              {addresses[0]}) host={names[0]};;
              {addresses[1]}) host={names[1]};;
            esac
            exec ip netns exec "{PREFIX}-{os.getpid()}-$host" \\
              unshare --uts --ipc --mount sh -c '{inside}' "$host" "$@"
            """
        )
    )
    ssh.write_text(
        textwrap.dedent(
            f"""\
            #!/bin/sh
            while :; do
              case $1 in -[lop]) shift 2;; -*) shift;; *) break;; esac
            done
            host=${{1#*@}}; shift
            exec env -i HOME="$HOME" PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin {on} "$host" sh -c "$*"
            """
        )
    )
    for script in (on, ssh):
        script.chmod(0o755)
    return TwoHosts(names, addresses, on, ssh)


def _wait_for_the_cable(spaces: list[str]) -> None:
    """The kernel tells that both ends are plugged in with a delay of up to a second or two."""
    state = ["cat", f"/sys/class/net/{CABLE}/operstate"]
    for _ in range(100):
        ends = [
            subprocess.check_output(["ip", "netns", "exec", space, *state], text=True).strip()
            for space in spaces
        ]
        if ends == ["up", "up"]:
            return
        time.sleep(0.1)
    raise RuntimeError(f"the ends of the cable stay {ends}")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _remove(space: str) -> None:
    """Remove a namespace after everything that runs in it, children of killed launchers included."""
    listing = ["ip", "netns", "pids", space]
    for _ in range(20):
        pids = subprocess.run(listing, capture_output=True, text=True).stdout.split()
        if not pids:
            break
        for pid in pids:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)
    subprocess.run(["ip", "netns", "del", space], capture_output=True)


def _remove_leftovers() -> None:
    """Remove what a killed test session left: namespaces of this name whose maker is gone."""
    listing = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for space, maker in re.findall(rf"^({PREFIX}-(\d+)-\S+)", listing, re.MULTILINE):
        if not Path(f"/proc/{maker}").exists():
            _remove(space)
