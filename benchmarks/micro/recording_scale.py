"""Time and memory of the recording of routes, per token, by the number of tokens, layers and ranks.

    OMP_NUM_THREADS=1 python -m benchmarks.micro.recording_scale [--tokens 10000 100000 1000000]
    OMP_NUM_THREADS=1 python -m benchmarks.micro.recording_scale --stages rows written \
        --tokens 10000 100000 1000000 10000000          # 6 GB; other stages hold 1 to 2 kB a token
    OMP_NUM_THREADS=1 python -m benchmarks.micro.recording_scale --layers 12 24 48 --ranks 1 2 4

One core, made-up routes in the shape of a real model (48 MoE layers, top-8 of 128, 10% of routers
differ; `--layers`, `--top-k`, `--experts`), sequences of 1,024 tokens of which 768 are the
response's. Stages, each in a process of its own:

- taken and joined: what routers left behind in a forward is taken, sorted and laid out by sequence
- gathered: the same handed to the other tensor-parallel ranks over gloo (a process each; that of
  the slowest is given)
- rows: both sides compared, the rows of the token log and the step's sums made
- written: those rows to Parquet
- difference encoded: the trainer's routes as what to change in the engine's, a part of "written"
- decoded: both sides' routes read back from their bytes

Printed: processor microseconds and extra peak bytes per token at each size; the exponents of the
growth of time and memory fitted over the sizes (1: linear); and, since buffers of some MB weigh
much at small sizes, the extra bytes of each further token between the smallest and the largest.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

SEQUENCE, PROMPT = 1024, 256
TAP = ("taken and joined", "gathered")
CODEC = ("difference encoded", "decoded")
STAGES = (*TAP, "rows", "written", *CODEC)


class Clock:
    """Processor seconds and extra peak memory of the parts of a stage, by name."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, int]] = {}

    @contextmanager
    def __call__(self, name: str):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        before, begin = _memory("VmRSS"), time.process_time()
        yield
        self.found[name] = (time.process_time() - begin, _memory("VmHWM") - before)


def _memory(name: str) -> int:
    (line,) = (
        x
        for x in Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        if name + ":" in x
    )
    return 1024 * int(line.split()[1])


