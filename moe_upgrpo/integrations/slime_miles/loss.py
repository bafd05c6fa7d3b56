# SPDX-License-Identifier: Apache-2.0
"""A preset inside slime's or miles' own policy_loss_function, which stays as it is around it.

Log-probs, TIS, OPSM, the KL and entropy terms and the reducers are the stack's; only its
`compute_policy_loss` is replaced, for the length of a call. `moe_upgrpo.integrations.slime` and
`.miles` say which module of the stack that is. Flags: docs/slime.md.

Shapes: B sequences of a micro-batch, T tokens of the longest response.
"""

import copy
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.kit.hooking import replaced
from moe_upgrpo.integrations.kit.presets import Flag, coupled, resolve
from moe_upgrpo.integrations.slime_miles.layout import reducer_of, split_places
from moe_upgrpo.integrations.slime_miles.revisions import need
from moe_upgrpo.losses import CONTEXT, Metric, PolicyLossConfig, policy_loss

NOT_HANDED_OVER = ("router_log_probs", *CONTEXT)
# The stack's flag -> (its default, our field).
CLIPS = {
    "eps_clip": (0.2, "clip_low"),
    "eps_clip_high": (0.2, "clip_high"),
    "eps_clip_c": (None, "dual_clip"),
}
SUMS = "_numerator", "_denominator"
REPLACED = "get_log_probs_and_entropy", "compute_policy_loss"
# Arguments and micro-batch of the loss being evaluated: a stack does not pass them to its reducer.
AT_WORK: tuple[Namespace, dict[str, Any]] | None = None


def loss_config(args: Namespace) -> PolicyLossConfig:
    """The preset `moe_upgrpo_loss` with the changes of the flags and `moe_upgrpo_settings`.

    Both names come from the stack's --custom-config-path. The aggregation is that of the stack's
    reducer: token-mean with --calculate-per-token-loss; otherwise that of the settings or preset if
    it is over sequences, and the mean of sequence means if not.

    Raises:
        UserError: no such loss or field, or settings that are impossible or beyond the stack.
    """
    name = getattr(args, "moe_upgrpo_loss", None)
    settings = getattr(args, "moe_upgrpo_settings", None) or {}
    config = resolve(
        name,
        settings,
        [
            Flag(
                name=f"--{flag.replace('_', '-')}",
                value=getattr(args, flag, default),
                default=default,
                field=ours,
            )
            for flag, (default, ours) in CLIPS.items()
        ],
        option="moe_upgrpo_loss",
        settings_option="moe_upgrpo_settings",
        stack="the stack",
        not_handed_over=NOT_HANDED_OVER,
        settings_win=False,
    )
    aggregation = config.aggregation
    if args.calculate_per_token_loss:
        if settings.get("aggregation", "token-mean") != "token-mean":
            raise UserError(
                f"aggregation: {aggregation!r} given with --calculate-per-token-loss; allowed with "
                "it: token-mean"
            )
        aggregation = "token-mean"
    elif "aggregation" not in settings and aggregation == "token-mean":
        aggregation = "seq-mean-token-mean"
    elif aggregation == "token-mean":
        raise UserError("aggregation: 'token-mean' given; add --calculate-per-token-loss")
    config = replace(config, aggregation=aggregation)
    _check_stack(args, name, config)
    return config


def check_loss(args: Namespace, path: str, module: ModuleType) -> None:
    """Raise UserError where the loss's flags do not go together, or the stack lacks a function.

    path: of our loss. module: as for `stack_loss`.
    """
    if args.loss_type == "custom_loss" and args.custom_loss_function_path == path:
        loss_config(args)
        need(module, *REPLACED, "policy_loss_function", "all_gather_with_cp")
    elif getattr(args, "moe_upgrpo_loss", None):
        raise UserError(
            f"moe_upgrpo_loss: {args.moe_upgrpo_loss} given in --custom-config-path, but another "
            f"loss is chosen; add --loss-type custom_loss --custom-loss-function-path {path}"
        )


def _check_stack(args: Namespace, name: str, config: PolicyLossConfig) -> None:
    if args.use_tis and (whole := coupled(config)):
        raise UserError(
            f"--use-tis: given with {name}, a loss of whole sequences ({whole[0]}); allowed: its "
            "correction in moe_upgrpo_settings with a weight for sequences (or take gspo-token)"
        )
    if getattr(args, "custom_pg_loss_reducer_function_path", None):
        raise UserError(
            f"--custom-pg-loss-reducer-function-path: {args.custom_pg_loss_reducer_function_path} "
            "given; take aggregation in moe_upgrpo_settings instead"
        )


def scored_by(found: Any) -> dict[str, list[Tensor]]:
    """Take apart the result of get_log_probs_and_entropy: slime has a tensor before the dict."""
    return found[1] if isinstance(found, tuple) else found


