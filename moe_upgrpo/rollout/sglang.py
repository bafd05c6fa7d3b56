# SPDX-License-Identifier: Apache-2.0
"""Rollouts from an SGLang server, started here or given by its URL.

P prompt tokens, T response tokens, S = P + T, L MoE layers, K experts per token, N requests.
"""

from __future__ import annotations

import base64
import pickle
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import numpy as np
import torch

from moe_upgrpo.errors import MachineFault, UserError
from moe_upgrpo.hugging_face.config import is_tied
from moe_upgrpo.hugging_face.folder import Weights
from moe_upgrpo.rollout.base import (
    Rollout,
    SamplingConfig,
    check_prompts,
    check_sequences,
    request_seeds,
    routes_dtype,
)
from moe_upgrpo.rollout.beside import SharingRanks, later
from moe_upgrpo.rollout.checkpoint import ModelFolder, check_weights
from moe_upgrpo.rollout.handover import PART_BYTES, Part, check_whole, written
from moe_upgrpo.rollout.hf import DTYPES
from moe_upgrpo.rollout.server_client import ServerClient
from moe_upgrpo.rollout.server_key import new_key, read_key
from moe_upgrpo.rollout.sglang_process import ServerProcess, find_python
from moe_upgrpo.rollout.sglang_server import KEY
from moe_upgrpo.rollout.weight_group import WeightGroup
from moe_upgrpo.rollout.weights_folder import WeightsFolder

ATTEMPTS = 3  # to sample a sequence that an update cut off
GENERATE_TIMEOUT = 1800.0
Transfer = Literal["disk", "tensor", "distributed"]


