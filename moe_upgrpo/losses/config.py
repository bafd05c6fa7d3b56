# SPDX-License-Identifier: Apache-2.0
"""The parts of a policy loss, and the named losses."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses.aggregation import AGGREGATIONS
from moe_upgrpo.losses.branches import BRANCHES
from moe_upgrpo.losses.correction import RolloutCorrection
from moe_upgrpo.losses.names import check_name
from moe_upgrpo.losses.side import Side

# Fields that put a factor on a loss; `Branch.refuses` names those that do not fit its formula.
FACTORS = ("correction", "off_policy_limit", "top_entropy")


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """A positive and a negative branch, their numbers, and how tokens are aggregated.

    The defaults are UP-GRPO. `PolicyLossConfig.preset(name)` gives the published losses.
    """

    positive: str = "log-likelihood"
    """Branch for A > 0."""
    negative: str = "ppo"
    """Branch for A <= 0."""
    aggregation: str = "token-mean"
    """token-mean, seq-mean-token-mean, seq-mean-token-sum or seq-mean-token-sum-norm."""
    token_sum_norm: float | None = None
    """Constant divisor of seq-mean-token-sum-norm (Dr.GRPO), such as the longest response."""
    clip_low: float | None = 0.2
    """εl: lower bound 1 - εl (gmpo: -εl in log space); None: no lower bound."""
    clip_high: float | None = 0.2
    """εh: upper bound 1 + εh (gmpo: εh in log space); None: no upper bound. Under UP the loss does
    not read it, only the metric of positive tokens beyond the other loss's clip."""
    dual_clip: float | None = 3.0
    """C: bound on r for A < 0 (ppo); cap on both weights (aspo); None: off."""
    ratio_cap: float = 20.0
    """dppo: cap on the ratio as a weight."""
    divergence_limit: float = 0.2
    """dppo: δ, on |π - π_old| (tv) or on the binary KL (kl)."""
    sapo_tau_positive: float = 1.0
    """sapo: τ for A > 0."""
    sapo_tau_negative: float = 1.05
    """sapo: τ for A <= 0."""
    power_positive: float = 0.0
    """power: γ for A > 0, the weight being r^γ."""
    power_negative: float = 1.0
    """power: γ for A <= 0."""
    vespo_k_positive: float = 2.0
    """vespo: k of the weight exp(λ + k·log w − λ·w), for A > 0."""
    vespo_lambda_positive: float = 3.0
    """vespo: λ for A > 0."""
    vespo_k_negative: float = 3.0
    """vespo: k for A <= 0."""
    vespo_lambda_negative: float = 2.0
    """vespo: λ for A <= 0."""
    dro_beta: float = 1.0
    """dro: β of the penalty β·(log r)²/2."""
    kl_tau: float = 1e-3
    """ipo: τ of the penalty τ·(log r)²."""
    influence_range: float = 0.2
    """fipo: how far the weight of a token's future goes above 1."""
    influence_safety: float = 4.0
    """fipo: r above which a negative token's weight stays in [.8, 1]."""
    covariance_share: float = 2e-4
    """clip-cov, kl-cov: share of the batch's tokens that are taken, one at least."""
    covariance_range: tuple[float, float] = (1.0, 5.0)
    """clip-cov: bounds of the covariance of the tokens that may be drawn."""
    covariance_kl: float = 1.0
    """kl-cov: coefficient of the penalty |log r|."""
    positive_nll: float = 0.1
    """vapo: μ of the mean negative log-likelihood of the positive tokens."""
    real_tau: float = 0.5
    """real: τ."""
    top_entropy: float | None = None
    """Share of the batch's tokens, those of largest entropy, that count, for both signs; None:
    all."""
    off_policy_limit: float | None = None
    """DeepSeek-V3.2's mask, for A < 0: drop sequences with mean(log μ - log π) above this; None:
    off."""
    router_shift_floor: float | None = None
    """RSPO: multiply r by γ = max(exp(-mean |Δ log router prob|), this); None: off."""
    correction: RolloutCorrection = field(default_factory=RolloutCorrection)
    """Weights for the mismatch between the rollout engine and the trainer."""

    def __post_init__(self) -> None:
        for sign in ("positive", "negative"):
            name = getattr(self, sign)
            check_name(sign, name, BRANCHES)
            self._check_aggregation(sign, name)
        self._check_ranges()
        self._check_refused()
        rule = self.correction.of_tokens
        if rule and self._corrects_coupled():
            raise UserError(
                f"correction.{rule}: {getattr(self.correction, rule)!r} given with positive "
                f"{self.positive!r} and negative {self.negative!r}; allowed with losses of whole "
                "sequences: a sequence-level weight (or take 'gspo-token')"
            )

    def _check_aggregation(self, sign: str, name: str) -> None:
        allowed = BRANCHES[name].aggregations
        check_name("aggregation", self.aggregation, AGGREGATIONS)
        if self.aggregation not in allowed:
            goes = [n for n, b in BRANCHES.items() if self.aggregation in b.aggregations]
            raise UserError(
                f"aggregation: {self.aggregation!r} given; allowed with {sign} {name!r}: "
                f"{', '.join(allowed)} (and with {self.aggregation!r}: {', '.join(goes)})"
            )
        if self.aggregation == "seq-mean-token-sum-norm" and self.token_sum_norm is None:
            raise UserError(
                "token_sum_norm: None given; allowed: a constant > 0, needed by aggregation "
                "'seq-mean-token-sum-norm' (the longest response, for instance)"
            )

    def _check_ranges(self) -> None:
        # name -> (low, high), both allowed
        ranges = {
            "clip_low": (0, 1),
            "clip_high": (0, math.inf),
            "ratio_cap": (1, math.inf),
            "divergence_limit": (0, math.inf),
            "sapo_tau_positive": (1e-6, math.inf),
            "sapo_tau_negative": (1e-6, math.inf),
            "power_positive": (-math.inf, math.inf),
            "power_negative": (-math.inf, math.inf),
            "router_shift_floor": (1e-6, 1),
            "off_policy_limit": (-math.inf, math.inf),
            "vespo_k_positive": (0, math.inf),
            "vespo_lambda_positive": (1e-4, math.inf),
            "vespo_k_negative": (0, math.inf),
            "vespo_lambda_negative": (1e-4, math.inf),
            "dro_beta": (1e-6, math.inf),
            "kl_tau": (0, math.inf),
            "influence_range": (0, math.inf),
            "influence_safety": (1, math.inf),
            "covariance_share": (1e-9, 1),
            "covariance_kl": (0, math.inf),
            "positive_nll": (0, math.inf),
            "real_tau": (1e-6, math.inf),
            "top_entropy": (1e-6, 1),
            "token_sum_norm": (1e-6, math.inf),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"{name}: {value} given; allowed: from {low} to {high}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise UserError(
                f"dual_clip: {self.dual_clip} given; allowed: above 1, so that it lies above the "
                f"lower bound 1 - clip_low = {self.lower}, or None for no dual clip"
            )

        low, high = self.covariance_range
        if not low < high:
            raise UserError(f"covariance_range: {self.covariance_range} given; allowed: low < high")

    def _check_refused(self) -> None:
        """Raise UserError where a factor is put on a loss whose formula has no place for it."""
        used = {name: getattr(self, name) is not None for name in FACTORS}
        used["correction"] = self.correction.active
        for sign in ("positive", "negative"):
            name = getattr(self, sign)
            for field_name in BRANCHES[name].refuses:
                if used[field_name]:
                    open_to = [n for n, b in BRANCHES.items() if field_name not in b.refuses]
                    raise UserError(
                        f"{field_name}: {getattr(self, field_name)} given with {sign} {name!r}, "
                        f"which takes none; allowed with {', '.join(open_to)}"
                    )

    def _corrects_coupled(self) -> bool:
        sides = {"positive": self.positive, "negative": self.negative}
        return any(getattr(self.correction, s) and BRANCHES[n].coupled for s, n in sides.items())

    @property
    def sides(self) -> tuple[Side, Side]:
        """The functions for A > 0 and for A <= 0."""
        return BRANCHES[self.positive].positive, BRANCHES[self.negative].negative

    @property
    def arguments(self) -> frozenset[str]:
        """The optional arguments of `policy_loss`, and fields of its context, that this config
        uses. `statistics` can be left out where a micro-batch is the whole batch."""
        names = {*BRANCHES[self.positive].arguments, *BRANCHES[self.negative].arguments}
        if self.correction.active or self.off_policy_limit is not None:
            names.add("rollout_log_probs")
        if self.router_shift_floor is not None:
            names.add("router_log_probs")
        if self.top_entropy is not None:
            names |= {"entropy", "statistics"}
        of_branches = (BRANCHES[self.positive].statistics, BRANCHES[self.negative].statistics)
        if self.correction.m2 is not None or of_branches != (None, None):
            names.add("statistics")
        return frozenset(names)

    @property
    def statistics_of_policy(self) -> bool:
        """Whether the statistics look at the current log-probs or entropy."""
        branches = (BRANCHES[self.positive], BRANCHES[self.negative])
        reads = any(b.statistics is not None and b.statistics_of_policy for b in branches)
        # M2PO's statistics are π_old's, which is the current policy where no old log-probs are
        # given.
        return reads or self.top_entropy is not None or self.correction.m2 is not None

    @property
    def lower(self) -> float:
        return 0.0 if self.clip_low is None else 1 - self.clip_low

    @property
    def upper(self) -> float:
        return math.inf if self.clip_high is None else 1 + self.clip_high

    @property
    def dual(self) -> float:
        return math.inf if self.dual_clip is None else self.dual_clip

    @property
    def log_of_lower(self) -> float:
        """log(1 - εl)"""
        return math.log(self.lower) if self.lower > 0 else -math.inf

    @property
    def log_of_upper(self) -> float:
        """log(1 + εh)"""
        return math.log(self.upper)

    @property
    def log_space_lower(self) -> float:
        """-εl, gmpo's bound in log space"""
        return -math.inf if self.clip_low is None else -self.clip_low

    @property
    def log_space_upper(self) -> float:
        """εh, gmpo's bound in log space"""
        return math.inf if self.clip_high is None else self.clip_high

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "PolicyLossConfig":
        """The published loss of that name, with the given fields changed.

        Raises:
            UserError: unknown name; the message lists the known ones.
        """
        check_name("preset", name, PRESETS)
        return replace(PRESETS[name], **changes)


