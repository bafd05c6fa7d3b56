# SPDX-License-Identifier: Apache-2.0
"""A training state in Megatron's distributed checkpoints: written in one layout, read in any.

Every tensor is kept under its name in the whole model, with the part that each rank holds: weights,
and the optimizer's fp32 weights and moments (in `fully_reshardable`, the one format of
Megatron-Core 0.16.1 that other tensor-, expert- and pipeline-parallel sizes can read). Line numbers
are those of the released megatron-core 0.16.1.
"""

from __future__ import annotations

import errno
import io
import pickle
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron.actor import MegatronActor

# The objects that torch's writer pickles into `.metadata`.
_OBJECTS = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # Python 3.13
}
# Data-parallel ranks send their parts of the optimizer's state to the first of each group, which
# writes them; otherwise every rank would hold all parts in memory.
_STATES = ("param", "exp_avg", "exp_avg_sq")
_OPTIMIZER = {"distrib_optim_fully_reshardable_mem_efficient": True}


# Threads of a rank; each writes its own file, so that files can be checked in as many threads.
_THREADS = 2


class _Writer(TorchDistSaveShardedStrategy):
    """Megatron's format, by torch's own writer, in this process.

    Files are written but not synced: the code that describes them does that (`store.checkpoints`).

    Megatron's writer forks a process for each file and starts a server to hear from them
    (filesystem_async.py:53). That takes seconds for any save, and it waits forever for a process
    that is killed.
    """

    def save(self, sharded_state_dict, checkpoint_dir) -> None:
        by_key, *_ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, keep_only_main_replica=True
        )
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(by_key),
            storage_writer=torch_checkpoint.FileSystemWriter(
                checkpoint_dir, thread_count=_THREADS, sync_files=False
            ),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def save_state(
    folder: Path,
    actor: MegatronActor,
    frozen: MegatronActor | None = None,
    reference: MegatronActor | None = None,
) -> None:
    """Write an actor's weights, optimizer and schedule, and the weights of the frozen actors.

    folder: empty, and visible to every rank. A collective, after at least one optimizer step. The
    files are not synced yet. Raises OSError where a file cannot be written.
    """
    actor.make_whole()
    model = _model_state(actor)
    state = {
        "model": model,
        "optimizer": _optimizer_state(actor.optimizer, model, is_loading=False),
        "scheduler": actor.scheduler.state_dict(),
        "frozen": _frozen_state(frozen, "frozen"),
        "reference": _frozen_state(reference, "reference"),
    }
    try:
        dist_checkpointing.save(state, str(folder), sharded_strategy=_Writer("torch_dist", 1))
    except torch_checkpoint.CheckpointException as error:
        raise _told(next(iter(error.failures.values()))[0]) from error
    except RuntimeError as error:
        raise _told(error) from error


def _told(error: BaseException) -> BaseException:
    """Name a full disk: torch says only at which byte the file ended (inline_container.cc:672)."""
    if isinstance(error, RuntimeError) and "inline_container.cc" in str(error):
        return OSError(errno.ENOSPC, f"torch could not write all of a file: {error}")
    return error


def load_state(
    folder: Path,
    actor: MegatronActor,
    frozen: MegatronActor | None = None,
    reference: MegatronActor | None = None,
) -> None:
    """Read what `save_state` wrote, in this or another layout, bit for bit. A collective.

    Raises UserError where the folder holds another model's state, lacks a part that is asked for,
    or has an object that no state of ours has. No code in it is run: it may be somebody else's.
    """
    _check_objects(folder)
    try:
        # First the schedule: the optimizer's state is allocated with the number of its steps.
        schedule = dist_checkpointing.load_common_state_dict(str(folder))["scheduler"]
        for part in _parts(actor.optimizer):
            _allocate(part, steps=schedule["num_steps"])
        model = _model_state(actor)
        state = {
            "model": model,
            "optimizer": _optimizer_state(actor.optimizer, model, is_loading=True),
            "frozen": _frozen_state(frozen, "frozen"),
            "reference": _frozen_state(reference, "reference"),
        }
        with warnings.catch_warnings():  # about future changes of torch
            warnings.simplefilter("ignore", FutureWarning)
            loaded = dist_checkpointing.load(state, str(folder))
    except (CheckpointingException, torch_checkpoint.CheckpointException, KeyError) as error:
        raise UserError(
            f"{folder} does not hold this model's training state: {str(error)[:500]}"
        ) from error
    for one, name in ((actor, "model"), (frozen, "frozen"), (reference, "reference")):
        for i, chunk in enumerate(unwrap_model(list(one.chunks)) if one else ()):
            chunk.load_state_dict(loaded[name][str(i)])
    for i, part in enumerate(_parts(actor.optimizer)):
        _set_state(part, loaded["optimizer"].get(str(i), {}), steps=schedule["num_steps"])
    actor.scheduler.load_state_dict(schedule)
    actor.scheduler.step(increment=0)  # gives the optimizer the rate


