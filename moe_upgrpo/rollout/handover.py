# SPDX-License-Identifier: Apache-2.0
"""New weights on their way from the ranks to servers: checked, and taken by all servers at once."""

from __future__ import annotations

import queue
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from moe_upgrpo.errors import MachineFault, UserError, as_user_error
from moe_upgrpo.hugging_face.export import by_umask
from moe_upgrpo.hugging_face.folder import INDEX, Weights
from moe_upgrpo.hugging_face.shards import ShardWriter
from moe_upgrpo.rollout.beside import SharingRanks
from moe_upgrpo.rollout.checkpoint import check_weights, faults_of
from moe_upgrpo.rollout.digest import Digest

PART_BYTES = 256 << 20  # of the weights in memory at a time

NamedTensors = Iterable[tuple[str, torch.Tensor]]
Part = list[tuple[str, torch.Tensor]]


class TakesWeights(Protocol):
    """A server that takes new weights, with a digest of what it took."""

    url: str

    def load(self, folder: Path, version: int, digest: str) -> str | None:
        """Have the server load a folder, on rank 0; raises unless it took the weights of `digest`.

        The server names them `version` only once they are whole. Returns its own checksum of what
        it holds, where it has one: that of its peers has to be the same.
        """

    def take(self, parts: Iterator[Part], version: int, digest: Callable[[], str]) -> str | None:
        """Send the server weights, on rank 0: else as `load`. digest: known after the last part."""

    def took(self, version: int) -> None:
        """Note, on every rank, the version that the server has."""


def at_once(
    actions: Sequence[Callable[[], Any]],
    *,
    to_the_end: bool = True,
    cut: Callable[[], None] = lambda: None,
) -> list[Any]:
    """The results of all actions, each in a thread: an exception stands in the place of its own.

    `cut` is called where the waiting ends early, to end what still runs: at an exception here, such
    as a signal's, or, unless `to_the_end`, after the first action that raised.
    """
    arrived: queue.SimpleQueue = queue.SimpleQueue()

    def run(i: int, action: Callable[[], Any]) -> None:
        try:
            arrived.put((i, action()))
        except Exception as error:
            arrived.put((i, error))

    for item in enumerate(actions):
        # Not a pool, whose threads a dying process would wait for.
        threading.Thread(target=run, args=item, daemon=True).start()
    found: list[Any] = [None] * len(actions)
    try:
        for _ in actions:
            i, found[i] = arrived.get()
            if isinstance(found[i], Exception) and not to_the_end:
                cut()
                break
    except BaseException:
        cut()
        raise
    return found


def through_files(
    servers: Sequence[TakesWeights],
    named_tensors: NamedTensors,
    expected: Mapping[str, tuple[int, ...]],
    *,
    ranks: SharingRanks,
    version: int,
    held: int,
    parent: str,
    beside: Path,
) -> list[UserError | None]:
    """Write weights once, below `parent`, and have all servers load them: the error of each.

    A collective of `ranks`. beside: the model folder. expected: names and shapes; others raise
    UserError, and version `held` stays in use. At most `PART_BYTES` of the weights are in memory
    beside what `named_tensors` holds.
    """
    folder = None
    if ranks.first:
        folder = Path(tempfile.mkdtemp(prefix=f"version-{version}-", dir=parent))
    try:
        given, digest, failed = written(named_tensors, folder, beside=beside)
        check_weights(given, expected, held=held)

        def load() -> list[UserError | None]:
            if failed is not None:
                raise failed
            check_whole(folder, expected, held=held)
            loading = [lambda s=s: s.load(folder, version, digest) for s in servers]
            return failures(servers, at_once(loading))

        ranks.meet()  # a rank that still generates would meet the new weights
        errors = ranks.from_first(load)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    for server, error in zip(servers, errors, strict=True):
        if error is None:
            server.took(version)
    return errors


def through_streams(
    servers: Sequence[TakesWeights],
    named_tensors: NamedTensors,
    expected: Mapping[str, tuple[int, ...]],
    *,
    ranks: SharingRanks,
    version: int,
) -> list[UserError | None]:
    """Send weights to all servers at once, part by part: the error of each.

    A collective of `ranks`. expected: names and shapes; others raise UserError, and no server can
    be sampled from until it has taken whole weights. Three parts of `PART_BYTES` are held at most:
    one that comes together, one that waits, one that is sent.
    """
    ranks.meet()  # a rank that still generates would meet the new weights
    digest, given = Digest(), {}
    feeds = [_Feed(s, version, digest.value) for s in servers] if ranks.first else []

    def fitting() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in named_tensors:  # a collective: to its end, whatever is refused
            given[name] = tensor.detach().to("meta")
            if feeds and not faults_of({name: given[name]}, expected):
                digest.add(name, tensor)
                yield name, tensor

    for part in parts_of(fitting()):
        for feed in feeds:
            feed.put(part)
    refused: Exception | None = None
    try:
        check_weights(given, expected, held=None)
    except UserError as error:
        refused = error
    for feed in feeds:
        feed.put(refused)
    errors = ranks.from_first(lambda: failures(servers, [feed.said() for feed in feeds]))
    if refused is not None:
        raise refused
    for server, error in zip(servers, errors, strict=True):
        if error is None:
            server.took(version)
    return errors


