# SPDX-License-Identifier: Apache-2.0
"""NeMo-RL: every preset whose inputs it has, in the place of its `ClippedPGLossFn`.

    loss_fn:
      moe_upgrpo: {preset: up-grpo, negative: gspo-token, clip_low: 0.1}

Denominators, weights for the rollout, KL and VAPO's term are NeMo-RL's own, from its settings.
Without `moe_upgrpo` the loss is NeMo-RL's. How it gets into a job: install.py, docs/nemo-rl.md.

Shapes: B sequences of a micro-batch, T positions except the first; index t is the token at t + 1.
"""

from typing import Any

import torch
from nemo_rl.algorithms.loss import interfaces
from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossConfig, ClippedPGLossFn
from torch import Tensor

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.kit.presets import Flag, coupled, resolve, served
from moe_upgrpo.integrations.kit.weighted import weighted_sum
from moe_upgrpo.integrations.nemo_rl import start
from moe_upgrpo.losses import (
    CONTEXT,
    GLOSSARY,
    PolicyLoss,
    PolicyLossConfig,
    policy_loss,
)

NOT_HANDED_OVER = ("router_log_probs", *CONTEXT)
LOSSES = served(NOT_HANDED_OVER)

# NeMo-RL's field -> (its default, our field).
CLIPS = {
    "ratio_clip_min": (0.2, "clip_low"),
    "ratio_clip_max": (0.2, "clip_high"),
    "ratio_clip_c": (None, "dual_clip"),
}


def loss_config(cfg: ClippedPGLossConfig) -> PolicyLossConfig | None:
    """The preset of `loss_fn.moe_upgrpo` with its settings and NeMo-RL's clips; None: no preset.

    Raises:
        UserError: an impossible preset or setting, or one that NeMo-RL's own contradict.
    """
    given = getattr(cfg, "moe_upgrpo", None)
    if given is None:
        return None
    settings = dict(given)
    preset = settings.pop("preset", None)
    config = resolve(
        preset,
        settings,
        [
            Flag(name=f"loss_fn.{name}", value=getattr(cfg, name), default=default, field=ours)
            for name, (default, ours) in CLIPS.items()
        ],
        option="loss_fn.moe_upgrpo.preset",
        settings_option="loss_fn.moe_upgrpo",
        stack="NeMo-RL",
        not_handed_over=NOT_HANDED_OVER,
    )
    _check(cfg, config, preset)
    return config


def _check(cfg: ClippedPGLossConfig, config: PolicyLossConfig, preset: str) -> None:
    sides = {config.positive, config.negative}
    by_sequence = cfg.sequence_level_importance_ratios
    refused = {
        "loss_fn.use_cispo": cfg.use_cispo and "it is a loss of NeMo-RL: take the preset cispo",
        "loss_fn.disable_ppo_ratio": cfg.disable_ppo_ratio
        and "it is a loss of NeMo-RL: take the preset reinforce",
        "loss_fn.sequence_level_importance_ratios": by_sequence
        and config.aggregation == "token-mean"
        and "its weights are of sequences, and this loss is averaged over tokens",
    }
    if cfg.use_importance_sampling_correction:
        token_weights = not by_sequence and (
            "one weight for each token, and this is a loss of whole sequences: set "
            "loss_fn.sequence_level_importance_ratios, or take gspo-token"
        )
        refused["loss_fn.use_importance_sampling_correction"] = (
            coupled(config) and token_weights
        ) or (
            ("topr" in sides or config.correction.active)
            and "this loss corrects for the rollout itself, and would do it twice"
        )
    for name, reason in refused.items():
        if reason:
            raise UserError(f"{name}: given with the preset {preset}; {reason}")


