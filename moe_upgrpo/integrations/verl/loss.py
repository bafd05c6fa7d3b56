# SPDX-License-Identifier: Apache-2.0
"""verl 0.9.1: every preset as a policy loss, registered by the entry point `verl.plugins`.

verl imports this module when it is imported itself (verl/__init__.py:60). If that fails, it says so
only at level DEBUG (line 74): hence `check`, `LossConfig` and

    python -m moe_upgrpo.integrations.verl moe_upgrpo/up-grpo

A loss is named `moe_upgrpo/PRESET`: verl has losses of its own called gspo, sapo and cispo. With
MOE_UPGRPO_RUN set, `log` writes the routing log of the Megatron engine. Flags, metrics and
limits: docs/verl.md.

Shapes: B sequences, T response tokens.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo import core_algos
from verl.workers.config.actor import PolicyLossConfig as VerlLossConfig

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.kit import environment, revisions
from moe_upgrpo.integrations.kit.presets import Flag, coupled, resolve, served
from moe_upgrpo.integrations.kit.weighted import weighted_sum
from moe_upgrpo.integrations.verl import install
from moe_upgrpo.losses import (
    CONTEXT,
    GLOSSARY,
    PolicyLoss,
    PolicyLossConfig,
    policy_loss,
)

PREFIX = "moe_upgrpo/"
NOT_HANDED_OVER = ("rollout_log_probs", "router_log_probs", *CONTEXT)

# verl's actor field -> (its default, our field).
CLIPS = {
    "clip_ratio_low": (0.2, "clip_low"),
    "clip_ratio_high": (0.2, "clip_high"),
    "clip_ratio_c": (3.0, "dual_clip"),
    "tau_pos": (1.0, "sapo_tau_positive"),
    "tau_neg": (1.05, "sapo_tau_negative"),
}


def loss_config(preset: str, actor: Any, mode: str, length: int) -> PolicyLossConfig:
    """The preset with what the user changed: the actor's clips, then `policy_loss.settings`.

    actor: verl's ActorConfig. mode: verl's loss_agg_mode, which always holds. length: T, by which
    verl divides under seq-mean-token-sum-norm where loss_scale_factor is not set.

    Raises:
        UserError: a clip that the loss does not have, impossible settings, a loss that needs what
            verl does not hand over.
    """
    settings = dict(actor.policy_loss.get("settings") or {})
    flags = []
    for name, (default, ours) in CLIPS.items():
        value = actor.get(name, default)
        if value is None and name.startswith("clip_ratio_"):
            value = actor.clip_ratio  # verl's rule
        flags.append(Flag(name=f"actor.{name}", value=value, default=default, field=ours))
    config = _resolve(preset, settings, flags)
    # The sum over all tokens is the mean with a denominator of 1: verl's token-sum.
    aggregation = "token-mean" if mode == "token-sum" else mode
    norm = actor.global_batch_info.get("loss_scale_factor") or length
    return replace(
        config,
        aggregation=settings.get("aggregation", aggregation),
        token_sum_norm=settings.get("token_sum_norm", norm),
    )


def _resolve(preset: str, settings: dict[str, Any], flags: Sequence[Flag] = ()) -> PolicyLossConfig:
    return resolve(
        preset,
        settings,
        flags,
        option="loss_mode",
        settings_option="policy_loss.settings",
        stack="verl",
        not_handed_over=NOT_HANDED_OVER,
        settings_win=False,
        label=PREFIX + preset,
    )


@dataclass(frozen=True)
class VerlLoss:
    """A preset in verl's signature, tested against verl's own loss of that name."""

    preset: str

    def evaluate(
        self,
        *,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, PolicyLoss]:
        """The scalar that verl expects and the library's result.

        verl's data-parallel ranks average gradients, so its losses (core_algos.py:1140) are dp_size
        times this rank's share of the global mean: Σ/(N/dp_size). rollout_is_weights `[B, T]`
        multiply both signs, as in verl's own losses.
        """
        of_batch = config.global_batch_info
        ours = loss_config(self.preset, config, loss_agg_mode, response_mask.shape[-1])
        dp_size = of_batch.get("dp_size") or 1
        tokens, sequences = (
            of_batch.get(name) for name in ("batch_num_tokens", "global_batch_size")
        )
        if loss_agg_mode == "token-sum":
            tokens = 1
        needed = tokens if ours.aggregation == "token-mean" else sequences
        if dp_size > 1 and needed is None:
            raise UserError(
                f"global_batch_info: {of_batch} given with dp_size {dp_size}; allowed: with "
                "batch_num_tokens (token-mean) or global_batch_size (the other modes)"
            )
        totals = {
            "global_tokens": None if tokens is None else tokens / dp_size,
            "global_sequences": None if sequences is None else sequences / dp_size,
        }
        result = policy_loss(
            log_prob, old_log_prob, advantages, response_mask, config=ours, **totals
        )
        if rollout_is_weights is None:
            return result.loss, result
        mask = response_mask.bool()
        self._check_weights(ours, rollout_is_weights, mask)
        return weighted_sum(result, mask, rollout_is_weights, ours, **totals), result

    def _check_weights(self, ours: PolicyLossConfig, weights_BT: Tensor, mask: Tensor) -> None:
        if not coupled(ours):
            return
        first_B1 = weights_BT.gather(1, mask.int().argmax(dim=1, keepdim=True))
        if bool(((weights_BT != first_B1) & mask).any()):
            raise UserError(
                f"rollout_is_weights: one for each token given with {PREFIX}{self.preset}, a loss "
                "of whole sequences; allowed: algorithm.rollout_correction.rollout_is=sequence "
                f"(or take {PREFIX}gspo-token)"
            )

    def __call__(self, **arguments: Any) -> tuple[Tensor, dict[str, float]]:
        """(loss, metrics): each metric `actor/NAME` of the loss library, 0 where nothing was
        counted, and pg_clipfrac and pg_clipfrac_lower as verl's own losses have them."""
        loss, result = self.evaluate(**arguments)
        names = list(result.metrics)
        pairs = torch.stack(
            [torch.as_tensor(x).double() for name in names for x in result.metrics[name]]
        ).tolist()  # one wait for the device
        counts = dict(zip(names, zip(pairs[::2], pairs[1::2], strict=True), strict=True))
        metrics = {
            f"actor/{name}": GLOSSARY[name].value(*pair) if pair[1] else 0.0
            for name, pair in counts.items()
        }
        tokens = counts["ppo_kl"][1] or 1.0
        bounds = ("clip_fraction_positive_upper", "clip_fraction_negative_lower")
        metrics["actor/pg_clipfrac"] = sum(counts[bound][0] for bound in bounds) / tokens
        dual = counts.get("dual_clip_fraction", (0.0, 0.0))[0]
        metrics["actor/pg_clipfrac_lower"] = dual / tokens
        return loss, metrics


