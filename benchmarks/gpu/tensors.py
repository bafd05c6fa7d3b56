"""Checks that need no Megatron-Core: log-probs by rows, the comparison of routes, the loss.

N rows, H hidden size, V vocabulary; B sequences of T tokens; L MoE layers, K experts each.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from benchmarks.gpu.checks import Outcome
from benchmarks.gpu.measure import compared, cost, device, relative, seconds
from benchmarks.micro.compare_routes import EXPERTS, LAYERS, TOP_K, make_routes, naive_overlap
from moe_upgrpo.losses import PolicyLossConfig, policy_loss
from moe_upgrpo.megatron.logprobs import log_probs_and_entropy
from moe_upgrpo.routing import compare_routes, shared
from moe_upgrpo.routing.shared import count_shared

BF16_LIMIT = 0.02
TEMPERATURE = 0.9
COUNTING_GOAL = 0.8
"""Share of a copy's bandwidth at which the Triton kernel should read ids; never measured."""


def log_probs(job) -> Outcome:
    """Log-probs from hidden states, a few rows of logits at a time, against all logits at once."""
    rows, sizes = job.sizes.lengths[-1], job.sizes.layer
    torch.manual_seed(0)
    hidden_NH = torch.randn(rows, sizes["hidden_size"], device=device()).bfloat16()
    weight_VH = torch.randn(sizes["vocab_size"], sizes["hidden_size"], device=device()) * 0.02
    weight_VH = weight_VH.bfloat16().requires_grad_()
    hidden_NH.requires_grad_()
    targets_N = torch.randint(sizes["vocab_size"], (rows,), device=device())
    mask_N = torch.ones(rows, dtype=torch.bool, device=device())
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        return log_probs_and_entropy(
            hidden_NH, weight_VH, targets_N, mask_N, temperature=TEMPERATURE, group=dist.group.WORLD
        )[:2]

    def plain() -> tuple[torch.Tensor, torch.Tensor]:
        log_probs_NV = ((hidden_NH @ weight_VH.t()).float() / TEMPERATURE).log_softmax(-1)
        with torch.no_grad():
            entropy_N = -(log_probs_NV.exp() * log_probs_NV).sum(-1)
        return log_probs_NV.gather(1, targets_N[:, None])[:, 0], entropy_N

    def trained(form) -> list[torch.Tensor]:
        log_probs_N, entropy_N = form()
        gradients = torch.autograd.grad(log_probs_N.mean(), [hidden_NH, weight_VH])
        return [log_probs_N.detach(), entropy_N, *gradients]

    def scored(form) -> None:
        with torch.no_grad():
            form()

    try:
        figures, lines = {}, []
        pairs = zip(trained(ours), trained(plain), strict=True)
        off = max(relative(a, b) for a, b in pairs)
        for what, call in (("score", scored), ("forward and backward", trained)):
            figures[what] = {
                name: cost(lambda call=call, form=form: call(form), job.sizes.repeats)
                for name, form in (("ours", ours), ("plain", plain))
            }
            lines.append(f"{what}: {compared(figures[what]['ours'], figures[what]['plain'])}")
    finally:
        dist.destroy_process_group()
    faults = [] if off <= BF16_LIMIT else [f"{off:.2g} from the plain form"]
    logits_MB = 4 * rows * sizes["vocab_size"] / 1e6
    for what, most in (("score", 0.15), ("forward and backward", 0.30)):
        share = figures[what]["ours"]["peak_MB"] / logits_MB
        figures[what]["peak of one fp32 logits tensor"] = share
        # The head's gradient in its own dtype and in fp32 is not counted: a trainer has both.
        if what == "forward and backward":
            share -= 6 * weight_VH.numel() / 1e6 / logits_MB
        if job.on_card and share > most:
            faults.append(f"{what}: {share:.0%} of one logits tensor; {most:.0%} were promised")
    return Outcome(
        line=f"{rows:,} rows × {sizes['vocab_size']:,}: " + "; ".join(lines),
        figures=figures | {"relative difference": off},
        faults=tuple(faults),
    )


