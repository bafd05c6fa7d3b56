"""Hosts on this machine: network namespaces that a switch joins, each with a name of its own.

They share its processors, clock and, unless told otherwise, its folders.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Mounts come in pairs, a host's own folder and the common name of it.
_IN_HOST = 'hostname "$1"; shift; while [ "$1" != -- ]; do mount --bind "$1" "$2"; shift 2; done; '
_IN_HOST += 'shift; exec "$@"'


class NoNamespaces(OSError):
    """This machine, or this user, may make no network namespaces."""


@dataclass(frozen=True)
class Host:
    """A namespace; device: its end of the cable. own: the common name of a folder -> its own."""

    name: str
    address: str
    device: str
    switch: str
    own: Mapping[Path, Path]

    def popen(self, words: Sequence[object], **environment: str) -> subprocess.Popen:
        """A process on this host, from this repository's folder."""
        mounts = [str(p) for name, mine in self.own.items() for p in (mine, name)]
        prefix = ["ip", "netns", "exec", self.name, "unshare", "--uts", "--mount"]
        prefix += ["sh", "-ec", _IN_HOST, "sh", self.name, *mounts, "--"]
        own = {"GLOO_SOCKET_IFNAME": self.device, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*prefix, *map(str, words)],
            cwd=ROOT,
            env=os.environ | own | environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def cut(self) -> None:
        """Cut its link behind the switch: neither side sees that its cable has no other end."""
        _ip("-n", self.switch, "link", "set", f"p{self.device}", "nomaster")

    def kill(self) -> None:
        """End all its processes, by SIGKILL."""
        for pid in map(int, _ip("netns", "pids", self.name).split()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def hosts(count: int, own: Sequence[Mapping[Path, Path]] = ()) -> Iterator[list[Host]]:
    """So many hosts, each of which reaches the others; their processes are killed on leaving.

    own: for each host, folders that it has for itself. Raises NoNamespaces.
    """
    me, switch = os.getpid(), f"moe{os.getpid()}s"
    made = [
        Host(f"moe{me}{'abc'[i]}", f"10.77.0.{i + 1}", f"v{me}{'abc'[i]}", switch, folders)
        for i, folders in enumerate(own or [{}] * count)
    ]
    try:
        try:
            _ip("netns", "add", switch)
            _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", switch, "link", "set", "bridge", "up")
            for host in made:
                _ip("netns", "add", host.name)
                port = f"p{host.device}"
                ends = (port, "netns", switch, "type", "veth", "peer", host.device, "netns")
                _ip("link", "add", *ends, host.name)
                _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
                _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.device)
                for device in ("lo", host.device):
                    _ip("-n", host.name, "link", "set", device, "up")
        except OSError as error:
            raise NoNamespaces(str(error)) from None
        yield made
    finally:
        for host in made:
            with suppress(OSError):
                host.kill()
        for name in (*(host.name for host in made), switch):
            with suppress(OSError):
                _ip("netns", "del", name)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip())
    return done.stdout
