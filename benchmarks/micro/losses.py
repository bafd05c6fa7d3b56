"""Time and peak memory of every loss against verl 0.9.1's function of its kind, or GRPO here.

    python benchmarks/micro/losses.py [--sequences 512] [--tokens 1024] [--rounds 30] [--device cpu]

One run alternates the two, forward and backward, and reports the median of each, the median of the
per-round ratios (ours / theirs; below 1 is faster) and the peak of memory allocated by the call.
Measured are loss, gradient and, where the counterpart counts what its loss did to the tokens, our
`clipped`, `gradient_weight` and all metrics; verl's gpg counts nothing, and its dro, sapo and
kl_cov give no more than a mean log-ratio: "loss alone" of ours is compared with them. A loss that
verl has none of is compared with GRPO of this library. Exit status 1 if GRPO or GSPO is slower than
verl's, another loss takes more than 1.2 times the time of its counterpart, or one more memory. What
to install for verl: tests/losses/test_parity_verl.py.
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
from verl.workers.config.actor import PolicyLossConfig as VerlPolicyLossConfig

from moe_upgrpo.losses import PRESETS, Context, PolicyLossConfig, policy_loss

# branch of the negative side -> verl's loss of its kind
KINDS = {
    "ppo": "vanilla",
    "gspo": "gspo",
    "gspo-token": "gspo",
    "gmpo": "geo_mean",
    "cispo": "cispo",
    "dppo-tv": "dppo_tv",
    "dppo-kl": "dppo_kl",
    "sapo": "sapo",
    "log-likelihood": "gpg",
    "clip-cov": "clip_cov",
    "kl-cov": "kl_cov",
    "dro": "dro",
}
# They read the router's log-probs, or are another loss's formula with other numbers.
LEFT_OUT = ("pro-grpo", "rspo", "up-rspo")
# verl's functions that count nothing of tokens
WITHOUT_COUNTS = ("gpg", "dro", "sapo", "kl_cov")
CLAIMED = ("grpo", "gspo")
OWN = "grpo (ours)"


@dataclass
class Arguments:
    sequences: int = 512
    tokens: int = 1024
    rounds: int = 30
    device: str = "cpu"
    only: tuple[str, ...] = ()
    """Presets to run; all without it."""


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
    returned = call(leaf)  # kept through backward, as a trainer keeps it
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


def context(arguments: Arguments, mask: Tensor) -> Context:
    """Make all inputs of a loss; groups of 8."""
    g = torch.Generator().manual_seed(1)
    draws = torch.rand(mask.shape, generator=g).to(mask.device)
    groups = torch.arange(arguments.sequences, device=mask.device) // 8
    return Context(draws=draws, groups=groups, token_weights=mask, entropy=draws)


def verls(name: str, config: PolicyLossConfig) -> Callable:
    """verl's function with the clip range of our config; GMPO's lies in log space there too."""
    low, high = config.clip_low, config.clip_high
    options = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=0.2 if low is None else low,
        clip_ratio_high=0.2 if high is None else high,
        policy_loss=VerlPolicyLossConfig(dro_beta=1.0),
    )
    loss = core_algos.get_policy_loss_fn(name)
    return lambda leaf, old, advantages, mask: loss(
        old, leaf, advantages, mask, loss_agg_mode=config.aggregation, config=options
    )


def ours(config: PolicyLossConfig, beside: Context, measures: bool = True) -> Callable:
    def call(leaf: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple:
        result = policy_loss(leaf, old, advantages, mask, config=config, context=beside)
        if measures:
            assert result.metrics
        return result.loss, result

    return call


def main(arguments: Arguments) -> int:
    log_probs, *rest = tensors(arguments)
    beside = context(arguments, rest[-1])
    threads = torch.get_num_threads()
    print(
        f"{arguments.sequences}x{arguments.tokens} float32 on {arguments.device}, {threads} "
        f"thread(s), torch {torch.__version__}, medians of {arguments.rounds} rounds"
    )
    heads = ("ours ms", "theirs ms", "ratio", "ours MiB", "theirs MiB")
    print(f"{'preset':18}{'against':12}{'of ours':14}" + "".join(f"{head:>11}" for head in heads))
    worse = []
    for preset, config in PRESETS.items():
        if preset in LEFT_OUT or (arguments.only and preset not in arguments.only):
            continue
        name = KINDS.get(config.negative, OWN)
        other = ours(PRESETS["grpo"], beside) if name == OWN else verls(name, config)
        measures = name not in WITHOUT_COUNTS
        calls = ours(config, beside, measures), other
        pair = [lambda leaf, call=call: call(leaf, *rest) for call in calls]
        times = [[seconds(call, log_probs) for call in pair] for _ in range(arguments.rounds + 3)][
            3:
        ]
        ratio = statistics.median(a / b for a, b in times)
        our_ms, their_ms = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        our_peak, their_peak = (peak_bytes(call, log_probs) for call in pair)
        of_ours = "with measures" if measures else "loss alone"
        print(
            f"{preset:18}{name:12}{of_ours:14}{our_ms:11.2f}{their_ms:11.2f}{ratio:11.2f}"
            f"{our_peak / 2**20:11.1f}{their_peak / 2**20:11.1f}",
            flush=True,
        )
        # A tensor of tokens is 2 MiB; numbers per sequence are negligible.
        heavier = our_peak > their_peak + 2**15
        if ratio > (1 if preset in CLAIMED else 1.2) or heavier:
            worse.append(preset)
    if worse:
        print(f"slower or heavier than allowed: {', '.join(worse)}")
    return bool(worse)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
