# SPDX-License-Identifier: Apache-2.0
"""Per-token numbers that depend on the rest of the group: OTB, GTPO's weights, NTHR's mask; also
the tokens' random numbers, and when PPO without a clip stops.

Shapes: N responses, the `group_size` of a prompt adjacent, T positions, V ids, H hidden size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from moe_upgrpo.errors import UserError
from moe_upgrpo.lazy import torch
from moe_upgrpo.losses.metrics import Metric
from moe_upgrpo.losses.names import check_name
from moe_upgrpo.losses.tokens import guarded_exp, mask_and_lengths

if TYPE_CHECKING:
    from torch import Tensor


def optimal_token_baseline(
    rewards: Tensor,
    group_size: int,
    old_log_probs: Tensor,
    mask: Tensor,
    sum_pi_squared: Tensor,
    *,
    rollout_weights: Tensor | None = None,
) -> Tensor:
    """OTB: `[N, T]` advantages R − b_t with a baseline for each position (verl
    `optimal_token_baseline`).

    W_t = Σ_{j≤t} (1 − 2π_j + Σπ²)·ρ², b_t = Σ R·W_t/(Σ W_t + 1e-8) over the group's responses that
    reach t. Where only the longest response is left, its baseline is 0; where several with one
    reward are, they get exactly 0 (verl: R times the rounding). The reward comes at the end.

    Args:
        rewards: `[N]`.
        old_log_probs, mask: `[N, T]`.
        sum_pi_squared: `[N, T]` Σ_v π_old(v)² over the vocabulary at each position.
        rollout_weights: `[N, T]` ρ of a rollout correction; None: 1.

    Raises:
        UserError: shapes that do not fit.
    """
    named = {"sum_pi_squared": sum_pi_squared, "mask": mask, "rollout_weights": rollout_weights}
    _check_tokens(named, tuple(old_log_probs.shape), group_size, rewards)
    mask_NT, _ = mask_and_lengths(mask)
    dtype = torch.promote_types(old_log_probs.dtype, torch.float32)
    # (1 − π)² and the others' π², of which rounding may make a little less than nothing.
    step_NT = (1 - 2 * old_log_probs.to(dtype).exp() + sum_pi_squared.to(dtype)).clamp(min=0)
    if rollout_weights is not None:
        step_NT = step_NT * rollout_weights.to(dtype).square()
    step_NT = torch.where(mask_NT, step_NT, 0.0)
    energy_NT = torch.where(mask_NT, step_NT.cumsum(-1), 0.0)
    rewards_N1 = rewards.to(dtype)[:, None]
    grouped = (len(rewards) // group_size, group_size, -1)
    energy_PGT = energy_NT.view(grouped)
    total_P1T = (rewards_N1 * energy_NT).view(grouped).sum(1, keepdim=True)
    baseline_P1T = total_P1T / (energy_PGT.sum(1, keepdim=True) + 1e-8)
    alone_P1T = mask_NT.view(grouped).sum(1, keepdim=True) == 1
    live_PGT, rewards_PG1 = mask_NT.view(grouped), rewards_N1.view(-1, group_size, 1)
    most_P1T = torch.where(live_PGT, rewards_PG1, -math.inf).amax(1, keepdim=True)
    least_P1T = torch.where(live_PGT, rewards_PG1, math.inf).amin(1, keepdim=True)
    baseline_P1T = torch.where(most_P1T == least_P1T, most_P1T, baseline_P1T)
    baseline_P1T = torch.where(alone_P1T, 0.0, baseline_P1T)
    baseline_NT = baseline_P1T.expand(-1, group_size, -1).reshape(mask_NT.shape)
    return torch.where(mask_NT, rewards_N1 - baseline_NT, 0.0)


class Gtpo(NamedTuple):
    """advantages: `[N]`; token_weights: `[N, T]`, for `Context`."""

    advantages: Tensor
    token_weights: Tensor


# The authors' constants.
ENTROPY_LIMIT, ENTROPY_SCALE, CONFLICT_WEIGHT = 0.7, 0.1, 2.0


def gtpo_weights(
    token_ids: Tensor,
    advantages: Tensor,
    mask: Tensor,
    group_size: int,
    mean_entropy: Tensor | None = None,
) -> Gtpo:
    """GTPO's advantages and token weights (arXiv 2508.03772v5; github winstonsmith1897/GTPO).

    A conflict token occurs, with the same position and id, in a completion with A > 0 and in one
    with A < 0 of its group, inside the unbroken run of such tokens from the start, or, with
    positions counted from the end, from the end. δ is 2 at a conflict token of a positive
    completion, 0 of a negative one, 1 elsewhere; the weights are δ from the start times δ from the
    end, over max(conflict tokens of the completion, 1). A completion whose mean entropy is above .7
    gets A = 0, the others A − .1·entropy.

    Args:
        token_ids, mask: `[N, T]`, responses at the left.
        advantages: `[N]`.
        mean_entropy: `[N]` nats, of a completion's tokens; None: the advantages stay.
    """
    _check_tokens({"mask": mask}, tuple(token_ids.shape), group_size, advantages)
    mask_NT, lengths_N1 = mask_and_lengths(mask)
    lengths_N1 = lengths_N1.long()
    positive_N1, negative_N1 = (advantages > 0)[:, None], (advantages < 0)[:, None]
    place_NT = torch.arange(mask.shape[-1], device=mask.device).expand(mask.shape)
    if not ((place_NT < lengths_N1) == mask_NT).all():
        raise UserError(
            "mask: a gap given; allowed: ones from position 0 to the end of each response, as a "
            "conflict is a run of tokens from either end"
        )
    backwards_NT = (lengths_N1 - 1 - place_NT).clamp(min=0)

    def conflicts(ids_NT: Tensor) -> Tensor:
        grouped = (len(ids_NT) // group_size, group_size, -1)
        ids_PGT, live_PGT = ids_NT.view(grouped), mask_NT.view(grouped)
        same_PGGT = (ids_PGT[:, :, None] == ids_PGT[:, None]) & live_PGT[:, None]
        found = [
            (same_PGGT & (sign_N1.view(grouped)[:, None])).any(2)
            for sign_N1 in (positive_N1, negative_N1)
        ]
        both_NT = (found[0] & found[1]).view(ids_NT.shape) & mask_NT
        return both_NT.int().cumprod(-1).bool() & (positive_N1 | negative_N1)

    first_NT = conflicts(token_ids)
    last_NT = conflicts(token_ids.gather(-1, backwards_NT)).gather(-1, backwards_NT) & mask_NT
    of_sign_N1 = torch.where(positive_N1, CONFLICT_WEIGHT, 0.0)
    dtype = torch.promote_types(advantages.dtype, torch.float32)
    weights_NT = torch.where(first_NT, of_sign_N1, 1.0) * torch.where(last_NT, of_sign_N1, 1.0)
    count_N1 = (first_NT | last_NT).sum(-1, keepdim=True).clamp(min=1)
    weights_NT = torch.where(mask_NT, weights_NT / count_N1, 0.0).to(dtype)
    if mean_entropy is None:
        return Gtpo(advantages, weights_NT)
    shaped_N = advantages - ENTROPY_SCALE * mean_entropy
    return Gtpo(torch.where(mean_entropy <= ENTROPY_LIMIT, shaped_N, 0.0), weights_NT)


def nthr_factors(
    hidden: Tensor,
    residuals: Tensor,
    positive: Tensor,
    mask: Tensor,
    *,
    beta: float = 1.0,
    eta: float | None = None,
) -> Tensor:
    """NTHR's factors on the advantages of one group's tokens, `[G, T]`: η where a negative token
    pulls on the likelihood of the positive responses, else 1 (our reading of arXiv 2505.18830).

    With g = e_y − π_old of a token, over the ids sampled in the group, and h its last hidden state:
    M = Σ g·hᵀ over the positive responses' tokens, s = gᵀ·M·h, s̄_i the mean of s over response i.
    A negative token gets η where s > β·min s̄_i over the positive responses. A group of one sign
    gets 1 throughout.

    Args:
        hidden: `[G, T, H]` last hidden states, of the positions whose output the token is.
        residuals: `[G, T, V]` g.
        positive: `[G]` bool, the right responses.
        mask: `[G, T]`.
        beta: β.
        eta: η; None: 2·|.5 − share of right responses|.

    Raises:
        UserError: hidden states or residuals missing, or shapes that do not fit.
    """
    for name, x in (("hidden", hidden), ("residuals", residuals)):
        if x is None or x.dim() != 3 or x.shape[:2] != mask.shape:
            given = None if x is None else tuple(x.shape)
            raise UserError(
                f"{name}: {given} given, and NTHR needs it; allowed: [G, T, ...] with [G, T] = "
                f"{tuple(mask.shape)}"
            )
    if positive.shape != mask.shape[:1]:
        raise UserError(
            f"positive: shape {tuple(positive.shape)} given; allowed: {tuple(mask.shape[:1])}"
        )
    mask_GT, lengths_G1 = mask_and_lengths(mask)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    factors_GT = torch.ones(mask.shape, dtype=dtype, device=hidden.device)
    right_G = positive.bool() & (lengths_G1[:, 0] > 0)
    if not right_G.any() or positive.all():
        return factors_GT
    rows = [
        (h_TH[mask_T].to(dtype), g_TV[mask_T].to(dtype))
        for h_TH, g_TV, mask_T in zip(hidden, residuals, mask_GT, strict=True)
    ]
    right = [row for row, is_right in zip(rows, right_G.tolist(), strict=True) if is_right]
    pull_VH = nthr_pull(*(torch.cat(parts) for parts in zip(*right, strict=True)))
    scores_GT = factors_GT.new_zeros(mask.shape)
    for score_T, mask_T, (h_NH, g_NV) in zip(scores_GT, mask_GT, rows, strict=True):
        score_T[mask_T] = nthr_scores(h_NH, g_NV, pull_VH)
    return nthr_rule(scores_GT, positive, mask_GT, beta=beta, eta=eta)


def nthr_pull(hidden_NH: Tensor, residuals_NV: Tensor) -> Tensor:
    """Sum up M = Σ g·hᵀ, `[V, H]`, over N tokens of right responses."""
    return residuals_NV.t() @ hidden_NH


def nthr_scores(hidden_NH: Tensor, residuals_NV: Tensor, pull_VH: Tensor) -> Tensor:
    """Score N tokens by s = gᵀ·M·h, `[N]`."""
    return ((residuals_NV @ pull_VH) * hidden_NH).sum(-1)


def nthr_rule(
    scores: Tensor, positive: Tensor, mask: Tensor, *, beta: float, eta: float | None
) -> Tensor:
    """The factors `[G, T]` of a group that has both signs, of its tokens' s."""
    mask_GT, lengths_G1 = mask_and_lengths(mask)
    right_G = positive.bool() & (lengths_G1[:, 0] > 0)
    scores_GT = torch.where(mask_GT, scores, 0.0)
    limit = beta * (scores_GT.sum(-1) / lengths_G1[:, 0].clamp(min=1))[right_G].min()
    share = positive.to(scores.dtype).mean()
    factor = 2 * (0.5 - share).abs() if eta is None else torch.full_like(share, eta)
    hit_GT = (scores_GT > limit) & ~positive.bool()[:, None] & mask_GT
    return torch.where(hit_GT, factor, 1.0)


