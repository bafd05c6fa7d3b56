"""compare_routes on 1M tokens x 48 layers x top-8 of 128 in int32, one thread, against one copy.

Claim: comparing takes at most 5 times as long as copying the two arrays once, into memory that is
already mapped. The naive broadcast ([R, K, 1] == [R, 1, K]) is timed on a part of the rows, in the
same run, and scaled up. Rounds are interleaved; the medians are compared.

    python benchmarks/micro/compare_routes.py [--tokens 1000000] [--rounds 3] [--device cpu]
"""

import argparse
import statistics
import time

import torch

from moe_upgrpo.routing import compare_routes

LAYERS, TOP_K, EXPERTS = 48, 8, 128
NAIVE_SHARE = 50


def make_routes(tokens: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random expert sets; the trainer's differ from the rollout's by one expert in ~10% of rows."""
    rows = min(tokens, 10_000) * LAYERS
    scores = torch.rand(rows, EXPERTS, device=device)
    chosen = scores.topk(TOP_K + 1, dim=1).indices.to(torch.int32)
    rollout, train = chosen[:, :TOP_K], chosen[:, :TOP_K].clone()
    flipped = torch.rand(rows, device=device) < 0.1
    train[flipped, TOP_K - 1] = chosen[flipped, TOP_K]
    repeat = -(-tokens // min(tokens, 10_000))
    return tuple(
        side.view(-1, LAYERS, TOP_K).repeat(repeat, 1, 1)[:tokens].contiguous()
        for side in (rollout, train)
    )


def naive_overlap(rollout: torch.Tensor, train: torch.Tensor) -> torch.Tensor:
    return (rollout[..., :, None] == train[..., None, :]).sum(dim=(-1, -2))


def timed(work, device: str) -> float:
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)

    rollout, train = make_routes(args.tokens, args.device)
    target = torch.zeros_like(rollout)
    part = max(1, args.tokens // NAIVE_SHARE)
    works = {
        "copy": lambda: (target.copy_(rollout), target.copy_(train)),
        "compare": lambda: compare_routes(rollout, train, num_experts=EXPERTS),
        "naive": lambda: naive_overlap(rollout[:part], train[:part]),
    }
    seconds = {name: [] for name in works}
    for work in works.values():  # warm-up: pages mapped, kernels loaded
        work()
    for _ in range(args.rounds):
        for name, work in works.items():
            seconds[name].append(timed(work, args.device))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    median["naive"] *= args.tokens / part

    gigabytes = 2 * rollout.nbytes / 1e9
    divergence = compare_routes(rollout, train, num_experts=EXPERTS)
    expected = naive_overlap(rollout[:part], train[:part])
    assert torch.equal(divergence.overlap[:part].long(), expected)
    print(f"{args.tokens} tokens x {LAYERS} x {TOP_K} int32, {gigabytes:.2f} GB, {args.device}")
    print(f"router mismatch rate {divergence.router_mismatch_rate:.4f}")
    for name, value in median.items():
        spread = max(seconds[name]) / min(seconds[name]) - 1
        print(
            f"{name:8s} {value:8.3f} s  {gigabytes / value:8.2f} GB/s read  "
            f"{value / median['copy']:7.2f} x copy  (rounds spread {spread:.0%})"
        )


if __name__ == "__main__":
    main()
