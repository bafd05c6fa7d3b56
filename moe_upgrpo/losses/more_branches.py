# SPDX-License-Identifier: Apache-2.0
"""Per-token losses: those that the stacks added later, and those of the seeds' related work.

The contract is `side.py`; the table of all losses is `branches.py`.
r, s: see `tokens.py`; Δ = log π − log π_old, sg: stop-gradient; εl, εh: `clip_low`, `clip_high`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from moe_upgrpo.lazy import torch
from moe_upgrpo.losses.classic_branches import (
    CLASSIC_BRANCHES,
    by_sign,
    moved_down_tv,
    moved_up_tv,
    ppo_negative,
    ppo_negative_clip,
    ppo_positive,
    ppo_positive_clip,
)
from moe_upgrpo.losses.passes import (
    clamp,
    exceeds,
    falls_below,
    of_sign,
    scaled_square,
    where_below,
)
from moe_upgrpo.losses.side import (
    Branch,
    Side,
    above,
    kept,
    one,
    starting_with,
    token_ratio,
    zero_at_padding,
)
from moe_upgrpo.losses.tokens import MAX_LOG_RATIO, Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from moe_upgrpo.losses.config import PolicyLossConfig as Config
    from moe_upgrpo.losses.side import Bounds, TensorFn


# --- VESPO (TRL `vespo`): REINFORCE under a smooth weight φ of the whole sequence's ratio to μ

MIN_LOG_WEIGHT = math.log(1e-8)


def vespo_side(sign: str) -> Side:
    @kept
    def weight(t: Tokens, cfg: Config) -> Tensor:
        """φ(w) = exp(λ + k·log w − λ·w), w = ∏ π/μ; φ(1) = 1."""
        k, rate = getattr(cfg, f"vespo_k_{sign}"), getattr(cfg, f"vespo_lambda_{sign}")
        moved_BT = t.log_ratio_BT.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        mismatch_BT = t.log_rho_BT.clamp(MIN_LOG_WEIGHT, MAX_LOG_RATIO)
        log_w_B1 = (moved_BT + mismatch_BT).sum(-1, keepdim=True)
        log_w_B1 = log_w_B1.clamp(MIN_LOG_WEIGHT, MAX_LOG_RATIO)
        return (rate + k * log_w_B1 - rate * log_w_B1.exp()).exp()

    def surrogate(t: Tokens, cfg: Config) -> Tensor:
        return weight(t, cfg) * t.log_probs_BT

    return Side(surrogate, weight, weight=weight)


# --- DRO (verl `dro`): REINFORCE with a quadratic penalty on Δ


@zero_at_padding
def dro_penalty(t: Tokens, cfg: Config) -> Tensor:
    return scaled_square(t.raw_log_ratio_BT, cfg.dro_beta / 2)


@zero_at_padding
def dro_penalty_slope(t: Tokens, cfg: Config) -> Tensor:
    return t.raw_log_ratio_BT * cfg.dro_beta


# --- Hinge family (arXiv 2110.13799): |A|·max(0, ε − sign(A)·f) with four classifiers f


def hinge_branch(
    classifier: TensorFn,
    slope: TensorFn,
    *,
    c: str,
    f: str,
    shift: float = 0.0,
    guard: float = math.inf,
) -> Branch:
    """A loss of the hinge family, with f = classifier − shift.

    guard: the log r beyond which the classifier's exp, and with it its gradient, is cut.
    """

    @kept
    def value(t: Tokens, cfg: Config) -> Tensor:
        return classifier(t, cfg)

    def positive(t: Tokens, cfg: Config) -> Tensor:
        """min(f, εh) − εh: A times it is −|A|·max(0, εh − f)."""
        bound = cfg.log_space_upper + shift
        return clamp(value(t, cfg), high=bound).sub_(bound if bound < math.inf else shift)

    def positive_clip(t: Tokens, cfg: Config) -> Bounds:
        bound = cfg.log_space_upper + shift
        if bound < math.inf:
            return None, exceeds(value(t, cfg), bound)
        return None, exceeds(t.log_ratio_BT, guard)

    def negative(t: Tokens, cfg: Config) -> Tensor:
        """max(f, −εl) + εl: A times it is −|A|·max(0, εl + f)."""
        bound = cfg.log_space_lower + shift
        return clamp(value(t, cfg), low=bound).sub_(bound if bound > -math.inf else shift)

    def negative_clip(t: Tokens, cfg: Config) -> Bounds:
        bound = cfg.log_space_lower + shift
        below = falls_below(value(t, cfg), bound) if bound > -math.inf else None
        return below, exceeds(t.log_ratio_BT, guard) if guard < math.inf else None

    return Branch(
        positive=Side(positive, slope, positive_clip),
        negative=Side(negative, slope, negative_clip),
        c=(f"{c}·1[{f} ≤ εh]", f"{c}·1[{f} ≥ −εl]"),
        fields=("clip_low", "clip_high"),
        up=c in ("r", "1"),  # at r = 1 the others weigh a token by π_old and by 1/2
        source="arXiv 2110.13799",
    )


@kept
def probability(t: Tokens, cfg: Config) -> Tensor:
    """π"""
    return t.probability()


def moved_probability(t: Tokens, cfg: Config) -> Tensor:
    """π − π_old"""
    return probability(t, cfg) - t.old_log_probs_BT.clamp_(max=MAX_LOG_RATIO).exp_()


@kept
def root(t: Tokens, cfg: Config) -> Tensor:
    """√r"""
    return (clamp(t.log_ratio_BT, high=2 * MAX_LOG_RATIO) / 2).exp()


def half_root(t: Tokens, cfg: Config) -> Tensor:
    """√r/2"""
    return root(t, cfg) / 2


# --- COPG (arXiv 2311.05846, rebuilt from its abstract): log π under PPO's clip
# min(A·log π, A·clip(log π, log π_old + log(1−ε), log π_old + log(1+ε)))


def copg_positive(t: Tokens, cfg: Config) -> Tensor:
    return clamp(t.log_ratio_BT, high=cfg.log_of_upper).add_(t.old_log_probs_BT)


def copg_positive_clip(t: Tokens, cfg: Config) -> Bounds:
    return None, exceeds(t.log_ratio_BT, cfg.log_of_upper)


def copg_negative(t: Tokens, cfg: Config) -> Tensor:
    return clamp(t.log_ratio_BT, low=cfg.log_of_lower).add_(t.old_log_probs_BT)


def copg_negative_clip(t: Tokens, cfg: Config) -> Bounds:
    return falls_below(t.log_ratio_BT, cfg.log_of_lower), None


# --- IPO (prime-rl's default): DPPO's TV mask on the ratio itself, and kl_tau·(log r)² everywhere


@kept
def beyond_guard(t: Tokens, cfg: Config) -> Tensor:
    return above(t.ratio_BT, t.log_ratio_BT, math.inf)


def ipo_side(dropped: TensorFn, *, upwards: bool) -> Side:
    def clip(t: Tokens, cfg: Config) -> Bounds:
        cut, beyond = dropped(t, cfg), beyond_guard(t, cfg)
        return (None, cut | beyond) if upwards else (cut, beyond)

    return Side(token_ratio, token_ratio, clip, ipo_penalty, ipo_penalty_slope, drop=dropped)


@zero_at_padding
def ipo_penalty(t: Tokens, cfg: Config) -> Tensor:
    return scaled_square(t.raw_log_ratio_BT, cfg.kl_tau)


@zero_at_padding
def ipo_penalty_slope(t: Tokens, cfg: Config) -> Tensor:
    return t.raw_log_ratio_BT * (2 * cfg.kl_tau)


# --- FIPO (arXiv 2603.19835; ms-swift `fipo`): PPO's loss times the influence of the token's future

# ms-swift's decay of the future per token
FUTURE_DECAY = 2 ** (-1 / 32)
# Tokens of a block of the sum over a token's future.
FUTURE_BLOCK = 32


def discounted_future(x_BT: Tensor, decay: float) -> Tensor:
    """y_t = Σ_{k≥t} decay^(k−t)·x_k.

    Within a block, it is a product with the powers of the decay. What the later blocks add is
    itself such a sum, over the blocks' first values.
    """
    (rows, width), n = x_BT.shape, FUTURE_BLOCK
    place = torch.arange(n, device=x_BT.device, dtype=x_BT.dtype)
    powers_nn = (decay ** (place[:, None] - place)).tril()
    if width <= n:
        return x_BT @ powers_nn[:width, :width]
    blocks = -(-width // n)
    rest = blocks * n - width
    padded = torch.nn.functional.pad(x_BT, (0, rest)) if rest else x_BT  # it copies in any case
    y = (padded.reshape(-1, n) @ powers_nn).view(rows, blocks, n)
    later = discounted_future(y[:, 1:, 0], decay**n)
    y[:, :-1].addcmul_(later[..., None], decay ** (n - place))
    return y.view(rows, -1)[:, :width]


def influence(t: Tokens, cfg: Config) -> Tensor:
    """exp(Σ_{k≥t} γ^(k−t)·Δ_k) within [1, 1 + influence_range], detached.

    Tokens with r above the dual clip leave the sum. A negative token with r > 4 has weight 1:
    ms-swift clips it to [.8, 1], and it is never below 1.
    """
    log_ratio_BT = summed_BT = t.log_ratio_BT.detach()
    if cfg.dual < math.inf:
        summed_BT = where_below(log_ratio_BT, log_ratio_BT, math.log(cfg.dual))
    future_BT = discounted_future(summed_BT, FUTURE_DECAY)
    future_BT.clamp_(0.0, math.log1p(cfg.influence_range))
    out = None if summed_BT is log_ratio_BT else summed_BT  # its sums are made
    of_negative_BT = of_sign(log_ratio_BT, t.advantages_BT, positive=False, out=out)
    safe = math.log(cfg.influence_safety)
    return where_below(future_BT, of_negative_BT, safe, or_at=True, out=future_BT).exp_()


def influenced(surrogate: TensorFn, clip: Callable[[Tokens, Config], Bounds]) -> Side:
    return Side(surrogate, token_ratio, clip, factor=influence)


# --- GTPO (arXiv 2508.03772): REINFORCE as a self-ratio under the weights of `gtpo_weights`


def token_weights(t: Tokens, cfg: Config) -> Tensor:
    return t.weights_BT


def weighted_self_ratio(t: Tokens, cfg: Config) -> Tensor:
    return t.weights_BT * t.self_ratio_BT


GSPO = CLASSIC_BRANCHES["gspo"]
DRO = Side(
    lambda t, cfg: t.log_probs_BT,
    one,
    extra=dro_penalty,
    extra_slope=dro_penalty_slope,
    weight=one,
)
GTPO = Side(weighted_self_ratio, token_weights)

MORE_BRANCHES: dict[str, Branch] = {
    "vespo": Branch(
        positive=vespo_side("positive"),
        negative=vespo_side("negative"),
        c=("φ₊(∏π/μ)", "φ₋(∏π/μ)"),
        fields=(
            "vespo_k_positive",
            "vespo_lambda_positive",
            "vespo_k_negative",
            "vespo_lambda_negative",
        ),
        arguments=("rollout_log_probs",),
        refuses=("correction",),  # its own weight has ρ in it
        source="TRL vespo",
    ),
    "luspo": Branch(
        positive=GSPO.positive,
        negative=GSPO.negative,
        c=GSPO.c,
        aggregations=("seq-mean-token-sum",),
        fields=GSPO.fields,
        coupled=True,
        source="TRL luspo: GSPO times the length",
    ),
    "dro": Branch(
        positive=DRO,
        negative=DRO,
        c=("1 − βΔ/A", "1 − βΔ/A"),
        fields=("dro_beta",),
        source="verl dro",
    ),
    "hinge-ratio": hinge_branch(
        token_ratio, token_ratio, c="r", f="r−1", shift=1.0, guard=MAX_LOG_RATIO
    ),
    "hinge-probability": hinge_branch(
        moved_probability,
        probability,
        c="π",
        f="π−π_old",
    ),
    "hinge-log": hinge_branch(lambda t, cfg: t.log_ratio_BT, one, c="1", f="log r"),
    "hinge-root": hinge_branch(
        root,
        half_root,
        c="√r/2",
        f="√r−1",
        shift=1.0,
        guard=2 * MAX_LOG_RATIO,
    ),
    "copg": Branch(
        positive=Side(copg_positive, one, copg_positive_clip),
        negative=Side(copg_negative, one, copg_negative_clip),
        c=("1[r ≤ 1+εh]", "1[r ≥ 1−εl]"),
        fields=("clip_low", "clip_high"),
        source="our reading of the abstract of arXiv 2311.05846",
    ),
    "ipo": Branch(
        positive=ipo_side(moved_up_tv, upwards=True),
        negative=ipo_side(moved_down_tv, upwards=False),
        both=ipo_side(by_sign(moved_up_tv, moved_down_tv), upwards=True),
        c=("r·1[π−π_old ≤ δ] − 2τΔ/A", "r·1[π−π_old ≥ −δ] − 2τΔ/A"),
        fields=("divergence_limit", "kl_tau"),
        source="prime-rl, default loss (DPPO-TV and kl_tau)",
    ),
    "fipo": Branch(
        positive=influenced(ppo_positive, ppo_positive_clip),
        negative=influenced(ppo_negative, ppo_negative_clip),
        c=("w·r·1[r ≤ 1+εh]", "w·r·1[1−εl ≤ r ≤ C]"),
        fields=("clip_low", "clip_high", "dual_clip", "influence_range", "influence_safety"),
        source="arXiv 2603.19835; ms-swift fipo",
    ),
    "gtpo": Branch(
        positive=GTPO,
        negative=GTPO,
        c=("δ", "δ"),
        aggregations=starting_with("seq-mean-token-mean"),
        arguments=("token_weights",),
        up=False,
        source="arXiv 2508.03772v5; winstonsmith1897/GTPO",
    ),
}