LOSSES = {PREFIX + name: VerlLoss(name) for name in served(NOT_HANDED_OVER)}


def check(loss_mode: str | None = None) -> list[str]:
    """The names that verl finds in this process; prints a line about them.

    Raises:
        UserError: the entry point is not installed or switched off, a name is missing from verl's
            registry or taken by another, or loss_mode is none of verl's losses.
    """
    revisions.check("verl", "loss")
    registry = core_algos.POLICY_LOSS_REGISTRY
    found = [ep.name for ep in entry_points(group="verl.plugins") if ep.value == _MODULE]
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    if not found:
        raise UserError(
            f"verl.plugins: no entry point {_MODULE}; install moe_upgrpo with pip in the "
            "environment of verl's workers (a folder on PYTHONPATH has no entry points)"
        )
    if policy != "auto" and not {*found} & {name.strip() for name in policy.split(",")}:
        raise UserError(
            f"VERL_USE_EXTERNAL_PLUGINS: {policy!r} given; allowed: auto, or a list with {found[0]}"
        )
    wrong = [name for name, loss in LOSSES.items() if registry.get(name) != loss]
    if wrong:
        raise UserError(f"verl's registry lacks, or has another loss under: {', '.join(wrong)}")
    if loss_mode is not None and loss_mode not in registry:
        raise UserError(f"loss_mode: {loss_mode!r} given; allowed: {', '.join(registry)}")
    print(
        f"moe_upgrpo: {len(LOSSES)} losses registered in verl (pid {os.getpid()})"
        + (f"; in use: {loss_mode}" if loss_mode else "")
        + (f"; routing log: {environment.run_folder()}" if environment.run_folder() else ""),
        flush=True,
    )
    return list(LOSSES)


@dataclass
class LossConfig(VerlLossConfig):
    """verl's `policy_loss` config with a check and with `settings`: fields of `PolicyLossConfig`.

    Chosen by `actor_rollout_ref.actor.policy_loss._target_`, it is built in every worker before the
    model, so a plugin that did not load or a wrong setting ends the job there.
    """

    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        check(self.loss_mode)
        loss = core_algos.POLICY_LOSS_REGISTRY[self.loss_mode]
        if isinstance(loss, VerlLoss):
            _resolve(loss.preset, dict(self.settings))
        elif self.settings:
            raise UserError(
                f"policy_loss.settings: {dict(self.settings)} given with loss_mode "
                f"{self.loss_mode!r}; allowed with {PREFIX}PRESET alone"
            )


_MODULE = "moe_upgrpo.integrations.verl"

for _name, _loss in LOSSES.items():
    core_algos.register_policy_loss(_name)(_loss)
install.when_imported()
