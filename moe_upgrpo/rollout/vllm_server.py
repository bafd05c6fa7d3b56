# SPDX-License-Identifier: Apache-2.0
"""Rollouts from a vLLM server, which the ranks of the trainer share.

P prompt tokens, T response tokens, S = P + T, L MoE layers, K experts per token.
"""

from __future__ import annotations

import base64
import io
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch

from moe_upgrpo.errors import MachineFault, UserError
from moe_upgrpo.hugging_face.folder import Weights
from moe_upgrpo.rollout.base import (
    Rollout,
    SamplingConfig,
    check_prompts,
    check_sequences,
    request_seeds,
)
from moe_upgrpo.rollout.beside import SharingRanks, later
from moe_upgrpo.rollout.checkpoint import ModelFolder
from moe_upgrpo.rollout.digest import Digest
from moe_upgrpo.rollout.engines import Transfer
from moe_upgrpo.rollout.handover import Part, check_taken, digest_of, parts_of
from moe_upgrpo.rollout.hf import DTYPES
from moe_upgrpo.rollout.server_client import ServerClient
from moe_upgrpo.rollout.server_key import read_key
from moe_upgrpo.rollout.servers import replace_weights
from moe_upgrpo.rollout.vllm import LEAST_TEMPERATURE
from moe_upgrpo.rollout.vllm_guard import VARIABLE
from moe_upgrpo.rollout.vllm_plugin import VERSIONS
from moe_upgrpo.rollout.weight_group import send
from moe_upgrpo.rollout.weights_folder import WeightsFolder

FLAGS = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --host 127.0.0.1 --dtype DTYPE --skip-tokenizer-init "
    "--enable-scale-out --logprobs-mode processed_logprobs --enable-return-routed-experts "
    "(the last for MoE models)"
)
SIGN_OF_LIFE = 5.0  # seconds between checks that the server is alive
HALF = "half of "  # the name of the weights while they are loaded


