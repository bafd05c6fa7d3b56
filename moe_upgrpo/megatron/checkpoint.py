# SPDX-License-Identifier: Apache-2.0
"""A training state in Megatron's distributed checkpoints: written in one layout, read in any.

Every tensor is kept under its name in the whole model, with the part that each rank holds: weights,
and the optimizer's fp32 weights and moments (in `fully_reshardable`, the one format of
Megatron-Core 0.16.1 that other tensor-, expert- and pipeline-parallel sizes can read). Line numbers
are those of the released megatron-core 0.16.1.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.utils import unwrap_model

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import backend
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.checkpoint_files import Writer, check_objects, read_in_place, told

# Data-parallel ranks send their parts of the optimizer's state to the first of each group, which
# writes them; otherwise every rank would hold all parts in memory.
_STATES = ("param", "exp_avg", "exp_avg_sq")
_OPTIMIZER = {"distrib_optim_fully_reshardable_mem_efficient": True}


def save_state(
    folder: Path,
    actor: MegatronActor,
    frozen: MegatronActor | None = None,
    reference: MegatronActor | None = None,
) -> dict[str, dict]:
    """Write an actor's weights, optimizer and schedule, and the weights of the frozen actors.

    folder: empty, and visible to every rank. A collective, after at least one optimizer step. The
    files are not synced yet. Returns those that this rank wrote, all but small ones, with sizes
    and checksums as in `store.checkpoints.describe`. Raises OSError where a file cannot be written.
    """
    return ready_state(folder, actor, frozen, reference)()


def ready_state(
    folder: Path,
    actor: MegatronActor,
    frozen: MegatronActor | None = None,
    reference: MegatronActor | None = None,
    *,
    own: dist.ProcessGroup | None = None,
) -> Callable[[], dict[str, dict]]:
    """Make a state ready to be written, by calling what is returned; otherwise as `save_state`.

    own: a group of `groups.own_group`. With it the state is copied to the host's memory, and may be
    written in another thread while the actors change.
    """
    actor.make_whole()
    model = _model_state(actor)
    gathered: set[int] = set()
    state = {
        "model": model,
        "optimizer": _optimizer_state(actor.optimizer, model, gathered),
        "scheduler": actor.scheduler.state_dict(),
        "frozen": _frozen_state(frozen, "frozen"),
        "reference": _frozen_state(reference, "reference"),
    }
    writer = Writer(gathered, own)
    try:
        with backend.suspended():
            dist_checkpointing.save(state, str(folder), sharded_strategy=writer)
    except RuntimeError as error:  # of the small files
        raise told(error) from error
    return writer.write


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
    check_objects(folder)
    try:
        # First the schedule: the optimizer's state is allocated with the number of its steps.
        schedule = dist_checkpointing.load_common_state_dict(str(folder))["scheduler"]
        for part in _parts(actor.optimizer):
            _allocate(part, steps=schedule["num_steps"])
        model = _model_state(actor)
        state = {
            "model": model,
            "optimizer": _optimizer_state(actor.optimizer, model, gathered=None),
            "frozen": _frozen_state(frozen, "frozen"),
            "reference": _frozen_state(reference, "reference"),
        }
        dict_list_map_inplace(_merged_in_place, state)
        with warnings.catch_warnings(), read_in_place(), backend.suspended():
            warnings.simplefilter("ignore", FutureWarning)  # about future changes of torch
            # A rank asks for what it keeps: not for every part whose first copy it is said to have.
            loaded = dist_checkpointing.load(state, str(folder), validate_access_integrity=False)
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


def _frozen_state(actor: MegatronActor | None, name: str) -> dict:
    state = _model_state(actor) if actor else {}
    add_prefix_for_sharding(state, f"{name}.")
    return state


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of dense and of expert parameters that this rank has anything for."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not part.is_stub_optimizer]


def _merged_in_place(value: object) -> object:
    """Spare tensors of several named parts a copy, where the parts were read to their places."""
    if not isinstance(value, ShardedTensorFactory):
        return value

    def merge(parts):
        home = value.data.untyped_storage().data_ptr()
        if all(part.untyped_storage().data_ptr() == home for part in nested_values(parts)):
            return value.data
        return value.merge_fn(parts)

    return replace(value, merge_fn=merge)


def _optimizer_state(optimizer: MegatronOptimizer, model: dict, gathered: set[int] | None) -> dict:
    """Part of the optimizer -> this rank's fp32 weights and moments, as in `_model_state`.

    gathered: gets the memory that is taken for other ranks' parts; None where a state is read.
    """
    states = (_part_state(part, model, gathered) for part in _parts(optimizer))
    # Without SGD's empty parts: the number of parts depends on the layout.
    return {str(i): state for i, state in enumerate(states) if state}


def _part_state(part: MegatronOptimizer, model: dict, gathered: set[int] | None) -> dict:
    """fp32 weights and moments of one part.

    Not `part.sharded_state_dict`: that keeps the parameter groups as well, whose number depends on
    the layout (and which follow from the settings and the schedule), and it needs the state of
    torch's Adam before that exists (distrib_optimizer.py:659).
    """
    parameters = {id(sharded.data): sharded for sharded in _sharded(model)}
    if not isinstance(part, DistributedOptimizer):
        # The only state of SGD without momentum is the fp32 weights of a bf16 model.
        return {
            str(i): make_sharded_optimizer_tensor(
                parameters[id(parameter)], main, prefix="optimizer.state.param"
            )
            for i, (parameter, main) in enumerate(_main_parameters(part))
        }
    if gathered is None or part.data_parallel_group_gloo.size() == 1:
        return {
            str(i): {
                name: make_sharded_optimizer_tensor(
                    parameters[id(parameter)],
                    _place(part, states[name], parameter),
                    prefix=f"optimizer.state.{name}",
                )
                for name in _STATES
            }
            for i, (parameter, _, states) in enumerate(_kept(part))
        }
    with (
        _padding_counted(part),
        mock.patch.object(part, "get_parameter_state_dp_zero", partial(_gathered, part, gathered)),
    ):
        return part.sharded_param_state_fully_reshardable(model, False, _OPTIMIZER) or {}


def _kept(
    part: DistributedOptimizer,
) -> Iterator[tuple[torch.nn.Parameter, slice, dict[str, torch.Tensor]]]:
    """(parameter, this rank's part of it laid flat, fp32 weights and moments of that part)."""
    for ranges in part.gbuf_ranges:
        ((_, buckets),) = ranges.items()
        for bucket in buckets:
            for parameter, places in bucket["param_map"].items():
                place = slice(places["param"].start, places["param"].end)
                yield parameter, place, part._get_main_param_and_optimizer_states(parameter)


def _place(
    part: DistributedOptimizer, state: torch.Tensor, parameter: torch.Tensor
) -> torch.Tensor:
    """A tensor of the parameter's shape: the state itself, where it is fp32 and all of it is here.

    Otherwise room for it on the host.
    """
    whole = state.numel() == parameter.numel() and state.dtype == torch.float32
    if not whole or _is_offloaded(part):
        state = torch.empty(parameter.numel(), device="cpu")
    return state.detach().view(parameter.shape)


def _gathered(
    part: DistributedOptimizer,
    gathered: set[int],
    *,
    use_gloo_comm: bool,
    empty_data: bool,
    return_on_all_ranks: bool,
) -> dict | None:
    """Buffer -> dtype -> fp32 weights and moments of all data-parallel ranks, on the first.

    Upstream (distrib_optimizer.py:977) copies every element several times on its way. Here it is
    gathered straight to its place. To be called inside `_padding_counted`.
    """
    group = part.data_parallel_group_gloo
    first, is_first, ranks = dist.get_process_group_ranks(group)[0], group.rank() == 0, group.size()
    state: dict = {}
    for index, ranges in enumerate(part.gbuf_ranges):
        ((dtype, buckets),) = ranges.items()
        buffer = part.buffers[index]
        whole = {}
        if is_first:
            whole = {name: torch.empty(buffer.numel, device="cpu") for name in _STATES}
            gathered.update(x.untyped_storage().data_ptr() for x in whole.values())
        state[index] = {dtype: whole}
        start = 0
        for bucket, of_bucket in zip(buffer.buckets, buckets, strict=True):
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
            for name in _STATES:
                to = list(shards[name]) if is_first else None
                dist.gather(mine[name], to, dst=first, group=group)
            start += size
    return state if is_first else None


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


@torch.no_grad()
def _set_state(part: MegatronOptimizer, values: dict, *, steps: int) -> None:
    """Set the state that was not read straight to its place, and Adam's count of steps."""
    if not isinstance(part, DistributedOptimizer):
        for i, (_, main) in enumerate(_main_parameters(part)):
            main.copy_(values[str(i)])
        return
    for i, (parameter, place, states) in enumerate(_kept(part)):
        tensors = {name: values[str(i)][name].flatten()[place] for name in _STATES}
        if _is_offloaded(part):
            _set_offloaded(part, parameter, tensors, steps=steps)
            continue
        if any(tensors[name].data_ptr() != states[name].data_ptr() for name in _STATES):
            # The step, of torch's Adam alone, is not among the checkpoint's tensors.
            others = {name: state for name, state in states.items() if name not in _STATES}
            part._set_main_param_and_optimizer_states(parameter, tensors | others)
    for state in part.optimizer.state.values() if not _is_offloaded(part) else ():
        if "step" in state:
            state["step"] = torch.tensor(float(steps))  # its own: each is counted up


def _is_offloaded(part: MegatronOptimizer) -> bool:
    return isinstance(getattr(part, "optimizer", None), HybridDeviceOptimizer)


def _set_offloaded(
    part: DistributedOptimizer,
    parameter: torch.nn.Parameter,
    tensors: dict[str, torch.Tensor],
    *,
    steps: int,
) -> None:
    """Set the state that the optimizers of host and GPU hold, copies of weights included."""
    hybrid = part.optimizer
    group, order = part.model_param_group_index_map[parameter]
    main = hybrid.param_groups[group]["params"][order]
    hybrid.param_to_inner_param[main].data.copy_(tensors["param"])
    state = hybrid.state[main]
    for name in ("exp_avg", "exp_avg_sq"):
        state[name].copy_(tensors[name])
    if "step" in state:
        state["step"].fill_(float(steps))
