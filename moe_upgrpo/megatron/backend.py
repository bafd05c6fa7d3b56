# SPDX-License-Identifier: Apache-2.0
"""Changes to Megatron-Core at run time: fixes for every machine, and a backend for CPU.

Line numbers are those of the released megatron-core 0.16.1, where no other release is named.
`apply()` is a context manager, which undoes its replacements on leaving. On a machine with CUDA
only `mends()` act, and only where they are needed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from megatron.core import optimizer as megatron_optimizer
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer_config
from megatron.core.optimizer import optimizer as optimizer_module
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.utils import (
    get_te_version,
    local_multi_tensor_applier,
    local_multi_tensor_l2_norm,
    local_multi_tensor_scale,
)
from torch.overrides import TorchFunctionMode

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import elementwise, releases

_hybrid_init = HybridDeviceOptimizer.__init__


def _init_of_views(self, params, *args, **kwargs) -> None:
    for group in params:
        for parameter in group["params"]:
            if not parameter.is_leaf:
                parameter.retain_grad()
    _hybrid_init(self, params, *args, **kwargs)


@dataclass(frozen=True, slots=True)
class Replacement:
    """`owner.name` becomes `value` while the backend is applied; `reason`: upstream's line."""

    owner: Any
    name: str
    value: Any
    reason: str


def mends() -> list[Replacement]:
    """Faults of Megatron-Core that show on any machine."""
    found = []
    if not hasattr(moe_utils, "te_general_gemm"):
        found.append(
            Replacement(
                moe_utils,
                "te_general_gemm",
                None,
                "moe_utils.py:1192 reads a name that is only defined where Transformer Engine is "
                "installed: the router raises NameError without it",
            )
        )
    if getattr(multi_latent_attention, "Linear", None) is None:
        found.append(
            Replacement(
                multi_latent_attention,
                "Linear",
                Linear,
                "since 0.17 the module knows ModelOpt's Linear only where Transformer Engine is "
                "installed, and refuses it as a down projection (0.19: line 581)",
            )
        )
    if not gpt_layer_specs.HAVE_TE:
        found.append(
            Replacement(
                multi_latent_attention,
                "HAVE_TE",
                False,
                "multi_latent_attention.py:62 takes Transformer Engine to be installed where it is "
                "not (its stand-ins import), and line 185 asks isinstance of one of them",
            )
        )
    found.append(
        Replacement(
            HybridDeviceOptimizer,
            "__init__",
            _init_of_views,
            "distrib_optimizer.py:389 hands over views of fp32 weights, which torch's optimizers "
            "refuse (can't optimize a non-leaf Tensor) unless they retain their gradient",
        )
    )
    if get_te_version() is None:
        found.append(
            Replacement(
                optimizer_config,
                "is_te_min_version",
                lambda *_, **__: False,
                "optimizer_config.py:383 compares Transformer Engine's version where there is none "
                "(0.19 calls it 0.0.0), also for an optimizer on the host, which does without",
            )
        )
    return found


class _CpuForCuda(TorchFunctionMode):
    """Torch calls that ask for CUDA get the CPU.

    A mode rather than replaced functions: torch and transformers tell factories apart by identity.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # clip_grads.py:90, optimizer.py:473, schedules.py:596, transformer/utils.py:35 and more
        # write device="cuda". Hardly any call has a device: a small model's step makes 400,000.
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs = kwargs | {"device": "cpu"}
        if kwargs.get("pin_memory"):  # hybrid_optimizer.py:116
            kwargs = kwargs | {"pin_memory": False}
        if func is torch.Tensor.cuda:  # optimizer.py:375, exchange_utils.py:336
            return args[0]
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            # clip_grads.py:167, distrib_optimizer.py:361 and optimizer.py:671 compare the name
            # with 'torch.cuda.FloatTensor'.
            return result.replace("torch.", "torch.cuda.", 1)
        return result


class _Stream:
    """A stream on a machine without streams. A class, because vLLM puts it into type unions."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self) -> _Stream:
        return self  # an event of no stream: waiting for it is synchronize(), which returns at once

    def wait(self, stream=None) -> None:
        pass


class _HostCopies(TorchFunctionMode):
    """Every tensor counts as on the GPU except those that went through `cpu()` and their copies."""

    def __init__(self):
        super().__init__()
        self.on_host: dict[int, torch.Tensor] = {}  # kept, so that no other gets the id

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.is_cuda.__get__:  # made anew each time it is asked for
            return id(args[0]) not in self.on_host
        moves = func in (torch.Tensor.cpu, torch.Tensor.pin_memory)
        result = args[0] if moves else func(*args, **(kwargs or {}))
        if torch.is_tensor(result) and (moves or id(args[0]) in self.on_host):
            self.on_host[id(result)] = result
        return result


