# SPDX-License-Identifier: Apache-2.0
"""Quantities that a loss may look at, per token: masked log-probs, ratios and advantages.

Shapes: B sequences, T response positions, L MoE layers, K experts per token; a suffix names them
(`mask_BT`). A quantity of a whole sequence is `[B, 1]`, so that it broadcasts over its tokens.
Policies: current = π_θ (trained now), old = π_old (trainer's, at the rollout's weights),
rollout = μ (the engine's).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from moe_upgrpo.errors import NumericalFailure, UserError
from moe_upgrpo.lazy import torch
from moe_upgrpo.losses.passes import (
    clamped_exp,
    exceeds,
    falls_below,
    masked,
    ratio_to_itself,
    weigh,
)

if TYPE_CHECKING:
    from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

# exp() of anything above this is cut, and its gradient with it: e^20 ≈ 4.9e8 leaves room for
# squares in float32, and no loss is meant to work there. Below there is nothing to guard: exp → 0.
MAX_LOG_RATIO = 20.0


# Fields of `Context` with a number for each token.
OF_TOKENS = ("entropy", "draws", "token_weights")


def guarded_exp(log_x: Tensor) -> Tensor:
    """exp(min(x, 20)); gradient exp(x) up to the guard and 0 beyond it."""
    return clamped_exp(log_x, MAX_LOG_RATIO)


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """The function as it is outside torch.autocast, on the device of its first tensor.

    Autocast makes a dot product of float32 one of bfloat16, which counts 301 tokens as 302.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        device = next((x.device.type for x in tensors), "cpu")
        if not torch.amp.is_autocast_available(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


@dataclass(frozen=True, kw_only=True)
class Context:
    """Inputs that only some losses look at; `PolicyLossConfig.arguments` names those of a config.

    groups: `[B]` integers, equal for the responses to one prompt. A group has to be in one
        micro-batch as a whole.
    entropy: `[B, T]` entropy of the policy at each token, in nats.
    draws: `[B, T]` a random number in [0, 1) for each token: `token_draws`.
    token_weights: `[B, T]` weights that a loss is defined with: `gtpo_weights`.
    statistics: numbers over all micro-batches and ranks, from `batch_statistics`; None: those of
        this micro-batch, as with the denominators.
    """

    groups: Tensor | None = None
    entropy: Tensor | None = None
    draws: Tensor | None = None
    token_weights: Tensor | None = None
    statistics: Mapping[str, Tensor | float] | None = None


# As `PolicyLossConfig.arguments` names them.
CONTEXT = tuple(field.name for field in fields(Context))


class Tokens:
    """The inputs of one micro-batch with everything behind the mask replaced by 0.

    The replacement is done by `where` before any exp or product, so padding may hold NaN or ±inf
    and neither value nor gradient sees it; padded tokens have log-ratio 0 and advantage 0.

    Args (all `[B, T]`): see `policy_loss`. `log_router_shift_BT` is log γ ≤ 0 of RSPO. `reads`
    names the fields of `context` that are read.

    Raises:
        UserError: shapes differ, the mask is not 0/1, or an unmasked value is not finite.
    """

    def __init__(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        rollout_log_probs: Tensor | None = None,
        log_router_shift: Tensor | None = None,
        context: Context | None = None,
        reads: Collection[str] = (),
    ):
        self._context = context or Context()
        beside = {n: getattr(self._context, n) for n in OF_TOKENS if n in reads}
        named = {
            "log_probs": log_probs,
            "old_log_probs": old_log_probs,
            "advantages": advantages,
            "rollout_log_probs": rollout_log_probs,
            "router_log_probs": log_router_shift,
            **beside,
        }
        check_shapes(log_probs, {**named, "mask": mask})
        dtype = torch.promote_types(log_probs.dtype, torch.float32)
        self._given_mask_BT = mask
        self.mask_BT, lengths_B1 = mask_and_lengths(mask)
        self.lengths_B1 = lengths_B1.to(dtype)
        self._mask_number_BT = mask.detach() if mask.dtype == dtype else None
        self.raw_log_probs_BT = log_probs.to(dtype)
        self._old_BT = old_log_probs.detach().to(dtype)
        self._log_ratio_BT: Tensor | None = self._log_ratio()
        self._read_log_ratio = False
        self.advantages_BT = self.masked(advantages.detach().to(dtype))
        # log ρ = log π_old − log μ; None (no rollout log-probs, or none needed) means 0
        self._log_rho_BT = self.log_shift_BT = None
        if rollout_log_probs is not None:
            self._log_rho_BT = self.masked(self._old_BT - rollout_log_probs.detach().to(dtype))
        if log_router_shift is not None:
            self.log_shift_BT = self.masked(log_router_shift.detach().to(dtype))

        self._beside = {n: self.masked(x.detach().to(dtype)) for n, x in beside.items()}
        self.statistics: dict[str, Tensor] = {}
        self._made: dict[Hashable, Any] = {}
        seen: tuple[Tensor | None, ...]
        seen = (self._log_ratio_BT, self.advantages_BT, self._log_rho_BT, self.log_shift_BT)
        seen += tuple(self._beside.values())
        sums = [x.detach().sum() for x in seen if x is not None]
        if not torch.stack(sums).sum().isfinite():
            check_finite(named, self.mask_BT)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Call `make` once and keep its result: both sides of a loss and its oracle ask for it."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def groups_B(self) -> Tensor:
        if self._context.groups is None:
            raise ValueError("groups: None given in the context of a loss of groups")
        return self._context.groups

    @property
    def entropy_BT(self) -> Tensor:
        return self._beside["entropy"]

    @property
    def draws_BT(self) -> Tensor:
        return self._beside["draws"]

    @property
    def weights_BT(self) -> Tensor:
        return self._beside["token_weights"]

    @cached_property
    def mask_BT(self) -> Tensor:
        """The mask as bool; made again if asked for after `forget`."""
        return self._given_mask_BT.bool()

    @property
    def raw_log_ratio_BT(self) -> Tensor:
        """log π_θ − log π_old, without RSPO's γ; made again, and not kept, if first asked for after
        `forget`."""
        self._read_log_ratio = True
        return self._log_ratio() if self._log_ratio_BT is None else self._log_ratio_BT

    def _log_ratio(self) -> Tensor:
        return self.masked(self.raw_log_probs_BT - self._old_BT)

    def forget(self) -> None:
        """Free the bool mask, unless it is the one that was given, and a log-ratio that only the
        check of finite numbers has read."""
        self.__dict__.pop("mask_BT", None)
        if not self._read_log_ratio:
            self._log_ratio_BT = None

    def masked(self, x_BT: Tensor) -> Tensor:
        return masked(x_BT, self._any_mask_BT)

    @property
    def _any_mask_BT(self) -> Tensor:
        """The mask as numbers if it was given as such, else as bool."""
        return self.mask_BT if self._mask_number_BT is None else self._mask_number_BT

    def times_log_probs(self, weight: Tensor) -> Tensor:
        """w·log π_θ, w as in `weigh`."""
        return weigh(self.raw_log_probs_BT, weight, self._any_mask_BT)

    def probability(self) -> Tensor:
        """π, 1 at padding; with the condition of `clamped_exp` on the gradient."""
        return clamped_exp(self.raw_log_probs_BT, MAX_LOG_RATIO, self._any_mask_BT)

    # These are not kept: the graph keeps what it needs of them.
    @property
    def gain_BT(self) -> Tensor:
        """A⁺: the advantages above 0, else 0."""
        return self.advantages_BT.clamp(min=0)

    @property
    def pain_BT(self) -> Tensor:
        """A⁻: the advantages below 0, else 0."""
        return self.advantages_BT.clamp(max=0)

    @cached_property
    def positive_BT(self) -> Tensor:
        """A > 0"""
        return exceeds(self.advantages_BT, 0.0)

    @cached_property
    def negative_BT(self) -> Tensor:
        """A < 0"""
        return falls_below(self.advantages_BT, 0.0)

    def by_sign(self, positive: float, negative: float) -> Tensor:
        """`positive` where A > 0, `negative` elsewhere."""
        high, low = (self.advantages_BT.new_tensor(x) for x in (positive, negative))
        return torch.where(self.positive_BT, high, low)

    def of_finite_(self, x_BT: Tensor) -> Tensor:
        """`masked` in place, for numbers that are finite at padding too. Without a gradient."""
        if self._mask_number_BT is None:
            return x_BT.masked_fill_(~self.mask_BT, 0.0)
        return x_BT.mul_(self._mask_number_BT)

    def of_tokens(self, x: Tensor) -> Tensor:
        """x for each token, from `[B, T]` that is 0 at padding, or from `[B, 1]`."""
        shape = self.advantages_BT.shape
        return x if x.shape == shape and shape[-1] > 1 else self.masked(x.expand(shape))

    @property  # nor these
    def log_probs_BT(self) -> Tensor:
        return self.masked(self.raw_log_probs_BT)

    @property
    def old_log_probs_BT(self) -> Tensor:
        return self.masked(self._old_BT)

    @cached_property
    def log_rho_BT(self) -> Tensor:
        """log ρ = log π_old − log μ; zeros where no rollout log-probs were given (bypass)."""
        return (
            torch.zeros_like(self.advantages_BT) if self._log_rho_BT is None else self._log_rho_BT
        )

    def probabilities(self) -> tuple[Tensor, Tensor]:
        """π and π_old, detached, in memory of their own; anything at padding."""
        current_BT, old_BT = self.raw_log_probs_BT.detach(), self._old_BT
        return current_BT.clamp(max=0).exp_(), old_BT.clamp(max=0).exp_()

    def mean_B1(self, x_BT: Tensor) -> Tensor:
        """Mean over a sequence's tokens of a quantity that is 0 at padding; 0 if it has none."""
        return x_BT.sum(-1, keepdim=True) / self.lengths_B1.clamp(min=1)

    @cached_property
    def log_ratio_BT(self) -> Tensor:
        """log r = log π_θ − log π_old (+ log γ when RSPO's router-shift weight is on)."""
        if self.log_shift_BT is None:
            return self.raw_log_ratio_BT
        return self.raw_log_ratio_BT + self.log_shift_BT

    @cached_property
    def ratio_BT(self) -> Tensor:
        """r_t"""
        return guarded_exp(self.log_ratio_BT)

    @property
    def has_ratio(self) -> bool:
        """Whether `ratio_BT` has been made."""
        return "ratio_BT" in self.__dict__

    @cached_property
    def log_sequence_ratio_B1(self) -> Tensor:
        """log s = mean_t log r_t"""
        return self.mean_B1(self.log_ratio_BT)

    @cached_property
    def sequence_ratio_B1(self) -> Tensor:
        """s = (∏_t r_t)^(1/|y|)"""
        return guarded_exp(self.log_sequence_ratio_B1)

    @cached_property
    def log_trajectory_ratio_B1(self) -> Tensor:
        """log R = Σ_t log r_t"""
        return self.log_ratio_BT.sum(-1, keepdim=True)

    @cached_property
    def trajectory_ratio_B1(self) -> Tensor:
        """R = ∏_t r_t"""
        return guarded_exp(self.log_trajectory_ratio_B1)

    @cached_property
    def self_ratio_BT(self) -> Tensor:
        """π_θ/sg(π_θ): value 1, gradient ∇log π_θ."""
        # π_old is constant, so the log-ratio, which is already masked, serves as log π_θ
        return ratio_to_itself(self.raw_log_ratio_BT)

    @cached_property
    def token_sequence_ratio_BT(self) -> Tensor:
        """s_t = sg(s)·π_θ/sg(π_θ): the sequence's value, the token's own gradient."""
        return self.sequence_ratio_B1.detach() * self.self_ratio_BT


def mask_and_lengths(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The mask as bool and the tokens per sequence `[B, 1]`; UserError if it is not bool or 0/1."""
    if mask.dtype == torch.bool:
        return mask, mask.sum(-1, keepdim=True)
    exact = mask if mask.dtype.itemsize >= 4 else mask.to(torch.float32)
    bool_mask, lengths = mask.bool(), exact.sum(-1, keepdim=True)
    if not mask.numel():  # aminmax needs a value
        return bool_mask, lengths
    low, high = exact.aminmax()
    # values in [0, 1] whose sum is their number are all 1 where they are not 0
    if not ((low >= 0) & (high <= 1) & (lengths.double().sum() == bool_mask.count_nonzero())):
        raise UserError("mask: values other than 0 and 1 given; allowed: bool, or only 0 and 1")
    return bool_mask, lengths


def check_shapes(log_probs: Tensor, others: dict[str, Tensor | None]) -> None:
    """Raise UserError naming the first tensor whose shape is not log_probs' `[B, T]`."""
    shape = tuple(log_probs.shape)
    if len(shape) != 2:
        raise UserError(f"log_probs: shape {shape} given; allowed: two dimensions [B, T]")
    for name, x in others.items():
        if x is not None and tuple(x.shape) != shape:
            raise UserError(
                f"{name}: shape {tuple(x.shape)} given; allowed: {shape}, the shape of log_probs"
            )


def check_finite(named: dict[str, Tensor | None], mask_BT: Tensor) -> None:
    """Raise NumericalFailure naming the first tensor that is NaN or infinite inside the mask."""
    for name, x in named.items():
        if x is None:
            continue
        bad = (mask_BT & ~x.isfinite()).nonzero()
        if len(bad):
            b, t = bad[0].tolist()
            raise NumericalFailure(
                f"{name}: {x[b, t].item()} given at sequence {b}, position {t} ({len(bad)} such); "
                "allowed: finite numbers wherever the mask is 1"
            )