def _whole(branch: str, **numbers: Any) -> PolicyLossConfig:
    """One loss for both signs, with the aggregation of its source."""
    return PolicyLossConfig(
        positive=branch,
        negative=branch,
        **{"aggregation": BRANCHES[branch].aggregations[0], **numbers},
    )


# Sources of the numbers: docs/losses.md.
BASELINES: dict[str, PolicyLossConfig] = {
    "grpo": _whole("ppo"),
    "dapo": _whole("ppo", clip_high=0.28, dual_clip=10.0),
    "deepseek-v3.2": _whole("ppo", off_policy_limit=1e-4),
    "gspo": _whole("gspo", clip_low=3e-4, clip_high=4e-4),
    "gspo-token": _whole("gspo-token", clip_low=3e-4, clip_high=4e-4),
    "tic-grpo": _whole("tic-upper"),
    "tic-grpo-min": _whole("tic-min"),
    "gmpo": _whole("gmpo", clip_low=0.4, clip_high=0.4),
    "rspo": _whole("gmpo", clip_low=0.4, clip_high=0.4, router_shift_floor=0.8),
    "cispo": _whole("cispo", clip_low=None, clip_high=4.0),
    "dppo-tv": _whole("dppo-tv"),
    "dppo-kl": _whole("dppo-kl", divergence_limit=0.05),
    "aspo": _whole("aspo"),
    "sapo": _whole("sapo"),
    "vespo": _whole("vespo"),
    "luspo": _whole("luspo", clip_low=3e-4, clip_high=4e-4),
    "dro": _whole("dro"),
    "ipo": _whole("ipo"),
    "fipo": _whole("fipo", clip_high=0.28, dual_clip=10.0),
    "clip-cov": _whole("clip-cov", dual_clip=None),
    "kl-cov": _whole("kl-cov"),
    "copg": _whole("copg"),
    "hinge-ratio": _whole("hinge-ratio"),
    "hinge-probability": _whole("hinge-probability"),
    "hinge-log": _whole("hinge-log"),
    "hinge-root": _whole("hinge-root"),
    "ppo-early-stop": _whole("ppo", clip_low=None, clip_high=None, dual_clip=None),
    "vapo": _whole("vapo", clip_high=0.28),
    "real": _whole("real"),
    "gtpo": _whole("gtpo"),
}

# UP-X is X with the positive branch replaced; the aggregation and every number stay X's.
PRESETS: dict[str, PolicyLossConfig] = BASELINES | {
    "up-" + name.replace("-grpo", ""): replace(config, positive="log-likelihood")
    for name, config in BASELINES.items()
    if BRANCHES[config.negative].up
}
PRESETS |= {
    "pro-grpo": PRESETS["up-grpo"],
    # These have UP's positive branch already, or are made to be compared with it.
    "topr": _whole("topr"),
    "reinforce": _whole("log-likelihood"),
    "is-reshape": _whole("power"),
    "no-upper-clip": _whole("ppo", clip_high=None),
    "symmetric-ratio": _whole("ppo", clip_low=None, clip_high=None, dual_clip=None),
}
