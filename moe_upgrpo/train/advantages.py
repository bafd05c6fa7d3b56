# SPDX-License-Identifier: Apache-2.0
"""Advantages of a step's responses, and of their tokens where a kind or a loss defines them.

Some kinds need sums over all data-parallel ranks; a group is of one rank, which also has its
scores, wherever they were computed. B responses of this rank, T tokens of one, N of which count, V
ids that are sampled in a group, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import ADVANTAGES, advantage_sums, group_advantages, gtpo_weights
from moe_upgrpo.losses.per_token import nthr_pull, nthr_rule, nthr_scores
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor, Scored
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.rollout.base import Rollout
from moe_upgrpo.tasks.base import Terms


def advantages_of(
    rewards_B: np.ndarray,
    rollouts: Sequence[Rollout],
    *,
    group: int,
    kind: str,
    terms_B: Sequence[Terms] = (),
    old: Sequence[Scored] | None = None,
) -> np.ndarray | list[np.ndarray]:
    """Advantages `[B]` float32 of this data-parallel rank's responses, or `[T]` for each of them,
    where the kind has one for each token. A collective.

    terms_B: the rewards that add up to a response's reward, for kinds that take several. old: the
    old policy's scores, with Σπ², for kinds of tokens.
    """
    if ADVANTAGES[kind].of_tokens is not None:
        return _of_tokens(torch.from_numpy(rewards_B), rollouts, old, group, kind)
    given = {"lengths": torch.tensor([int(one.sampled_or_all.sum()) for one in rollouts])}
    rewards = torch.from_numpy(rewards_B)
    if ADVANTAGES[kind].several:
        rewards, given["reward_weights"] = _several(terms_B, kind)
    sums = advantage_sums(rewards, group, kind, **given)
    if sums is not None:
        given["batch_sums"] = torch.tensor(groups.summed(sums.tolist()), dtype=torch.float64)
    return group_advantages(rewards, group, kind, **given).numpy()


def _of_tokens(
    rewards_B: torch.Tensor,
    rollouts: Sequence[Rollout],
    old: Sequence[Scored],
    group: int,
    kind: str,
) -> list[np.ndarray]:
    """One advantage for each token, group by group."""
    found = []
    for first in range(0, len(rollouts), group):
        mine = slice(first, first + group)
        columns = [
            [torch.from_numpy(values) for values in column]
            for column in zip(
                *(
                    (one.log_probs, rollout.sampled_or_all, one.sum_pi_squared)
                    for one, rollout in zip(old[mine], rollouts[mine], strict=True)
                ),
                strict=True,
            )
        ]
        padded = (pad_sequence(column, batch_first=True) for column in columns)
        advantages_GT = ADVANTAGES[kind].of_tokens(rewards_B[mine], group, *padded)
        found += [
            row_T[: len(mask_T)].numpy()
            for row_T, mask_T in zip(advantages_GT, columns[1], strict=True)
        ]
    return found


def _several(terms_B: Sequence[Terms], kind: str) -> tuple[torch.Tensor, list[float]]:
    """The rewards `[K, B]` and their weights, in one order on all ranks.

    A reward that a response lacks is 0; one that failed lacks all.
    """
    mine = {name: weight for terms in terms_B for name, (weight, _) in terms.items()}
    weights: Mapping[str, float] = dict(groups.gather_over_data_parallel([*mine.items()]))
    if len(weights) < 2:
        raise UserError(
            f"advantage={kind!r} takes several rewards of a response, and this step's have "
            f"{', '.join(weights) or 'one number'} alone. Give --reward several words, or a "
            "function that returns a mapping of names to numbers, without a 'score'."
        )
    absent = (0.0, 0.0)
    rewards_KB = [[terms.get(name, absent)[1] for terms in terms_B] for name in weights]
    return torch.tensor(rewards_KB, dtype=torch.float32), [*weights.values()]


def with_token_weights(
    samples: Sequence[Sample], scored: Sequence[Scored], *, group: int
) -> list[Sample]:
    """The samples with GTPO's token weights and its advantages (`gtpo_weights`).

    The G responses to a prompt are adjacent. scored: at the old weights, whose entropy is used; the
    authors use the entropy of the policy at each update.
    """
    found = []
    for first in range(0, len(samples), group):
        mine = slice(first, first + group)
        responses = [torch.as_tensor(s.tokens[s.prompt_length :]).long() for s in samples[mine]]
        masks = [
            torch.ones(len(ids), dtype=torch.bool) if s.sampled is None else torch.tensor(s.sampled)
            for s, ids in zip(samples[mine], responses, strict=True)
        ]
        entropies = [
            float(one.entropy[s.counted].mean())
            for s, one in zip(samples[mine], scored[mine], strict=True)
        ]
        advantages, weights = gtpo_weights(
            pad_sequence(responses, batch_first=True),
            torch.tensor([s.advantage for s in samples[mine]]),
            pad_sequence(masks, batch_first=True),
            group,
            torch.tensor(entropies),
        )
        found += [
            replace(s, advantage=float(a), token_weights=w_T[: len(ids)].numpy())
            for s, a, w_T, ids in zip(samples[mine], advantages, weights, responses, strict=True)
        ]
    return found


@torch.no_grad()
def with_nthr(
    samples: Sequence[Sample],
    scored: Sequence[Scored],
    actor: MegatronActor,
    *,
    group: int,
    beta: float,
    eta: float | None,
) -> list[Sample]:
    """The samples with the advantages of their tokens times NTHR's factors (`nthr_factors`).

    The right responses are those with A > 0, the G to a prompt adjacent. scored: at the old
    weights, with hidden states on the rank of each copy that computes the factors for all of it. A
    collective of the ranks of a copy.
    """
    found = []
    for first in range(0, len(samples), group):
        mine = samples[first : first + group]
        ids = [torch.as_tensor(s.tokens[s.prompt_length :])[s.counted].long() for s in mine]
        right = [s.advantage > 0 and len(n) > 0 for s, n in zip(mine, ids, strict=True)]
        if not any(right) or all(s.advantage > 0 for s in mine):
            continue
        ids_V = torch.cat(ids).unique()
        weight_VH = actor.head_rows(ids_V)
        if scored[first].hidden is None:
            continue
        factors_GN = _nthr_of_group(
            [scored[first + i].hidden for i in range(group)],
            [torch.as_tensor(scored[first + i].log_probs[s.counted]) for i, s in enumerate(mine)],
            [torch.searchsorted(ids_V, ids_N) for ids_N in ids],
            weight_VH / actor.temperature,
            torch.tensor(right),
            beta,
            eta,
        )
        found += [
            (first + i, f_N[: len(n)].cpu().numpy())
            for i, (f_N, n) in enumerate(zip(factors_GN, ids, strict=True))
            if not right[i]
        ]
    samples = list(samples)
    for i, factors_N in groups.gather_in_model_copy(found):
        sample = samples[i]
        advantage_T = np.full(len(sample.tokens) - sample.prompt_length, sample.advantage, "f4")
        advantage_T[sample.counted] *= factors_N
        samples[i] = replace(sample, advantage=advantage_T)
    return samples


def _nthr_of_group(
    hidden: Sequence[torch.Tensor],
    log_probs: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    weight_VH: torch.Tensor,
    right_G: torch.Tensor,
    beta: float,
    eta: float | None,
) -> torch.Tensor:
    """The factors `[G, N]`, one response's probabilities of the V ids at a time.

    Each with log p of the sampled id, and its place among the V: p(v) = exp(l_v − l_y + log p(y)),
    without the rest of the vocabulary. weight_VH: makes logits, temperature included.
    """
    device = weight_VH.device

    def one(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        h_NH, target_N1 = hidden[i].to(device).float(), targets[i].to(device)[:, None]
        logits_NV = h_NH @ weight_VH.t()
        logits_NV += log_probs[i].to(device)[:, None] - logits_NV.gather(1, target_N1)
        g_NV = logits_NV.exp_().neg_()
        return h_NH, g_NV.scatter_add_(1, target_N1, torch.ones_like(g_NV[:, :1]))

    pull_VH = sum(nthr_pull(*one(i)) for i in right_G.nonzero()[:, 0].tolist())
    scores = [nthr_scores(*one(i), pull_VH) for i in range(len(hidden))]
    mask_GN = pad_sequence([torch.ones_like(x) for x in scores], batch_first=True)
    scores_GN = pad_sequence(scores, batch_first=True)
    return nthr_rule(scores_GN, right_G.to(device), mask_GN, beta=beta, eta=eta)
