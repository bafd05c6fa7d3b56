"""Peak memory and time of log-probs and entropy from hidden states, with a real vocabulary.

    OMP_NUM_THREADS=1 python -m benchmarks.micro.head

One sequence of 8,192 tokens, a vocabulary of 151,936, hidden size 64, fp32, on one rank and split
over two: the most memory of the process (VmHWM) beyond what it held before, hidden states and head
included, in units of the logits of the rank in fp32. "plain" makes the logits and takes their
log-softmax, on an eighth of the tokens. Each figure is of a fresh process.
"""

import time

import torch
import torch.distributed as dist
import tyro

from benchmarks.micro.beside import forget_the_most, resident
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.logprobs import log_probs_and_entropy
from tests.ranks import run_ranks

HIDDEN = 64


def plain(hidden_NH, weight_VH, targets_N, mask_N, *, temperature, group, entropy=True):
    all_NV = (hidden_NH @ weight_VH.t() / temperature).log_softmax(-1)
    of_entropy = -(all_NV.detach().exp() * all_NV.detach()).sum(-1) if entropy else None
    return all_NV.gather(1, targets_N[:, None])[:, 0], of_entropy


def measure(form: str, purpose: str, tokens: int, vocabulary: int, ranks: int) -> tuple:
    """Return (peak in units of the rank's logits, seconds, sum of the log-probs)."""
    torch.set_num_threads(1)
    function = {"plain": plain, "ours": log_probs_and_entropy}[form]
    with groups.process_groups(Layout(tp=ranks)):
        torch.manual_seed(0)
        hidden_NH = torch.randn(tokens, HIDDEN)
        weight_VH = torch.randn(vocabulary, HIDDEN) / 8
        targets_N = torch.randint(vocabulary, (tokens,))
        weight_vH = weight_VH.chunk(ranks)[dist.get_rank()].clone()
        del weight_VH
        if purpose == "update":
            for tensor in (hidden_NH, weight_vH):
                tensor.requires_grad_()
            weight_vH.main_grad = torch.zeros_like(weight_vH)
        forget_the_most()
        before, begin = resident("VmRSS"), time.perf_counter()
        log_probs_N, *_ = function(
            hidden_NH, weight_vH, targets_N, torch.ones(tokens, dtype=torch.bool),
            temperature=0.9, group=dist.group.WORLD, entropy=purpose == "score",
        )  # fmt: skip
        if purpose == "update":
            log_probs_N.sum().backward()
        seconds = time.perf_counter() - begin
        peak = resident("VmHWM") - before
    return peak / (4 * tokens * len(weight_vH)), seconds, float(log_probs_N.detach().sum())


def main(tokens: int = 8192, vocabulary: int = 151_936) -> None:
    print("| form | ranks | score | update | seconds |\n| --- | --- | --- | --- | --- |")
    for form, ranks, share in (("plain", 1, 8), ("ours", 1, 8), ("ours", 1, 1), ("ours", 2, 1)):
        found = {}
        for purpose in ("score", "update"):
            given = (form, purpose, tokens // share, vocabulary, ranks)
            every = run_ranks(ranks, measure, *given, timeout_s=1200)
            found[purpose] = [max(column) for column in zip(*every, strict=True)]
        peaks = " | ".join(f"{found[purpose][0]:.3f}" for purpose in found)
        seconds = ", ".join(f"{found[purpose][1]:.1f}" for purpose in found)
        print(f"| {form}, {tokens // share:,} tokens | {ranks} | {peaks} | {seconds} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