_offloaded_groups = HybridDeviceOptimizer._get_sub_optimizer_param_groups


def _offloaded_groups_on_cpu(optimizer, offload_fraction: float):
    with _HostCopies():
        return _offloaded_groups(optimizer, offload_fraction)


_DEFAULT_STREAM = _Stream()


def _as_numpy_on_cpu(tensor, as_numpy: bool = False, record_stream: bool = False):
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


_rotary = rope_utils._apply_rotary_pos_emb_bshd


def _rotary_in_few_passes(t, freqs, *args, mscale=1.0, **how):
    plain = not args and not any(how.values())  # neither interleaved nor of latent attention
    if plain and freqs.shape[-1] == t.shape[-1] and elementwise.takes(t):
        cos, sin = ((function(freqs) * mscale).to(t.dtype) for function in (torch.cos, torch.sin))
        return elementwise.rotate(t, cos, sin)
    return _rotary(t, freqs, *args, mscale=mscale, **how)


_sort_chunks = moe_utils.sort_chunks_by_idxs


def _sort_chunks_out_of_order(input, split_sizes, sorted_idxs, probs=None, fused=False):
    if sorted_idxs.tolist() == list(range(len(sorted_idxs))):
        return input, probs
    return _sort_chunks(input, split_sizes, sorted_idxs, probs=probs, fused=fused)


def cpu_replacements() -> list[Replacement]:
    """Stand-ins for CUDA. Every entry is a place where Megatron-Core assumes a GPU."""

    def nothing(*args, **kwargs):
        return None

    def no_context(*args, **kwargs):
        return contextlib.nullcontext()

    streams = "token_dispatcher.py:445 makes a stream in its constructor and 873 waits on it"
    recompute = "random.py:520 keeps CUDA's generator states for the recomputation; dropout is 0"
    return [
        Replacement(torch.cuda, "current_device", lambda: "cpu", "layers.py:261 and 60 more lines"),
        Replacement(torch.Tensor, "record_stream", nothing, "moe_utils.py:1098"),
        Replacement(torch.cuda, "Stream", _Stream, streams),
        Replacement(torch.cuda, "current_stream", lambda *_: _DEFAULT_STREAM, streams),
        Replacement(torch.cuda, "default_stream", lambda *_: _DEFAULT_STREAM, streams),
        Replacement(torch.cuda, "stream", no_context, streams),
        Replacement(
            token_dispatcher.MoEAlltoAllTokenDispatcher,
            "cuda_dtoh_stream",
            _DEFAULT_STREAM,
            "token_dispatcher.py:445 makes it of torch.cuda.Stream, which vLLM, once imported, has "
            "replaced by a class whose events are None",
        ),
        Replacement(torch.cuda, "synchronize", nothing, "parallel_state.py:198"),
        Replacement(
            HybridDeviceOptimizer,
            "_get_sub_optimizer_param_groups",
            _offloaded_groups_on_cpu,
            "hybrid_optimizer.py:270 offloads weights whose is_cuda is true, and fails with "
            "KeyError at 104 where a weight is on the CPU of its own accord",
        ),
        Replacement(
            megatron_random.CudaRNGStatesTracker,
            "fork",
            no_context,
            "random.py:248 swaps CUDA generator states; here weights are loaded and dropout is 0",
        ),
        Replacement(megatron_random, "_get_all_rng_states", tuple, recompute),
        Replacement(megatron_random, "_set_all_rng_states", nothing, recompute),
        Replacement(
            megatron_random,
            "_fork_rng",
            _CpuForCuda,
            "random.py:550 recomputes layers inside torch.autograd.backward, which torch runs "
            "without the mode as it does every call that a mode takes",
        ),
        Replacement(
            token_dispatcher,
            "maybe_move_tensor_to_cpu",
            _as_numpy_on_cpu,
            "moe_utils.py:1093 converts CUDA tensors only; gloo refuses splits that are tensors",
        ),
        Replacement(
            rope_utils,
            "_apply_rotary_pos_emb_bshd",
            _rotary_in_few_passes,
            "rope_utils.py:118 makes six tensors of each head, and its backward as many",
        ),
        Replacement(
            token_dispatcher,
            "sort_chunks_by_idxs",
            _sort_chunks_out_of_order,
            "token_dispatcher.py:732 and 767 copy all tokens also where one rank has all experts, "
            "whose chunks are in order",
        ),
        Replacement(
            torch._dynamo.config,
            "disable",
            True,
            "jit.py decorates small functions with torch.compile: minutes of compiling on a CPU",
        ),
        *_instead_of_kernels(),
    ]