def routes(job) -> Outcome:
    """compare_routes against one copy of the same arrays, and against the naive broadcast."""
    where = str(device())
    rollout, train = make_routes(job.sizes.route_tokens, where)
    part = max(1, len(rollout) // 50)
    targets = torch.empty_like(rollout), torch.empty_like(train)

    def ours():
        return compare_routes(rollout, train, num_experts=EXPERTS)

    def plain() -> torch.Tensor:
        return naive_overlap(rollout[:part], train[:part])

    def counted() -> None:
        count_shared(rollout.flatten(0, 1), train.flatten(0, 1), num_experts=EXPERTS)

    def copied() -> None:
        targets[0].copy_(rollout)
        targets[1].copy_(train)

    costs = {"ours": cost(ours, job.sizes.repeats), "plain": cost(plain, job.sizes.repeats)}
    for name in ("ms", "peak_MB"):
        costs["plain"][name] = round(costs["plain"][name] * len(rollout) / part, 3)
    read = rollout.nbytes + train.nbytes
    bandwidth = 2 * read / seconds(copied, job.sizes.repeats)  # a copy reads and writes
    share = read / (costs["ours"]["ms"] / 1e3) / bandwidth
    counting = 1e3 * seconds(counted, job.sizes.repeats)  # ms
    of_count = (read + len(rollout) * LAYERS) / (counting / 1e3) / bandwidth
    form = shared.form(device().type, top_k=TOP_K, num_experts=EXPERTS).__module__
    right = torch.equal(ours().overlap[:part].long(), plain())
    return Outcome(
        line=f"{len(rollout):,} tokens × {LAYERS} × top-{TOP_K}: "
        f"{compared(costs['ours'], costs['plain'])} (scaled up); {share:.1%} of the bandwidth "
        f"of a copy, {bandwidth / 1e9:,.0f} GB/s; counting alone ({form}): "
        f"{counting:.3g} ms, {of_count:.1%}, goal {COUNTING_GOAL:.0%}",
        figures=costs
        | {
            "share of memory bandwidth": share,
            "copy GB/s": bandwidth / 1e9,
            "counting alone": {"form": form, "ms": counting, "share": of_count},
        },
        faults=() if right else ("overlaps differ from the naive broadcast",),
    )


def loss(job) -> Outcome:
    """policy_loss with its metrics against GRPO's formula written down in torch."""
    B, T = job.sizes.loss_shape
    torch.manual_seed(0)
    old_BT = -torch.rand(B, T, device=device()) * 2
    log_probs_BT = (old_BT + 0.1 * torch.randn_like(old_BT)).requires_grad_()
    advantages_BT = torch.randn(B, 1, device=device()).expand(B, T).contiguous()
    lengths_B1 = torch.randint(1, T + 1, (B, 1), device=device())
    mask_BT = torch.arange(T, device=device()) < lengths_B1
    config = PolicyLossConfig.preset("grpo")

    def ours() -> torch.Tensor:
        return policy_loss(log_probs_BT, old_BT, advantages_BT, mask_BT, config=config).loss

    def plain() -> torch.Tensor:
        ratio_BT = (log_probs_BT - old_BT).exp()
        clipped_BT = ratio_BT.clamp(0.8, 1.2)
        per_token_BT = -torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
        return (per_token_BT * mask_BT).sum() / mask_BT.sum()

    def run(form) -> list[torch.Tensor]:
        value = form()
        return [value.detach(), *torch.autograd.grad(value, [log_probs_BT])]

    off = max(relative(a, b) for a, b in zip(run(ours), run(plain), strict=True))
    costs = {
        name: cost(lambda form=form: run(form), job.sizes.repeats)
        for name, form in (("ours", ours), ("plain", plain))
    }
    return Outcome(
        line=f"{B} × {T:,} tokens, with all metrics: {compared(costs['ours'], costs['plain'])}",
        figures=costs | {"relative difference": off},
        faults=() if off <= 1e-4 else (f"{off:.2g} from the formula",),
    )
