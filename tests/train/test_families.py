"""OLMoE and Qwen2-MoE as published ones are shaped, made on the spot: trained, and probed after."""

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig, Qwen2MoeConfig

from moe_upgrpo.store import read_metrics, read_tokens
from moe_upgrpo.tasks import arithmetic
from tests.ranks import run_command

SIZES = dict(
    vocab_size=len(arithmetic.VOCABULARY),
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,  # as many as queries, in OLMoE-1B-7B and Qwen1.5-MoE-A2.7B
    max_position_embeddings=64,
    initializer_range=0.1,
    eos_token_id=arithmetic.EOS_ID,
    pad_token_id=arithmetic.PAD_ID,
)
MODELS = {
    "olmoe": OlmoeConfig(**SIZES, intermediate_size=64, num_experts=64, num_experts_per_tok=8),
    "qwen2_moe": Qwen2MoeConfig(
        **SIZES,
        intermediate_size=128,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=128,
        num_experts=60,
        num_experts_per_tok=4,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_a_public_shape_is_trained_and_probed(family, tmp_path):
    """In fp32, engine and trainer agree on tokens and routes, before and after updates."""
    hf, model, run = MODELS[family], tmp_path / "model", tmp_path / "run"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(hf).save_pretrained(model)
    arithmetic.save_tokenizer(model)
    done = run_command(
        "train", "--model", model, "--output-dir", run, "--digits", 1, "--steps", 3,
        "--optimizer.lr", 1e-3,
        "--prompts", 8, "--group", 4, "--minibatches", 2, "--max-new-tokens", 6, "--no-report",
        "--eval-every", 3, "--engine-dtype", "float32", "--tp", 2, "--ep", 2,
        "--reward", "regex:[0-4]",  # which a random model earns now and then
        ranks=2, timeout_s=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    tokens = read_tokens(run).to_pandas()
    assert {*tokens.step} == {1, 2, 3}
    assert (tokens.logp_old - tokens.logp_rollout).abs().max() < 1e-4
    assert tokens.layers_mismatched.mean() < 0.01 and (tokens.ratio != 1).any()

    prompts, probed = tmp_path / "prompts.txt", tmp_path / "probed"
    prompts.write_text("1+2=\n3+4=\n")
    trained = run / "checkpoints/step-000003"
    done = run_command(
        "probe", "--model", trained, "--prompts", prompts, "--samples", 4, "--output-dir", probed,
        "--engine-dtype", "float32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = read_metrics(probed)
    assert row["logp_gap/mean_abs"] < 1e-5 and row["mismatch/router_rate"] < 0.01
    assert row["mismatch/router_denominator"] == 2 * len(read_tokens(probed)) > 0