class PolicyLossFn(ClippedPGLossFn):
    """NeMo-RL's loss with the policy term of a preset; NeMo-RL's own where none is named."""

    def __init__(self, cfg: ClippedPGLossConfig, *args, **kwargs):
        start.watch_policies()  # a job makes its loss in the driver
        if cfg.force_on_policy_ratio:
            start.warn_of_missing_forward()
        self.config = loss_config(cfg)
        self.preset = None
        if self.config is not None:
            # NeMo-RL averages the KL term as it does the loss.
            by_token = self.config.aggregation == "token-mean"
            cfg = cfg.model_copy(update={"token_level_loss": by_token})
            self.preset = cfg.moe_upgrpo["preset"]
        super().__init__(cfg, *args, **kwargs)
        normalizer = getattr(interfaces, "MetricNormalizer", None)  # v0.7.0 has none
        if self.config is not None and normalizer is not None:
            for name in GLOSSARY:
                for end in ("", "/numerator", "/denominator"):
                    self.metric_normalizations[f"moe_upgrpo/{name}{end}"] = (
                        normalizer.NONE if end else normalizer.TOKENS
                    )

    def evaluate(
        self, log_probs: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, PolicyLoss]:
        """The policy term, this micro-batch's share of the global mean, and the library's result.

        Fractional sample masks are weights, as in NeMo-RL.
        """
        of_token = {
            name: data[name][:, 1:]
            for name in ("token_mask", "advantages", "generation_logprobs", "prev_logprobs")
            if name in data
        }
        weights_BT = of_token["token_mask"] * data["sample_mask"].unsqueeze(-1)
        mask_BT = weights_BT > 0
        current = log_probs.float()
        if self.force_on_policy_ratio:
            of_token["prev_logprobs"] = current.detach()
        old, rollout = of_token["prev_logprobs"], of_token["generation_logprobs"]
        totals = {
            "global_tokens": float(global_valid_toks),
            "global_sequences": float(global_valid_seqs),
        }
        result = policy_loss(
            current,
            old,
            of_token["advantages"],
            mask_BT,
            config=self.config,
            rollout_log_probs=rollout if "rollout_log_probs" in self.config.arguments else None,
            **totals,
        )
        if self.use_importance_sampling_correction:
            weights_BT = weights_BT * self._rollout_weights(old, rollout, mask_BT)
        return weighted_sum(result, mask_BT, weights_BT, self.config, **totals), result

    def _rollout_weights(self, old: Tensor, rollout: Tensor, mask_BT: Tensor) -> Tensor:
        """π_old/μ, cut or masked as loss_functions.py:564 does it; `[B, T]` or `[B, 1]`."""
        gap_BT = torch.where(mask_BT, old - rollout, 0.0)
        if self.sequence_level_importance_ratios:
            gap_BT = gap_BT.sum(-1, keepdim=True)
        weights = torch.nan_to_num(gap_BT.exp(), nan=0.0, posinf=0.0, neginf=0.0).detach()
        low = self.truncated_importance_sampling_ratio_min
        high = self.truncated_importance_sampling_ratio
        match self.truncated_importance_sampling_type:
            case "tis":
                return weights.clamp(min=low or 0.0, max=high)
            case "icepop":
                return torch.where((weights >= low) & (weights <= high), weights, 0.0)
            case "seq-mask-tis":
                lengths_B1 = mask_BT.sum(-1, keepdim=True).clamp(min=1)
                mean_B1 = (gap_BT.sum(-1, keepdim=True) / lengths_B1).exp()
                return torch.where((mean_B1 >= low) & (mean_B1 <= high), weights, 0.0)
        return weights

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: Any,
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
    ) -> tuple[Tensor, dict[str, Any]]:
        """(loss, metrics): NeMo-RL's metrics, and the library's as sums that NeMo-RL adds up."""
        if self.config is None:
            return super().__call__(next_token_logprobs, data, global_valid_seqs, global_valid_toks)
        totals = (global_valid_seqs, global_valid_toks)
        # Without advantages NeMo-RL's loss has only its other terms: KL, and VAPO's likelihood.
        alone = {**data, "advantages": torch.zeros_like(data["advantages"])}
        has_others = self.reference_policy_kl_penalty != 0 or self.positive_example_nll_weight != 0
        with torch.set_grad_enabled(has_others and torch.is_grad_enabled()):
            others, metrics = super().__call__(next_token_logprobs, alone, *totals)
        loss, result = self.evaluate(next_token_logprobs, data, *totals)
        if has_others:
            loss = loss + others
        metrics["loss"] = loss.item()
        tokens = float(global_valid_toks)
        for name, (numerator, denominator) in result.metrics.items():
            if GLOSSARY[name].normaliser == "response tokens":
                metrics[f"moe_upgrpo/{name}"] = float(numerator) / max(tokens, 1.0)
            else:
                metrics[f"moe_upgrpo/{name}/numerator"] = float(numerator)
                metrics[f"moe_upgrpo/{name}/denominator"] = float(denominator)
        return loss, metrics
