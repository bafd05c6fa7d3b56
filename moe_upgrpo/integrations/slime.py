# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402
"""slime (THUDM/slime): every preset as its custom loss, and the routing log of its Megatron actor.

    --loss-type custom_loss --custom-loss-function-path moe_upgrpo.integrations.slime.loss
    --custom-megatron-init-path moe_upgrpo.integrations.slime.init

Flags, metrics and limits: docs/slime.md. Between the releases and newer checkouts, names moved and
arguments were added or removed; the code follows what it finds (`slime_miles.revisions`).
"""

import os
from argparse import Namespace
from contextlib import contextmanager

from moe_upgrpo.integrations.kit import revisions

revisions.check("slime", "loss")  # before importing what may have moved

from slime.backends.megatron_utils import cp_utils
from slime.backends.megatron_utils import loss as losses
from slime.utils import routing_replay
from slime.utils.misc import load_function
from torch import Tensor

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.kit import environment
from moe_upgrpo.integrations.kit.hooking import replaced
from moe_upgrpo.integrations.slime_miles.layout import is_padded, reducer_of, splits_the_whole
from moe_upgrpo.integrations.slime_miles.loss import check_loss, stack_loss, sum_of_sequences
from moe_upgrpo.integrations.slime_miles.revisions import Partition, first_module, need, taken

HERE = "moe_upgrpo.integrations.slime"


def loss(args: Namespace, batch, logits: Tensor, sum_of_sample_mean):
    """--custom-loss-function-path: see `slime_miles.loss.stack_loss`."""
    check_layout(args)
    return stack_loss(
        losses, cp_utils, f"{HERE}.sequence_sum", args, batch, logits, sum_of_sample_mean
    )


def sequence_sum(total_lengths, response_lengths, loss_masks, calculate_per_token_loss):
    """Reducer of seq-mean-token-sum."""
    return sum_of_sequences(cp_utils.get_sum_of_sample_mean, loss_masks)


def check_layout(args: Namespace) -> None:
    """Raise UserError where slime's gathering over context-parallel ranks has another layout."""
    if is_padded(args) and args.context_parallel_size > 1:
        raise UserError(
            f"--qkv-format: {args.qkv_format} given with --context-parallel-size "
            f"{args.context_parallel_size}; allowed with it: thd, which slime's own gathering of "
            "log-probs is for"
        )


def init(args: Namespace) -> None:
    """--custom-megatron-init-path: check the settings before the model is built; install the log.

    Raises:
        UserError: impossible settings; a run folder that already holds a run; something of slime
            that the log needs and the installed revision lacks.
    """
    # Megatron's model code: not needed for the loss alone.
    from moe_upgrpo.integrations.slime_miles import health, log

    check_loss(args, f"{HERE}.loss", losses)
    mode = log.check_replay(args)
    if args.loss_type == "custom_loss" or environment.run_folder():
        check_layout(args)
    if mode == "none":
        os.environ["ENABLE_ROUTING_REPLAY"] = "0"
    logs = environment.run_folder() is not None
    if logs:
        revisions.check("slime", "log")
        older = not hasattr(cp_utils, "prepare_routed_experts_for_routing_replay")  # up to v0.3.0
        environment.refuse(
            {
                "R3 with --allgather-cp in this release of slime (it lays the rollout's routes out "
                "as without that flag; v0.3.1 does it right)": (
                    mode == "R3" and older and splits_the_whole(args)
                ),
                "R3 with --qkv-format bshd (slime does not pad the rollout's routes; take thd)": (
                    mode == "R3" and is_padded(args)
                ),
            }
        )
    replays = mode != "none" and revisions.has("slime", "health")
    if not (logs or replays):
        return
    stack = Slime()
    if replays:
        health.install(stack, args)  # inside of the log, whose own forwards are not counted
    if logs:
        log.install(stack, args, mode)


class Slime:
    """`log.Stack` of slime."""

    name = "slime"
    losses = losses

    def __init__(self):
        # The init hook is called from the actor's module, so that module is loaded.
        from slime.backends.megatron_utils import actor, model

        need(routing_replay, "get_routing_replay_compute_topk")
        self.actor, self.model = actor, model
        # Up to v0.3.1 under utils.
        self.tracking = first_module(
            "slime.observability.logging_utils", "slime.utils.logging_utils"
        )
        self.steps = first_module("slime.observability.metric_utils", "slime.utils.metric_utils")
        need(self.tracking, "log")
        need(self.steps, "compute_rollout_step")

    def prepare(self):
        from slime.utils import data

        need(routing_replay, "RoutingReplay")
        need(cp_utils, "get_sum_of_sample_mean", "slice_log_prob_with_cp")
        need(self.actor, "process_rollout_data")
        self.partition = Partition.from_ray(self.actor, data)

    @contextmanager
    def extra_forward(self, stage: str):
        before = os.environ.get("ROUTING_REPLAY_STAGE")
        os.environ["ROUTING_REPLAY_STAGE"] = stage
        try:
            yield
        finally:
            if before is None:
                del os.environ["ROUTING_REPLAY_STAGE"]
            else:
                os.environ["ROUTING_REPLAY_STAGE"] = before
            routing_replay.RoutingReplay.clear_all_forward()

    def watched(self, see):
        """Watch: slime's patch of Megatron looks get_routing_replay_compute_topk up each time."""
        original = routing_replay.get_routing_replay_compute_topk

        def watching(old_compute_topk):
            compute_topk = original(old_compute_topk)

            def topk(scores, k, num_groups=None, group_topk=None):
                limits = dict(num_groups=num_groups, group_topk=group_topk)
                see(old_compute_topk(scores, k, **limits)[1])
                return compute_topk(scores, k, **limits)

            return topk

        return replaced(routing_replay, get_routing_replay_compute_topk=watching)

    def watch_replay(self, look):
        """Watch permanently, in the same way as `watched`."""
        original = routing_replay.get_routing_replay_compute_topk

        def watching(old_compute_topk):
            compute_topk = original(old_compute_topk)

            def topk(scores, k, num_groups=None, group_topk=None):
                limits = dict(num_groups=num_groups, group_topk=group_topk)
                found = compute_topk(scores, k, **limits)

                def shown():
                    return found[1], old_compute_topk(scores.detach(), k, **limits)[1]

                if os.environ.get("ENABLE_ROUTING_REPLAY", "0") == "1":
                    stage = os.environ["ROUTING_REPLAY_STAGE"]
                    look(stage, shown)
                return found

            return topk

        routing_replay.get_routing_replay_compute_topk = watching

    def forward_arguments(self, rollout_id):
        return taken(self.model.forward_only, use_rollout_top_p_replay=True)

    def loss_of(self, args, batch):
        # v0.3.0 calls a rollout's samples a group; v0.2.4 has no sums over them.
        sums = batch.get("rollout_mask_sums", batch.get("group_mask_sums"))
        reducer = reducer_of(cp_utils.get_sum_of_sample_mean, args, batch, sample_denoms=sums)
        if args.loss_type == "custom_loss":
            return load_function(args.custom_loss_function_path), reducer
        return losses.policy_loss_function, reducer

    def rewards(self, data):
        return self.partition.rewards(data)

    def report(self, args, rollout_id, metrics):
        row = {f"rollout/{name}": value for name, value in metrics.items()}
        step = {"rollout/step": self.steps.compute_rollout_step(args, rollout_id)}
        self.tracking.log(args, row | step, step_key="rollout/step")
