# SPDX-License-Identifier: Apache-2.0
"""Ranks on hosts that do not see the run's folder: rank 0's host writes, they send."""

from __future__ import annotations

import socket
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import groups
from moe_upgrpo.store import RunFolder
from moe_upgrpo.store.files import publish


class Apart:
    """The token rows of ranks that do not see the run's folder, on their way to rank 0's host.

    ranks: those that write rows and do not see the folder; the same on every rank.
    """

    def __init__(self, run: RunFolder, ranks: Sequence[int]):
        self.ranks = list(ranks)
        self._run = run.tokens
        self._own = None
        if groups.rank() in self.ranks:
            self._own = tempfile.TemporaryDirectory(prefix="moe_upgrpo_rows_")

    @property
    def folder(self) -> Path:
        """The folder for this rank's rows."""
        return Path(self._own.name) if self._own else self._run

    def send(self) -> None:
        """Move all finished files of rows into the run's folder. A collective of all ranks."""
        for rank in self.ranks:
            if groups.rank() == rank:
                files = sorted(self.folder.glob("*.parquet"))
                groups.send_to_rank_0([(file.name, file) for file in files])
                for file in files:
                    file.unlink()
            elif groups.rank() == 0:
                for name, parts in groups.received_from(rank):
                    part = self._run / f".{name}.tmp"
                    with part.open("wb") as file:
                        for some in parts:
                            file.write(some)
                    publish(part, self._run / name)


def without(folder: Path, *, make: bool = False) -> list[tuple[int, str]]:
    """Ranks that do not see rank 0's folder, and their hosts; the same on every rank.

    A collective. make: whether rank 0 makes the folder where it is missing.
    """
    probe = None
    if groups.rank() == 0 and (make or folder.is_dir()):
        folder.mkdir(parents=True, exist_ok=True)
        # A name that nobody has looked for: a file system of a network may remember it as absent.
        probe = folder / f".seen-{uuid.uuid4().hex}"
        probe.touch()
    name = groups.from_rank_0(probe and probe.name)
    sees = name is None or (folder / name).exists()
    found = groups.gather_everywhere([(groups.rank(), socket.gethostname(), sees)])
    if probe is not None:
        probe.unlink()
    return [(rank, host) for rank, host, its in found if not its]


def check(run: RunFolder, *, resumes: bool, states: bool, rollouts: bool) -> list[int]:
    """The ranks that do not see the run's folder. A collective.

    resumes, states, rollouts: whether the run goes on from a folder, and keeps states and rollouts.
    Raises UserError on every rank where one of these needs a folder that all see.
    """
    ranks = without(run.path, make=not resumes)
    if not ranks:
        return []
    needs = {"--resume": resumes, "--save-every above 0": states, "--save-rollouts": rollouts}
    path, host = groups.from_rank_0((str(run.path), socket.gethostname()))
    if asked := [option for option, given in needs.items() if given]:
        raise UserError(
            f"{_named(ranks)}: no such folder as rank 0's {path} (host {host}). "
            f"{' and '.join(asked)} need a folder that all hosts share, since every rank writes "
            "and reads its part there. Name one by --output-dir; or give --save-every 0, which "
            "keeps no state: rank 0's host then writes all the rest, and the others send their rows"
        )
    return [rank for rank, _ in ranks]


def check_model(model_dir: Path) -> None:
    """Raise UserError on every rank where one does not see the model that rank 0 made."""
    sees = (model_dir / "config.json").exists()
    found = groups.gather_everywhere([(groups.rank(), socket.gethostname(), sees)])
    if missing := [(rank, host) for rank, host, its in found if not its]:
        raise UserError(
            f"{_named(missing)}: no such folder as {model_dir}, the model that rank 0 made (host "
            f"{found[0][1]}). Name a folder that all hosts share by --cache-dir, or copy the model "
            "to each and give its folder by --model"
        )


def _named(ranks: Sequence[tuple[int, str]]) -> str:
    hosts: dict[str, list[str]] = {}
    for rank, host in ranks:
        hosts.setdefault(host, []).append(str(rank))
    return "; ".join(f"host {host} (rank {', '.join(of)})" for host, of in hosts.items())
