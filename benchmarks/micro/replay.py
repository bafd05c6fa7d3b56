"""The part of the divergence between engine and trainer that replaying the engine's routes removes.

    OMP_NUM_THREADS=1 python benchmarks/micro/replay.py [--engine vllm]

Random Qwen3-MoE models of about 8M parameters; a bf16 engine samples 64 sequences of up to 32
tokens from each, the trainer scores them in fp32 and in bf16, on its own routes and on the
engine's. k3 is the mean of exp(d) − 1 − d, d = log p_train − log p_rollout; rates are over whole
sequences. One run each, seed 0; the models are random, and another seed gives other figures.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import tyro
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moe_upgrpo import kernels
from moe_upgrpo.cli import silence_upstream
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.rollout import SamplingConfig
from moe_upgrpo.rollout.engines import EngineName, make_engine
from moe_upgrpo.routing import compare_routes

# experts, their width, top-k, initializer
MODELS = (
    (20, 128, 2, 0.05),
    (20, 128, 2, 0.1),
    (40, 64, 4, 0.05),
    (40, 64, 4, 0.02),
    (64, 64, 4, 0.2),
    (64, 32, 8, 0.05),
)


def save(folder: Path, experts: int, width: int, top_k: int, initializer: float) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=64,
        max_position_embeddings=128,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=width,
        norm_topk_prob=True,
        initializer_range=initializer,
        tie_word_embeddings=False,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=None,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


def rollouts_of(folder: Path, engine: EngineName) -> list:
    rng = np.random.default_rng(5)
    prompts = [rng.integers(2, 512, size=length) for length in (8, 16, 24, 32)]
    sampler = make_engine(engine, folder, dtype="bfloat16", device=groups.device(), max_tokens=64)
    sampling = SamplingConfig(max_new_tokens=32)
    found = sampler.generate(prompts, sampling, samples_per_prompt=16, seed=0)
    sampler.close()
    return found


def k3(scored: list, rollouts: list) -> float:
    d = np.concatenate(
        [s.log_probs - r.logp_rollout for s, r in zip(scored, rollouts, strict=True)]
    )
    return float(np.mean(np.exp(d.astype(np.float64)) - 1 - d))


def main(engine: EngineName = "vllm") -> None:
    silence_upstream()
    kernels.pin()
    print(
        "| experts × width, top-k | initializer | trainer | routers that differ | tokens with any "
        "| k3 | replayed | ratio |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    with groups.process_groups(Layout()), tempfile.TemporaryDirectory() as scratch:
        for i, (experts, width, top_k, initializer) in enumerate(MODELS):
            folder = Path(scratch) / str(i)
            save(folder, experts, width, top_k, initializer)
            rollouts = rollouts_of(folder, engine)
            samples = [
                Sample(
                    tokens=np.concatenate([r.prompt_ids, r.response_ids]),
                    prompt_length=len(r.prompt_ids),
                )
                for r in rollouts
            ]
            held = [replace(s, routes=r.routes) for s, r in zip(samples, rollouts, strict=True)]
            for dtype in ("float32", "bfloat16"):
                actor = MegatronActor(folder, Layout(), dtype=dtype)
                native, replayed = actor.score(samples), actor.score(held)
                sides = ([r.routes.astype(np.int16) for r in rollouts], [s.routes for s in native])
                routes = compare_routes(
                    *(torch.from_numpy(np.concatenate(side)) for side in sides),
                    num_experts=experts,
                )
                before, after = k3(native, rollouts), k3(replayed, rollouts)
                print(
                    f"| {experts} × {width}, top-{top_k} | {initializer} | {dtype} | "
                    f"{routes.router_mismatch_rate:.1%} | {routes.token_any_rate:.1%} | "
                    f"{before:.1e} | {after:.1e} | {before / after:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    tyro.cli(main)