class VLLMServerEngine:
    """`Engine` on a vLLM server at `url`, dense or MoE, that was started as `FLAGS` says.

    Every request carries the server's key: `api_key`, else that of the variable VLLM_API_KEY.

    The server must serve `model_dir`, under this path or name, in `dtype` (None: in any). At the
    start it is asked for its settings, given the weights of `model_dir` and asked for a short
    response. Rank 0 of torch.distributed writes new weights to `weights_dir`, which the server must
    see under the same path, and has them loaded; with transfer="distributed" it sends them to the
    server's workers, by gloo. Making the engine and `update_weights` are collectives, and where
    rank 0 fails all ranks raise. The other calls are each rank's own.

    An update waits for running generations. The server names the weights that it has, and those
    that sampled each response. Where these are not this engine's, nothing is asked or accepted:
    after an update that failed half-way, when the server was started again or when another trainer
    updated it. A further `update_weights` makes the server usable again.

    UserError is raised where the server does not answer a small question within `timeout` seconds,
    even while it generates, a request within `generate_timeout`, or an update within
    `update_timeout`.
    """

    def __init__(
        self,
        model_dir: str | Path,
        url: str,
        dtype: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 30.0,
        generate_timeout: float = 1800.0,
        update_timeout: float = 600.0,
        weights_dir: str | Path | None = None,
        transfer: Transfer = "disk",
    ):
        if dtype not in (None, *DTYPES):
            raise UserError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}.")
        self.timeout, self.generate_timeout = timeout, generate_timeout
        self.update_timeout, self.transfer = update_timeout, transfer
        self.model_dir, self.dtype = Path(model_dir).absolute(), dtype
        self._model = ModelFolder.read(model_dir, weights_dir)
        config, self.moe_layer_ids = self._model.config, self._model.moe_layer_ids
        self._layers = config.num_hidden_layers
        self._top_k = config.num_experts_per_tok if self.moe_layer_ids else 0
        self._eos_ids = self._model.eos_ids
        self._weights = WeightsFolder("moe_upgrpo-vllm-", weights_dir)
        self.expected, self.weights_dir = self._model.shapes, self._weights.name
        self.weight_version = 0
        self.ranks = SharingRanks(generate_timeout + update_timeout)
        self._key = self.ranks.from_first(lambda: read_key(VARIABLE, api_key))
        self._client = ServerClient(
            "vLLM",
            url,
            key=self._key,
            key_variable=VARIABLE,
            late="did not answer {path} within {timeout} s",
            unknown=f"Start it as: {FLAGS}",
        )
        self.url = self._client.url
        # Another run's version 3 is not this one's.
        self._run = self.ranks.from_first(lambda: uuid.uuid4().hex[:8])
        self.max_model_len = self.ranks.from_first(self._check_server)
        self.ranks.from_first(self._first_response)

    def _check_server(self) -> int:
        """The longest sequence that it takes."""
        config = self._call("/server_info?config_format=json")["vllm_config"]
        model = config["model_config"]
        served = self._call("/v1/models")["data"]
        wrong = []
        if not any(
            str(self.model_dir) in (name["id"], name["root"])
            or self.model_dir.resolve() == Path(name["root"]).resolve()
            for name in served
        ):
            wrong.append(
                f"it serves {served[0]['root']}, not {self.model_dir} (if these are the same: "
                f"--served-model-name {self.model_dir})"
            )
        if self.dtype is not None and model["dtype"] != f"torch.{self.dtype}":
            wrong.append(f"its dtype is {model['dtype']} (--dtype {self.dtype})")
        if model["quantization"]:
            wrong.append(f"it quantizes with {model['quantization']}, which was not tried")
        if model["logprobs_mode"] != "processed_logprobs":
            wrong.append(
                f"logprobs_mode is {model['logprobs_mode']} (--logprobs-mode processed_logprobs)"
            )
        if self.moe_layer_ids:
            if not (config["aux_output_config"] or {}).get("enable_return_routed_experts"):
                wrong.append("it returns no routed experts (--enable-return-routed-experts)")
            version = self._call("/version")["version"]
            if config["device_config"]["device"] == "cpu" and version not in VERSIONS:
                wrong.append(
                    f"vLLM {version} on CPU was not tried with MoE models ({', '.join(VERSIONS)} "
                    "was, whose updates corrupt the experts without vllm_plugin.py)"
                )
        if wrong:
            raise UserError(
                f"The server at {self.url} cannot be used: {'; '.join(wrong)}. Start it as: {FLAGS}"
            )
        self._workers = config["parallel_config"]["world_size"]
        return model["max_model_len"]

    def _first_response(self) -> None:
        """Give the server the weights of version 0, and check a first response."""
        if self.transfer == "disk":
            self.load(self._model.view, 0, digest_of(self._model.view))
        else:
            with Weights(self._model.view) as weights:
                digest = Digest()
                parts = parts_of(digest.through(weights.tensors()))
                self.take(parts, 0, digest.value)
        prompt = np.zeros(min(3, self.max_model_len - 1), dtype=np.int64)
        sampling = SamplingConfig(max_new_tokens=min(2, self.max_model_len - len(prompt)))
        self.generate([prompt], sampling, samples_per_prompt=1, seed=0)

    # --- Sampling --------------------------------------------------------------------------------

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
        self._check_length("A prompt", prompts, sampling.max_new_tokens)
        if 0 < sampling.temperature < LEAST_TEMPERATURE:
            raise UserError(
                f"temperature is {sampling.temperature}; vLLM takes 0 (greedy) or at least "
                f"{LEAST_TEMPERATURE}."
            )
        salt = uuid.uuid4().hex  # of the prefix cache: shared within this call alone
        prompts_B = [np.asarray(prompt) for prompt in prompts for _ in range(seeds_NG.shape[1])]
        choices_B = self._ask(
            [
                {
                    "token_ids": prompt.tolist(),
                    "cache_salt": salt,
                    "sampling_params": {
                        "temperature": sampling.temperature,
                        "max_tokens": sampling.max_new_tokens,
                        "seed": int(request_seed),
                        "stop_token_ids": self._eos_ids,
                        "ignore_eos": True,  # those of `stop_token_ids` alone
                        "logprobs": 0,  # of the sampled token only
                        "detokenize": False,
                        # Else the checkpoint's generation_config.json may set them.
                        "top_p": 1.0,
                        "top_k": 0,
                        "min_p": 0.0,
                        "repetition_penalty": 1.0,
                    },
                }
                for prompt, request_seed in zip(prompts_B, seeds_NG.flat, strict=True)
            ]
        )
        return [
            self._rollout(prompt, choice, sampling)
            for prompt, choice in zip(prompts_B, choices_B, strict=True)
        ]

    def routes(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `Engine.routes`; in one pass up to the server's `max_num_batched_tokens` tokens."""
        check_sequences(sequences)
        self._check_length("A sequence", sequences, 0)
        choices = self._ask(
            [
                {
                    # One token is always sampled, in the place of the last, never fed in.
                    "token_ids": np.asarray(sequence[:-1]).tolist(),
                    "cache_salt": uuid.uuid4().hex,
                    "sampling_params": {"max_tokens": 1, "temperature": 0, "detokenize": False},
                }
                for sequence in sequences
            ]
        )
        return [
            self._moe_rows(choice, len(sequence) - 1, np.asarray(sequence).tolist())
            for sequence, choice in zip(sequences, choices, strict=True)
        ]

    def _check_length(self, what: str, sequences: Sequence[np.ndarray], new_tokens: int) -> None:
        """Check before anything is sampled: vLLM cuts a response that does not fit."""
        longest = max(len(sequence) for sequence in sequences)
        if longest + new_tokens > self.max_model_len:
            raise UserError(
                f"{what} has {longest} tokens"
                + (f" and {new_tokens} new ones may follow" if new_tokens else "")
                + f"; the server's max_model_len={self.max_model_len} allows "
                f"{self.max_model_len - new_tokens}. Shorten it or raise --max-model-len."
            )

    def _checked(self, answer: dict) -> dict:
        """The one sample of an answer, whole and of this engine's weights."""
        (choice,) = answer["choices"]
        if choice["finish_reason"] not in ("stop", "length"):
            raise UserError(
                f"vLLM ended a response with {choice['finish_reason']!r}: was the server paused, "
                "or its requests aborted, by another?"
            )
        held = [span["version"] for span in choice["weight_versions"] or ()]
        if held != [self._name(self.weight_version)]:
            raise self._other_weights(f"sampled a response from weights {held}")
        return choice

    def _check_held(self) -> None:
        """Raise unless the server's engine, beyond its HTTP side, answers and has the weights.

        vLLM 0.32 ends when it samples after a load that broke off.
        """
        held = self._call("/weight_info")["weight_version"]
        if held != self._name(self.weight_version):
            raise self._other_weights(f"has weights {[held]}")

    def _other_weights(self, what: str) -> MachineFault:
        return MachineFault(
            f"vLLM at {self.url} {what}, not {self._name(self.weight_version)} alone: an "
            "update failed half-way, or the server was started again or updated by another. "
            "Update the weights."
        )

    def _rollout(self, prompt: np.ndarray, choice: dict, sampling: SamplingConfig) -> Rollout:
        finished = choice["finish_reason"] == "stop"
        tokens = choice["token_ids"]
        named = f"{prompt.tolist()} -> {tokens}"
        if not finished and len(tokens) != sampling.max_new_tokens:
            raise UserError(
                f"vLLM cut the sequence {named} off after {len(tokens)} of "
                f"{sampling.max_new_tokens} tokens. Does the server limit max_tokens?"
            )
        logged = choice["logprobs"]["content"]
        if [item["token_id"] for item in logged] != tokens:
            raise UserError(f"vLLM's log-probs are not of the tokens of the sequence {named}.")
        return Rollout(
            prompt_ids=prompt,
            response_ids=np.array(tokens, dtype=np.int64),
            logp_rollout=np.array([item["logprob"] for item in logged], dtype=np.float32),
            routes=self._moe_rows(choice, len(prompt) + len(tokens) - 1, named),
            weight_version=self.weight_version,
            finished=finished,
        )

    def _moe_rows(self, choice: dict, rows: int, named: str | list) -> np.ndarray:
        """The routes of one request `[rows, L, K]`; base64 of an .npy with all layers' rows."""
        if not self.moe_layer_ids:
            return np.zeros((rows, 0, 0), dtype=np.uint8)
        if choice["routed_experts"] is None:
            raise UserError(f"vLLM returned no routed experts for the sequence {named}.")
        try:
            file = io.BytesIO(base64.b64decode(choice["routed_experts"]))
            routes = np.load(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise UserError(
                f"vLLM's routes of the sequence {named} are no array: {error}"
            ) from error
        needed = (rows, self._layers, self._top_k)
        if routes.shape != needed or routes.dtype.kind != "u":
            raise UserError(
                f"vLLM returned routes of shape {routes.shape}, {routes.dtype}, for the sequence "
                f"{named}; {needed}, unsigned, are needed."
            )
        return routes[:, list(self.moe_layer_ids)]

    # --- Weights ---------------------------------------------------------------------------------

    def update_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int
    ) -> None:
        """See `Engine.update_weights`."""
        (error,) = replace_weights([self], named_tensors, version=version, held=self.weight_version)
        if error is not None:
            raise error

    def take_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int
    ) -> Callable[[], None]:
        """See `beside.hand_over`."""
        return later(self, named_tensors, version, whole=self.ranks.first)

    def took(self, version: int) -> None:
        """See `SharedServer.took`."""
        self.weight_version = version

    def load(self, folder: Path, version: int, digest: str) -> None:
        """See `TakesWeights.load`."""

        def give(broke_off: bool) -> None:
            for _ in range(2 if broke_off else 1):
                taken = self._on_workers("take_files", weights_path=str(folder))
            check_taken(f"vLLM at {self.url}", taken, digest)

        self._replace(version, give)

    def take(self, parts: Iterator[Part], version: int, digest: Callable[[], str]) -> None:
        """See `TakesWeights.take`."""

        def give(broke_off: bool) -> None:
            if broke_off:
                self._on_workers("reload_weights")
            taken = send(
                parts,
                lambda where: self._on_workers("take_stream", timeout=self.timeout, **where),
                urlsplit(self.url).hostname,
                self._workers,
                server=f"vLLM at {self.url}",
                timeout=self.timeout,
            )
            check_taken(f"vLLM at {self.url}", taken, digest())

        self._replace(version, give)

    def _on_workers(self, method: str, **arguments: Any) -> list[Any]:
        """The results of a method of the server's workers."""
        body = {"method": method, "kwargs": arguments}
        return self._call("/collective_rpc", body, timeout=self.update_timeout)["results"]

    def _replace(self, version: int, give: Callable[[bool], None]) -> None:
        """Replace the weights by calling `give`, while nothing is generated.

        After a load that broke off, as `give` is told, the next one completes it: vLLM 0.32 keeps
        the tensors already read and drops the surplus (reload/layerwise.py:105, :156), so that
        experts of both loads are mixed, without an error. The load after that is whole.
        """
        try:
            self._call("/pause?mode=wait", {}, timeout=self.update_timeout)
            broke_off = self._call("/weight_info")["weight_version"].startswith(HALF)
            # Until all is loaded: a response sampled from a mixture bears this name.
            self._call("/update_weight_version", {"new_version": HALF + self._name(version)})
            give(broke_off)
            if not self._call("/reset_prefix_cache", {})["success"]:
                raise UserError(f"vLLM at {self.url} did not reset its prefix cache.")
            self._call("/update_weight_version", {"new_version": self._name(version)})
            self._call("/resume", {})
        except UserError:
            with suppress(UserError):
                self._call("/resume", {}, timeout=min(SIGN_OF_LIFE, self.timeout))
            raise

    def _name(self, version: int) -> str:
        return f"{self._run}-{version}"

    # --- HTTP ------------------------------------------------------------------------------------

    def _ask(self, bodies: Sequence[dict]) -> list[dict]:
        """The responses to requests, while the server shows signs of life."""
        self._check_held()
        call = uuid.uuid4().hex
        bodies = [body | {"request_id": f"{call}-{i}"} for i, body in enumerate(bodies)]

        def ask(body: dict, opened: list) -> dict:
            path, timeout = "/inference/v1/generate", self.generate_timeout
            return self._checked(self._call(path, body, timeout, opened=opened))

        found: list[dict | None] = [None] * len(bodies)
        heard = time.monotonic()
        try:
            with closing(self._client.answers(ask, bodies, beat=SIGN_OF_LIFE)) as arriving:
                for arrived in arriving:
                    if arrived is not None:
                        i, found[i] = arrived
                        heard = time.monotonic()
                    elif time.monotonic() - heard > self.generate_timeout:
                        raise MachineFault(
                            f"vLLM at {self.url} has answered none of {found.count(None)} "
                            f"requests for generate_timeout={self.generate_timeout:g} s."
                        )
                    else:
                        self._check_held()
        except UserError:  # nothing more is computed
            ids = [f"generate-tokens-{body['request_id']}" for body in bodies]
            with suppress(UserError):
                self._call(
                    "/inference/v1/abort_requests",
                    {"request_ids": ids},
                    timeout=min(SIGN_OF_LIFE, self.timeout),
                )
            raise
        return found

    def _call(
        self, path: str, body: dict | None = None, timeout: float | None = None, **given
    ) -> Any:
        return self._client.call(path, body, timeout=timeout or self.timeout, **given)

    def cut(self) -> None:
        """See `SharedServer.cut`."""
        self._client.cut()

    def health(self) -> bool:
        """Whether the server answers, within `timeout` seconds."""
        return self._client.is_alive(self.timeout)

    def close(self) -> None:
        """See `Engine.close`; the server goes on."""
        self._weights.cleanup()
