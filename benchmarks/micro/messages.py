"""Messages and bytes of a step, counted on 2, 4 and 8 processes, and as `plan` predicts them.

    python -m benchmarks.micro.messages                       # every layout of `LAYOUTS`
    python -m benchmarks.micro.messages --only TP2·EP4 DP8

Real processes over gloo run the actor's own score (routes and margins recorded), optimizer step and
hand-over of the weights, of a model of eight layers; a step has the same 1,024 tokens on any number
of ranks. Torch's dispatcher is asked for every collective, so the figures are counts, the same on
any machine, and no times. "counted" is the mean over the ranks. "predicted" is what `moe-upgrpo
plan` says (`moe_upgrpo.megatron.memory`), with experts chosen evenly; here each token's are given
so. The exponents are of the growth of a rank's bytes with the ranks of one kind.

Bytes are those that a rank sends to d ranks in a ring, which NCCL takes for long messages: of an
all-reduce of B bytes 2·B·(d − 1)/d, of a gather its own part (d − 1) times, of a reduce-scatter the
part that it keeps (d − 1) times, of an all-to-all what does not stay, of a broadcast B·(d − 1)/d.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from megatron.core import parallel_state
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeForCausalLM

from benchmarks.micro.recording_scale import exponent
from benchmarks.studies.exact.report import table
from moe_upgrpo.cli import silence_upstream
from moe_upgrpo.losses import PolicyLossConfig
from moe_upgrpo.megatron import groups, memory, plan
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.memory import Sizes
from moe_upgrpo.megatron.settings import OptimizerSettings
from moe_upgrpo.train.warm_start import tiny_model_config
from tests.ranks import run_ranks

LENGTH, SEQUENCES, PROMPT, LAYERS = 64, 16, 8, 8
SMALL = 4096  # bytes below which no growth is told
LAYOUTS = {
    **{f"DP{n}": (n, Layout()) for n in (2, 4, 8)},
    **{f"TP{n}": (n, Layout(tp=n)) for n in (2, 4, 8)},
    **{f"EP{n}": (n, Layout(ep=n)) for n in (2, 4, 8)},
    **{f"PP{n}": (n, Layout(pp=n)) for n in (2, 4, 8)},
    "TP2·EP2": (2, Layout(tp=2, ep=2)),
    "TP2·EP4": (4, Layout(tp=2, ep=4)),
    "TP2·EP2·PP2": (8, Layout(tp=2, ep=2, pp=2)),
}
# Groups by what their messages are for, as `memory.communication` names it; the first that fits.
_GROUPS = (
    ("tensor-parallel", parallel_state.get_tensor_model_parallel_group),
    ("pipeline", parallel_state.get_pipeline_model_parallel_group),
    ("expert-parallel", parallel_state.get_expert_model_parallel_group),
    ("expert-parallel", parallel_state.get_expert_tensor_parallel_group),
    ("expert-parallel", parallel_state.get_expert_tensor_and_model_parallel_group),
    ("data-parallel", parallel_state.get_data_parallel_group),
    ("data-parallel", lambda: parallel_state.get_data_parallel_group(with_context_parallel=True)),
    ("data-parallel", parallel_state.get_expert_data_parallel_group),
    ("copy of the model", parallel_state.get_model_parallel_group),
)


@dataclass(slots=True)
class Sent:
    """Messages that a rank sent, and their bytes."""

    calls: float = 0
    bytes: float = 0.0

    def add(self, other: Sent) -> None:
        self.calls += other.calls
        self.bytes += other.bytes


class Counting(TorchDispatchMode):
    """Inside, what this rank sends is counted, by group and collective.

    To be entered inside `groups.process_groups`. On CPUs the backward runs in the thread that asks
    for it, so that its messages are seen too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[tuple[str, str], Sent] = defaultdict(Sent)
        self._names: dict[str, str] = {}
        for name, group in _GROUPS:
            self._names.setdefault(group().group_name, name)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::").strip("_"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, collective: str, args: tuple) -> None:
        (boxed,) = (a for a in args if _is_group(a))
        group = ProcessGroup.unbox(boxed)
        if group.size() == 1 or collective in ("recv", "barrier"):
            return
        tensors = [list(_tensors(arg)) for arg in args]
        splits = args[4] if collective == "alltoall_base" else ()
        size = ring_bytes(
            collective,
            [sum(tensor.nbytes for tensor in part) for part in tensors],
            group.size(),
            stays=splits[group.rank()] / max(1, sum(splits)) if splits else None,
        )
        objects = next(part for part in tensors if part)[0].dtype == torch.uint8
        name = self._names.get(group.group_name, "all ranks")
        sent = self.sent[name, "objects" if objects else collective]
        sent.add(Sent(1, size))


def _is_group(given) -> bool:
    return isinstance(given, torch.ScriptObject) and given._type().name() == "ProcessGroup"


def _tensors(given) -> Iterator[torch.Tensor]:
    if isinstance(given, torch.Tensor):
        yield given
    elif isinstance(given, list | tuple):
        for inner in given:
            yield from _tensors(inner)


def ring_bytes(
    collective: str, sizes: Sequence[int], ranks: int, *, stays: float | None = None
) -> float:
    """Bytes that one of `ranks` ranks sends, see above.

    sizes: bytes of the tensors of each argument of torch's operator, what is received before what
    is given. stays: the share of an all-to-all that is for the rank itself; None: 1/ranks. Raises
    NotImplementedError for a collective that is not known here, rather than miss it.
    """
    if collective == "allreduce":
        return 2 * sizes[0] * (ranks - 1) / ranks
    if collective.startswith("allgather"):
        return sizes[1] * (ranks - 1)
    if collective.startswith("reduce_scatter"):
        return sizes[0] * (ranks - 1)
    if collective == "alltoall_base":
        return sizes[1] * (1 - (1 / ranks if stays is None else stays))
    if collective == "broadcast":
        return sizes[0] * (ranks - 1) / ranks
    if collective == "send":
        return sizes[0]
    raise NotImplementedError(f"What a rank sends in {collective} is not known.")


