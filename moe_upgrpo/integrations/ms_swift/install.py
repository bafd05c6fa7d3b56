"""Puts losses and log into Megatron-SWIFT's GRPO trainer."""

from swift.megatron.trainers import grpo_trainer

from moe_upgrpo.integrations.kit import environment, revisions
from moe_upgrpo.integrations.kit.hooking import delegate, wrap
from moe_upgrpo.integrations.ms_swift import log, loss

# Methods of the trainer that methods of `log.TrainerLog` stand around.
LOGGED = ("_prepare_vllm_engine", "_colocate_rollout", "_score_completions", "train_step",
          "_generate_and_score_completions", "_maybe_compute_logps")  # fmt: skip


def install() -> None:
    """Wrap the hooks of MegatronGRPOTrainer; once. Raises UserError: one is gone."""
    trainer_class = grpo_trainer.MegatronGRPOTrainer
    if hasattr(trainer_class, "moe_upgrpo_log"):
        return
    revisions.check("ms-swift", "log" if environment.run_folder() else "loss")

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
