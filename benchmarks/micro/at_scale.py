"""Limits of a step on 64 and on 1,024 H100s, the first of them: a model, not a measurement.

    python -m benchmarks.micro.at_scale

Qwen3-30B-A3B on 64 GPUs (TP4·EP8, 4,096 sequences) and Qwen3-235B-A22B on 1,024 (TP4·EP16·PP2,
8,192), all of 1,024 + 8,192 tokens, one to a micro-batch, in four optimizer steps, recomputed, with
every route recorded. Bytes and messages are those of `moe-upgrpo plan`, which
`benchmarks.micro.messages` holds to counts on 2, 4 and 8 processes; the rest is arithmetic on data
sheets (`Machine`). A row is the time that one thing would take alone on its slowest rank; nothing
is taken to overlap, and generation, which other GPUs do, is not in it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from benchmarks.studies.exact.report import table
from moe_upgrpo.cli import silence_upstream
from moe_upgrpo.megatron import memory
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.memory import MicroBatch, Sizes, Stage
from moe_upgrpo.tools.plan import Plan, _passes, make_plan
from moe_upgrpo.tools.plan_options import PlanConfig

CONFIGS = Path(__file__).parents[2] / "examples" / "configs" / "models"
SMALL = "qwen3-30b-a3b"
# Of the published config.json of Qwen3-235B-A22B, what differs from Qwen3-30B-A3B's.
LARGE = {
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "max_window_layers": 94,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Machines of eight GPUs. Rates in FLOP/s and byte/s, each way; times in seconds.

    NVIDIA's H100 SXM data sheet: bf16 without sparsity, HBM3, NVLink (900e9 both ways). DGX H100's:
    one 400 Gbit/s ConnectX-7 for each GPU. NCCL's tuning table (src/graph/tuning.cc, ring, simple):
    start of a collective, a hop over NVLink and over the network. Assumed, not from a source: the
    shares of the peaks that are reached, and the file systems.
    """

    flops: float = 989.4e12
    hbm: float = 3.35e12
    nvlink: float = 450e9
    network: float = 50e9
    start_s: float = 8.4e-6
    nvlink_hop_s: float = 3.4e-6
    network_hop_s: float = 9.6e-6
    gpus: int = 8
    of_flops: float = 0.4
    of_bytes: float = 0.8
    folder: float = 5e9  # rank 0 to the folder that the engine's server reads
    disk: float = 20e9  # all ranks to the file system of checkpoints


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """Processor microseconds for a token of 48 MoE layers, top-8 of 128, on one core.

    Of `python -m benchmarks.micro.recording_scale --tokens 16384` on a busy Intel Cascade Lake.
    Each rank of a copy of the model takes and joins the records of all the copy's tokens; one
    compares both sides and makes rows, and its thread writes them beside the next step.
    """

    joined_us: float = 3.5
    rows_us: float = 2.7
    written_us: float = 5.0


