# ruff: noqa: E402
"""miles (radixark/miles): every preset as its custom loss, and the log of its Megatron actor.

    --loss-type custom_loss --custom-loss-function-path moe_upgrpo.integrations.miles.loss
    --custom-megatron-init-path moe_upgrpo.integrations.miles.init

Flags, metrics and limits: docs/slime.md. Between the released 0.0.2 and its newer checkouts names
moved and arguments came in; what is found decides (`slime_miles.revisions`).
"""

from argparse import Namespace
from contextlib import ExitStack, contextmanager

from moe_upgrpo.integrations.kit import revisions

revisions.check("miles", "loss")  # before what may have moved is imported

from miles.backends.training_utils import cp_utils
from miles.utils.misc import load_function
from miles.utils.replay_base import all_replay_managers, routing_replay_manager
from torch import Tensor

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.kit import environment
from moe_upgrpo.integrations.slime_miles.loss import check_loss, replaced, stack_loss
from moe_upgrpo.integrations.slime_miles.revisions import first_module, taken

losses = first_module(
    "miles.backends.training_utils.loss_hub.losses",
    "miles.backends.training_utils.loss",  # up to 0.0.2
)
HERE = "moe_upgrpo.integrations.miles"
ROWS = "moe_upgrpo_rows"  # in the rollout's data while `Miles.rows` lays them out


def loss(args: Namespace, batch, logits: Tensor, sum_of_sample_mean):
    """--custom-loss-function-path: see `slime_miles.loss.stack_loss`."""
    if args.qkv_format != "thd" and args.context_parallel_size > 1:
        raise UserError(
            f"--qkv-format: {args.qkv_format} given with context parallelism; allowed with it: thd"
        )
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
    if mode != "none":
        health.install(Miles(), args)  # inside of the log, whose own forwards are not counted
    if environment.run_folder():
        revisions.check("miles", "log")
        not_covered = {
            f"--qkv-format {args.qkv_format}": args.qkv_format != "thd",
            "independent data-parallel replicas (--ft-components)": getattr(
                args, "indep_dp", False
            ),
            "multi-LoRA": getattr(args, "multi_lora", False),
        }
        environment.refuse(not_covered)
        log.install(Miles(), args, mode)


class Miles:
    """`log.Stack` of miles."""

    name = "miles"
    losses = losses

    def __init__(self):
        # The actor's module calls the init hook, so that it is loaded.
        from miles.backends.megatron_utils import actor, model

        self.actor, self.model = actor, model
        self.partition: list[int] = []
        self._keep_partition()
        self.tracking = first_module(
            "miles.utils.tracking_utils.tracking", "miles.utils.tracking_utils"
        )
        method = getattr(actor.MegatronTrainRayActor, "_fill_replay_data", None)
        if method:  # 0.0.2; it reads the actor's arguments and model
            self.fill = lambda args, **given: method(Namespace(args=args, model=None), **given)
        else:
            fill = first_module("miles.backends.training_utils.replay_data").fill_replay_data
            self.fill = lambda args, **given: fill(args=args, models=None, **given)

    def _keep_partition(self):
        """Sees to it that `partition` has the rows of each rollout, which miles drops."""
        from miles.utils import data

        def kept(rollout_data):
            self.partition = list(rollout_data["partition"])
            return rollout_data

        if not hasattr(data, "ray"):
            conversion = first_module("miles.ray.rollout.train_data_conversion")
            shard = conversion.process_rollout_data_shard
            conversion.process_rollout_data_shard = lambda args, rollout_data: shard(
                args, kept(rollout_data)
            )
            return

        from miles.backends.training_utils import data as batches  # 0.0.2: straight from Ray

        process, get = batches.process_rollout_data, data.ray.get

        def watched(*args):
            with replaced(data, ray=Namespace(get=lambda ref: kept(get(ref)))):
                return process(*args)

        batches.process_rollout_data = watched

    def rows(self, args, data_iterator, num_microbatches, ids):
        """Through miles' own layout for replayed routes; it pads with -1."""
        found = []
        data = data_iterator[0].rollout_data
        data[ROWS] = [x[:, None, None] for x in ids]
        self.fill(
            args,
            data_iterator=data_iterator,
            num_microbatches=num_microbatches,
            rollout_data=data,
            data_key=ROWS,
            replay_list=[],
            register_replay_list_func=lambda _, rows, *__, **___: found.append(rows[:, 0, 0]),
        )
        return found

    @contextmanager
    def stage(self, name: str):
        with ExitStack() as undo:
            for manager in all_replay_managers:
                undo.enter_context(replaced(manager, stage=name))
            yield

    @contextmanager
    def watched(self, see):
        """Through the place where miles' tests compare the two sides."""
        manager = routing_replay_manager
        checks, check = manager.enable_check_replay_result, manager.check_replay_result

        def watching(topk_fn, scores, topk, top_indices, *args, **kwargs):
            see(topk_fn(scores, topk, *args, **kwargs)[1])
            if checks:
                check(topk_fn, scores, topk, top_indices, *args, **kwargs)

        with replaced(manager, enable_check_replay_result=True, check_replay_result=watching):
            yield

    def watch_replay(self, look):
        """For good, at the stack's own wrapper of a top-k."""
        manager = routing_replay_manager
        wrapped = manager.get_topk_fn

        def get_topk_fn(old_topk_fn, return_probs):
            topk = wrapped(old_topk_fn, return_probs)

            def watching(scores, *args, **kwargs):
                def shown():  # before the routes are used: miles puts others in the place of -1
                    replay = manager.get_current()
                    given = replay.top_indices_list[replay.forward_index].to(scores.device)
                    return given, old_topk_fn(scores.detach(), *args, **kwargs)[1]

                if manager.enabled:
                    look(manager.stage, shown)
                return topk(scores, *args, **kwargs)

            return watching

        manager.get_topk_fn = get_topk_fn

    def rewind(self):
        for manager in all_replay_managers:
            manager.clear_all_forward()

    def forward_arguments(self, rollout_id):
        return taken(self.model.forward_only, rollout_id=rollout_id)

    def loss_of(self, args, batch):
        reducer = cp_utils.get_sum_of_sample_mean(
            batch["total_lengths"],
            batch["response_lengths"],
            batch["loss_masks"],
            args.calculate_per_token_loss,
            **taken(cp_utils.get_sum_of_sample_mean, denominators=batch.get("rollout_mask_sums")),
        )
        if args.loss_type == "custom_loss":
            return load_function(args.custom_loss_function_path), reducer
        return losses.policy_loss_function, reducer

    def rewards(self, data):
        """Rewards of the whole batch in raw_reward, of this rank's sequences in rewards."""
        if "raw_reward" in data and len(self.partition) == len(data["tokens"]):
            return [data["raw_reward"][i] for i in self.partition]
        return data["rewards"]

    def report(self, args, rollout_id, metrics):
        from miles.utils.metric_utils import compute_rollout_step

        row = {f"rollout/{name}": value for name, value in metrics.items()}
        step = {"rollout/step": compute_rollout_step(args, rollout_id)}
        self.tracking.log(args, row | step, step_key="rollout/step")
