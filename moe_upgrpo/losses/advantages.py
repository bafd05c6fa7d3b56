"""Rewards to advantages, within groups of responses to one prompt; DAPO's reward and group rules.

Shapes: N responses = P prompts × G responses per prompt, the G of a prompt adjacent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from moe_upgrpo.errors import UserError, nearest
from moe_upgrpo.lazy import torch

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


ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "grpo": _grpo,
    "dr-grpo": _centred,
    "rloo": _rloo,
}


def register_advantage(name: str, function: Callable[[Tensor], Tensor]) -> None:
    """Give advantages of one's own a name: a function of rewards `[P, G]`, a row for each prompt.

    Raises UserError where the name is another's.
    """
    if ADVANTAGES.get(name, function) is not function:
        raise UserError(
            f"register_advantage: {name!r} given; allowed: a name that is not taken, as are "
            f"{', '.join(ADVANTAGES)}"
        )
    ADVANTAGES[name] = function


def group_advantages(rewards: Tensor, group_size: int, kind: str = "grpo") -> Tensor:
    """One advantage per response from its group's rewards.

    Args:
        rewards: `[N]`, the `group_size` responses to a prompt adjacent.
        group_size: G ≥ 2.
        kind: `grpo` (R − mean)/(std + 1e-6), `dr-grpo` R − mean, `rloo` R − mean of the others, or
            the name of one that is registered.

    Returns:
        `[N]`. A group whose rewards are all equal gets exactly 0 (rounding of the mean would
        otherwise be blown up by the division by a vanishing std).

    Raises:
        UserError: unknown kind, N not a multiple of G, G < 2, rewards or advantages that are not
            finite, advantages of another shape than the rewards.
    """
    if kind not in ADVANTAGES:
        raise UserError(
            f"kind: {kind!r} given; allowed: {', '.join(ADVANTAGES)}{nearest(kind, ADVANTAGES)}"
        )
    rewards_PG = _grouped(rewards, group_size)
    advantages_PG = ADVANTAGES[kind](rewards_PG)
    shape = tuple(getattr(advantages_PG, "shape", ()))
    if shape != tuple(rewards_PG.shape) or not advantages_PG.isfinite().all():
        raise UserError(
            f"advantages {kind!r} of rewards {tuple(rewards_PG.shape)} (prompts, responses) gave "
            f"{shape or type(advantages_PG).__name__}; finite ones of the same shape are needed"
        )
    return torch.where(
        informative_groups(rewards, group_size)[:, None], advantages_PG, 0.0
    ).flatten()


def informative_groups(rewards: Tensor, group_size: int) -> Tensor:
    """`[P]` bool: groups whose rewards are not all equal; DAPO's dynamic sampling keeps these."""
    rewards_PG = _grouped(rewards, group_size)
    return rewards_PG.amax(-1) > rewards_PG.amin(-1)


def _grouped(rewards: Tensor, group_size: int) -> Tensor:
    if rewards.dim() != 1 or group_size < 2 or len(rewards) == 0 or len(rewards) % group_size:
        raise UserError(
            f"rewards, group_size: shape {tuple(rewards.shape)}, group_size {group_size} given; "
            "allowed: [N] with N > 0 a multiple of group_size, and group_size >= 2"
        )
    if not rewards.isfinite().all():
        raise UserError("rewards: NaN or infinity given; allowed: finite numbers")
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