def _model_state(actor: MegatronActor) -> dict:
    """Chunk -> parameter name -> its name in the whole model, and this rank's part of it."""
    # Each layer under its own number: layers may be of different kinds.
    return {
        str(i): chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True})
        for i, chunk in enumerate(unwrap_model(list(actor.chunks)))
    }


class _OnlyOurs(pickle.Unpickler):
    """Unpickles the objects that torch's writer puts into `.metadata`, and refuses all others."""

    def find_class(self, module: str, name: str):
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if name not in _OBJECTS.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _check_objects(folder: Path) -> None:
    """Refuse a folder with pickled objects that do not belong to a state.

    torch unpickles `.metadata` (filesystem.py:930) and the objects beside the tensors
    (default_planner.py:387) unchecked, and so runs whatever code they name.
    """
    try:
        with (folder / ".metadata").open("rb") as file:
            metadata = _OnlyOurs(file).load()
        for index, stored in metadata.storage_data.items():
            if Path(stored.relative_path).name != stored.relative_path:
                raise pickle.UnpicklingError(f"it leads to {stored.relative_path}")
            if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
                with (folder / stored.relative_path).open("rb") as file:
                    file.seek(stored.offset)
                    torch.load(io.BytesIO(file.read(stored.length)), weights_only=True)
        if (folder / "common.pt").exists():  # before Megatron-Core 0.19
            torch.load(folder / "common.pt", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} does not hold this model's training state: {error.filename} is missing."
        ) from None
    except Exception as error:  # damaged pickles raise anything
        raise UserError(
            f"{folder} holds what no checkpoint of moe_upgrpo does ({str(error)[:200]}); none of "
            "its code was run. Resume from a checkpoint whose origin you know."
        ) from error


def _frozen_state(actor: MegatronActor | None, name: str) -> dict:
    state = _model_state(actor) if actor else {}
    add_prefix_for_sharding(state, f"{name}.")
    return state


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of dense and of expert parameters that this rank has anything for."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not part.is_stub_optimizer]


def _optimizer_state(optimizer: MegatronOptimizer, model: dict, *, is_loading: bool) -> dict:
    """Part of the optimizer -> this rank's fp32 weights and moments, as in `_model_state`."""
    states = (_part_state(part, model, is_loading) for part in _parts(optimizer))
    # Without SGD's empty parts: the number of parts depends on the layout.
    return {str(i): state for i, state in enumerate(states) if state}


def _part_state(part: MegatronOptimizer, model: dict, is_loading: bool) -> dict:
    """fp32 weights and moments of one part.

    Not `part.sharded_state_dict`: that keeps the parameter groups as well, whose number depends on
    the layout (and which follow from the settings and the schedule), and it needs the state of
    torch's Adam before that exists (distrib_optimizer.py:659).
    """
    if isinstance(part, DistributedOptimizer):
        gathered = partial(_gathered, part)
        with (
            _padding_counted(part),
            mock.patch.object(part, "get_parameter_state_dp_zero", gathered),
        ):
            return part.sharded_param_state_fully_reshardable(model, is_loading, _OPTIMIZER) or {}
    # The only state of SGD without momentum is the fp32 weights of a bf16 model.
    parameters = {id(sharded.data): sharded for sharded in _sharded(model)}
    return {
        str(i): make_sharded_optimizer_tensor(
            parameters[id(parameter)], main, prefix="optimizer.state.param"
        )
        for i, (parameter, main) in enumerate(_main_parameters(part))
    }


