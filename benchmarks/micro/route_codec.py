"""Bytes per token of the two route columns against the routes' entropy, and tokens per second.

    python -m benchmarks.micro.route_codec [--layers 48] [--top-k 8] [--experts 128] \\
        [--mismatch 0.1]

Routes are uniform: the entropy is log2 C(E, K) for each set, and for the other side, independently
in each (token, layer), h(p) of the mismatch and p·log2(K·(E − K)) of the one expert exchanged; real
routes hold less, and a general compressor behind the codec may find some of it. Claim, for the
default model: at most 300 bytes per token. Exit status 1 beyond it.
"""

import argparse
import statistics
import sys
import time
from math import comb, log2

import numpy as np

from moe_upgrpo.routing import codec

LIMIT = 300


def make_routes(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Random expert sets; the trainer's differ by one expert in the given share of the rows."""
    rng = np.random.default_rng(0)
    shape = (arguments.tokens, arguments.layers, arguments.experts)
    chosen = rng.random(shape, dtype=np.float32).argpartition(arguments.top_k, axis=-1)
    chosen = chosen[..., : arguments.top_k + 1].astype(np.int16)
    rollout, train = chosen[..., :-1].copy(), chosen[..., :-1].copy()
    flipped = rng.random(shape[:2]) < arguments.mismatch
    train[flipped, -1] = chosen[flipped, -1]
    return rollout, train


def entropy_bytes(arguments: argparse.Namespace) -> tuple[float, float]:
    L, K, E, p = arguments.layers, arguments.top_k, arguments.experts, arguments.mismatch
    mask = -sum(q * log2(q) for q in (p, 1 - p) if q)
    return L * log2(comb(E, K)) / 8, L * (mask + p * log2(K * (E - K))) / 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--mismatch", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    N, L, K, E = arguments.tokens, arguments.layers, arguments.top_k, arguments.experts

    rollout, train = make_routes(arguments)
    packed = codec.encode_sets(rollout, num_experts=E)
    data, offsets = codec.encode_difference(rollout, train, num_experts=E)
    sets = codec.decode_sets(packed, num_layers=L, top_k=K, num_experts=E)
    trained = codec.decode_difference(sets, data, offsets, num_experts=E)
    assert np.array_equal(sets, np.sort(rollout)) and np.array_equal(trained, np.sort(train))

    entropies = entropy_bytes(arguments)
    took = (packed.shape[1], len(data) / N)
    print(f"{N} tokens x {L} layers, top-{K} of {E}, {arguments.mismatch:.0%} mismatch")
    rows = zip(("rollout", "training"), took, entropies, strict=True)
    for name, size, entropy in [*rows, ("both", sum(took), sum(entropies))]:
        print(
            f"{name:10s}{size:8.1f} bytes per token, entropy {entropy:6.1f}: x {size / entropy:.3f}"
        )

    works = {
        "encode sets": lambda: codec.encode_sets(rollout, num_experts=E),
        "decode sets": lambda: codec.decode_sets(packed, num_layers=L, top_k=K, num_experts=E),
        "encode difference": lambda: codec.encode_difference(rollout, train, num_experts=E),
        "decode difference": lambda: codec.decode_difference(sets, data, offsets, num_experts=E),
    }
    for name, work in works.items():
        seconds = []
        for _ in range(arguments.rounds):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        median, best = statistics.median(seconds), min(seconds)
        print(f"{name:18s}{N / median:10.0f} tokens/s, best round {N / best:10.0f}")
    return int((L, K, E, arguments.mismatch) == (48, 8, 128, 0.1) and sum(took) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
