# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402
"""miles (radixark/miles): every preset as its custom loss, and the log of its Megatron actor.

    --loss-type custom_loss --custom-loss-function-path moe_upgrpo.integrations.miles.loss
    --custom-megatron-init-path moe_upgrpo.integrations.miles.init

Flags, metrics and limits: docs/slime.md. Between the released 0.0.2 and newer checkouts, names
moved and arguments were added; the code follows what it finds (`slime_miles.revisions`).
"""

from argparse import Namespace
from contextlib import ExitStack, contextmanager

from moe_upgrpo.integrations.kit import revisions

revisions.check("miles", "loss")  # before importing what may have moved

from miles.backends.training_utils import cp_utils
from miles.utils.misc import load_function
from miles.utils.replay_base import all_replay_managers, routing_replay_manager
from torch import Tensor

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.kit import environment
from moe_upgrpo.integrations.kit.hooking import replaced
from moe_upgrpo.integrations.slime_miles.layout import is_padded, reducer_of, splits_the_whole
from moe_upgrpo.integrations.slime_miles.loss import check_loss, stack_loss, sum_of_sequences
from moe_upgrpo.integrations.slime_miles.revisions import Partition, first_module, need, taken

losses = first_module(
    "miles.backends.training_utils.loss_hub.losses",
    "miles.backends.training_utils.loss",  # up to 0.0.2
)
HERE = "moe_upgrpo.integrations.miles"


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
    """Raise UserError where miles itself takes the log-probs of other tokens."""
    if is_padded(args) and splits_the_whole(args) and args.micro_batch_size > 1:
        raise UserError(
            f"--micro-batch-size: {args.micro_batch_size} given with --qkv-format "
            f"{args.qkv_format} and --allgather-cp; allowed with them: 1 (miles looks for the "
            "second sequence of a micro-batch where it would be without padding)"
        )


def init(args: Namespace) -> None:
    """--custom-megatron-init-path: check the settings before the model is built; install the log.

    Raises:
        UserError: impossible settings; a run folder that already holds a run.
    """
    # Megatron's model code: not needed for the loss alone.
    from moe_upgrpo.integrations.slime_miles import health, log

    check_loss(args, f"{HERE}.loss", losses)
    mode = log.check_replay(args)
    if args.loss_type == "custom_loss" or environment.run_folder():
        check_layout(args)
    logs, r3 = environment.run_folder() is not None, mode == "R3"
    if logs:
        revisions.check("miles", "log")
        not_covered = {
            "independent data-parallel replicas (--ft-components)": getattr(
                args, "indep_dp", False
            ),
            "multi-LoRA": getattr(args, "multi_lora", False),
            "R3 with --allgather-cp in this release of miles (it lays the rollout's routes out as "
            "without that flag; v0.1.0 does it right)": (
                r3 and is_older() and splits_the_whole(args)
            ),
            f"R3 with --qkv-format bshd and --micro-batch-size {args.micro_batch_size} (miles lays "
            "the rollout's routes out sequence by sequence, its routers run position by position; "
            "take 1)": r3 and is_padded(args) and args.micro_batch_size > 1,
        }
        environment.refuse(not_covered)
    replays = mode != "none" and revisions.has("miles", "health")
    if not (logs or replays):
        return
    stack = Miles(args)
    if replays:
        health.install(stack, args)  # inside of the log, whose own forwards are not counted
    if logs:
        log.install(stack, args, mode)


def is_older() -> bool:
    """Whether it is miles 0.0.2, which takes a rank's shard straight from Ray."""
    from miles.utils import data

    return hasattr(data, "ray")


class Miles:
    """`log.Stack` of miles."""

    name = "miles"
    losses = losses

    def __init__(self, args: Namespace):
        # The init hook is called from the actor's module, so that module is loaded.
        from miles.backends.megatron_utils import actor, model

        self.args, self.actor, self.model = args, actor, model
        self.tracking = first_module(
            "miles.utils.tracking_utils.tracking", "miles.utils.tracking_utils"
        )
        self.steps = first_module("miles.utils.metric_utils")
        need(self.tracking, "log")
        need(self.steps, "compute_rollout_step")

    def prepare(self):
        need(cp_utils, "get_sum_of_sample_mean", "slice_log_prob_with_cp")
        need(routing_replay_manager, "check_replay_result", "clear_all_forward", "stage")
        if is_older():
            from miles.backends.training_utils import data as batches
            from miles.utils import data

            self.partition = Partition.from_ray(batches, data)
        else:
            conversion = first_module("miles.ray.rollout.train_data_conversion")
            need(conversion, "process_rollout_data_shard")
            self.partition = Partition.from_shards(conversion)

    @contextmanager
    def extra_forward(self, stage: str):
        """The indexer's replay (--use-indexer-replay, --use-rollout-indexer-replay) is left alone:
        what it records is not recorded here, and what it replays is replayed here too."""
        with ExitStack() as undo:
            for manager in all_replay_managers:
                if manager is routing_replay_manager:
                    here = stage
                elif getattr(self.args, f"use_rollout_{manager.name}_replay", False):
                    here = "replay_forward"
                else:
                    here = "fallthrough"
                undo.enter_context(replaced(manager, stage=here))
            yield
        for manager in all_replay_managers:
            manager.clear_all_forward()

    @contextmanager
    def watched(self, see):
        """Watch through the place where miles' tests compare the two sides."""
        manager = routing_replay_manager
        checks, check = manager.enable_check_replay_result, manager.check_replay_result

        def watching(topk_fn, scores, topk, top_indices, *args, **kwargs):
            see(topk_fn(scores, topk, *args, **kwargs)[1])
            if checks:
                check(topk_fn, scores, topk, top_indices, *args, **kwargs)

        with replaced(manager, enable_check_replay_result=True, check_replay_result=watching):
            yield

    def watch_replay(self, look):
        """Watch permanently, in the stack's own wrapper of a top-k."""
        manager = routing_replay_manager
        wrapped = manager.get_topk_fn

        def get_topk_fn(old_topk_fn, return_probs):
            topk = wrapped(old_topk_fn, return_probs)

            def watching(scores, *args, **kwargs):
                def shown():  # before the routes are used: miles replaces -1 by other ids
                    replay = manager.get_current()
                    given = replay.top_indices_list[replay.forward_index].to(scores.device)
                    return given, old_topk_fn(scores.detach(), *args, **kwargs)[1]

                if manager.enabled:
                    look(manager.stage, shown)
                return topk(scores, *args, **kwargs)

            return watching

        manager.get_topk_fn = get_topk_fn

    def forward_arguments(self, rollout_id):
        return taken(self.model.forward_only, rollout_id=rollout_id)

    def loss_of(self, args, batch):
        sums = batch.get("rollout_mask_sums")
        reducer = reducer_of(cp_utils.get_sum_of_sample_mean, args, batch, denominators=sums)
        if args.loss_type == "custom_loss":
            return load_function(args.custom_loss_function_path), reducer
        return losses.policy_loss_function, reducer

    def rewards(self, data):
        return self.partition.rewards(data)

    def report(self, args, rollout_id, metrics):
        row = {f"rollout/{name}": value for name, value in metrics.items()}
        step = {"rollout/step": self.steps.compute_rollout_step(args, rollout_id)}
        self.tracking.log(args, row | step, step_key="rollout/step")
