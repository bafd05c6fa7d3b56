# SPDX-License-Identifier: Apache-2.0
"""Every preset as `--loss_type moe_upgrpo/PRESET` of ms-swift's Megatron GRPO trainer.

KL, weights for the rollout and masks are ms-swift's own, from its flags.

Shapes: B sequences of a micro-batch, T positions; the log-prob at index t is that of the token at
t + 1 (behind the padding on the left, with --padding_free).
"""

from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.kit import environment, weighted
from moe_upgrpo.integrations.kit.presets import Flag, resolve, served
from moe_upgrpo.losses import CONTEXT, PolicyLoss, PolicyLossConfig

PREFIX = "moe_upgrpo/"
NOT_HANDED_OVER = ("router_log_probs", *CONTEXT)
OWN = ("grpo", "dapo", "cispo", "sapo", "real", "fipo")  # ms-swift's losses with names like ours
# Aggregation -> ms-swift's loss_type that averages KL in that way, or most nearly so.
LIKE = {"token-mean": "dapo", "seq-mean-token-mean": "grpo", "seq-mean-token-sum": "grpo",
        "seq-mean-token-sum-norm": "dr_grpo"}  # fmt: skip


def loss_config(args: Any) -> PolicyLossConfig | None:
    """The preset of --loss_type with its settings and ms-swift's clips; None: a loss of ms-swift.

    Raises UserError: an impossible preset or setting, or one that ms-swift's flags contradict.
    """
    name, settings = args.loss_type, environment.loss_settings()
    if not name.startswith(PREFIX):
        if settings or (name in served(()) and name not in OWN):
            raise UserError(
                f"--loss_type: {name} given; allowed: {PREFIX}PRESET, or a loss of ms-swift "
                f"without {environment.SETTINGS}"
            )
        return None
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high  # ms-swift's rule
    if "cispo" in name and args.epsilon_high is not None:
        high -= 1  # there it is the bound itself, not the distance from 1
    clips = (
        ("--epsilon", args.epsilon, 0.2, "clip_low"),
        ("--epsilon_high", high, 0.2, "clip_high"),
        ("--delta", args.delta, None, "dual_clip"),
        ("--tau_pos", args.tau_pos, 1.0, "sapo_tau_positive"),
        ("--tau_neg", args.tau_neg, 1.05, "sapo_tau_negative"),
    )
    config = resolve(
        name.removeprefix(PREFIX),
        settings,
        [Flag(name=n, value=v, default=d, field=f) for n, v, d, f in clips],
        option="--loss_type",
        settings_option=environment.SETTINGS,
        stack="ms-swift",
        not_handed_over=NOT_HANDED_OVER,
        label=name,
    )
    if args.importance_sampling_level != "token":
        raise UserError(
            f"--importance_sampling_level: {args.importance_sampling_level} given with --loss_type "
            f"{name}, which says itself what its ratio is of; leave it out"
        )
    if args.off_policy_sequence_mask_delta is not None:
        raise UserError(  # grpo_trainer.py:1039 treats every job as one with a teacher
            f"--off_policy_sequence_mask_delta: given with --loss_type {name}; ms-swift 4.6.0 "
            f"itself ends a job with it in its first update. Take {PREFIX}deepseek-v3.2, whose "
            "off_policy_limit is such a mask, or leave it out"
        )
    if mode := args.rollout_importance_sampling_mode:
        option = f"--rollout_importance_sampling_mode {mode}"
        weighted.check_rollout_weights(config, option, of_tokens=mode != "sequence_truncate")
    return config


def parts(trainer: Any) -> int:
    """Parts of the global batch; Megatron and its ranks average the losses of that many."""
    return parallel_state.get_data_parallel_world_size() * trainer.args.num_microbatches


def evaluate(trainer: Any, log_probs: Tensor, data: dict[str, Any]) -> tuple[Tensor, PolicyLoss]:
    """The policy term, `parts` times its share of the mean, and the library's result.

    Masks and weights in the order of grpo_trainer.py:976-1120.
    """
    batch = data["grpo_batch"]
    mask_BT, old_BT = batch.completion_mask, batch.old_per_token_logps
    rollout_BT = batch.rollout_per_token_logps
    weights_BT = torch.ones_like(old_BT)
    if mode := trainer.rollout_importance_sampling_mode:
        behind_BT = weighted.required(rollout_BT, f"--rollout_importance_sampling_mode {mode}")
        weights_BT = trainer._apply_rollout_importance_sampling(old_BT - behind_BT, mask_BT)
    if trainer.args.overlong_filter:
        mask_BT = mask_BT & ~batch.truncated_mask[:, None]
    if trainer.top_entropy_quantile < 1:
        entropy_BT = data["per_token_entropy"].float().masked_fill(~mask_BT, torch.nan)
        bound = torch.nanquantile(entropy_BT.flatten(), 1 - trainer.top_entropy_quantile)
        weights_BT = torch.where(entropy_BT >= bound, weights_BT, 0.0)
    tokens = batch.num_items_in_batch
    return weighted.weighted_loss(
        log_probs,
        old_BT,
        batch.advantages,
        mask_BT,
        weights_BT,
        config=trainer.moe_upgrpo_loss,
        rollout_log_probs=rollout_BT,
        global_tokens=None if tokens is None else float(tokens) / parts(trainer),
        global_sequences=float(trainer.micro_batch_size),
    )


def loss_func(original, trainer: Any, log_probs: Tensor, data: dict) -> tuple[Tensor, dict]:
    """(loss, metrics) of MegatronGRPOTrainer.loss_func: its KL and metrics, and the library's.

    Without advantages ms-swift's loss is its KL term.
    """
    loss, result = evaluate(trainer, log_probs, data)
    batch = data["grpo_batch"]
    alone = replace(batch, advantages=torch.zeros_like(batch.advantages))
    has_kl = trainer.beta != 0 and not trainer.kl_in_reward
    with torch.set_grad_enabled(has_kl and torch.is_grad_enabled()):
        kl, metrics = original(log_probs, data | {"grpo_batch": alone})
    loss = loss + kl if has_kl else loss
    metrics = {name: x for name, x in metrics.items() if not name.startswith("clip_ratio/")}
    metrics |= trainer._all_reduce_metric({"loss": loss.detach().clone()})
    # ms-swift reads two numbers as a numerator and a denominator (base.py:1035).
    sums = weighted.summed_means(result, parallel_state.get_data_parallel_group())
    return loss, metrics | {f"{PREFIX}{name}": pair for name, pair in sums.items()}
