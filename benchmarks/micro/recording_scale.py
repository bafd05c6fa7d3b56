"""Time and memory of the recording of routes, per token and by the number of tokens.

    OMP_NUM_THREADS=1 python -m benchmarks.micro.recording_scale [--tokens 10000 100000 1000000]

One core, made-up routes in the shape of a real model (48 MoE layers, top-8 of 128, 10% of routers
differ; `--layers`, `--top-k`, `--experts`), sequences of 1,024 tokens of which 768 are the
response's. Stages, each in a process of its own:

- taken and joined: what routers left behind in a forward is taken, sorted and laid out by sequence
- gathered: the same handed to another tensor-parallel rank over gloo (two processes; the time of
  one)
- rows: both sides compared, the rows of the token log and the step's sums made
- written: those rows to Parquet
- difference encoded: the trainer's routes as what to change in the engine's, a part of "written"
- decoded: both sides' routes read back from their bytes

Printed: processor microseconds and extra peak bytes per token at each size, and the exponent
of the time's growth fitted over the sizes (1: linear).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import tempfile
import time
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
    """Both sides' experts [T, L, K], ascending; a hundred sequences repeated where T is larger."""
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
    """The trainer's side: visits of 16 sequences, as the routers left them."""
    import torch

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
        joined = []
        for run in runs:
            mine = [tap.hand_over(visits[run], model.experts)]
            shares = groups.gather_in_model_copy([(groups.rank(), mine)])
            joined += tap.join(shares, len(visits[run]))
    assert joined[-1]["routes"].shape == (batch, SEQUENCE, model.layers, model.top_k)


def record_stage(tokens: int, model: argparse.Namespace, clock: Clock) -> None:
    """From both sides' sequences to Parquet."""
    from moe_upgrpo.record import SequenceRecord, StepRecord
    from moe_upgrpo.store import TokenLogWriter

    rng = np.random.default_rng(0)
    count, response = max(1, tokens // SEQUENCE), SEQUENCE - PROMPT
    rollout, train = make_routes(count * (SEQUENCE - 1), model)

    def numbers() -> np.ndarray:
        return rng.standard_normal(response).astype(np.float32)

    sequences = []
    for i in range(count):
        rows = slice(i * (SEQUENCE - 1), (i + 1) * (SEQUENCE - 1))
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
                train_routes=train[rows].astype(np.int16),
                margins=rng.random((SEQUENCE - 1, model.layers), dtype=np.float32),
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
    """Of few tokens first: for imports and tables."""
    stage(SEQUENCE, model, clock)
    stage(tokens, model, clock)


def measure(stage: str, tokens: int, model: argparse.Namespace) -> tuple[float, int]:
    """Seconds of a processor, and extra peak bytes, of a stage in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, answer = context.Pipe(duplex=False)
    world = 2 if stage == "gathered" else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    ranks = [
        context.Process(
            target=_work,
            args=(stage, tokens, model, place | {"RANK": str(rank), "LOCAL_RANK": "0"}, answer),
        )
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    answer.close()
    found = [ours.recv()[stage] for _ in ranks]
    for rank in ranks:
        rank.join()
    return max(found)


def exponent(tokens: list[int], seconds: list[float]) -> float:
    """The slope of log seconds over log tokens, by least squares."""
    return float(np.polyfit(np.log(tokens), np.log(seconds), 1)[0])


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384, 131_072, 1_048_576])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    model = parser.parse_args(words)
    print(
        f"{model.layers} MoE layers, top-{model.top_k} of {model.experts}; load {os.getloadavg()}"
    )
    print(f"{'':18s}{'tokens':>10s}{'µs per token':>14s}{'extra bytes per token':>24s}")
    for stage in model.stages:
        seconds = []
        for tokens in model.tokens:
            took, extra = measure(stage, tokens, model)
            seconds.append(took)
            print(f"{stage:18s}{tokens:10,d}{1e6 * took / tokens:14.2f}{extra / tokens:24,.0f}")
        if len(model.tokens) > 1:
            print(f"{stage:18s}grows as tokens^{exponent(model.tokens, seconds):.2f}")


if __name__ == "__main__":
    main()
