# SPDX-License-Identifier: Apache-2.0
"""KL and entropy terms of a run: their part in each step's loss and rewards, and their state.

T response tokens of a sequence, B sequences of this data-parallel rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from moe_upgrpo.losses import EntropyControl, LossTerms, Metric, kl_estimate
from moe_upgrpo.megatron.actor import MegatronActor, Scored, Update
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.record import Sums

ENTROPY = "entropy/mean"  # field of metrics.jsonl by which the entropy is controlled


@dataclass(kw_only=True)
class Terms:
    """The terms over the steps of a run.

    reference: the policy from which the KL divergence is taken: the start model or, renewed every
        `reference_every` steps, the policy as it is then. None: no KL term.
    entropies: mean entropies of the steps done, from which the controlled coefficient follows.
    """

    reference: MegatronActor | None = None
    reference_every: int = 0
    kl_coef: float = 0.0
    kl_in: str = "loss"
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    control: EntropyControl | None = None
    entropies: list[float] = field(default_factory=list)

    @property
    def needs_old(self) -> bool:
        """Whether a step needs the old log-probs before its advantages."""
        return self.kl_coef > 0 and self.kl_in == "reward"

    def of_loss(self) -> LossTerms:
        """The terms of this step's loss."""
        entropy_coef = self.entropy_coef
        if self.control is not None:
            entropy_coef = self.control.coefficient(entropy_coef, self.entropies)
        return LossTerms(
            kl_coef=self.kl_coef if self.kl_in == "loss" else 0.0,
            kl_estimator=self.kl_estimator,
            entropy_coef=entropy_coef,
        )

    def penalised(
        self,
        rewards_B: np.ndarray,
        samples: Sequence[Sample],
        old: Sequence[Scored] | None,
        reference: Sequence[Scored] | None,
    ) -> tuple[np.ndarray, Sums]:
        """Rewards less β·Σ_t k(log π_old, log π_ref), where the KL term is in them, and its sums.

        PPO for language models and verl's `apply_kl_penalty` take it off each token's reward, and
        GRPO adds these up over the response. The group's advantages are made from what is left.
        """
        if not self.needs_old:
            return rewards_B, {}
        estimates = [
            kl_estimate(
                torch.from_numpy(policy.log_probs[sample.counted]).double(),
                torch.from_numpy(of_reference.log_probs[sample.counted]).double(),
                self.kl_estimator,
            )
            for sample, policy, of_reference in zip(samples, old, reference, strict=True)
        ]
        sums_B = np.array([float(estimate_T.sum()) for estimate_T in estimates])
        tokens = sum(len(estimate_T) for estimate_T in estimates)
        penalty_B = self.kl_coef * sums_B
        return (rewards_B - penalty_B).astype(rewards_B.dtype), {
            "kl/reference": Metric(float(sums_B.sum()), tokens),
            "kl/reward_penalty": Metric(float(penalty_B.sum()), len(penalty_B)),
        }

    def refresh(self, actor: MegatronActor, step: int) -> None:
        """Give the reference the policy's weights, after the steps where that is due."""
        if self.reference_every and step % self.reference_every == 0:
            self.reference.take_weights(actor)

    def end_step(self, row: Mapping[str, float | None]) -> None:
        """Keep a step's entropy, from which α follows; None: it was not finite."""
        if self.control is not None:
            entropy = row[ENTROPY]
            self.entropies.append(math.nan if entropy is None else entropy)


def term_sums(
    terms: LossTerms, updates: Sequence[Update], *, counted: bool, controlled: bool = False
) -> Sums:
    """Sums of the terms over a step's optimizer steps, this rank's share.

    counted: true on one data-parallel rank, because all take the same optimizer steps. controlled:
    whether the bonus's coefficient changes; if so it is logged even where it is 0.
    """
    steps = len(updates) if counted else 0
    found: Sums = {}
    for name in updates[0].terms:
        found[f"loss/{name}"] = Metric(sum(update.terms[name] for update in updates), steps)
        sums = [update.term_metrics[name] for update in updates]
        found[_MEASURED[name]] = Metric(*(float(sum(side)) for side in zip(*sums, strict=True)))
    if controlled or "entropy" in updates[0].terms:
        found["entropy/coef"] = Metric(terms.entropy_coef * steps, steps)
    return found


_MEASURED = {"kl": "kl/reference", "entropy": "entropy/visits"}
