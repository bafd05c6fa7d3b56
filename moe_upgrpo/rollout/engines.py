# SPDX-License-Identifier: Apache-2.0
"""The engines by name: a record of each, for code that does not run it, and how each is made.

Nothing outside this folder compares engine names: code that needs to know an engine's traits asks
`ENGINES`. This module imports no engine, and no torch; each engine's module is imported only when
it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moe_upgrpo.errors import UserError, nearest

if TYPE_CHECKING:
    import torch

    from moe_upgrpo.rollout.base import Engine

EngineName = Literal["hf", "vllm", "sglang"]
Transfer = Literal["disk", "distributed"]
WhenLost = Literal["end", "go-on"]
EngineWeights = Literal["as-trained", "fp8"]
Place = Literal["each rank", "a server", "a server started here"]
HF_SEQUENCES = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class VLLMSettings:
    """Settings of vLLM in process."""

    sequences: int = 256
    """Most sequences in flight."""
    kv_cache_gib: float = 0.25
    """Memory for their keys and values, in each rank."""

    def __post_init__(self):
        if self.sequences < 1:
            raise UserError(f"vllm.sequences={self.sequences}: at least 1 is needed.")
        if not 0 < self.kv_cache_gib < math.inf:
            raise UserError(f"vllm.kv_cache_gib={self.kv_cache_gib}: above 0 is needed.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The state of an engine's package, as `moe-upgrpo doctor` shows it."""

    name: str
    version: str | None
    state: Literal["ok", "missing", "wrong"]
    note: str = ""
    get: str = ""  # how to get it, where it is missing or wrong
    never_run: bool = False  # none of our machines could


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRecord:
    """The traits of one engine.

    Fields:
        title: its name in a sentence.
        make: makes it, from a folder and the keywords of `make_engine`.
        look: says how far it is installed; None where it comes with the packages that training
            needs. It gets the installed distributions (`tools.doctor.Installed`), and as keywords
            `cuda`, whether torch finds a GPU, and `source`, how this project itself is installed.
        without_url: where it runs unless a URL names a server.
        takes_url: whether it can be a server that is already running.
        weights: the forms in which it samples with the trainer's weights.
        takes_beside: whether, in each rank, it takes new weights in another thread while the
            trainer computes (`beside.hand_over`); a server does.
    Memory where it runs in each rank:
        cache_setting: the setting of the GiB that it reserves for keys and values, as a path in
            the configuration; None where it allocates them as it generates, and frees them.
        in_flight: most sequences with keys and values at a time, where it allocates them.
    """

    title: str
    make: Callable[..., Engine]
    look: Callable[..., Found] | None = None
    without_url: Place = "each rank"
    takes_url: bool = False
    weights: tuple[EngineWeights, ...] = ("as-trained",)
    takes_beside: bool = False
    cache_setting: str | None = None
    in_flight: int | None = None

    def place(self, url: str | None) -> Place:
        """Where it runs, with the URL of a server or without one."""
        return self.without_url if url is None else "a server"

    def cache_gib(self, config: Any) -> float:
        """GiB that each rank holds for keys and values, by a configuration's `cache_setting`."""
        return attrgetter(self.cache_setting)(config) if self.cache_setting else 0.0

    def with_cache(self, config: Any, gib: float) -> dict[str, Any]:
        """The change of a configuration that gives a cache of `gib`."""
        settings, name = self.cache_setting.split(".")
        return {settings: replace(getattr(config, settings), **{name: gib})}


def _make_hf(
    model_dir: str | Path, *, dtype: str, weights: EngineWeights, device: torch.device, **_
) -> Engine:
    from moe_upgrpo.rollout.hf import HFEngine

    return HFEngine(model_dir, dtype=dtype, device=device, weights=weights)


def _make_vllm(
    model_dir: str | Path,
    *,
    dtype: str,
    max_tokens: int,
    seed: int,
    url: str | None,
    transfer: Transfer,
    vllm: VLLMSettings | None,
    **_,
) -> Engine:
    if url is not None:
        from moe_upgrpo.rollout.vllm_server import VLLMServerEngine

        return VLLMServerEngine(model_dir, url, dtype, transfer=transfer)
    from moe_upgrpo.rollout.vllm import VLLMEngine

    vllm = vllm or VLLMSettings()
    return VLLMEngine(
        model_dir,
        dtype,
        max_model_len=max_tokens,
        max_num_seqs=vllm.sequences,
        memory_bytes=int(vllm.kv_cache_gib * 2**30),
        seed=seed,
    )


def _make_sglang(
    model_dir: str | Path,
    *,
    dtype: str,
    url: str | None,
    transfer: Transfer,
    server_log: str | Path | None,
    **_,
) -> Engine:
    from moe_upgrpo.rollout.sglang import SGLangEngine

    return SGLangEngine.shared(model_dir, dtype, url=url, transfer=transfer, log=server_log)