def sum_of_sequences(function: Callable, loss_masks: list[Tensor]) -> Callable:
    """The reducer of seq-mean-token-sum: the stack divides by the number of rollouts.

    function: the stack's get_sum_of_sample_mean.
    """
    args, batch = AT_WORK
    ours = copy.copy(args)
    ours.calculate_per_token_loss = True
    return reducer_of(function, ours, batch | {"loss_masks": loss_masks})


def stack_loss(
    module: ModuleType,
    cp_utils: ModuleType,
    sequence_sum_path: str,
    args: Namespace,
    batch: dict[str, Any],
    logits: Tensor,
    sum_of_sample_mean: Callable[[Tensor], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of the stack's policy_loss_function with our loss as its inner one.

    Metrics: the stack's, with our `clipped` as its pg_clipfrac, and two sums for each of the
    library's, NAME_numerator and NAME_denominator: the stack scales both alike, so their quotient
    is the metric over all micro-batches and ranks.

    module: has policy_loss_function and the functions that it calls. cp_utils: has the stack's
    slice_log_prob_with_cp, the reverse of all_gather_with_cp. sequence_sum_path: of the stack's
    reducer for sums over a sequence, which calls `sum_of_sequences`.
    """
    config = loss_config(args)
    ours = copy.copy(args)
    # Keeps the stack from making a ratio of whole sequences or calling another inner loss.
    ours.advantage_estimator = "grpo"
    if config.aggregation.startswith("seq-mean-token-sum"):
        ours.custom_pg_loss_reducer_function_path = sequence_sum_path
    places = split_places(args, batch)
    get_log_probs = module.get_log_probs_and_entropy
    log_probs: list[Tensor] = []
    metrics: dict[str, Metric] = {}

    def kept(*arguments, **keywords):
        found = get_log_probs(*arguments, **keywords)
        log_probs[:] = scored_by(found)["log_probs"]
        return found

    def whole(parts: list[Tensor]) -> Tensor:
        """`[B, T]`, for whole responses even where context parallelism has split them."""
        rows = [
            module.all_gather_with_cp(part, *place)
            for part, place in zip(parts, places, strict=True)
        ]
        return pad_sequence(rows, batch_first=True)

    def of_batch(name: str) -> list[Tensor]:
        if not batch.get(name):
            raise UserError(
                f"moe_upgrpo_loss: {args.moe_upgrpo_loss} given; the batch lacks {name}, which it "
                "needs"
            )
        return batch[name]

    def inner(ppo_kl, advantages, *_, **__):
        if args.use_rollout_logprobs:
            old = of_batch("rollout_log_probs")
        else:
            old = batch.get("log_probs") or [x.detach() for x in log_probs]
        mu = "rollout_log_probs" in config.arguments
        result = policy_loss(
            whole(log_probs),
            whole([x.detach() for x in old]),
            whole([x.detach() for x in batch["advantages"]]),
            pad_sequence(list(batch["loss_masks"]), batch_first=True),
            config=config,
            rollout_log_probs=whole(of_batch("rollout_log_probs")) if mu else None,
            # The stack's reducer divides.
            global_tokens=1,
            global_sequences=1,
        )
        metrics.update(result.metrics)
        norm = config.token_sum_norm if config.aggregation.endswith("-norm") else 1
        per_token, clipped = (
            torch.cat(
                [
                    cp_utils.slice_log_prob_with_cp(row_T[: place[1]], *place)
                    for row_T, place in zip(rows_BT, places, strict=True)
                ]
            )
            for rows_BT in (result.per_token / norm, result.clipped.float())
        )
        # A rank without a token of its own has no path to its log-probs; under --allgather-cp the
        # others would wait for its part in the backward of their redistribution.
        return per_token + torch.cat(log_probs)[:0].sum(), clipped

    with (
        replaced(module, get_log_probs_and_entropy=kept, compute_policy_loss=inner),
        replaced(sys.modules[__name__], AT_WORK=(args, batch)),
    ):
        loss, reported = module.policy_loss_function(ours, batch, logits, sum_of_sample_mean)
    for name, sums in metrics.items():
        reported |= {
            name + suffix: torch.as_tensor(part).detach().to(loss)
            for suffix, part in zip(SUMS, sums, strict=True)
        }
    return loss, reported


def library_sums(reported: dict[str, float]) -> dict[str, Metric]:
    """The library's metrics among those that `stack_loss` reports."""
    numerator, denominator = SUMS
    return {
        name.removesuffix(numerator): Metric(value, reported[name[: -len(numerator)] + denominator])
        for name, value in reported.items()
        if name.endswith(numerator)
    }
