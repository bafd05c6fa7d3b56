# SPDX-License-Identifier: Apache-2.0
"""Several servers of one engine as one: they share the prompts, and all take the same weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moe_upgrpo.errors import MachineFault, UserError
from moe_upgrpo.rollout.base import (
    Rollout,
    SamplingConfig,
    check_prompts,
    check_sequences,
    request_seeds,
)
from moe_upgrpo.rollout.beside import SharingRanks, later
from moe_upgrpo.rollout.engines import WhenLost
from moe_upgrpo.rollout.handover import (
    NamedTensors,
    Part,
    at_once,
    through_files,
    through_streams,
)


class SharedServer(Protocol):
    """One of the servers: an `Engine` with what `SeveralServers` needs of it."""

    url: str
    ranks: SharingRanks  # those that share it
    weight_version: int
    moe_layer_ids: tuple[int, ...]
    expected: dict[str, tuple[int, ...]]  # names and shapes of its weights
    model_dir: Path
    weights_dir: str  # a folder for weights, which it sees where `transfer` is disk
    transfer: str

    def sample(
        self, prompts: Sequence[np.ndarray], seeds_NG: np.ndarray, sampling: SamplingConfig
    ) -> list[Rollout]:
        """Responses to N prompts, G each, prompt-major, one for each seed of a request."""

    def routes(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]: ...

    def load(self, folder: Path, version: int, digest: str) -> str | None: ...

    def take(
        self, parts: Iterator[Part], version: int, digest: Callable[[], str]
    ) -> str | None: ...

    def took(self, version: int) -> None: ...

    def cut(self) -> None:
        """End the requests that are in flight: the calls that wait for them raise."""

    def health(self) -> bool: ...

    def close(self) -> None: ...


class SeveralServers:
    """`Engine` on several servers of the same model.

    Prompt i goes to server (i + rank) mod n of the n that are left, with the seeds that one server
    alone would get: which server answers decides nothing but the rounding of its batches. Results
    come in the order of the prompts.

    lost: what follows where a server does not answer, has other weights than it was given, or took
    weights of another digest. "end": the error is raised. "go-on": rank 0 says so once, the others
    answer in its place, and it is not asked again; the last one's error is raised.
    """

    def __init__(self, servers: Sequence[SharedServer], *, lost: WhenLost = "end"):
        self._servers, self._lost = list(servers), lost
        self._ranks = servers[0].ranks
        self._gone: dict[str, str] = {}  # url -> why
        self._said: set[str] = set()
        self.moe_layer_ids = servers[0].moe_layer_ids
        self.weight_version = 0

    @property
    def urls(self) -> list[str]:
        """The servers that are left."""
        return [server.url for server in self._left()]

    def _left(self) -> list[SharedServer]:
        return [server for server in self._servers if server.url not in self._gone]

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingConfig,
        *,
        samples_per_prompt: int,
        seed: int,
    ) -> list[Rollout]:
        """See `Engine.generate`."""
        check_prompts(prompts, samples_per_prompt)
        seeds_NG = request_seeds(seed, len(prompts) * samples_per_prompt).reshape(len(prompts), -1)

        def ask(server: SharedServer, mine: list[int]) -> list[list[Rollout]]:
            found = server.sample([prompts[i] for i in mine], seeds_NG[mine], sampling)
            return [
                found[k : k + samples_per_prompt] for k in range(0, len(found), samples_per_prompt)
            ]

        return [one for of_prompt in self._shared_out(len(prompts), ask) for one in of_prompt]

    def routes(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `Engine.routes`."""
        check_sequences(sequences)
        return self._shared_out(
            len(sequences), lambda server, mine: server.routes([sequences[i] for i in mine])
        )

    def _shared_out(
        self, count: int, ask: Callable[[SharedServer, list[int]], list[Any]]
    ) -> list[Any]:
        """Ask all servers for the results 0 ... count − 1, each for its own."""
        found: list[Any] = [None] * count
        missing = list(range(count))
        first = self._ranks.rank
        while missing:
            left = self._left()
            shares = [missing[(k - first) % len(left) :: len(left)] for k in range(len(left))]
            asked = [(server, mine) for server, mine in zip(left, shares, strict=True) if mine]
            servers = [server for server, _ in asked]
            answers = at_once(
                [partial(ask, server, mine) for server, mine in asked],
                to_the_end=self._lost == "go-on",
                cut=partial(_cut, servers),
            )
            self._lose(servers, [one if isinstance(one, Exception) else None for one in answers])
            for (_, mine), answer in zip(asked, answers, strict=True):
                if not isinstance(answer, Exception):
                    for i, one in zip(mine, answer, strict=True):
                        found[i] = one
            missing = [i for i in missing if found[i] is None]
        return found

    def _lose(self, servers: Sequence[SharedServer], errors: Sequence[Exception | None]) -> None:
        """Leave out the servers that failed, or raise the first error.

        A request that was refused is nobody's fault but the asker's, and is always raised.
        """
        failed = [(s.url, e) for s, e in zip(servers, errors, strict=True) if e is not None]
        for _, error in failed:
            if self._lost == "end" or not isinstance(error, MachineFault):
                raise error
        self._gone |= {url: str(error) for url, error in failed}
        if failed and not self._left():
            raise failed[-1][1]
        self._say()

    def _say(self) -> None:
        for url in self._gone.keys() - self._said:
            if self._ranks.first:
                left = len(self._servers) - len(self._gone)
                print(
                    f"engine server lost, {left} of {len(self._servers)} left: {self._gone[url]}",
                    file=sys.stderr,
                    flush=True,
                )
            self._said.add(url)

    def update_weights(self, named_tensors: NamedTensors, *, version: int) -> None:
        """See `Engine.update_weights`: all servers at once, each with a digest of what it took."""
        of_ranks = self._ranks.gathered(self._gone)
        self._gone = {url: why for gone in of_ranks for url, why in gone.items()}
        left = self._left()
        if not left:
            raise MachineFault(f"No engine server is left: {'; '.join(self._gone.values())}")
        errors = replace_weights(left, named_tensors, version=version, held=self.weight_version)
        self._lose(left, errors)
        self.weight_version = version

    def take_weights(self, named_tensors: NamedTensors, *, version: int) -> Callable[[], None]:
        """See `beside.hand_over`: rank 0 keeps the weights, for all servers together."""
        return later(self, named_tensors, version, whole=self._ranks.first)

    def health(self) -> bool:
        """Whether all that are left answer."""
        return all(at_once([server.health for server in self._left()]))

    def close(self) -> None:
        """See `Engine.close`."""
        for server in self._servers:
            server.close()


def replace_weights(
    servers: Sequence[SharedServer], named_tensors: NamedTensors, *, version: int, held: int
) -> list[UserError | None]:
    """Give servers new weights in the way that their `transfer` says: the error of each."""
    first = servers[0]
    if first.transfer != "disk":
        return through_streams(
            servers, named_tensors, first.expected, ranks=first.ranks, version=version
        )
    return through_files(
        servers,
        named_tensors,
        first.expected,
        ranks=first.ranks,
        version=version,
        held=held,
        parent=first.weights_dir,
        beside=first.model_dir,
    )


def _cut(servers: Sequence[SharedServer]) -> None:
    for server in servers:
        server.cut()
