"""The cost of a replay's health figures: a layer's forward and backward with and without them.

    OMP_NUM_THREADS=1 python benchmarks/micro/health.py [--tokens 1024] [--experts 128]

One transformer layer of Megatron-Core of the given sizes (by default half the width of
Qwen3-30B-A3B's, with its number of experts) under replay of planted routes; a step of training
also has a head, an optimizer and rollouts, so that its share is smaller. Printed with quartiles
over the runs: the time of the counting alone, its top-k included, over that of the layer beside it
(`share`); and the layer with the figures over the layer without, in turn (`ratio`), in which other
work on the machine shows. Claim: a share of at most 1%; exit status 1 beyond it.
"""

import statistics
import sys
import time
from contextlib import nullcontext

import torch
import tyro
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

from moe_upgrpo import kernels
from moe_upgrpo.cli import silence_upstream
from moe_upgrpo.integrations.kit.health import Health
from moe_upgrpo.megatron import backend, groups
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.model import build_model
from moe_upgrpo.routing.health import count_rows
from moe_upgrpo.train.warm_start import tiny_model_config

LIMIT = 0.01


def model_of(hidden: int, width: int, experts: int, top_k: int) -> torch.nn.Module:
    hf = tiny_model_config(
        layers=1,
        hidden=hidden,
        heads=16,
        head_dim=64,
        experts=experts,
        expert_intermediate=width,
        top_k=top_k,
    )
    (chunk,) = build_model(hf, Layout(), torch.float32)
    for parameter in chunk.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    chunk.decoder.layers[0].mlp.router.router_replay = RouterReplay()
    return chunk


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call) -> float:
    settle()
    begin = time.perf_counter()
    call()
    settle()
    return time.perf_counter() - begin


def printed(name: str, values: list[float]) -> float:
    low, median, high = statistics.quantiles(values, n=4)
    print(f"{name}: median {median:.4f} of {len(values)} runs (quartiles {low:.4f} to {high:.4f})")
    return median


def main(
    tokens: int = 1024,
    hidden: int = 1024,
    width: int = 384,
    experts: int = 128,
    top_k: int = 8,
    runs: int = 10,
) -> int:
    silence_upstream()
    kernels.pin()
    torch.manual_seed(0)
    with groups.process_groups(Layout()), backend.apply():
        chunk = model_of(hidden, width, experts, top_k)
        layer = chunk.decoder.layers[0]
        health, replay = Health([chunk]), layer.mlp.router.router_replay
        x = torch.randn(tokens, 1, hidden, device=groups.device())
        given = torch.rand(tokens, experts, device=x.device).topk(top_k).indices
        replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)

        def step() -> None:
            replay.clear_indices()
            replay.set_target_indices(given)
            output, _ = layer(x, attention_mask=None)
            output.square().mean().backward()
            chunk.zero_grad()

        scores = torch.randn(tokens, experts, device=x.device)
        used = torch.zeros(tokens, experts, dtype=torch.bool, device=x.device)
        used.scatter_(1, given, True)

        def counting() -> None:
            count_rows(used, given, scores.topk(top_k).indices)

        shares, ratios = [], []
        for run in range(runs + 1):
            took = {}
            for on in (run % 2 == 0, run % 2 == 1):
                with health.counting() if on else nullcontext():
                    took[on] = seconds(step)
            if run:  # the first warms up
                shares.append(seconds(counting) / took[False])
                ratios.append(took[True] / took[False])
        found = health.take()
    assert found["replay/applied_rate"] == 1 and found["replay/rows"] == tokens * (runs + 1)
    print(f"{tokens} tokens, hidden {hidden}, {experts} experts of {width}, top-{top_k}")
    share = printed("share of the layer's time", shares)
    printed("with / without", ratios)
    return int(share > LIMIT)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