def _gathered(
    part: DistributedOptimizer,
    *,
    use_gloo_comm: bool,
    empty_data: bool,
    return_on_all_ranks: bool,
) -> dict | None:
    """Buffer -> dtype -> fp32 weights and moments of all data-parallel ranks, on the first.

    Upstream (distrib_optimizer.py:977) copies every element several times on its way. Here it is
    gathered straight to its place. To be called inside `_padding_counted`. return_on_all_ranks:
    with empty_data, room on every rank for the values to be loaded.
    """
    group = part.data_parallel_group_gloo
    first, is_first, ranks = dist.get_process_group_ranks(group)[0], group.rank() == 0, group.size()
    state: dict = {}
    for index, ranges in enumerate(part.gbuf_ranges):
        ((dtype, buckets),) = ranges.items()
        buffer = part.buffers[index]
        whole = {}
        if is_first or return_on_all_ranks:
            whole = {name: torch.empty(buffer.numel, device="cpu") for name in _STATES}
        state[index] = {dtype: whole}
        start = 0
        for bucket, of_bucket in zip(buffer.buckets, () if empty_data else buckets, strict=False):
            size = bucket.grad_data.numel()
            shards = {name: x[start : start + size].chunk(ranks) for name, x in whole.items()}
            mine = {
                name: shards[name][0] if is_first else torch.empty(size // ranks, device="cpu")
                for name in _STATES
            }
            for parameter, places in of_bucket["param_map"].items():
                place = slice(places["gbuf_local"].start, places["gbuf_local"].end)
                states = part._get_main_param_and_optimizer_states(parameter)
                for name in _STATES:
                    mine[name][place].copy_(states[name].detach())
            for name in _STATES if ranks > 1 else ():
                to = list(shards[name]) if is_first else None
                dist.gather(mine[name], to, dst=first, group=group)
            start += size
    return state if is_first or return_on_all_ranks else None


@contextmanager
def _padding_counted(part: DistributedOptimizer) -> Iterator[None]:
    """Let a state be written with every element at the place from which it is read.

    Where gradients travel in several buckets, distrib_optimizer.py:1114 leaves out the padding
    between them and 1501 looks for each weight as if the padding were there: all states after the
    first padding are those of other elements, without an error.
    """
    with ExitStack() as stack:
        for buffer in part.buffers:
            sizes = [(buffer, buffer.numel)]
            sizes += [(bucket, bucket.grad_data.numel()) for bucket in buffer.buckets]
            for one, size in sizes:
                stack.enter_context(mock.patch.object(one, "numel_unpadded", size))
        yield


def _sharded(model: dict) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    for value in nested_values(model):
        if isinstance(value, ShardedTensor | ShardedTensorFactory):
            yield value


def _main_parameters(part: MegatronOptimizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(parameter, its fp32 copy) pairs of an optimizer that is not distributed."""
    groups = zip(
        getattr(part, "float16_groups", ()),
        getattr(part, "fp32_from_float16_groups", ()),
        strict=True,
    )
    for parameters, mains in groups:
        yield from zip(parameters, mains, strict=True)


def _allocate(part: MegatronOptimizer, *, steps: int) -> None:
    if _is_offloaded(part):
        # Its own loading of a state looks for fp32 copies even of fp32 weights
        # (hybrid_optimizer.py:369). The step is on random gradients; loading replaces all that it
        # changes.
        part.optimizer.dummy_step()
    elif isinstance(part, DistributedOptimizer):
        param_groups = [
            {name: value for name, value in group.items() if name != "params"} | {"step": steps}
            for group in part.optimizer.param_groups
        ]
        part.load_state_dict({"optimizer": {"param_groups": param_groups}})


def _set_state(part: MegatronOptimizer, values: dict, *, steps: int) -> None:
    if not isinstance(part, DistributedOptimizer):
        for i, (_, main) in enumerate(_main_parameters(part)):
            main.data.copy_(values[str(i)])
        return
    if _is_offloaded(part):
        _set_offloaded(part, values, steps=steps)
        return
    # distrib_optimizer.py:941 looks for the step of torch's Adam among the checkpoint's tensors,
    # and it is not there.
    states = list(part.optimizer.state.values())
    counted = [state for state in states if state.pop("step", None) is not None]
    part.load_parameter_state_from_fully_reshardable(values)
    for state in counted:
        state["step"] = torch.tensor(float(steps))


def _is_offloaded(part: MegatronOptimizer) -> bool:
    return isinstance(getattr(part, "optimizer", None), HybridDeviceOptimizer)


def _set_offloaded(part: DistributedOptimizer, values: dict, *, steps: int) -> None:
    """Set the state that the optimizers of host and GPU hold, copies of weights included."""
    hybrid = part.optimizer

    def set_one(model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        parameter = hybrid.param_groups[group]["params"][order]
        hybrid.param_to_inner_param[parameter].data.copy_(tensors["param"])
        state = hybrid.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            state[name].copy_(tensors[name])
        if "step" in state:
            state["step"].fill_(float(steps))

    with (
        mock.patch.object(part, "_set_main_param_and_optimizer_states", set_one),
        mock.patch.object(hybrid, "_sync_hdo_state_to_sub_optimizers", lambda: None),
    ):
        part.load_parameter_state_from_fully_reshardable(values)
