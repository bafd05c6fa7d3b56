"""Parity with TRL 1.16.0's GRPOTrainer loss types: value and gradient, where the definitions agree.

The trainer's `_compute_loss` runs with its forward pass replaced by our log-probs. Needs

    pip install --no-deps trl==1.16.0
    pip install accelerate datasets

Without them this file fails rather than skips. Where TRL differs:

- TRL's `vespo` takes the ratio of a rollout correction, cut by its rule; here it is ρ itself.
- TRL's `delta` cuts r for both signs; for A > 0 the bound 1 + ε_high lies below it, so that it is
  the dual clip here.
- TRL's sequence means divide by all rows, empty ones included: `global_sequences` says so here.
- TRL's `cispo` has the bound itself in ε_high; verl has 1 + ε_high, and so has this library.
- TRL's `sapo` keeps its temperatures in float32, so agreement is to 1e-6.
- TRL's `epsilon_high` defaults to `epsilon`, and its dual clip (`delta`) is off by default.
"""

import collections
import importlib
import types

import pytest
import torch

from moe_upgrpo.losses import PolicyLossConfig, policy_loss
from tests.losses.batches import random_batch

try:
    GRPOTrainer = importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer
    GMPOTrainer = importlib.import_module("trl.experimental.gmpo.gmpo_trainer").GMPOTrainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; the head of {__file__} says what to install") from error


def ours(name: str, **changes) -> PolicyLossConfig:
    return PolicyLossConfig.preset(name, **changes)


SEQUENCES = {"aggregation": "seq-mean-token-mean"}
# name -> (TRL's trainer attributes, TRL's arguments, our config)
AGREE = {
    "grpo with delta": (
        dict(loss_type="grpo", epsilon_low=0.2, epsilon_high=0.28),
        dict(delta=3.0),
        ours("grpo", clip_high=0.28, **SEQUENCES),
    ),
    "bnpo": (
        dict(loss_type="bnpo", epsilon_low=0.2, epsilon_high=0.2),
        dict(delta=None),
        ours("grpo", dual_clip=None),
    ),
    "dapo": (
        dict(loss_type="dapo", epsilon_low=0.2, epsilon_high=0.28),
        dict(delta=None),
        ours("dapo", dual_clip=None),
    ),
    "dr_grpo": (
        dict(loss_type="dr_grpo", epsilon_low=0.2, epsilon_high=0.2, max_completion_length=40),
        dict(delta=None),
        ours("grpo", dual_clip=None, aggregation="seq-mean-token-sum-norm", token_sum_norm=40.0),
    ),
    "grpo at sequence level": (
        dict(
            loss_type="grpo",
            importance_sampling_level="sequence",
            epsilon_low=0.05,
            epsilon_high=0.08,
        ),
        dict(delta=None),
        ours("gspo", clip_low=0.05, clip_high=0.08),
    ),
    "cispo": (dict(loss_type="cispo", epsilon_high=1.5), {}, ours("cispo", clip_high=0.5)),
    "sapo": (
        dict(loss_type="sapo"),
        dict(sapo_temperature_pos=1.0, sapo_temperature_neg=1.05),
        ours("sapo"),
    ),
    "off-policy mask": (
        dict(loss_type="grpo", epsilon_low=0.2, epsilon_high=0.2, off_policy_mask_threshold=0.05),
        dict(delta=3.0),
        ours("deepseek-v3.2", off_policy_limit=0.05, **SEQUENCES),
    ),
    "luspo": (
        dict(
            loss_type="luspo",
            importance_sampling_level="sequence",
            epsilon_low=0.05,
            epsilon_high=0.08,
        ),
        dict(delta=None),
        ours("luspo", clip_low=0.05, clip_high=0.08),
    ),
    "vespo": (
        dict(loss_type="vespo"),
        dict(vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0),
        ours("vespo"),
    ),
    "top_entropy_quantile": (
        dict(loss_type="grpo", epsilon_low=0.2, epsilon_high=0.2, top_entropy_quantile=0.3),
        dict(delta=3.0),
        ours("grpo", top_entropy=0.3, **SEQUENCES),
    ),
}


class OneProcess:
    """The accelerator's collectives for a single process."""

    num_processes = 1

    def gather(self, x):
        return x

    def reduce(self, x, reduction):
        return x

    def pad_across_processes(self, x, dim, pad_index):
        return x


def trl_loss(trainer_class, batch, attributes: dict, arguments: dict) -> torch.Tensor:
    empty = torch.zeros(len(batch.mask), 0, dtype=torch.long)
    trainer = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (
            batch.log_probs,
            batch.entropy,
            None,
        ),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        accelerator=OneProcess(),
        args=types.SimpleNamespace(steps_per_generation=1, **arguments),
        aux_loss_enabled=False,
        beta=0.0,
        current_gradient_accumulation_steps=1,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        model=types.SimpleNamespace(training=True),
        use_vllm=False,
        _entropy_bonus_enabled=False,
        **{
            "top_entropy_quantile": 1.0,
            "importance_sampling_level": "token",
            "off_policy_mask_threshold": None,
            **attributes,
        },
    )
    trainer.get_high_entropy_mask = types.MethodType(GRPOTrainer.get_high_entropy_mask, trainer)
    rho = (batch.old_log_probs - batch.rollout_log_probs).exp()
    inputs = {
        "importance_sampling_ratio": torch.where(batch.mask.bool(), rho, 1.0),
        "prompt_ids": empty,
        "prompt_mask": empty,
        "completion_ids": batch.mask.long(),
        "completion_mask": batch.mask,
        "advantages": batch.advantages[:, 0],
        "old_per_token_logps": batch.old_log_probs,
        "sampling_per_token_logps": batch.rollout_log_probs,
        "num_items_in_batch": batch.mask.sum(),
    }
    return trainer_class._compute_loss(trainer, None, inputs)


def compare(trainer_class, attributes, arguments, config, rel=1e-12):
    lengths = (7, 3, 2, 5, 1, 6)
    theirs = random_batch(seed=60, lengths=lengths, spread=0.6).with_grad()
    mine = random_batch(seed=60, lengths=lengths, spread=0.6).with_grad()
    expected = trl_loss(trainer_class, theirs, attributes, arguments)
    expected.backward()
    result = policy_loss(**mine.arguments(config), global_sequences=6)
    result.loss.backward()
    assert theirs.log_probs.grad.count_nonzero() > 3
    assert result.loss.item() == pytest.approx(expected.item(), rel=rel)
    torch.testing.assert_close(mine.log_probs.grad, theirs.log_probs.grad, rtol=rel, atol=1e-16)


@pytest.mark.parametrize("name", AGREE)
def test_loss_and_gradient(name):
    # TRL keeps SAPO's and VESPO's numbers in float32
    compare(GRPOTrainer, *AGREE[name], rel=1e-6 if name in ("sapo", "vespo") else 1e-12)


def test_gmpo():
    attributes = dict(epsilon_low=0.3, epsilon_high=0.4)
    compare(GMPOTrainer, attributes, {}, ours("gmpo", clip_low=0.3, clip_high=0.4))