def token_draws(seed: int, sequences: Tensor, width: int) -> Tensor:
    """`[B, T]` numbers in [0, 1), fixed by the seed, the sequence's number and the position.

    A token's number is therefore the same in every micro-batch and on every rank. float64.

    Args:
        seed: of the step.
        sequences: `[B]` integers, a different one for each sequence of the batch.
        width: T.
    """
    place_1T = torch.arange(width, device=sequences.device)[None]
    state = _mixed(_mixed(_mixed(sequences.long()[:, None]) + seed) + place_1T)
    return (state & (2**53 - 1)).double() / 2**53


def _mixed(x: Tensor) -> Tensor:
    """splitmix64's finaliser, on int64 with its wrap-around."""
    x = x + -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return x ^ ((x >> 31) & (2**33 - 1))


def ratio_deviation(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> Metric:
    """Mean of |r − 1| as two sums, which add up over micro-batches and ranks."""
    off_BT, mask_BT = _deviations(log_probs, old_log_probs, mask)
    return Metric(off_BT.sum(dtype=torch.float64), mask_BT.sum())


def stops_early(
    log_probs: Tensor,
    old_log_probs: Tensor,
    mask: Tensor,
    *,
    limit: float = 0.25,
    statistic: str = "mean",
) -> bool:
    """Whether PPO without a clip takes no further step on its batch (arXiv 2202.00079; RL-X espo).

    True where the mean or the median of |r − 1| over the batch's tokens is above `limit`. Tensors
    `[B, T]` of the whole batch; a mean over ranks comes from the summed `ratio_deviation`.

    Raises:
        UserError: an unknown statistic, a limit that is not above 0, a mask that selects nothing.
    """
    check_name("statistic", statistic, ("mean", "median"))
    if not limit > 0:
        raise UserError(f"limit: {limit} given; allowed: a number > 0")
    off_BT, mask_BT = _deviations(log_probs, old_log_probs, mask)
    if not mask_BT.any():
        raise UserError("mask: 0 tokens selected; allowed: at least one")
    return bool(getattr(off_BT[mask_BT], statistic)() > limit)


def _deviations(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    mask_BT, _ = mask_and_lengths(mask)
    dtype = torch.promote_types(log_probs.dtype, torch.float32)
    log_ratio_BT = log_probs.detach().to(dtype) - old_log_probs.detach().to(dtype)
    return (guarded_exp(torch.where(mask_BT, log_ratio_BT, 0.0)) - 1).abs(), mask_BT


def _check_tokens(
    named: dict[str, Tensor | None], shape: tuple[int, ...], group_size: int, of_responses: Tensor
) -> None:
    """Raise UserError where a shape is not `[N, T]`, or N is not a multiple of the group size."""
    for name, x in named.items():
        if x is not None and tuple(x.shape) != shape:
            raise UserError(f"{name}: shape {tuple(x.shape)} given; allowed: {shape}")
    if tuple(of_responses.shape) != shape[:1] or group_size < 2 or shape[0] % group_size:
        raise UserError(
            f"{tuple(of_responses.shape)} responses in groups of {group_size} given with tokens of "
            f"shape {shape}; allowed: one number for each response, and N a multiple of "
            "group_size >= 2"
        )
