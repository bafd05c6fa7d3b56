# SPDX-License-Identifier: Apache-2.0
"""The settings of a job of Megatron-LM's RL: ours in the environment, its own in its arguments.

    MOE_UPGRPO_LOSS           a preset; unset: Megatron-LM's own loss
    MOE_UPGRPO_LOSS_SETTINGS  JSON, fields of `PolicyLossConfig`: {"clip_low": 0.1}
    MOE_UPGRPO_RUN            a new folder for the routing log (`log`); unset: none

`check` tells, from the arguments of a job, what the loss or the log cannot follow; it does not
import Megatron.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.kit.environment import RUN, SETTINGS, loss_settings
from moe_upgrpo.integrations.kit.presets import coupled, resolve
from moe_upgrpo.losses import CONTEXT, PolicyLossConfig

LOSS = "MOE_UPGRPO_LOSS"
CLAMP_DEFAULT = 0.01  # of --grpo-clamp-eps-lower and -upper (arguments.py:2740)
NOT_HANDED_OVER = ("router_log_probs", *CONTEXT)


@dataclass(frozen=True)
class Refused:
    """A setting that the routing log cannot follow: `given` says whether the arguments have it."""

    flag: str
    given: Callable[[Any], bool]
    why: str
    instead: str


def _is(name: str, *allowed: Any) -> Callable[[Any], bool]:
    """Whether an argument has a value other than the allowed ones."""
    return lambda args: getattr(args, name, allowed[0]) not in allowed


NOT_COVERED = (
    Refused(
        "--num-experts",
        lambda args: not getattr(args, "num_experts", None),
        "has nothing to say of a model without MoE layers",
        "Take a model with experts",
    ),
    Refused(
        "--moe-enable-routing-replay",
        lambda args: not getattr(args, "moe_enable_routing_replay", False),
        "needs --moe-enable-routing-replay, with which inference records its routes",
        "Add the flag (nothing is replayed)",
    ),
    Refused(
        "--moe-router-fusion",
        _is("moe_router_fusion", False, None),
        "does not cover --moe-router-fusion: the fused router records no routes",
        "Leave the flag out",
    ),
    Refused(
        "--rl-training-cuda-graphs",
        _is("rl_training_cuda_graphs", False, None),
        "does not cover --rl-training-cuda-graphs: the trainer's graphs run no hooks",
        "Leave the flag out: inference keeps its graphs (--cuda-graph-impl local)",
    ),
    Refused(
        "--cuda-graph-impl",
        _is("cuda_graph_impl", "none", "local"),
        "covers the graphs of --cuda-graph-impl local alone, as Megatron-LM's RL does",
        "Set it to local or none",
    ),
    Refused(
        "--num-layers-per-virtual-pipeline-stage",
        _is("virtual_pipeline_model_parallel_size", None, 1),
        "does not cover interleaved pipeline stages, of which Megatron-LM's RL takes the first "
        "chunk for the whole model",
        "Leave --num-layers-per-virtual-pipeline-stage (or -virtual-stages-per-pipeline-rank) out",
    ),
    Refused(
        "--hybrid-context-parallel",
        _is("hybrid_context_parallel", False, None),
        "does not cover --hybrid-context-parallel, whose groups change by micro-batch",
        "Take --context-parallel-size alone",
    ),
    Refused(
        "--inference-dynamic-batching-async-sched-mode",
        _is("inference_dynamic_batching_async_sched_mode", "legacy", None),
        "does not cover --inference-dynamic-batching-async-sched-mode async, under which "
        "Megatron-LM's engine records no routes",
        "Set it to legacy",
    ),
)  # fmt: skip


def check(args: Any, config: PolicyLossConfig | None, settings: set[str], *, log: bool) -> None:
    """Raise UserError for what the loss, or the log where there is one, cannot follow.

    args: Megatron-LM's. config: of the preset, None without one. settings: its fields that
    MOE_UPGRPO_LOSS_SETTINGS names.
    """
    if config is not None:
        clamps = args.grpo_clamp_eps_lower, args.grpo_clamp_eps_upper
        with_clamps(config, settings, clip_low=clamps[0], clip_high=clamps[1])
        truncation = args.rl_importance_sampling_truncation_coef
        check_correction(config, args.rl_inference_logprobs_is_correction, truncation)
    for refused in NOT_COVERED if log else ():
        if refused.given(args):
            raise UserError(
                f"{RUN}: the routing log {refused.why}. {refused.instead}, or unset {RUN}"
            )


def asked() -> tuple[PolicyLossConfig | None, set[str]]:
    """The preset named by the environment, with its settings, and the fields that these name.

    None: no preset.

    Raises:
        UserError: an impossible preset or setting.
    """
    name = os.environ.get(LOSS)
    if not name:
        if os.environ.get(SETTINGS):
            raise UserError(f"{SETTINGS} is set, {LOSS} is not: name a preset")
        return None, set()
    settings = loss_settings()
    config = resolve(
        name,
        settings,
        option=LOSS,
        settings_option=SETTINGS,
        stack="Megatron-LM",
        not_handed_over=NOT_HANDED_OVER,
    )
    return config, set(settings or ())


def with_clamps(config: PolicyLossConfig, settings: set[str], **clamps: float) -> PolicyLossConfig:
    """--grpo-clamp-eps-lower and -upper, where they are set and `settings` does not name the field.

    Raises:
        UserError: a loss whose clip is not on the scale of a token's ratio.
    """
    changes = {
        name: value
        for name, value in clamps.items()
        if value != CLAMP_DEFAULT and name not in settings
    }
    if changes and "ppo" not in (config.positive, config.negative):
        raise UserError(
            f"--grpo-clamp-eps-lower, --grpo-clamp-eps-upper: {changes} given with the branches "
            f"{config.positive} and {config.negative}, whose bounds are not those of GRPO. Leave "
            f"both at {CLAMP_DEFAULT} (the preset's hold then), or set clip_low and clip_high in "
            f"{SETTINGS}"
        )
    return replace(config, **changes)


def check_correction(config: PolicyLossConfig, given: bool, truncation: float | None) -> None:
    """Raise UserError where the loss and Megatron-LM's importance weights exclude each other.

    given: whether the log-probs of inference are handed over. truncation: their weights' bound.
    """
    if "rollout_log_probs" in config.arguments:
        if not given or truncation is not None:
            raise UserError(
                "this loss reads the rollout's log-probs itself: it needs "
                "--rl-inference-logprobs-is-correction, and "
                "--rl-importance-sampling-truncation-coef has no part in it (leave it out; "
                '{"correction": {"high": ...}} is the bound of a correction)'
            )
    elif given and coupled(config):
        raise UserError(
            "--rl-inference-logprobs-is-correction weights every token, and the loss is one of "
            "whole sequences. Take gspo-token, or one weight for each sequence: "
            f'{SETTINGS}={{"correction": {{"weight": "sequence-tis", "positive": true}}}}'
        )


def loss_name() -> str:
    """Name the loss of this job, for the run's config."""
    return os.environ.get(LOSS) or "grpo of Megatron-LM"