def _look_for_vllm(installed: Any, *, cuda: bool, source: str) -> Found:
    from moe_upgrpo.rollout import vllm_install

    return vllm_install.look(installed, cuda=cuda, source=source)


def _look_for_sglang(*_, **__) -> Found:
    from moe_upgrpo.rollout import sglang_process

    return sglang_process.look()


ENGINES: dict[str, EngineRecord] = {
    "hf": EngineRecord(
        title="transformers",
        make=_make_hf,
        weights=("as-trained", "fp8"),
        takes_beside=True,
        in_flight=HF_SEQUENCES,
    ),
    "vllm": EngineRecord(
        title="vLLM",
        make=_make_vllm,
        look=_look_for_vllm,
        takes_url=True,
        cache_setting="vllm.kv_cache_gib",
    ),
    "sglang": EngineRecord(
        title="SGLang",
        make=_make_sglang,
        look=_look_for_sglang,
        without_url="a server started here",
        takes_url=True,
    ),
}


def register_engine(name: str, record: EngineRecord) -> None:
    """Register an engine under a name for `--engine`. Raises UserError where the name is taken."""
    if ENGINES.get(name, record) != record:
        raise UserError(
            f"register_engine: {name!r} given; allowed: a name that is not taken, as are "
            f"{', '.join(ENGINES)}."
        )
    ENGINES[name] = record


def with_servers() -> list[str]:
    """The engines that can be a server that is already running."""
    return [name for name, record in ENGINES.items() if record.takes_url]


def urls_of(url: str | None) -> list[str]:
    """The URLs in an option, which names several with commas between them."""
    return [] if url is None else [one.strip() for one in url.split(",")]


def check_engine(
    name: str, *, weights: EngineWeights = "as-trained", url: str | None = None, ahead: int = 0
) -> EngineRecord:
    """The record of an engine. Raises UserError where it does not go with the form of the weights,
    with a URL or with batches that are generated ahead."""
    record = ENGINES.get(name)
    if record is None:
        raise UserError(
            f"engine={name!r}: allowed are {', '.join(ENGINES)}{nearest(name, ENGINES)}."
        )
    if weights not in record.weights:
        able = " or ".join(n for n, other in ENGINES.items() if weights in other.weights)
        raise UserError(
            f"engine_weights={weights!r} with engine={name}: allowed with engine={able}."
        )
    if url is not None and not record.takes_url:
        able = " and ".join(with_servers())
        raise UserError(
            f"engine_url={url} with engine={name}: only {able} have servers. Name one, or leave "
            "engine_url out."
        )
    named = [one.rstrip("/") for one in urls_of(url)]
    if "" in named or len(set(named)) < len(named):
        raise UserError(
            f"engine_url={url}: different URLs are needed, with commas between them: "
            "http://HOST:PORT,http://HOST:PORT."
        )
    if ahead > 1 and record.place(url) == "each rank" and not record.takes_beside:
        raise UserError(
            f"staleness={ahead} with engine={name} in each rank: it takes no weights while the "
            "trainer computes, and 1 is the most. Give a server's --engine-url, or --engine "
            f"{' or '.join(n for n, other in ENGINES.items() if other.takes_beside)}."
        )
    return record


def make_engine(
    name: str,
    model_dir: str | Path,
    *,
    dtype: str,
    weights: EngineWeights = "as-trained",
    device: torch.device,
    max_tokens: int,
    seed: int = 0,
    url: str | None = None,
    transfer: Transfer = "disk",
    lost: WhenLost = "end",
    vllm: VLLMSettings | None = None,
    server_log: str | Path | None = None,
) -> Engine:
    """The engine `name` on a checkpoint; a collective of all ranks of the job.

    It runs where its record says: one in each rank, or one server for all, which is at `url` or is
    started by rank 0, with its output in `server_log`; or several, where `url` names several, and
    `lost` what follows where one of them fails; `transfer`: how a server gets weights.
    `max_tokens`: length of the longest sequence,
    prompt and response together. `weights`: one of the forms in its record.
    """
    record = check_engine(name, weights=weights, url=url)

    def made(url: str | None) -> Engine:
        return record.make(
            model_dir,
            dtype=dtype,
            weights=weights,
            device=device,
            max_tokens=max_tokens,
            seed=seed,
            url=url,
            transfer=transfer,
            vllm=vllm,
            server_log=server_log,
        )

    urls = urls_of(url)
    if len(urls) < 2:
        return made(url)
    from moe_upgrpo.rollout.servers import SeveralServers

    return SeveralServers([made(one) for one in urls], lost=lost)
