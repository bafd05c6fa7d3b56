# SPDX-License-Identifier: Apache-2.0
"""Rewards to advantages, within groups of responses to one prompt; DAPO's reward and group rules.

Shapes: N responses = P prompts × G responses per prompt, the G of a prompt adjacent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from moe_upgrpo.errors import UserError
from moe_upgrpo.lazy import torch
from moe_upgrpo.losses.names import check_name
from moe_upgrpo.losses.per_token import optimal_token_baseline

if TYPE_CHECKING:
    from torch import Tensor

Group = TypeVar("Group")


def _grpo(rewards_PG: Tensor) -> Tensor:
    """(R − mean)/(std + 1e-6), std with G−1 (arXiv 2402.03300; eps and std as in verl)."""
    return _centred(rewards_PG) / (rewards_PG.std(-1, keepdim=True) + 1e-6)


def _centred(rewards_PG: Tensor) -> Tensor:
    """R − mean: Dr.GRPO (arXiv 2503.20783)."""
    return rewards_PG - rewards_PG.mean(-1, keepdim=True)


def _rloo(rewards_PG: Tensor) -> Tensor:
    """R − mean of the others = (R − mean)·G/(G−1) (arXiv 2402.14740)."""
    group = rewards_PG.shape[-1]
    return _centred(rewards_PG) * (group / (group - 1))


def _maxrl(rewards_PG: Tensor) -> Tensor:
    """(R − mean)/(mean + 1e-6) (SkyRL `maxrl`): for rewards of 0 and more."""
    return _centred(rewards_PG) / (rewards_PG.mean(-1, keepdim=True) + 1e-6)


def _pass_at_k(rewards_PG: Tensor) -> Tensor:
    """(best − second)/(std + 1e-6) for the best, 0 for the others (arXiv 2503.19595; verl).

    If several share the best reward, none has an advantage.
    """
    two = rewards_PG.topk(2, -1)
    lead_P1 = (two.values[:, :1] - two.values[:, 1:]) / (rewards_PG.std(-1, keepdim=True) + 1e-6)
    return torch.zeros_like(rewards_PG).scatter(-1, two.indices[:, :1], lead_P1)


def _opo(rewards_PG: Tensor, lengths_PG: Tensor) -> Tensor:
    """R − Σ length·R/Σ length (arXiv 2505.23585; verl `opo`)."""
    tokens_P1 = lengths_PG.sum(-1, keepdim=True).clamp(min=1)
    return rewards_PG - (lengths_PG * rewards_PG).sum(-1, keepdim=True) / tokens_P1


@dataclass(frozen=True)
class Advantage:
    """An advantage estimator as data.

    formula: as the docs print it; means and std are the group's unless they say otherwise.
    of_group: rewards `[P, G]` -> advantages `[P, G]`; it also takes lengths `[P, G]` where
        `lengths` is set without `sums` (otherwise `sums` takes them).
    sums: the sums over prompts or responses that it needs from the whole batch, which add up over
        the ranks; of_batch: (`of_group`'s result, rewards, the sums) -> advantages.
    several: rewards come as `[K, N]`, K kinds of them.
    whole_batch: a group with equal rewards may have an advantage other than 0.
    allowed: the lowest and the highest reward that it is defined for.
    of_tokens: for one advantage of each token, in place of `of_group`: takes what
        `optimal_token_baseline` does, of the old policy.
    """

    of_group: Callable[..., Tensor]
    formula: str
    source: str
    lengths: bool = False
    sums: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None
    of_batch: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    several: bool = False
    whole_batch: bool = False
    allowed: tuple[float, float] = (-math.inf, math.inf)
    of_tokens: Callable[[Tensor, int, Tensor, Tensor, Tensor], Tensor] | None = None


def _token_moments(x_PG: Tensor, rewards_PG: Tensor, lengths_PG: Tensor) -> Tensor:
    """(tokens, Σx, Σx²) with the response's value at each of its tokens."""
    x_PG, lengths_PG = x_PG.double(), lengths_PG.double()
    return torch.stack([(lengths_PG * x_PG**power).sum() for power in range(3)])


def _whiten(x_PG: Tensor, rewards_PG: Tensor, moments: Tensor) -> Tensor:
    """(x − mean)/√(var + 1e-8), var with N−1, over the tokens of the batch (verl)."""
    tokens, total, squares = moments.double()
    mean = total / tokens.clamp(min=1)
    variance = (squares - tokens * mean**2).clamp(min=0) / (tokens - 1).clamp(min=1)
    return ((x_PG.double() - mean) / (variance + 1e-8).sqrt()).to(x_PG.dtype)


def _as_given(rewards_PG: Tensor) -> Tensor:
    return rewards_PG


def _group_rates(x_PG: Tensor, rewards_PG: Tensor, lengths_PG: Tensor | None) -> Tensor:
    """(prompts, Σp, Σp²), p the mean reward of a prompt."""
    rates_P = rewards_PG.double().mean(-1)
    return torch.stack([(rates_P**power).sum() for power in range(3)])


def _bnpo(centred_PG: Tensor, rewards_PG: Tensor, moments: Tensor) -> Tensor:
    """(R − p)/f(p; α, β), f the density of a Beta distribution (arXiv 2506.02864).

    With the mean p̄ and variance v (with P−1) of p over the batch: a = (p̄(1−p̄)/v − 1)·p̄, b the
    same times 1−p̄; α = max(1 + a/3, 1), β = max(1 + b/3, 1); 1/f within [0, 1e6]. One prompt: p̄ =
    0 and v = 1, as in the authors' code, so that f = 1. The same holds where v is 0 (to 1e-12).
    """
    prompts, total, squares = moments.double()
    mean = total / prompts
    variance = (squares - prompts * mean**2) / (prompts - 1).clamp(min=1)
    if variance < 1e-12:
        return centred_PG
    concentration = mean * (1 - mean) / variance - 1
    alpha = (1 + concentration * mean / 3).clamp(min=1)
    beta = (1 + concentration * (1 - mean) / 3).clamp(min=1)
    p_P1 = rewards_PG.double().mean(-1, keepdim=True)
    log_norm = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    log_f_P1 = torch.xlogy(alpha - 1, p_P1) + torch.special.xlog1py(beta - 1, -p_P1) - log_norm
    return centred_PG * (-log_f_P1).exp().clamp(0, 1e6).to(centred_PG.dtype)


def _rewarded(x_PG: Tensor, rewards_PG: Tensor, lengths_PG: Tensor | None) -> Tensor:
    """(responses, responses with R ≠ 0)"""
    rewarded = rewards_PG.count_nonzero().double()
    return torch.stack([torch.full_like(rewarded, rewards_PG.numel()), rewarded])


def _gpg(centred_PG: Tensor, rewards_PG: Tensor, counts: Tensor) -> Tensor:
    """α·(R − mean), α = responses/those with R ≠ 0 (arXiv 2504.02546; verl `gpg`)."""
    responses, rewarded = counts.double()
    return centred_PG * (responses / rewarded.clamp(min=1)).to(centred_PG.dtype)


_WHITENED: dict[str, Any] = dict(lengths=True, sums=_token_moments, of_batch=_whiten)

ADVANTAGES: dict[str, Advantage] = {
    "grpo": Advantage(
        _grpo, "(R − mean)/(std + 1e-6), std with G−1", "arXiv 2402.03300; verl grpo"
    ),
    "dr-grpo": Advantage(_centred, "R − mean", "arXiv 2503.20783"),
    "rloo": Advantage(_rloo, "R − mean of the others", "arXiv 2402.14740; verl rloo"),
    "maxrl": Advantage(
        _maxrl, "(R − mean)/(mean + 1e-6), R ≥ 0", "SkyRL maxrl", allowed=(0, math.inf)
    ),
    "pass-at-k": Advantage(
        _pass_at_k,
        "(best − second)/(std + 1e-6) for the best, 0 for the others",
        "arXiv 2503.19595; verl grpo_passk",
    ),
    "opo": Advantage(_opo, "R − Σ length·R/Σ length", "arXiv 2505.23585; verl opo", lengths=True),
    "gpg": Advantage(
        _centred,
        "α·(R − mean), α = responses of the batch/those with R ≠ 0",
        "arXiv 2504.02546; verl gpg",
        sums=_rewarded,
        of_batch=_gpg,
    ),
    "bnpo": Advantage(
        _centred,
        "(R − mean)/Beta density(mean; α, β), α and β fitted to the batch's means; R from 0 to 1",
        "arXiv 2506.02864; changyi7231/BNPO",
        sums=_group_rates,
        of_batch=_bnpo,
        allowed=(0, 1),
    ),
    "reinforce++": Advantage(
        _as_given,
        "R, whitened over the tokens of the batch",
        "arXiv 2501.03262; verl reinforce_plus_plus, γ = 1",
        whole_batch=True,
        **_WHITENED,
    ),
    "reinforce++-baseline": Advantage(
        _centred,
        "R − mean, whitened over the tokens of the batch",
        "arXiv 2501.03262; verl reinforce_plus_plus_baseline",
        whole_batch=True,
        **_WHITENED,
    ),
    "gdpo": Advantage(
        _grpo,
        "Σ_k weight_k·(R_k − mean_k)/(std_k + 1e-6), whitened over the tokens of the batch",
        "arXiv 2601.05242; verl gdpo",
        several=True,
        whole_batch=True,
        **_WHITENED,
    ),
    "otb": Advantage(
        _centred,
        "R − Σ R·W_t/Σ W_t over the responses that reach t, W_t = Σ_{j≤t} (1 − 2π_j + Σπ²)",
        "verl optimal_token_baseline",
        of_tokens=optimal_token_baseline,
    ),
}


def register_advantage(name: str, estimator: Advantage | Callable[[Tensor], Tensor]) -> None:
    """Register your own advantage estimator under a name.

    estimator: a function of rewards `[P, G]`, a row for each prompt, or an `Advantage` if it needs
        more than these. The same one may be registered again.

    Raises:
        UserError: a name that another estimator has, an estimator that is neither a function nor an
            `Advantage`, or an `Advantage` with only one of `sums` and `of_batch`.
    """
    if not isinstance(estimator, Advantage):
        estimator = Advantage(estimator, "its own", "register_advantage")
    if not callable(estimator.of_group) or (estimator.sums is None) != (estimator.of_batch is None):
        raise UserError(
            f"register_advantage({name!r}): {estimator.of_group!r} given with sums "
            f"{estimator.sums!r} and of_batch {estimator.of_batch!r}; allowed: a function, and "
            "beside it both of the others or none"
        )
    if ADVANTAGES.get(name, estimator) != estimator:
        raise UserError(
            f"register_advantage: {name!r} given; allowed: a name that is not taken, as are "
            f"{', '.join(ADVANTAGES)}"
        )
    ADVANTAGES[name] = estimator


def group_advantages(
    rewards: Tensor,
    group_size: int,
    kind: str = "grpo",
    *,
    lengths: Tensor | None = None,
    reward_weights: Sequence[float] | None = None,
    batch_sums: Tensor | None = None,
) -> Tensor:
    """One advantage per response from its group's rewards.

    Args:
        rewards: `[N]`, the `group_size` responses to a prompt adjacent; for `gdpo` `[K, N]`, a row
            for each kind of reward.
        group_size: G ≥ 2.
        kind: a name in `ADVANTAGES`.
        lengths: `[N]` response tokens, for the kinds that say so in `ADVANTAGES`.
        reward_weights: K weights for `gdpo`; None: all 1.
        batch_sums: `advantage_sums` added up over all ranks, for the kinds that look at the whole
            batch; None: those of this call.

    Returns:
        `[N]`. A group whose rewards are all equal gets exactly 0 (rounding of the mean would
        otherwise be blown up by the division by a vanishing std), except with the kinds that
        subtract a baseline of the whole batch.

    Raises:
        UserError: unknown kind, N not a multiple of G, G < 2, rewards that are not finite, lengths
            or several rewards missing where they are needed, advantages that are not finite or not
            one for each response.
    """
    estimator, x_PG, rewards_PG, lengths_PG = _estimated(
        rewards, group_size, kind, lengths, reward_weights
    )
    if estimator.of_batch is not None and estimator.sums is not None:
        if batch_sums is None:
            batch_sums = estimator.sums(x_PG, rewards_PG, lengths_PG)
        x_PG = estimator.of_batch(x_PG, rewards_PG, batch_sums.to(x_PG.device))
        x_PG = _checked(kind, x_PG, rewards_PG)
    if estimator.whole_batch:
        return x_PG.flatten()
    return torch.where(_informative(rewards_PG)[:, None], x_PG, 0.0).flatten()


def advantage_sums(
    rewards: Tensor,
    group_size: int,
    kind: str,
    *,
    lengths: Tensor | None = None,
    reward_weights: Sequence[float] | None = None,
) -> Tensor | None:
    """Sums over these responses for a `kind` that needs them over the whole batch; else None.

    Float64, to be added up over the ranks and given to `group_advantages` as `batch_sums`.
    """
    estimator, x_PG, rewards_PG, lengths_PG = _estimated(
        rewards, group_size, kind, lengths, reward_weights
    )
    return None if estimator.sums is None else estimator.sums(x_PG, rewards_PG, lengths_PG)


def _estimated(
    rewards: Tensor,
    group_size: int,
    kind: str,
    lengths: Tensor | None,
    reward_weights: Sequence[float] | None,
) -> tuple[Advantage, Tensor, Tensor, Tensor | None]:
    """The estimator, `of_group`'s advantages, rewards and lengths, each `[P, G]`."""
    check_name("kind", kind, ADVANTAGES)
    estimator = ADVANTAGES[kind]
    if estimator.of_tokens is not None:
        raise UserError(
            f"kind: {kind!r} given, which has an advantage for each token and needs π_old and Σπ² "
            "of each; allowed: ADVANTAGES[kind].of_tokens (optimal_token_baseline), or one of "
            f"{', '.join(name for name, one in ADVANTAGES.items() if one.of_tokens is None)}"
        )
    if estimator.several != (rewards.dim() == 2):
        wanted = "[K, N], a row for each kind of reward" if estimator.several else "[N]"
        several = [name for name, one in ADVANTAGES.items() if one.several]
        raise UserError(
            f"rewards: shape {tuple(rewards.shape)} given with kind {kind!r}; allowed: {wanted} "
            f"(several rewards are taken by {', '.join(several)})"
        )
    kinds = rewards if estimator.several else rewards[None]
    weights = [1.0] * len(kinds) if reward_weights is None else list(reward_weights)
    if len(weights) != len(kinds) or not len(kinds):
        raise UserError(
            f"reward_weights: {len(weights)} given for {len(kinds)} kinds of reward; allowed: one "
            "for each, and at least one kind"
        )
    rewards_KPG = [_grouped(one, group_size) for one in kinds]
    low, high = estimator.allowed
    if any(((one < low) | (one > high)).any() for one in rewards_KPG):
        raise UserError(
            f"rewards: from {float(rewards.min()):g} to {float(rewards.max()):g} given with kind "
            f"{kind!r}; allowed: from {low} to {high}"
        )
    lengths_PG = None
    if estimator.lengths:
        if lengths is None:
            raise UserError(
                f"lengths: None given, and kind {kind!r} needs the tokens of each response; "
                "allowed: [N]"
            )
        lengths_PG = _grouped(lengths, group_size, "lengths")
        if lengths_PG.shape != rewards_KPG[0].shape or (lengths_PG < 0).any():
            raise UserError(
                f"lengths: shape {tuple(lengths.shape)} given; allowed: "
                f"{tuple(kinds[0].shape)}, one for each response, 0 or more"
            )
        lengths_PG = lengths_PG.to(rewards_KPG[0].dtype)
    extra = (lengths_PG,) if estimator.lengths and not estimator.sums else ()
    x_PG = torch.zeros_like(rewards_KPG[0])
    for weight, rewards_PG in zip(weights, rewards_KPG, strict=True):
        advantages_PG = _checked(kind, estimator.of_group(rewards_PG, *extra), rewards_PG)
        if estimator.several:  # as for one reward: equal ones give 0, not their rounding
            advantages_PG = torch.where(_informative(rewards_PG)[:, None], advantages_PG, 0.0)
        x_PG = x_PG + weight * advantages_PG
    return estimator, x_PG, rewards_KPG[0], lengths_PG


def _checked(kind: str, advantages_PG: Tensor, rewards_PG: Tensor) -> Tensor:
    """Return the advantages; UserError where a user's own function gave unusable ones."""
    shape = tuple(getattr(advantages_PG, "shape", ()))
    if shape != tuple(rewards_PG.shape) or not advantages_PG.isfinite().all():
        raise UserError(
            f"advantages {kind!r} of rewards {tuple(rewards_PG.shape)} (prompts, responses) gave "
            f"{shape or type(advantages_PG).__name__}; finite ones of the same shape are needed"
        )
    return advantages_PG


def informative_groups(rewards: Tensor, group_size: int) -> Tensor:
    """`[P]` bool: groups whose rewards are not all equal; DAPO's dynamic sampling keeps these."""
    return _informative(_grouped(rewards, group_size))


def _informative(rewards_PG: Tensor) -> Tensor:
    return rewards_PG.amax(-1) > rewards_PG.amin(-1)


def _grouped(rewards: Tensor, group_size: int, name: str = "rewards") -> Tensor:
    if rewards.dim() != 1 or group_size < 2 or len(rewards) == 0 or len(rewards) % group_size:
        raise UserError(
            f"{name}, group_size: shape {tuple(rewards.shape)}, group_size {group_size} given; "
            "allowed: [N] with N > 0 a multiple of group_size, and group_size >= 2"
        )
    if not rewards.isfinite().all():
        raise UserError(f"{name}: NaN or infinity given; allowed: finite numbers")
    return rewards.to(torch.promote_types(rewards.dtype, torch.float32)).view(-1, group_size)


def dynamic_sampling(
    generate: Callable[[], Sequence[tuple[Group, Sequence[float]]]],
    groups: int,
    max_batches: int,
) -> list[tuple[Group, Sequence[float]]]:
    """DAPO's dynamic sampling: generate until `groups` groups have rewards that are not all equal.

    Args:
        generate: makes one generation batch: pairs of a group (anything) and its rewards.
        groups: how many informative groups to return; a surplus of the last batch is dropped.
        max_batches: bound on the number of calls of `generate`.

    Raises:
        UserError: `groups` or `max_batches` below 1, or too few informative groups after
            `max_batches` batches: the prompts are all too easy or too hard for the policy.
    """
    if groups < 1 or max_batches < 1:
        raise UserError(
            f"groups, max_batches: {groups}, {max_batches} given; allowed: both at least 1"
        )
    kept: list[tuple[Group, Sequence[float]]] = []
    for _ in range(max_batches):
        kept += [(group, rewards) for group, rewards in generate() if max(rewards) > min(rewards)]
        if len(kept) >= groups:
            return kept[:groups]
    raise UserError(
        f"max_batches: {max_batches} gave {len(kept)} groups whose rewards differ, {groups} are "
        "needed; allowed: a larger max_batches, fewer groups, or prompts of medium difficulty"
    )


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int, factor: float = 1.0) -> Tensor:
    """DAPO's soft overlong punishment, to be added to the reward (arXiv 2503.14476, eq. 13).

    0 up to max_length − buffer, then down linearly to −factor at max_length, and −factor beyond:
    −factor·min(max(length − (max_length − buffer), 0)/buffer, 1).

    Args:
        lengths: `[N]` response lengths in tokens.
        max_length, buffer: in tokens, 0 < buffer <= max_length.
        factor: penalty from max_length on, 0 or more.

    Raises:
        UserError: a buffer or a factor out of range.
    """
    if not 0 < buffer <= max_length:
        raise UserError(f"buffer: {buffer} given; allowed: from 1 to max_length = {max_length}")
    if not 0 <= factor < math.inf:
        raise UserError(f"factor: {factor} given; allowed: a finite number, 0 or more")
    lengths = lengths.to(torch.promote_types(lengths.dtype, torch.float32))
    excess = lengths - (max_length - buffer)
    return -factor * (excess / buffer).clamp(0, 1)
