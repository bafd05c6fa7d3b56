"""Random batches for the loss tests."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from moe_upgrpo.losses import BRANCHES, PRESETS, Context, PolicyLossConfig, batch_statistics

EVERY_PRESET = [name for name in PRESETS if name != "pro-grpo"]


def has_extra(config: PolicyLossConfig) -> bool:
    """Whether a term of the loss is not a multiple of the advantage."""
    return any(side.extra is not None for side in config.sides)


# Each sequence has its loss whatever the others are.
ALONE = [
    name
    for name in EVERY_PRESET
    if not has_extra(PRESETS[name]) and BRANCHES[PRESETS[name].negative].statistics is None
]


@dataclass(frozen=True)
class Batch:
    """The tensors of one `policy_loss` call: router log-probs `[B, T, L, K]`, the rest `[B, T]`.

    groups: the same number along a row.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    mask: Tensor
    rollout_log_probs: Tensor
    router_current: Tensor
    router_old: Tensor
    entropy: Tensor
    draws: Tensor
    token_weights: Tensor
    groups: Tensor

    def context(self, statistics: dict | None = None) -> Context:
        width = self.groups.shape[1]
        return Context(
            groups=self.groups[:, 0] if width else torch.zeros(len(self.groups)),
            entropy=self.entropy,
            draws=self.draws,
            token_weights=self.token_weights,
            statistics=statistics,
        )

    def statistics(self, config: PolicyLossConfig) -> dict[str, Tensor]:
        """Statistics of this batch, for the micro-batches that it is split into."""
        return batch_statistics(**self.arguments(config))

    def rows(self, index) -> "Batch":
        return Batch(*(getattr(self, f.name)[index] for f in fields(self)))

    def with_grad(self) -> "Batch":
        return replace(self, log_probs=self.log_probs.detach().clone().requires_grad_())

    def arguments(self, config: PolicyLossConfig, statistics: dict | None = None) -> dict:
        """Keyword arguments for `policy_loss` and `gradient_coefficients`."""
        router = (self.router_current, self.router_old)
        return {
            "log_probs": self.log_probs,
            "old_log_probs": self.old_log_probs,
            "advantages": self.advantages,
            "mask": self.mask,
            "config": config,
            "rollout_log_probs": self.rollout_log_probs,
            "router_log_probs": router if "router_log_probs" in config.arguments else None,
            "context": self.context(statistics),
        }


def random_batch(
    seed: int = 0,
    lengths: tuple[int, ...] = (7, 3, 0, 5, 1, 6),
    width: int = 7,
    spread: float = 0.3,
    dtype: torch.dtype = torch.float64,
) -> Batch:
    """Advantages constant in a sequence, both signs; log-ratios of standard deviation `spread`.

    Groups of two: the rows 0 and 1, 2 and 3, and so on.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rows = len(lengths)
    old = -0.2 - 2 * torch.rand(rows, width, generator=g, dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0] * rows)[:rows, None]
    tensors = (
        old + spread * normal(rows, width),
        old,
        (signs * (0.2 + normal(rows, 1).abs())).expand(rows, width).clone(),
        (torch.arange(width) < torch.tensor(lengths)[:, None]).double(),
        old + 0.05 * normal(rows, width),
        -normal(rows, width, 2, 3).abs(),
        -normal(rows, width, 2, 3).abs(),
        normal(rows, width).abs(),
        torch.rand(rows, width, generator=g, dtype=torch.float64),
        torch.randint(0, 3, (rows, width), generator=g).double(),
        (torch.arange(rows) // 2)[:, None].expand(rows, width).double().clone(),
    )
    return Batch(*(x.to(dtype) for x in tensors))