def made_samples(rank: int, ranks: int, layers: int, experts: int) -> list[Sample]:
    """A data-parallel rank's part of the step, each token's experts given, all equally often."""
    found = []
    for number in range(rank, SEQUENCES, ranks):
        rng = np.random.default_rng(number)
        old = np.full(LENGTH - PROMPT, -1.0, np.float32)
        first = np.arange(LENGTH - 1)[:, None] + np.arange(layers) + number
        found.append(
            Sample(
                tokens=rng.integers(2, 32, LENGTH),
                prompt_length=PROMPT,
                old_log_probs=old,
                rollout_log_probs=old,
                advantage=1.0,
                number=number,
                routes=np.stack([first, first + experts // 2], -1) % experts,
            )
        )
    return found


def config():
    """The model that is counted: eight MoE layers of eight experts, top-2."""
    return tiny_model_config(layers=LAYERS, heads=8, kv_heads=8)


def count(layout: Layout, folder: Path) -> tuple[int, dict[tuple[str, str], Sent]]:
    """Count on a rank; returns its pipeline stage, and what it sent, by name."""
    silence_upstream()
    with groups.process_groups(layout):
        actor = MegatronActor(folder, layout, optimizer=OptimizerSettings())
        samples = made_samples(*groups.data_parallel(), len(actor.layer_ids), actor.num_experts)
        with Counting() as step:
            actor.score(samples)
            actor.update(samples, PolicyLossConfig.preset("up-grpo"))
        with Counting() as engine:
            for _ in actor.export_weights():
                pass
        found: dict[str, Sent] = defaultdict(Sent)
        for (group, collective), sent in step.sent.items():
            name = collective if collective in ("objects", "allreduce") else group
            found[name].add(sent)
        for (_, collective), sent in engine.sent.items():
            if collective != "objects":
                found["engine"].add(sent)
        return parallel_state.get_pipeline_model_parallel_rank(), dict(found)


def predicted(layout: Layout, ranks: int) -> dict[str, Sent]:
    """Messages of a rank as `moe_upgrpo.megatron.memory` has them, the mean over the stages."""
    hf = config()
    model, stages = Sizes.of(hf), plan.stages(hf, layout, ranks, "float32")
    tokens = LENGTH * SEQUENCES / layout.data_parallel(ranks)
    passes = {"forwards": 2, "backwards": 1, "optimizer_steps": 1}
    found: dict[str, Sent] = defaultdict(Sent)
    for stage in stages:
        given = (model, layout, stage, ranks)
        sent = memory.communication(*given, tokens=tokens, dtype="float32", **passes)
        calls = memory.messages(*given, **passes)
        for name, size in sent.items():
            found[name].add(Sent(calls.get(name, 0) / layout.pp, size / layout.pp))
    return dict(found)


def counted(names: Sequence[str]) -> dict[str, dict[str, Sent]]:
    """Means over the ranks of what they sent, by layout and name."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(config()).save_pretrained(folder)
        for name in names:
            ranks, layout = LAYOUTS[name]
            total: dict[str, Sent] = defaultdict(Sent)
            for _, of_rank in run_ranks(ranks, count, layout, Path(folder), timeout_s=300):
                for kind, sent in of_rank.items():
                    total[kind].add(Sent(sent.calls / ranks, sent.bytes / ranks))
            found[name] = dict(total)
    return found


def growth(found: dict[str, dict[str, Sent]]) -> Iterator[str]:
    """Say how a rank's bytes grow with the ranks of one kind, where all three were counted."""
    for kind in ("DP", "TP", "EP", "PP"):
        sizes = [n for n in (2, 4, 8) if f"{kind}{n}" in found]
        if len(sizes) < 3:
            continue
        grown = []
        for name in sorted({name for n in sizes for name in found[f"{kind}{n}"]}):
            values = [found[f"{kind}{n}"].get(name, Sent()).bytes for n in sizes]
            if min(values) > SMALL:
                grown.append(f"{name} ranks^{exponent(sizes, values):+.2f}")
        yield f"{kind}: a rank's bytes grow as " + ", ".join(grown)


def main(only: tuple[str, ...] = tuple(LAYOUTS)) -> None:
    """Count, and print counts beside predictions. only: names of layouts."""
    silence_upstream()
    found = counted(only)
    rows = []
    for name, sent in found.items():
        ranks, layout = LAYOUTS[name]
        expected = predicted(layout, ranks)
        for kind in sorted(sent):
            mine, of_plan = sent[kind], expected.get(kind)
            cells = [name, kind, f"{mine.calls:.1f}", "", f"{mine.bytes:,.0f}", "", ""]
            if of_plan is not None and mine.bytes:
                if of_plan.calls:
                    cells[3] = f"{of_plan.calls:.1f}"
                cells[5:] = f"{of_plan.bytes:,.0f}", f"{of_plan.bytes / mine.bytes:.3f}"
            rows.append(cells)
    heads = ["layout", "messages of a rank", "number", "predicted", "bytes", "predicted", "ratio"]
    print(table(heads, rows))
    for line in growth(found):
        print(line)


if __name__ == "__main__":
    from benchmarks.micro.messages import main  # where the ranks find `count`

    tyro.cli(main, description=__doc__)