def parts_of(named_tensors: NamedTensors) -> Iterator[Part]:
    """Copies of the tensors in parts of about `PART_BYTES`."""
    part, size = [], 0
    for name, tensor in named_tensors:
        part.append((name, tensor.detach().clone()))
        size += tensor.nbytes
        if size >= PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


class _Feed:
    """The parts on their way to one server, which takes them in a thread of its own."""

    def __init__(self, server: TakesWeights, version: int, digest: Callable[[], str]):
        self._waiting: queue.Queue = queue.Queue(1)
        self._ended = threading.Event()
        self._said: Any = None
        threading.Thread(target=self._run, args=(server, version, digest), daemon=True).start()

    def _run(self, server: TakesWeights, version: int, digest: Callable[[], str]) -> None:
        try:
            self._said = server.take(self._parts(), version, digest)
        except Exception as error:
            self._said = error
        finally:
            self._ended.set()

    def _parts(self) -> Iterator[Part]:
        while (part := self._waiting.get()) is not None:
            if isinstance(part, Exception):
                raise part
            yield part

    def put(self, part: Part | Exception | None) -> None:
        """Pass a part on, the end (None) or a reason to break off; nothing after a failure."""
        while not self._ended.is_set():
            with suppress(queue.Full):
                return self._waiting.put(part, timeout=0.1)

    def said(self) -> Any:
        """Wait until `take` has ended; the result or the exception of it."""
        self._ended.wait()
        return self._said


def failures(servers: Sequence[TakesWeights], said: Sequence[Any]) -> list[UserError | None]:
    """The error of each server: its own, or that it holds other weights than most.

    said: what each said of an update, its checksum or None, or the exception that it raised.
    """
    counts = Counter(one for one in said if isinstance(one, str)).most_common(2)
    common = None if len(counts) == 2 and counts[0][1] == counts[1][1] else counts and counts[0][0]
    found: list[UserError | None] = []
    for server, one in zip(servers, said, strict=True):
        if isinstance(one, Exception):
            found.append(as_user_error(one))
        elif isinstance(one, str) and one != common:
            found.append(
                MachineFault(
                    f"{server.url} holds other weights than its peers after the same update: "
                    f"checksum {one[:16]}. Nothing is sampled from it. Start it again, and look "
                    "whether all servers were started with the same arguments."
                )
            )
        else:
            found.append(None)
    return found


def written(
    named_tensors: NamedTensors, folder: Path | None, *, beside: Path
) -> tuple[dict[str, torch.Tensor], str, Exception | None]:
    """Write tensors to `folder`, unless that is None: them without memory, their digest, an error.

    The tensors are gone through in any case: making them may be a collective. beside: the model
    folder, whose JSON files are copied.
    """
    given: dict[str, torch.Tensor] = {}
    digest, failed = Digest(), None
    writer = ShardWriter(folder, PART_BYTES) if folder is not None else None
    for name, tensor in named_tensors:
        given[name] = tensor.detach().to("meta")
        if writer is None or failed is not None:
            continue
        try:
            digest.add(name, tensor)
            writer.add(name, tensor)
        except Exception as error:
            failed = error
    if writer is not None and failed is None:
        try:
            for file in beside.glob("*.json"):
                if file.name != INDEX:  # of files that have other names here
                    shutil.copy(file, folder)
            writer.finish()
            by_umask(folder)
        except Exception as error:
            failed = error
    return given, digest.value(), failed


def check_whole(folder: Path, expected: Mapping[str, tuple[int, ...]], *, held: int) -> None:
    """Raise where not all has arrived in `folder`: an engine would load the rest and go on."""
    with Weights(folder) as found:
        whole = found.shapes() == expected
    if not whole:
        raise MachineFault(
            f"The weights written to {folder} are not whole: is it full? Version {held} stays in "
            "use."
        )


def digest_of(folder: Path) -> str:
    """The digest of the weights in a model folder."""
    digest = Digest()
    with Weights(folder) as weights:
        for name, tensor in weights.tensors():
            digest.add(name, tensor)
    return digest.value()


def check_taken(server: str, taken: Sequence[str], digest: str) -> None:
    """Raise unless every process of a server took the weights of `digest`."""
    if set(taken) != {digest}:
        raise MachineFault(
            f"{server} took other weights than it was given: their digest is "
            f"{', '.join(sorted({found[:16] for found in taken})) or 'missing'}, not "
            f"{digest[:16]}. Nothing is sampled from them. Look at its disk and network, or give "
            "it the weights another way (--engine-transfer)."
        )
