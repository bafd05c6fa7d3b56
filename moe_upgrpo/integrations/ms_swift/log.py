# SPDX-License-Identifier: Apache-2.0
"""The routing log of Megatron-SWIFT's GRPO trainer; a step is a generation.

Shapes: as in `kit.sequence_log`; N rows of a micro-batch on this rank.
"""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import swift
import torch
from swift.megatron.trainers import grpo_trainer

from moe_upgrpo.integrations.kit import environment, routers
from moe_upgrpo.integrations.kit.hooking import replaced
from moe_upgrpo.integrations.kit.second_look import second_look
from moe_upgrpo.integrations.kit.sequence_log import Generated, SequenceLog
from moe_upgrpo.integrations.ms_swift import health
from moe_upgrpo.integrations.ms_swift.loss import evaluate, parts

NEEDED = "vLLM 0.14 or newer, and enable_return_routed_experts of a server: docs/ms-swift.md"


class TrainerLog(SequenceLog):
    """The log of one trainer on one rank; its methods that take `original` wrap hooks."""

    def __init__(self, trainer):
        self.trainer, self.args = trainer, trainer.args
        mode = self.args.router_replay_mode
        # The engine's log-probs are computed after these; the trainer's are not.
        sampling = {"top_p": 1, "top_k": -1, "repetition_penalty": 1}
        changed = {f"--{n} other than {x}": getattr(self.args, n) != x for n, x in sampling.items()}
        fused = mode != "disabled" and trainer.config.moe_router_fusion
        given = {"--use_ray": self.args.use_ray, f"--moe_router_fusion under {mode}": fused}
        environment.refuse(given | changed)
        model = trainer.unwrapped_models[0]
        super().__init__(trainer.config, model, replay=None if mode == "disabled" else mode)

    trains = property(lambda self: self.trainer.unwrapped_models[0].training)

    def _lengths(self, batch) -> list[int] | None:
        return batch.seq_lengths.tolist() if self.args.padding_free else None

    def _prepare_vllm_engine(self, original, *args):
        # Only under R3 does ms-swift ask the engine for routes and share them among ranks.
        with replaced(self.args, router_replay_mode="R3"):
            return original(*args)

    _colocate_rollout = _prepare_vllm_engine

    def _score_completions(self, original, samples):
        rewards = original(samples)
        weighted = (rewards * self.trainer.reward_weights).nansum(dim=1).tolist()
        for sample, reward in zip(samples, weighted, strict=True):
            sample.moe_upgrpo_reward = reward  # travels with it to the other ranks
        return rewards

    def _generate_and_score_completions(self, original, inputs):
        collate, trains = grpo_trainer.collate_to_grpo_micro_batch, self.trains

        def seen(samples, *args, **kwargs):
            ids = [np.array(s.encoded["input_ids"]) for s in samples]  # before it pads them
            model_inputs, batch = collate(samples, *args, **kwargs)
            if self.replay != "R3":
                model_inputs.pop("routed_experts", None)  # the model's forward does not accept them
            if trains:
                made = [
                    Generated(
                        token_ids=token_ids,
                        reward=sample.moe_upgrpo_reward,
                        routes=sample.routed_experts,
                        finished=not sample.is_truncated,
                        staleness=0,  # of the newest weights (rollout_mixin.py:728)
                    )
                    for sample, token_ids in zip(samples, ids, strict=True)
                ]
                batch.moe_upgrpo_rows = self.generated(made, needed=NEEDED)
            return model_inputs, batch

        if trains:
            self.clear()
        with replaced(grpo_trainer, collate_to_grpo_micro_batch=seen):
            result = original(inputs)
        if trains:
            self.join()
        return result

    def _maybe_compute_logps(self, original, batch, *args, **kwargs):
        # The last forward of the trained model in it computes the old log-probs.
        if not self.trains:
            return original(batch, *args, **kwargs)
        of_batch = batch["grpo_batch"]
        inputs = {name: value for name, value in batch.items() if name != "grpo_batch"}
        return self.watched(
            lambda: original(batch, *args, **kwargs),
            lambda: self._native_forward(inputs, of_batch),
            lambda table_NLX: self._of_sequences(table_NLX, inputs, of_batch),
        )

    def _native_forward(self, inputs: dict[str, Any], batch) -> None:
        trainer, (size, width) = self.trainer, batch.completion_mask.shape
        logp, _ = trainer.compute_per_token_logps(
            trainer.unwrapped_models[0], iter([deepcopy(inputs)]), temperature=trainer.temperature
        )
        if logp is None:  # not the last pipeline stage
            return
        if self.args.padding_free:
            lengths = {"batch_size": size, "seq_lengths": batch.seq_lengths}
            logp, _ = grpo_trainer.pad_logps_back_to_batch(logp, logits_to_keep=width, **lengths)
        for row, logp_T in zip(batch.moe_upgrpo_rows, logp.double().cpu().numpy(), strict=True):
            self.sequences[row].native_logp = logp_T

    def _of_sequences(self, table_NLX: torch.Tensor, inputs: dict[str, Any], batch) -> dict:
        size = 1 if self.args.padding_free else len(batch.completion_mask)
        table_NLX = routers.whole_sequence_parallel(table_NLX, self.config.sequence_parallel)
        table = table_NLX.unflatten(0, (-1, size)).transpose(0, 1)
        if (cp := self.args.context_parallel_size) > 1:
            params = self.trainer._prepare_batch(deepcopy(inputs)).get("packed_seq_params")
            count = size if params is None else len(params.seq_lens)
            layout = (params, count, self.args.cp_partition_mode)
            join = grpo_trainer.reconstruct_tensor_cp
            table = routers.whole_context_parallel(table, lambda x: join(cp, x, *layout))
        return routers.by_sequence(table, batch.moe_upgrpo_rows, self._lengths(batch))

    def see(self, own_loss, log_probs: torch.Tensor, data: dict[str, Any]) -> None:
        """Record what the loss sees of a micro-batch, on every rank of the last stage."""
        if not self.trains:
            return
        trainer, batch = self.trainer, data["grpo_batch"]

        def loss(leaves):
            if trainer.moe_upgrpo_loss is not None:
                value, result = evaluate(trainer, leaves[0], data)
                return value, result.metrics
            # Without its KL; what it notes for its own metrics is noted only once.
            alone = data | {"grpo_batch": replace(batch, ref_per_token_logps=None)}
            noted = {"_metrics": deepcopy(trainer._metrics), "_flush_log_completions": lambda: None}
            with replaced(trainer, **noted):
                return own_loss(leaves[0], alone)[0], {}

        look = second_look(loss, [log_probs])
        if self.writes:
            self.visited(
                look,
                batch.moe_upgrpo_rows,
                self._lengths(batch),
                share=1 / parts(trainer),
                mask=batch.completion_mask,
                logp_rollout=batch.rollout_per_token_logps,
                advantage=batch.advantages,
                logp_old=batch.old_per_token_logps,
                logp_train=log_probs,
            )

    def train_step(self, original, *args):
        metrics, *rest = original(*args)
        self.gathered.updates += 1
        if health.ends_generation(self.trainer):
            self.step += 1
            if self.last_stage:
                found = self.write(
                    self.args,
                    tokenizer=self.args.model_info.model_dir,  # ms-swift's copy on this disk
                    stack=f"ms-swift {swift.__version__}",
                    loss=self.args.loss_type,
                    engine="vLLM",
                    model=str(self.args.model),
                )
                health.add(self.trainer, metrics, found)
        return metrics, *rest
