# SPDX-License-Identifier: Apache-2.0
"""Put losses, log and health figures into Megatron-SWIFT's GRPO trainer."""

from swift.megatron.trainers import grpo_trainer

from moe_upgrpo.integrations.kit import environment, revisions
from moe_upgrpo.integrations.kit.hooking import delegate, wrap
from moe_upgrpo.integrations.ms_swift import health, log, loss

# Methods of the trainer that methods of `log.TrainerLog` wrap.
LOGGED = ("_prepare_vllm_engine", "_colocate_rollout", "_score_completions", "train_step",
          "_generate_and_score_completions", "_maybe_compute_logps")  # fmt: skip


def install() -> None:
    """Wrap the hooks of MegatronGRPOTrainer; once."""
    trainer_class = grpo_trainer.MegatronGRPOTrainer
    if hasattr(trainer_class, "moe_upgrpo_log"):
        return

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

    trainer_class.moe_upgrpo_log = trainer_class.moe_upgrpo_health = None
    wrap(trainer_class, "_init_grpo_params", parameters)
    wrap(trainer_class, "loss_func", loss_func)
    if revisions.has("ms-swift", "health"):
        wrap(trainer_class, "forward_step", health.forward_step)
        wrap(trainer_class, "train_step", health.train_step)
    if environment.run_folder() is not None:
        delegate(trainer_class, "moe_upgrpo_log", LOGGED)