def ring(machine: Machine, size: float, calls: float, ranks: int, in_machine: int) -> float:
    """Seconds of `calls` ring collectives over `ranks` ranks in which each sends `size` bytes.

    `start + hops` each, d − 1 hops, of which those between machines are the network's. Rings that
    leave a machine use the adapters of all the group's ranks in it.
    """
    if ranks == 1:
        return 0.0
    machines = -(-ranks // in_machine)
    rate = machine.nvlink
    if machines > 1:
        rate = min(rate, in_machine * machine.network)
    hops = (machines - 1) * machine.network_hop_s + (ranks - machines) * machine.nvlink_hop_s
    return calls * (machine.start_s + hops) + size / (rate * machine.of_bytes)


def exchange(machine: Machine, size: float, calls: float, ranks: int, in_machine: int) -> float:
    """Seconds of `calls` all-to-alls of `ranks` ranks, each of which sends `size` bytes, evenly.

    Messages go straight to their ranks: one hop each, what leaves the machine by the network.
    """
    if ranks == 1:
        return 0.0
    leaves = size * (ranks - in_machine) / (ranks - 1)
    hop = machine.network_hop_s if leaves else machine.nvlink_hop_s
    rates = machine.nvlink * machine.of_bytes, machine.network * machine.of_bytes
    return calls * (machine.start_s + hop) + max((size - leaves) / rates[0], leaves / rates[1])


def flops(model: Sizes, length: int, *, forwards: int, backwards: int) -> float:
    """Floating-point operations of a token: 2 a forward for each active parameter, and 4·heads·D
    for each of the S/2 tokens before it and each layer; twice as many in a backward."""
    pairs = 4 * model.heads * model.head * model.layers * length / 2
    return (2 * memory.active_parameters(model) + pairs) * (forwards + 2 * backwards)


def hbm_bytes(
    model: Sizes, layout: Layout, stage: Stage, ranks: int, batch: MicroBatch, *,
    micro_batches: int, optimizer_steps: int, forwards: int, backwards: int,
) -> float:  # fmt: skip
    """Bytes that a rank in bf16 reads and writes in its memory.

    For each micro-batch its weights, 2·P a forward and 4·P a backward, gradients 8·P, and what
    autograd would keep of each layer, once written and once read a pass; 30 a parameter whose state
    it has in an optimizer step (gradient, fp32 weight and moments read; the last three and the new
    weight written).
    """
    kept = sum(memory.layer_activations(model, layout, batch, dtype="bfloat16", moe=True).values())
    of_weights = (2 * forwards + 12 * backwards) * stage.parameters
    each = of_weights + 2 * kept * stage.layers * (forwards + 2 * backwards)
    own = memory.own_parameters(stage, layout, ranks)
    return micro_batches * each + optimizer_steps * 30 * own


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One thing that a rank does in a step, and how long alone."""

    name: str
    amount: str
    seconds: float


def rows(plan: Plan, machine: Machine, recording: Recording) -> Iterator[Row]:
    """Things that a step does, on the slowest rank of the fullest stage."""
    config, layout, model, ranks = plan.config, plan.layout, plan.model, plan.config.ranks
    stage, length = plan.fullest.stage, plan.prompt_tokens + plan.new_tokens
    sequences = config.batch.sequences // layout.data_parallel(ranks)
    tokens, steps = sequences * length, config.batch.optimizer_steps
    forwards, backwards = _passes(config)
    passes = {"forwards": forwards, "backwards": backwards}
    of_rank = tokens * flops(model, length, **passes) / (layout.tp * layout.pp)
    yield Row(
        name="products",
        amount=f"{of_rank:.1e} FLOP",
        seconds=of_rank / (machine.flops * machine.of_flops),
    )
    batch = MicroBatch(sequences=1, length=length)
    moved = hbm_bytes(
        model, layout, stage, ranks, batch,
        micro_batches=sequences, optimizer_steps=steps, **passes,
    )  # fmt: skip
    yield _bytes("GPU memory", moved, moved / (machine.hbm * machine.of_bytes))
    calls = memory.messages(
        model, layout, stage, ranks,
        forwards=forwards * sequences, backwards=backwards * sequences, optimizer_steps=steps,
    )  # fmt: skip
    sent, experts = plan.fullest.sent, layout.ep * layout.expert_tp
    in_machine = min(machine.gpus, experts)
    tp = "tensor-parallel"
    yield _bytes(tp, sent[tp], ring(machine, sent[tp], calls[tp], layout.tp, layout.tp))
    ep = "expert-parallel"
    yield _bytes(ep, sent[ep], exchange(machine, sent[ep], calls[ep], experts, in_machine))
    if layout.pp > 1:
        size, count = sent["pipeline"], calls["pipeline"]
        yield _bytes("pipeline", size, exchange(machine, size, count, 2, 1))
    seconds, size = 0.0, sent["data-parallel"]
    of_experts = memory.communication(
        model, layout, replace(stage, shared=0), ranks, tokens=0, dtype="bfloat16",
        optimizer_steps=steps, **passes,
    )["data-parallel"]  # fmt: skip
    for part, copies, apart in (
        (size - of_experts, memory.dense_copies(layout, ranks), layout.tp),
        (of_experts, memory.expert_copies(layout, ranks), experts),
    ):
        seconds += ring(machine, part, 3 * steps, copies, max(1, machine.gpus // apart))
    yield _bytes("data-parallel", size, seconds)
    copy = layout.tp * layout.pp
    records = memory.traces(model, layout, tokens=tokens, layers=stage.moe_layers)
    gathered = records * (copy - 1)
    seconds = ring(machine, gathered, 2 * sequences, copy, min(copy, layout.tp))
    yield _bytes("routes gathered", gathered, seconds)
    for name, each_us in (
        ("routes joined, host", recording.joined_us),
        ("rows made, host", recording.rows_us),
        ("rows written, a thread", recording.written_us),
    ):
        yield Row(
            name=name,
            amount=f"{tokens:,} tokens of a copy",
            seconds=tokens * each_us * 1e-6 * model.moe_layers / 48,
        )
    size = sent["engine"]
    yield _bytes("weights gathered", size, ring(machine, size, 0, experts, in_machine))
    whole = 2 * memory.model_parameters(model)
    yield _bytes("weights to the server", whole, whole / machine.folder)
    kept = 7 * whole  # bf16 weights, fp32 weights and two moments
    if every := config.run.save_every:
        yield _bytes(f"checkpoint, 1 in {every}", kept / every, kept / machine.disk / every)


def _bytes(name: str, size: float, seconds: float) -> Row:
    return Row(name=name, amount=f"{size / 1e9:,.1f} GB", seconds=seconds)


def plans(folder: Path) -> Iterator[tuple[str, Plan]]:
    """The two cases. folder: for the larger model's config.json."""
    large = json.loads((CONFIGS / SMALL / "config.json").read_text(encoding="utf-8")) | LARGE
    (folder / "config.json").write_text(json.dumps(large), encoding="utf-8")
    both = dict(
        data=(Path("problems.parquet"),), max_prompt_tokens=1024, max_new_tokens=8192, group=8,
        dtype="bfloat16", recompute="full", micro_batch=1, engine="vllm",
        engine_url="http://SERVER:8000", reference_kl=False, tp=4, gpu_memory_gb=80,
    )  # fmt: skip
    yield (
        "Qwen3-30B-A3B",
        make_plan(PlanConfig.of(model=CONFIGS / SMALL, ep=8, nodes=8, prompts=512, **both)),
    )
    yield (
        "Qwen3-235B-A22B",
        make_plan(PlanConfig.of(model=folder, ep=16, pp=2, nodes=128, prompts=1024, **both)),
    )


def report(name: str, plan: Plan, found: list[Row]) -> Iterator[str]:
    """Lines of one case: a table, and what limits it first."""
    whole = sum(row.seconds for row in found)
    yield f"{name} on {plan.config.ranks:,} GPUs, {plan.layout}: modelled, not measured"
    yield table(
        ["in a step", "a rank's", "s", "share"],
        [[r.name, r.amount, f"{r.seconds:.1f}", f"{r.seconds / whole:.0%}"] for r in found],
    )
    first, second = sorted(found, key=lambda row: -row.seconds)[:2]
    yield f"first limit: {first.name} ({first.seconds:.0f} s of {whole:.0f}), then {second.name}"
    memory_gb = plan.fullest.peak / 1e9, plan.available / 1e9
    yield f"memory at its fullest: {memory_gb[0]:.1f} of {memory_gb[1]:.1f} GB"


def main() -> None:
    """Print what a step would take on 64 and on 1,024 GPUs."""
    silence_upstream()
    with tempfile.TemporaryDirectory() as folder:
        for name, plan in plans(Path(folder)):
            for line in report(name, plan, list(rows(plan, Machine(), Recording()))):
                print(line)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
