"""Time and peak memory of `policy_loss` against verl 0.9.1's functions, on the same tensors.

    python benchmarks/losses.py [--sequences 512] [--tokens 1024] [--rounds 30] [--device cpu]

One run alternates the two, forward and backward, and reports the median of each, the median of the
per-round ratios (ours / verl's; below 1 is faster) and the peak of memory allocated by the call.
Both compute their metrics: verl's three, all of ours. Exit status 1 if GRPO or GSPO is slower or
heavier than verl's. What to install for verl: tests/losses/test_parity_verl.py.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
import verl.trainer.ppo.core_algos as core_algos
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from verl.workers.config import ActorConfig

from moe_upgrpo.losses import PolicyLossConfig, policy_loss

# our preset, verl's loss, its aggregation, its clip range; the first two are the claim
PAIRS = [
    ("grpo", "vanilla", "token-mean", 0.2, 0.2),
    ("gspo", "gspo", "seq-mean-token-mean", 3e-4, 4e-4),
    ("up-grpo", "vanilla", "token-mean", 0.2, 0.2),
    ("up-gspo", "gspo", "seq-mean-token-mean", 3e-4, 4e-4),
    ("gspo-token", "gspo", "seq-mean-token-mean", 3e-4, 4e-4),
]
CLAIMED = ("grpo", "gspo")


@dataclass
class Arguments:
    sequences: int = 512
    tokens: int = 1024
    rounds: int = 30
    device: str = "cpu"


def tensors(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log-probs, old log-probs, advantages, mask (float, as verl has it); uniform lengths."""
    shape = (arguments.sequences, arguments.tokens)
    g = torch.Generator().manual_seed(0)
    old = -0.05 - 2 * torch.rand(shape, generator=g)
    log_probs = old + 0.1 * torch.randn(shape, generator=g)
    advantages = torch.randn(shape[0], 1, generator=g).expand(shape).contiguous()
    lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=g)
    mask = (torch.arange(shape[1]) < lengths).float()
    return tuple(x.to(arguments.device) for x in (log_probs, old, advantages, mask))


def seconds(call: Callable[[Tensor], tuple], log_probs: Tensor) -> float:
    leaf = log_probs.clone().requires_grad_()
    synchronize = torch.cuda.synchronize if leaf.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    returned = call(leaf)  # held through backward, as a trainer holds it
    returned[0].backward()
    synchronize()
    return time.perf_counter() - start


def peak_bytes(call: Callable[[Tensor], tuple], log_probs: Tensor) -> int:
    """Largest sum of tensors allocated and not yet freed during one forward and backward."""
    leaf = log_probs.clone().requires_grad_()
    if leaf.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        returned = call(leaf)
        returned[0].backward()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        returned = call(leaf)
        returned[0].backward()
    events = recorded.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    if not changes:
        raise RuntimeError("the profiler recorded no allocation")
    held = peak = 0
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    return peak


def main(arguments: Arguments) -> int:
    log_probs, old, advantages, mask = tensors(arguments)
    threads = torch.get_num_threads()
    print(
        f"{arguments.sequences}x{arguments.tokens} float32 on {arguments.device}, {threads} "
        f"thread(s), torch {torch.__version__}, medians of {arguments.rounds} rounds"
    )
    heads = ("ours ms", "verl ms", "ratio", "ours MiB", "verl MiB")
    print(f"{'preset':12}{'verl':10}" + "".join(f"{head:>10}" for head in heads))
    worse = []
    for preset, name, aggregation, low, high in PAIRS:
        config = PolicyLossConfig.preset(preset)
        their_config = ActorConfig(
            strategy="fsdp",
            rollout_n=1,
            ppo_micro_batch_size_per_gpu=1,
            clip_ratio_low=low,
            clip_ratio_high=high,
        )
        their_loss = core_algos.get_policy_loss_fn(name)

        def ours(leaf: Tensor, config=config) -> tuple:
            result = policy_loss(leaf, old, advantages, mask, config=config)
            return result.loss, result

        def theirs(leaf: Tensor, f=their_loss, mode=aggregation, config=their_config) -> tuple:
            return f(old, leaf, advantages, mask, loss_agg_mode=mode, config=config)

        for _ in range(3):
            seconds(ours, log_probs), seconds(theirs, log_probs)
        times = [
            (seconds(ours, log_probs), seconds(theirs, log_probs)) for _ in range(arguments.rounds)
        ]
        ratio = statistics.median(a / b for a, b in times)
        our_ms, their_ms = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        our_peak, their_peak = peak_bytes(ours, log_probs), peak_bytes(theirs, log_probs)
        print(
            f"{preset:12}{name:10}{our_ms:10.2f}{their_ms:10.2f}{ratio:10.2f}"
            f"{our_peak / 2**20:10.1f}{their_peak / 2**20:10.1f}"
        )
        if preset in CLAIMED and (ratio > 1 or our_peak > their_peak):
            worse.append(preset)
    if worse:
        print(f"slower or heavier than verl: {', '.join(worse)}")
    return bool(worse)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
