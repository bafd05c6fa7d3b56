"""Random checkpoints, and sequences for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.gpu.sizes import Sizes
from moe_upgrpo.megatron.batch import Sample


def config(sizes: dict[str, int], positions: int = 40_960) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        **sizes,
        max_position_embeddings=positions,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        initializer_range=0.05,
        eos_token_id=1,
        pad_token_id=None,
        bos_token_id=None,
    )


def checkpoint(hf: Qwen3MoeConfig, folder: Path, *, dtype=torch.float32, device="cpu") -> Path:
    """A folder of random weights of seed 0; an existing one is used as it is."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = Qwen3MoeForCausalLM(hf)
        finally:
            torch.set_default_dtype(before)
        model.save_pretrained(folder)
    return folder


def samples(sizes: Sizes) -> list[Sample]:
    """Random sequences of two lengths, rewards of both signs."""
    random = np.random.default_rng(0)
    made = []
    for i in range(sizes.sequences):
        response = sizes.response if i % 2 else sizes.response * 3 // 4
        made.append(
            Sample(
                tokens=random.integers(2, sizes.model["vocab_size"], sizes.prompt + response),
                prompt_length=sizes.prompt,
                rollout_log_probs=np.zeros(response, np.float32),
                advantage=1.0 if i % 3 else -1.0,
            )
        )
    return made
