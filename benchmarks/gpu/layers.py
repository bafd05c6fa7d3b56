"""Parts of a layer against Megatron-Core's own: time, peak memory, values.

S positions, N tokens sorted by expert, H hidden size; forward and backward together, in bf16.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.experts import SequentialMLP

from benchmarks.gpu import models
from benchmarks.gpu.checks import Outcome
from benchmarks.gpu.measure import compared, cost, device, relative, settle
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.attention import CausalAttention
from moe_upgrpo.megatron.experts import GroupedExperts
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.model import build_model, transformer_config
from moe_upgrpo.megatron.optimizer import one_call

BF16_LIMIT = 0.02  # relative, for whole tensors: between two orders of rounding


def attention(job) -> Outcome:
    """CausalAttention against Megatron's DotProductAttention."""
    sizes, lines, figures, faults = job.sizes.layer, [], {}, []
    hf = models.config(sizes)
    heads = [sizes["num_attention_heads"], *[sizes["num_key_value_heads"]] * 2]
    with groups.process_groups(Layout()):
        config = transformer_config(hf, Layout(), torch.bfloat16)
        given = config, 1, AttnMaskType.causal, "self"
        ours, plain = CausalAttention(*given), DotProductAttention(*given)
        for length in job.sizes.lengths:
            torch.manual_seed(0)
            tensors = [
                torch.randn(length, 1, count, sizes["head_dim"], device=device())
                .bfloat16()
                .requires_grad_()
                for count in heads
            ]

            def run(module, tensors=tensors) -> list[torch.Tensor]:
                out = module(*tensors, None)
                return [out.detach(), *torch.autograd.grad(out, tensors, out)]

            costs, off = _both(job, run, ours, plain)
            figures[length] = costs | {"relative difference": off}
            lines.append(f"S = {length:,}: {compared(costs['ours'], costs['plain'])}")
            if not off <= BF16_LIMIT:
                faults.append(f"S = {length}: {off:.2g} from Megatron's")
            if job.on_card and costs["ours"]["peak_MB"] > costs["plain"]["peak_MB"] / 4:
                faults.append(f"S = {length}: as much memory as if scores were made")
    return Outcome(line="; ".join(lines), figures=figures, faults=tuple(faults))


def experts(job) -> Outcome:
    """GroupedExperts against Megatron's loop over the experts, on the same weights."""
    sizes = job.sizes.layer | {"num_hidden_layers": 1, "vocab_size": 512}
    tokens = job.sizes.lengths[-1] * sizes["num_experts_per_tok"]
    with groups.process_groups(Layout()):
        (chunk,) = build_model(models.config(sizes), Layout(), torch.bfloat16)
        module = chunk.decoder.layers[0].mlp.experts
        name = type(module).__name__
        if not isinstance(module, SequentialMLP):
            return Outcome(line=f"{name} is used here; there is nothing to compare it with")
        torch.manual_seed(0)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        share = torch.ones(sizes["num_experts"]).multinomial(tokens, replacement=True)
        counts = share.bincount(minlength=sizes["num_experts"])
        hidden = torch.randn(tokens, sizes["hidden_size"], device=device()).bfloat16()
        hidden.requires_grad_()
        gates = torch.rand(tokens, device=device(), requires_grad=True)

        def run(forward) -> list[torch.Tensor]:
            out, _ = forward(module, hidden, counts, gates)
            inputs = [hidden, gates, *module.parameters()]
            return [out.detach(), *torch.autograd.grad(out, inputs, out, allow_unused=True)]

        costs, off = _both(job, run, GroupedExperts.forward, SequentialMLP.forward)
    faults = [] if off <= BF16_LIMIT else [f"{off:.2g} from Megatron's loop"]
    if name != GroupedExperts.__name__:
        faults.append(f"{name} is used here instead of {GroupedExperts.__name__}")
    if job.on_card and costs["ours"]["ms"] > costs["plain"]["ms"]:
        faults.append("slower than the loop")
    return Outcome(
        line=f"{tokens:,} rows, {sizes['num_experts']} experts: "
        f"{compared(costs['ours'], costs['plain'])}",
        figures=costs | {"relative difference": off},
        faults=tuple(faults),
    )


def _both(job, run: Callable, ours, plain) -> tuple[dict, float]:
    """The costs of both, and the largest relative difference of their results."""
    pairs = zip(run(ours), run(plain), strict=True)
    off = max(relative(a, b) for a, b in pairs if b is not None and bool(b.any()))
    costs = {
        name: cost(lambda which=which: run(which), job.sizes.repeats)
        for name, which in (("ours", ours), ("plain", plain))
    }
    gc.collect()
    settle()
    return costs, off


def adam(job) -> Outcome:
    """The call that torch's AdamW is told to make here, against its default one."""
    count = job.sizes.adam_parameters
    steps, after = {}, {}
    for name, options in (("ours", {one_call(): True}), ("plain", {})):
        torch.manual_seed(0)
        weights = [torch.randn(count // 4, device=device(), requires_grad=True) for _ in range(4)]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer = torch.optim.AdamW(weights, lr=1e-3, **options)
        optimizer.step()
        steps[name] = cost(optimizer.step, job.sizes.repeats)
        after[name] = weights[0].detach().cpu()
        del optimizer, weights, weight
        gc.collect()
    off = relative(after["ours"], after["plain"])
    faults = [] if off <= 1e-5 else [f"weights {off:.2g} apart"]
    return Outcome(
        line=f"{count:,} parameters, {one_call()}: {compared(steps['ours'], steps['plain'])}",
        figures=steps | {"option": one_call(), "relative difference": off},
        faults=tuple(faults),
    )