class SGLangEngine:
    """`Engine` on an SGLang server over HTTP, dense or MoE.

    Without `url` a server is started by `python` (of SGLang's environment) and dies with this
    process; `options` are its arguments: `max_total_tokens=4096` is `--max-total-tokens 4096`.
    With `url` it must run on the same files, with --skip-tokenizer-init and
    --enable-return-routed-experts.

    Every request carries the server's key: `api_key`, else that of the variable SGLANG_API_KEY. A
    server that is started here listens on 127.0.0.1 alone, and has a key in any case.

    Several ranks share one server. The one with `leader` gives it new weights; `update_weights` of
    the others goes through the tensors (making them is a collective), then waits until the server
    has the version, which must be a new one. `SGLangEngine.shared` arranges that.

    Log-probs are those of log_softmax(logits / temperature). A response never spans two versions
    of the weights: one that an update cuts off is sampled again. Every request has its own seed; a
    server with a GPU heeds it only with enable_deterministic_inference=True.

    UserError is raised where the server gives no sign of life for `timeout` seconds, has not
    generated after `generate_timeout`, is not up after `start_timeout`, or has died. An update
    takes at most `timeout`. `restart` brings a server that was started here back with the weights
    it had. The server's output is appended to `log`, which stays; without it only its end is
    shown, in errors.
    """

    def __init__(
        self,
        model_dir: str | Path,
        dtype: str = "bfloat16",
        *,
        url: str | None = None,
        leader: bool = True,
        api_key: str | None = None,
        python: str | Path | None = None,
        transfer: Transfer = "disk",
        timeout: float = 60.0,
        generate_timeout: float = GENERATE_TIMEOUT,
        start_timeout: float = 300.0,
        weights_dir: str | Path | None = None,
        log: str | Path | None = None,
        **options: Any,
    ):
        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}.")
        if transfer not in get_args(Transfer):
            raise UserError(f"transfer={transfer!r}: use one of {', '.join(get_args(Transfer))}.")
        self._key = read_key(KEY, api_key)
        if url is None and not leader:
            raise UserError("leader=False needs the url of the leader's server.")
        if url is not None and options:
            raise UserError(
                f"{', '.join(options)} given with a url: options are those of a server started "
                "here; give them to the server at the url when you start it."
            )
        self.model_dir = Path(model_dir).absolute()
        self._model = ModelFolder.read(self.model_dir, weights_dir)
        config, self.moe_layer_ids = self._model.config, self._model.moe_layer_ids
        self._layers = config.num_hidden_layers
        self._top_k = getattr(config, "num_experts_per_tok", 0) if self.moe_layer_ids else 0
        self._num_experts = _num_experts(config) if self.moe_layer_ids else 0
        self._eos_ids = self._model.eos_ids
        self.timeout, self.generate_timeout = timeout, generate_timeout
        self.leader, self.transfer = leader, transfer
        self._group: WeightGroup | None = None
        self.ranks: SharingRanks | None = None  # see `shared`
        self.weight_version = 0
        self._half_updated_to: int | None = None
        self._updating = threading.Lock()
        self._run = uuid.uuid4().hex[:8]  # the server's names for weights: run:version
        self._server: ServerProcess | None = None
        self._weights = WeightsFolder("moe_upgrpo-sglang-", weights_dir)
        self.expected, self.weights_dir = self._model.shapes, self._weights.name
        if url is None:
            self._key = self._key or new_key()
            self._server = ServerProcess(
                find_python(python),
                {"dtype": dtype, "enable_return_routed_experts": bool(self.moe_layer_ids)}
                | options,
                log=Path(log or Path(self._weights.name) / "server.log").absolute(),
                log_stays=log is not None,
                key=self._key,
                start_timeout=start_timeout,
            )
            url = self._server.url
        self._client = ServerClient(
            "SGLang",
            url,
            key=self._key,
            key_variable=KEY,
            late="has not answered within {timeout} s",
            **({"log": self._server.log_end} if self._server else {}),
        )
        self.url = self._client.url
        self._held_dir = self._model.view
        if self._server:
            self._server.start(self._held_dir, self._name(0))
        elif not leader:
            self._run = self._call("/model_info")["weight_version"].partition(":")[0]
            self._wait_for_version(0)
        elif transfer == "disk":
            self._hand_over(partial(self._load, self._model.view, 0), 0)
        else:
            with Weights(self.model_dir, tied=is_tied(config)) as weights:
                self._hand_over(partial(self._send, dict(weights.tensors()), 0), 0)

    @classmethod
    def shared(cls, model_dir: str | Path, dtype: str = "bfloat16", **arguments) -> SGLangEngine:
        """Make the engines of all ranks of torch.distributed on one server; a collective of all.

        Rank 0 leads. Where it fails, every rank raises its error.
        """
        ranks, engine = SharingRanks(arguments.get("generate_timeout", GENERATE_TIMEOUT)), None

        def lead() -> tuple[str, str | None]:
            nonlocal engine
            engine = cls(model_dir, dtype, **arguments)
            return engine.url, engine._key

        url, key = ranks.from_first(lead)
        if engine is None:
            names = ("timeout", "generate_timeout", "transfer")
            kept = {k: v for k, v in arguments.items() if k in names}
            engine = cls(model_dir, dtype, url=url, api_key=key, leader=False, **kept)
        engine.ranks = ranks
        return engine

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
        seeds_N = request_seeds(seed, len(prompts) * samples_per_prompt)
        return self.sample(prompts, seeds_N.reshape(len(prompts), -1), sampling)

    def sample(
        self, prompts: Sequence[np.ndarray], seeds_NG: np.ndarray, sampling: SamplingConfig
    ) -> list[Rollout]:
        """See `SharedServer.sample`."""
        samples_per_prompt = seeds_NG.shape[1]
        prompts_N = [np.asarray(p) for p in prompts for _ in range(samples_per_prompt)]
        params_N = [
            {
                "temperature": sampling.temperature,
                "max_new_tokens": sampling.max_new_tokens,
                "sampling_seed": int(request_seed),
                "stop_token_ids": self._eos_ids,
                "ignore_eos": False,  # True: not even those of `stop_token_ids` would stop
                # Else the checkpoint's generation_config.json may set them.
                "top_p": 1.0,
                "top_k": -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
            }
            for request_seed in seeds_NG.flat
        ]
        rollouts: list[Rollout | None] = [None] * len(prompts_N)
        # A key of this call's own: keys and values are shared by its samples, and by nothing else.
        key = uuid.uuid4().hex
        for _ in range(ATTEMPTS):
            held = self._usable_version()
            left = [i for i, rollout in enumerate(rollouts) if rollout is None]
            requests = [  # one for each prompt, so that no answer gets huge
                [i for i in left if i // samples_per_prompt == p] for p in range(len(prompts))
            ]
            requests = [request for request in requests if request]
            answers = self._ask(
                [
                    {
                        "input_ids": [prompts_N[i].tolist() for i in request],
                        "sampling_params": [params_N[i] for i in request],
                        "extra_key": key,
                    }
                    for request in requests
                ]
            )
            versions = {held, self.weight_version}  # updated meanwhile, by another thread
            refused = ""
            for request, items in zip(requests, answers, strict=True):
                for i, item in zip(request, items, strict=True):
                    refused = _unusable(item) or refused
                    if not _unusable(item):
                        rollouts[i] = self._rollout(prompts_N[i], item, sampling, versions)
            if not refused:
                return rollouts
        left = next(i for i, rollout in enumerate(rollouts) if rollout is None)
        raise UserError(
            f"The response to prompt {prompts_N[left].tolist()} was cut off {ATTEMPTS} times "
            f"({refused}). Update the weights, or pause the server, less often than it answers."
        )

    def _rollout(
        self, prompt: np.ndarray, item: dict, sampling: SamplingConfig, versions: set[int]
    ) -> Rollout:
        meta = item["meta_info"]
        response = np.array(item["output_ids"], dtype=np.int64)
        named = f"the sequence {prompt.tolist()} -> {response.tolist()}"
        name = meta["weight_versions"][0]["version"]
        version = {self._name(v): v for v in versions}.get(name)
        if version is None:
            raise UserError(
                f"{named} was sampled from weights {name!r}, but this engine gave the server "
                f"{self._name(self.weight_version)!r}. Was the server started again, or updated by "
                "another? Update it again, or restart the engine."
            )
        logged = [(token, logp) for logp, token, *_ in meta["output_token_logprobs"]]
        if [token for token, _ in logged] != response.tolist():
            raise UserError(f"SGLang's log-probs do not belong to the tokens of {named}.")
        finished = meta["finish_reason"]["type"] == "stop"
        if not finished and len(response) != sampling.max_new_tokens:
            raise UserError(
                f"SGLang cut {named} off after {len(response)} of {sampling.max_new_tokens} "
                "tokens: its context_length or max_total_tokens has no room for more. Raise "
                "them or lower max_new_tokens."
            )
        return Rollout(
            prompt_ids=prompt,
            response_ids=response,
            logp_rollout=np.array([logp for _, logp in logged], dtype=np.float32),
            routes=self._moe_rows(meta, len(prompt) + len(response) - 1, named),
            weight_version=version,
            finished=finished,
        )

    def routes(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `Engine.routes`; in one pass up to `chunked_prefill_size` tokens."""
        check_sequences(sequences)
        held = self._usable_version()
        # One token is always sampled: it takes the place of the last, which is never fed in.
        answers = self._ask(
            [
                {
                    "input_ids": [np.asarray(sequence[:-1]).tolist()],
                    "sampling_params": [{"temperature": 0, "max_new_tokens": 1}],
                    "extra_key": uuid.uuid4().hex,  # shares no keys and values with any other
                }
                for sequence in sequences
            ]
        )
        found = []
        for sequence, (item,) in zip(sequences, answers, strict=True):
            named = f"the sequence {np.asarray(sequence).tolist()}"
            if reason := _unusable(item):
                raise UserError(f"SGLang did not compute {named}: {reason}.")
            meta = item["meta_info"]
            if meta["cached_tokens"] or meta["weight_version"] != self._name(held):
                raise UserError(
                    f"SGLang took {meta['cached_tokens']} tokens of {named} from its cache, with "
                    f"weights {meta['weight_version']!r}; 0 of {self._name(held)!r} are needed."
                )
            found.append(self._moe_rows(meta, len(sequence) - 1, named))
        return found

    def _moe_rows(self, meta: dict, rows: int, named: str) -> np.ndarray:
        """The routes of one sequence `[rows, L, K]`; dense layers' rows are left out.

        They come as base64 of int32 `[rows, all layers, K]`, little-endian, without the shape.
        """
        if not self.moe_layer_ids:
            return np.zeros((rows, 0, 0), dtype=np.uint8)
        encoded = meta.get("routed_experts")
        if encoded is None:
            raise UserError(
                f"SGLang returned no routes for {named}: start it with "
                "--enable-return-routed-experts."
            )
        data = base64.b64decode(encoded)
        if len(data) != 4 * rows * self._layers * self._top_k:
            raise UserError(
                f"SGLang returned {len(data)} bytes of routes for {named}; "
                f"{rows} rows x {self._layers} layers x {self._top_k} experts x 4 bytes = "
                f"{4 * rows * self._layers * self._top_k} are needed."
            )
        routes = np.frombuffer(data, "<i4").reshape(rows, self._layers, self._top_k)
        dense = [layer for layer in range(self._layers) if layer not in self.moe_layer_ids]
        if routes[:, dense].any():
            raise UserError(
                f"SGLang routed {named} in a dense layer of the checkpoint, one of {dense}. It has "
                "made experts of it, without weights (0.5.23 does so with qwen3_moe, whose "
                "mlp_only_layers and decoder_sparse_step it does not read). Use another engine."
            )
        routes = routes[:, list(self.moe_layer_ids)]
        wrong = (routes < 0) | (routes >= self._num_experts)
        if wrong.any():
            row, layer, _ = np.argwhere(wrong)[0]
            raise UserError(
                f"SGLang returned expert {routes[wrong][0]} in row {row}, MoE layer {layer} of "
                f"the routes for {named}; 0 ... {self._num_experts - 1} are allowed."
            )
        return routes.astype(routes_dtype(self._num_experts))

    def _name(self, version: int) -> str:
        """The server's name for the weights; another trainer's have another name."""
        return f"{self._run}:{version}"

    def _usable_version(self) -> int:
        with self._updating:  # another thread's update is waited for
            if self._half_updated_to is not None:
                raise UserError(
                    f"The update to weight version {self._half_updated_to} failed half-way: the "
                    "server's weights are of no version. Update again, or restart the engine."
                )
            return self.weight_version

    # --- Weights ---------------------------------------------------------------------------------

    def update_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int
    ) -> None:
        """See `Engine.update_weights`; what is being generated is aborted, and sampled again."""
        if self.ranks is not None:
            self.ranks.meet()  # what another rank still samples would be aborted
        if self.leader and self.transfer == "disk":
            self._update_through_files(named_tensors, version)
            return
        # Followers go through the tensors; the leader keeps them until all are known to fit.
        given = {
            name: tensor.detach().clone() if self.leader else tensor.to("meta")
            for name, tensor in named_tensors
        }
        check_weights(given, self.expected, held=self.weight_version)
        with self._updating:
            if self.leader:
                self._hand_over(partial(self._send, given, version), version)
            else:
                self._wait_for_version(version)
        self._held_dir = None

    def take_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int
    ) -> Callable[[], None]:
        """See `beside.hand_over`."""
        return later(self, named_tensors, version, whole=self.leader)

    def _update_through_files(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> None:
        folder = Path(tempfile.mkdtemp(prefix=f"version-{version}-", dir=self.weights_dir))
        try:
            given, _, failed = written(named_tensors, folder, beside=self.model_dir)
            check_weights(given, self.expected, held=self.weight_version)
            if failed is not None:
                raise failed
            check_whole(folder, self.expected, held=self.weight_version)
            with self._updating:
                self._hand_over(partial(self._load, folder, version), version)
            folder, self._held_dir = self._held_dir, folder
        finally:
            if folder != self._model.view:
                shutil.rmtree(folder, ignore_errors=True)

    def load(self, folder: Path, version: int, digest: str) -> str:
        """See `SharedServer.load`; SGLang's checksum of the weights that it holds now."""
        with self._updating:
            self._hand_over(partial(self._load, folder, version), version)
        return self._checksum()

    def take(self, parts: Iterator[Part], version: int, digest: Callable[[], str]) -> str:
        """See `TakesWeights.take`; SGLang's checksum of the weights that it holds now."""
        with self._updating:
            self._hand_over(partial(self._send_parts, parts, version), version)
        self._held_dir = None
        return self._checksum()

    def _checksum(self) -> str:
        return self._call("/weights_checker", {"action": "checksum"})["per_engine_checksum"]

    def took(self, version: int) -> None:
        """See `SharedServer.took`."""
        self.weight_version, self._half_updated_to = version, None

    def _hand_over(self, give: Callable[[], None], version: int) -> None:
        """Replace the server's weights by calling `give`, while it generates nothing."""
        try:
            self._call("/pause_generation", {"mode": "abort"})
            self._half_updated_to = version
            give()
        except UserError:
            # SGLang 0.5.23 goes on with a mixture under the old version's name
            # (weight_updater.py:193: what it would go back to is the folder that failed).
            if self._half_updated_to is not None:
                self._try(
                    "/update_weight_version", {"new_version": f"{self._name(version)}-failed"}
                )
            raise
        finally:
            self._try("/continue_generation", {})
        self.weight_version, self._half_updated_to = version, None

    def _load(self, folder: Path, version: int) -> None:
        self._call(
            "/update_weights_from_disk",
            {"model_path": str(folder), "weight_version": self._name(version), "flush_cache": True},
        )

    def _send(self, state: dict[str, torch.Tensor], version: int) -> None:
        self._send_parts(iter(_parts(state)), version)

    def _send_parts(self, parts: Iterator[Part], version: int) -> None:
        """Send weights as tensors; SGLang takes them only between begin and end."""
        ranks = self._call("/server_info")["tp_size"]
        self._call("/begin_weight_update", {})
        try:
            coming = next(parts, None)
            while coming is not None:
                part, coming = coming, next(parts, None)
                last = coming is None
                about = {
                    "flush_cache": last,
                    "weight_version": self._name(version) if last else None,
                }
                if self.transfer == "tensor":
                    part = [(name, tensor.cpu()) for name, tensor in part]
                    data = base64.b64encode(pickle.dumps(part)).decode()
                    self._call(
                        "/update_weights_from_tensor",
                        about | {"serialized_named_tensors": [data] * ranks},
                    )
                else:
                    if self._group is None:
                        self._group = WeightGroup(
                            self._call,
                            urlsplit(self.url).hostname,
                            ranks,
                            cuda=part[0][1].is_cuda,
                            timeout=self.timeout,
                        )
                    self._group.broadcast(part, about)
        except BaseException:
            self._group = None  # no longer usable; the next update makes another
            self._try("/end_weight_update", {})
            raise
        self._call("/end_weight_update", {})

    def _wait_for_version(self, version: int) -> None:
        """Wait until the leader's update is done."""
        deadline = time.monotonic() + self.timeout
        while (found := self._call("/model_info")["weight_version"]) != self._name(version):
            if found.endswith("-failed") or time.monotonic() > deadline:
                self._half_updated_to = version
                raise MachineFault(
                    f"The server at {self.url} has the weights {found!r}; {self._name(version)!r} "
                    "were expected from the leading rank. See its error."
                )
            time.sleep(0.05)
        self.weight_version, self._half_updated_to = version, None

    # --- HTTP ------------------------------------------------------------------------------------

    def _ask(self, bodies: Sequence[dict]) -> list[list[dict]]:
        """The answers of `/generate` to bodies, each for a prompt with its samples."""
        asked = {
            "return_logprob": True,
            "return_routed_experts": bool(self.moe_layer_ids),
            "stream": False,
        }

        def ask(body: dict, opened: list) -> list[dict]:
            timeout = self.generate_timeout + self.timeout
            return self._call("/generate", body | asked, timeout, opened=opened)

        found: list[list[dict] | None] = [None] * len(bodies)
        begin = alive = time.monotonic()
        with closing(
            self._client.answers(ask, bodies, beat=min(5.0, self.timeout / 4))
        ) as arriving:
            for arrived in arriving:
                if arrived is None:
                    alive = self._sign_of_life(alive)
                else:
                    i, found[i] = arrived
                    alive = time.monotonic()
                if None in found and time.monotonic() - begin > self.generate_timeout:
                    raise MachineFault(
                        f"SGLang at {self.url} has not answered {found.count(None)} of "
                        f"{len(bodies)} prompts within generate_timeout="
                        f"{self.generate_timeout:g} s. Raise it, or ask for less."
                    )
        return found

    def _sign_of_life(self, alive: float) -> float:
        """The time of the server's last answer; UserError if that is `timeout` seconds ago."""
        if self._client.is_alive(max(alive + self.timeout - time.monotonic(), 0.1)):
            return time.monotonic()
        if time.monotonic() - alive < self.timeout:
            return alive
        raise MachineFault(
            f"SGLang at {self.url} has given no sign of life for {self.timeout:g} s while it "
            f"generated.{self._client.log()}"
        )

    def _call(
        self, path: str, body: dict | None = None, timeout: float | None = None, **given
    ) -> Any:
        return self._client.call(path, body, timeout=timeout or self.timeout, **given)

    def _try(self, path: str, body: dict) -> None:
        """Try a cleanup after a failure, ignoring errors of its own."""
        with suppress(UserError):
            self._call(path, body, min(5.0, self.timeout))

    # --- The server ------------------------------------------------------------------------------

    def cut(self) -> None:
        """See `SharedServer.cut`."""
        self._client.cut()

    def health(self) -> bool:
        """Whether the server answers, within `timeout` seconds."""
        return self._client.is_alive(self.timeout)

    def restart(self) -> None:
        """End the server, whatever its state, and start it with the weights that it had.

        With `transfer` other than disk these are lost with the server: the engine then refuses to
        sample until it is updated.
        """
        if self._server is None:
            raise UserError(f"The server at {self.url} was not started here; restart it there.")
        self._server.stop()
        self._group = None
        if self._held_dir is None:  # sent, and gone with the server
            self._server.start(self._model.view, f"{self._name(self.weight_version)}-lost")
            self._half_updated_to = self.weight_version
        else:
            self._server.start(self._held_dir, self._name(self.weight_version))
            self._half_updated_to = None

    def close(self) -> None:
        """See `Engine.close`; a server that was started here ends."""
        if self._group is not None:
            self._group.close()
            self._group = None
        if self._server is not None:
            self._server.stop()
        self._weights.cleanup()


def _parts(state: dict[str, torch.Tensor]) -> list[list[tuple[str, torch.Tensor]]]:
    """The tensors in parts of about `PART_BYTES`."""
    parts, size = [], PART_BYTES
    for name, tensor in state.items():
        if size >= PART_BYTES:
            parts.append([])
            size = 0
        parts[-1].append((name, tensor))
        size += tensor.nbytes
    return parts


def _num_experts(config) -> int:
    for name in ("num_experts", "n_routed_experts", "num_local_experts"):
        if number := getattr(config, name, None):
            return number
    raise UserError(f"{type(config).__name__} does not say how many experts a layer has.")


def _unusable(item: dict) -> str:
    """The reason to sample a response again; empty where it is whole and of one version."""
    meta = item["meta_info"]
    reason = meta["finish_reason"]
    spans = meta.get("weight_versions") or []
    if reason["type"] == "abort":
        return f"aborted: {reason.get('message', '')}"
    if len(spans) != 1:
        return f"sampled from weight versions {[span['version'] for span in spans]}"
    return ""