def _instead_of_kernels() -> list[Replacement]:
    """Replacements by what Megatron-Core uses without Transformer Engine and Apex.

    It only asks whether they can be imported. They can without a GPU, but their kernels need one.
    """
    taken = {
        megatron_optimizer: {  # optimizer/__init__.py:13
            "Adam": torch.optim.AdamW,
            "SGD": torch.optim.SGD,
            "USING_PYTORCH_OPTIMIZER": True,
        },
        clip_grads: {  # clip_grads.py:11
            "multi_tensor_applier": local_multi_tensor_applier,
            "l2_norm_impl": local_multi_tensor_l2_norm,
            "multi_tensor_scale_impl": local_multi_tensor_scale,
            "multi_tensor_scale_tensor_impl": None,  # since 0.17
        },
        optimizer_module: {  # optimizer.py:17
            "multi_tensor_applier": local_multi_tensor_applier,
            "multi_tensor_scale_impl": local_multi_tensor_scale,
        },
        distrib_optimizer: {"HAVE_APEX_OR_TE": False},  # distrib_optimizer.py:21
        moe_utils: {"te_general_gemm": None},  # moe_utils.py:1192
    }
    reason = "Transformer Engine's and Apex's kernels take a GPU, and importing them does not"
    return [
        Replacement(owner, name, value, reason)
        for owner, names in taken.items()
        for name, value in names.items()
        if getattr(owner, name, value) is not value
    ]


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """Lift the mode that `apply` put into this thread, for other libraries' code: it slows every
    call of torch, and vLLM and transformers make thousands in a step."""
    with contextlib.ExitStack() as stack:
        if torch._C._len_torch_function_stack() and isinstance(
            torch.overrides._get_current_function_mode(), _CpuForCuda
        ):
            stack.enter_context(torch.overrides._pop_mode_temporarily())
        yield


def has_cuda() -> bool:
    return torch.cuda.is_available()


# Settings that make CUDA's libraries compute alike each time. cuBLAS takes one of these two sizes
# of workspace; NCCL must not sum in the switch (NVLS); Transformer Engine asks when it is built.
_WORKSPACES = (":4096:8", ":16:8")
_SETTINGS = {
    "CUBLAS_WORKSPACE_CONFIG": _WORKSPACES[0],
    "NCCL_ALGO": "^NVLS",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Inside, torch and Megatron-Core compute the same bits each time, on the same machine.

    Megatron-Core asks torch for the mode where it has two ways (moe_utils.py:453, 731), and its
    config for the embedding's gradient (layers.py:283; `model.transformer_config` sets it).
    Raises UserError for a kernel that has neither a deterministic form nor a substitute, and for
    settings of the user that forbid it. Afterwards the earlier settings hold again.
    """
    for name, allowed in (("CUBLAS_WORKSPACE_CONFIG", _WORKSPACES),
                          ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", ("0",))):  # fmt: skip
        given = os.environ.get(name)
        if given is not None and given not in allowed:
            raise UserError(
                f"--deterministic with {name}={given}: {' or '.join(allowed)} is allowed. Leave "
                "the variable unset, or --deterministic out."
            )
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    added = [name for name in _SETTINGS if name not in os.environ]
    os.environ |= {name: _SETTINGS[name] for name in added}
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads it here
    try:
        yield
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        if "deterministic implementation" not in said and "not deterministic" not in said:
            raise
        raise UserError(
            f"--deterministic: a kernel has no deterministic form on this device. torch says: "
            f"{said} Leave --deterministic out, or what calls that kernel."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def apply() -> Iterator[list[Replacement]]:
    """Make Megatron-Core run here, and yield the replacements, which are undone on leaving."""
    stand_ins = [] if has_cuda() else cpu_replacements()
    for r in stand_ins:  # a mend may add what is not there; a stand-in for nothing would do nothing
        if not hasattr(r.owner, r.name):
            raise releases.lacks(f"{getattr(r.owner, '__name__', r.owner)}.{r.name} ({r.reason})")
    replacements = mends() + stand_ins
    missing = object()
    before = [getattr(r.owner, r.name, missing) for r in replacements]
    try:
        for r in replacements:
            setattr(r.owner, r.name, r.value)
        with contextlib.nullcontext() if has_cuda() else _CpuForCuda():
            yield replacements
    finally:
        for r, value in zip(reversed(replacements), reversed(before), strict=True):
            if value is missing:
                delattr(r.owner, r.name)
            else:
                setattr(r.owner, r.name, value)
