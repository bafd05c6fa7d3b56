import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

torch.set_num_threads(1)


def save_tiny(path):
    """A random Qwen3-MoE checkpoint that divides into every layout tested: 8 experts, top-2."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        intermediate_size=32,
        norm_topk_prob=True,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=False,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Qwen3MoeForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:  # ones would hide a norm that is skipped or swapped
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def tables(monkeypatch):
    """The tables that plug-ins add to, put back after the test."""
    from moe_upgrpo import losses, plugins, rewards
    from moe_upgrpo.losses.advantages import ADVANTAGES
    from moe_upgrpo.megatron.families import FAMILIES
    from moe_upgrpo.rollout.engines import ENGINES
    from moe_upgrpo.tasks.named import TASKS

    of_losses = (losses.BRANCHES, losses.PRESETS, ADVANTAGES)
    tables = (*of_losses, rewards.REWARDS, TASKS, ENGINES, FAMILIES)
    before = [dict(table) for table in tables]
    monkeypatch.setattr(plugins, "_loaded", {})
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)