def make_routes(tokens: int, model: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Both sides' experts [T, L, K], ascending; 10,000 tokens repeated where T is larger."""
    rng, base = np.random.default_rng(0), min(tokens, 10_000)
    scores = rng.random((base * model.layers, model.experts), dtype=np.float32)
    best = scores.argpartition(model.top_k, axis=1)[:, : model.top_k + 1].astype(np.uint8)
    rollout, train = best[:, :-1].copy(), best[:, :-1].copy()
    differ = rng.random(len(best)) < 0.1
    train[differ, 0] = best[differ, -1]
    rollout.sort(axis=1), train.sort(axis=1)
    shape, times = (base, model.layers, model.top_k), (-(-tokens // base), 1, 1)
    return tuple(np.tile(x.reshape(shape), times)[:tokens].copy() for x in (rollout, train))


def tap_stage(tokens: int, model: argparse.Namespace, clock: Clock) -> None:
    """Measure the trainer's side: visits of 16 sequences, as the routers left them."""
    import torch

    from moe_upgrpo import heap
    from moe_upgrpo.megatron import groups, tap

    torch.manual_seed(0)
    batch, world = 16, groups.world_size()
    count = max(1, tokens // (batch * SEQUENCE))
    visits = []
    for _ in range(count):
        traces, rows = {}, batch * SEQUENCE // world
        for layer in range(model.layers):
            trace = tap._Trace(None, ("routes", "margins"))
            ids = torch.randint(model.experts, (rows, model.top_k), dtype=torch.int16)
            trace.own_NK = trace.used_NK = ids
            trace.margins_N = torch.rand(rows)
            traces[layer + 1] = trace
        visits.append(tap.Visit(None, traces, batch))
    runs = tap.together([batch * SEQUENCE] * count, model.layers)
    with clock("gathered" if world > 1 else "taken and joined"):
        joined = [{} for _ in visits]
        for run in runs:
            mine = [tap.hand_over(visits, run, model.experts)]
            tap.join(groups.gather_in_model_copy([(groups.rank(), mine)]), run, joined)
            if run.part + 1 == run.parts:
                heap.give_back()
    assert joined[-1]["routes"].shape == (batch, SEQUENCE, model.layers, model.top_k)


def record_stage(tokens: int, model: argparse.Namespace, clock: Clock) -> None:
    """Measure the way from both sides' sequences to Parquet."""
    from moe_upgrpo.record import SequenceRecord, StepRecord
    from moe_upgrpo.store import TokenLogWriter

    rng = np.random.default_rng(0)
    count, response = max(1, tokens // SEQUENCE), SEQUENCE - PROMPT
    own = min(count, 100)  # further sequences share the routes of these, so that 10⁷ tokens fit
    rollout, train = make_routes(own * (SEQUENCE - 1), model)
    train = train.astype(np.int16)
    margins = rng.random((own * (SEQUENCE - 1), model.layers), dtype=np.float32)

    def numbers() -> np.ndarray:
        return rng.standard_normal(response).astype(np.float32)

    sequences = []
    for i in range(count):
        rows = slice(i % own * (SEQUENCE - 1), (i % own + 1) * (SEQUENCE - 1))
        sequences.append(
            SequenceRecord(
                prompt=i // 8,
                token_ids=rng.integers(0, 1000, SEQUENCE),
                positions=np.arange(PROMPT, SEQUENCE),
                reward=1.0,
                advantage=numbers(),
                logp_rollout=numbers(),
                logp_old=numbers(),
                logp_train=numbers(),
                clipped=np.zeros(response, bool),
                gradient_weight=numbers(),
                rollout_routes=rollout[rows],
                train_routes=train[rows],
                margins=margins[rows],
                entropy=numbers(),
                staleness=0,
                finished=True,
            )
        )
    with clock("rows"):
        record = StepRecord(sequences=sequences, first_sequence=0, num_experts=model.experts)
        columns = record.token_rows()
        record.sums()
    with tempfile.TemporaryDirectory() as folder:
        writer = TokenLogWriter(
            folder,
            rank=0,
            layer_ids=range(model.layers),
            top_k=model.top_k,
            num_experts=model.experts,
        )
        with clock("written"):
            writer.write(1, columns)


def codec_stage(tokens: int, model: argparse.Namespace, clock: Clock) -> None:
    from moe_upgrpo.routing import codec

    rollout, train = make_routes(tokens, model)
    shape = {"num_layers": model.layers, "top_k": model.top_k}
    packed = codec.encode_sets(rollout, num_experts=model.experts)
    with clock("difference encoded"):
        change = codec.encode_difference(rollout, train, num_experts=model.experts)
    with clock("decoded"):
        sets = codec.decode_sets(packed, **shape, num_experts=model.experts)
        found = codec.decode_difference(sets, *change, num_experts=model.experts)
    assert np.array_equal(found, train)


def _work(stage: str, tokens: int, model: argparse.Namespace, environment: dict, answer) -> None:
    os.environ |= environment
    clock = Clock()
    if stage not in TAP:
        _twice(codec_stage if stage in CODEC else record_stage, tokens, model, clock)
    else:
        from moe_upgrpo.megatron import groups
        from moe_upgrpo.megatron.layout import Layout

        with groups.process_groups(Layout(tp=int(environment["WORLD_SIZE"]))):
            _twice(tap_stage, tokens, model, clock)
    answer.send(clock.found)


def _twice(stage, tokens: int, model: argparse.Namespace, clock: Clock) -> None:
    """Run the stage on few tokens first, for imports and tables."""
    stage(SEQUENCE, model, clock)
    stage(tokens, model, clock)


def measure(
    stage: str, tokens: int, model: argparse.Namespace, ranks: int = 2
) -> tuple[float, int]:
    """Seconds of a processor, and extra peak bytes, of a stage in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, answer = context.Pipe(duplex=False)
    world = ranks if stage == "gathered" else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    processes = [
        context.Process(
            target=_work,
            args=(stage, tokens, model, place | {"RANK": str(rank), "LOCAL_RANK": "0"}, answer),
        )
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    answer.close()
    found = [ours.recv()[stage] for _ in processes]
    for process in processes:
        process.join()
    return max(found)


def exponent(sizes: list[int], values: list[float]) -> float:
    """The slope of log values over log sizes, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-9)), 1)[0])


def grown(
    stage: str, of: str, sizes: list[int], found: list[tuple[float, int]], tokens: list[int]
) -> Iterator[str]:
    """Lines of a stage by the sizes of one thing, and how it grows with them."""
    for size, (seconds, extra), count in zip(sizes, found, tokens, strict=True):
        yield f"{stage:18s}{size:10,d}{1e6 * seconds / count:14.2f}{extra / count:24,.0f}"
    if len(sizes) > 1:
        time_of, memory_of = zip(*found, strict=True)
        yield (
            f"{stage:18s} time grows as {of}^{exponent(sizes, time_of):.2f}, "
            f"memory as {of}^{exponent(sizes, memory_of):.2f}"
        )
        if of == "tokens":
            more = (memory_of[-1] - memory_of[0]) / (sizes[-1] - sizes[0])
            yield f"{stage:18s} {more:,.0f} extra bytes for each further token"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384, 131_072, 1_048_576])
    parser.add_argument("--layers", type=int, nargs="+", default=[48])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    given = parser.parse_args(words)
    tokens, layers, ranks = given.tokens, given.layers, given.ranks

    def at(stage: str, tokens: int, layers: int, ranks: int) -> tuple[float, int]:
        model = argparse.Namespace(layers=layers, top_k=given.top_k, experts=given.experts)
        return measure(stage, tokens, model, ranks)

    def table(of: str, sizes: list[int], cases: list[tuple[int, int, int]], stages) -> None:
        print(f"{'':18s}{of:>10s}{'µs per token':>14s}{'extra bytes per token':>24s}")
        for stage in stages:
            found = [at(stage, *case) for case in cases]
            for line in grown(stage, of, sizes, found, [case[0] for case in cases]):
                print(line, flush=True)

    print(f"top-{given.top_k} of {given.experts}; load {os.getloadavg()}")
    first = tokens[0], layers[0], ranks[0]
    print(f"{layers[0]} MoE layers, gathered by {ranks[0]} ranks")
    table("tokens", tokens, [(size, *first[1:]) for size in tokens], given.stages)
    if len(layers) > 1:
        print(f"{tokens[0]:,} tokens, gathered by {ranks[0]} ranks")
        table("layers", layers, [(first[0], size, first[2]) for size in layers], given.stages)
    if len(ranks) > 1:
        print(f"{tokens[0]:,} tokens, {layers[0]} MoE layers")
        table("ranks", ranks, [(*first[:2], size) for size in ranks], ["gathered"])


if __name__ == "__main__":
    main()
