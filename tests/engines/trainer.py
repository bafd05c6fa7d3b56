"""Tiny checkpoints, and an engine's rollouts held against the Megatron trainer."""

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.rollout import SamplingConfig
from tests.engines.tolerance import log_prob_tolerance

EOS = 1
SIZES = dict(
    vocab_size=64,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=64,
    max_position_embeddings=128,
    # Large weights: peaked distributions and well separated experts.
    initializer_range=0.2,
    tie_word_embeddings=False,
    eos_token_id=EOS,
    bos_token_id=None,
    pad_token_id=0,
)
MOE = SIZES | dict(
    num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True
)


def saved(folder, config, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if "norm" in name:  # ones would hide a norm that is not updated
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def prompts(*lengths):
    rng = np.random.default_rng(5)
    return [rng.integers(2, 64, size=length) for length in lengths]


def sample(engine, lengths=(3, 40, 1, 70), samples=4, seed=0, temperature=1.0, new_tokens=20):
    sampling = SamplingConfig(temperature=temperature, max_new_tokens=new_tokens)
    return engine.generate(prompts(*lengths), sampling, samples_per_prompt=samples, seed=seed)


def whole(rollout):
    return np.concatenate([rollout.prompt_ids, rollout.response_ids])


def score(actor, rollouts, *, replay=False):
    """The trainer's view of the engine's sequences, on its own routes or on the engine's."""
    return actor.score(
        [
            Sample(
                tokens=whole(r),
                prompt_length=len(r.prompt_ids),
                routes=r.routes if replay else None,
            )
            for r in rollouts
        ]
    )


def same(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.response_ids, b.response_ids)
        np.testing.assert_array_equal(a.logp_rollout, b.logp_rollout)
        np.testing.assert_array_equal(a.routes, b.routes)
        assert a.finished == b.finished
    return True


def differs(first, second):
    return any(
        not np.array_equal(a.logp_rollout, b.logp_rollout)
        for a, b in zip(first, second, strict=True)
    )


def agrees_with_trainer(actor, rollouts) -> int:
    """Log-probs to the rounding of fp32, routes as sets exactly; the routers that were compared."""
    rows, length = 0, max((len(whole(r)) for r in rollouts), default=0)
    tolerance = log_prob_tolerance(actor.hf, length=length, temperature=actor.temperature)
    for rollout, scored in zip(rollouts, score(actor, rollouts), strict=True):
        np.testing.assert_allclose(rollout.logp_rollout, scored.log_probs, rtol=0, atol=tolerance)
        np.testing.assert_array_equal(np.sort(rollout.routes), np.sort(scored.routes))
        rows += rollout.routes[..., 0].size
    return rows


def move_weights(actor):
    """As an optimizer step would, but further: every weight, norms and routers included."""
    with torch.no_grad():
        for weight in (w for chunk in actor.chunks for w in chunk.parameters()):
            weight.add_(torch.randn_like(weight), alpha=0.05)
