"""Puts losses and log into Megatron-SWIFT's GRPO trainer."""

import swift
from swift.megatron.trainers import grpo_trainer

from moe_upgrpo.integrations.kit import environment
from moe_upgrpo.integrations.kit.hooking import check, delegate, wrap
from moe_upgrpo.integrations.ms_swift import log, loss

TESTED = "4.6.0"
# Methods of the trainer: those that methods of `log.TrainerLog` stand around, and others in use.
LOGGED = ("_prepare_vllm_engine", "_colocate_rollout", "_score_completions", "train_step",
          "_generate_and_score_completions", "_maybe_compute_logps")  # fmt: skip
CALLED = ("_init_grpo_params", "loss_func", "_apply_rollout_importance_sampling", "_prepare_batch",
          "_compute_off_policy_sequence_mask", "_all_reduce_metric",
          "compute_per_token_logps")  # fmt: skip
FUNCTIONS = ("collate_to_grpo_micro_batch", "pad_logps_back_to_batch", "reconstruct_tensor_cp")


def install() -> None:
    """Wrap the hooks of MegatronGRPOTrainer; once. Raises UserError: one is gone."""
    trainer_class = grpo_trainer.MegatronGRPOTrainer
    if hasattr(trainer_class, "moe_upgrpo_log"):
        return
    needed = {grpo_trainer: FUNCTIONS, trainer_class: LOGGED + CALLED}
    check("ms-swift", swift.__version__, TESTED, needed)

    def parameters(original, self):
        original()
        self.moe_upgrpo_loss = config = loss.loss_config(self.args)
        if config is not None:
            self.loss_type = loss.LIKE[config.aggregation]
        if environment.run_folder() is not None:
            self.moe_upgrpo_log = log.TrainerLog(self)

    def loss_func(original, self, output_tensor, data):
        if self.moe_upgrpo_log is not None:
            self.moe_upgrpo_log.see(original, output_tensor, data)
        if self.moe_upgrpo_loss is None:
            return original(output_tensor, data)
        return loss.loss_func(original, self, output_tensor, data)

    trainer_class.moe_upgrpo_log = None
    wrap(trainer_class, "_init_grpo_params", parameters)
    wrap(trainer_class, "loss_func", loss_func)
    delegate(trainer_class, "moe_upgrpo_log", LOGGED)
