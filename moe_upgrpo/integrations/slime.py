# ruff: noqa: E402
"""slime (THUDM/slime): every preset as its custom loss, and the routing log of its Megatron actor.

    --loss-type custom_loss --custom-loss-function-path moe_upgrpo.integrations.slime.loss
    --custom-megatron-init-path moe_upgrpo.integrations.slime.init

Flags, metrics and limits: docs/slime.md.
"""

import os
from argparse import Namespace
from contextlib import contextmanager

from moe_upgrpo.integrations.kit import revisions

revisions.check("slime", "loss")  # before what may have moved is imported

from slime.backends.megatron_utils import cp_utils
from slime.backends.megatron_utils import loss as losses
from slime.utils import routing_replay
from slime.utils.misc import load_function
from torch import Tensor

from moe_upgrpo.integrations.kit import environment
from moe_upgrpo.integrations.slime_miles.loss import check_loss, replaced, stack_loss

HERE = "moe_upgrpo.integrations.slime"


def loss(args: Namespace, batch, logits: Tensor, sum_of_sample_mean):
    """--custom-loss-function-path: see `slime_miles.loss.stack_loss`."""
    return stack_loss(
        losses,
        cp_utils.slice_log_prob_with_cp,
        f"{HERE}.sequence_sum",
        args,
        batch,
        logits,
        sum_of_sample_mean,
    )


def sequence_sum(total_lengths, response_lengths, loss_masks, calculate_per_token_loss):
    """Reducer of seq-mean-token-sum: the stack divides by the number of rollouts."""
    return cp_utils.get_sum_of_sample_mean(
        total_lengths, response_lengths, loss_masks, calculate_per_token_loss=True
    )


def init(args: Namespace) -> None:
    """--custom-megatron-init-path: check the settings before the model is built; install the log.

    Raises:
        UserError: settings that cannot be; a run folder that holds a run already.
    """
    # Megatron's model code: not for the loss alone.
    from moe_upgrpo.integrations.slime_miles import health, log

    check_loss(args, f"{HERE}.loss")
    mode = log.check_replay(args)
    if mode == "none":
        os.environ["ENABLE_ROUTING_REPLAY"] = "0"
    else:
        health.install(Slime(), args)  # inside of the log, whose own forwards are not counted
    if environment.run_folder():
        revisions.check("slime", "log")
        log.install(Slime(), args, mode)


class Slime:
    """`log.Stack` of slime."""

    name = "slime"
    losses = losses

    def __init__(self):
        # The actor's module calls the init hook, so that it is loaded.
        from slime.backends.megatron_utils import actor, model

        self.actor, self.model = actor, model

    def rows(self, args, data_iterator, num_microbatches, ids):
        """Through slime's own layout for replayed routes; it pads with numbers modulo num_experts,
        here 0."""
        iterator = data_iterator[0]
        tokens = iterator.rollout_data["tokens"]
        return [
            cp_utils.prepare_routed_experts_for_routing_replay(
                [ids[i][:, None, None] + 1 for i in indices],
                [tokens[i] for i in indices],
                num_experts=1,
                data_pad_size_multiplier=args.data_pad_size_multiplier,
                sequence_parallel=args.sequence_parallel,
                allgather_cp=args.allgather_cp,
            )[:, 0, 0]
            - 1
            for indices in iterator.micro_batch_indices
        ]

    @contextmanager
    def stage(self, name: str):
        before = os.environ.get("ROUTING_REPLAY_STAGE")
        os.environ["ROUTING_REPLAY_STAGE"] = name
        try:
            yield
        finally:
            if before is None:
                del os.environ["ROUTING_REPLAY_STAGE"]
            else:
                os.environ["ROUTING_REPLAY_STAGE"] = before

    def watched(self, see):
        """slime's patch of Megatron looks get_routing_replay_compute_topk up at each call."""
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
        """For good; as `watched`."""
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

    def rewind(self):
        routing_replay.RoutingReplay.clear_all_forward()

    def forward_arguments(self, rollout_id):
        return {"use_rollout_top_p_replay": True}

    def loss_of(self, args, batch):
        reducer = cp_utils.get_sum_of_sample_mean(
            batch["total_lengths"],
            batch["response_lengths"],
            batch["loss_masks"],
            batch["rollout_mask_sums"],
            args.calculate_per_token_loss,
        )
        if args.loss_type == "custom_loss":
            return load_function(args.custom_loss_function_path), reducer
        return losses.policy_loss_function, reducer

    def rewards(self, data):
        return data["local_raw_reward"] if "local_raw_reward" in data else data["rewards"]

    def report(self, args, rollout_id, metrics):
        from slime.observability import logging_utils
        from slime.observability.metric_utils import compute_rollout_step

        row = {f"rollout/{name}": value for name, value in metrics.items()}
        step = {"rollout/step": compute_rollout_step(args, rollout_id)}
        logging_utils.log(args, row | step, step_key="rollout/step")
