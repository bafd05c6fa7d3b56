"""The stand-ins of published models: their architecture, small, and the shipped configs with them.

That the configs fit on GPUs: tests/tools/test_plan.py.
"""

from pathlib import Path

import pytest
from transformers import AutoConfig

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import memory
from moe_upgrpo.megatron.memory import Sizes
from moe_upgrpo.store import read_config, read_metrics
from moe_upgrpo.train.config import TrainConfig
from moe_upgrpo.train.tiny import TinyModel
from tests.train.test_launch import ROOT, job

CONFIGS = ROOT / "examples" / "configs"
MOE, DENSE = CONFIGS / "qwen3-30b-a3b.yaml", CONFIGS / "qwen3-14b-base.yaml"
STAND_IN = CONFIGS / "stand-in.yaml"


@pytest.mark.parametrize("like", ["qwen3-30b-a3b", "qwen3-14b-base"])
def test_a_stand_in_has_the_architecture(like):
    folder = CONFIGS / "models" / like
    big, small = AutoConfig.from_pretrained(folder), TinyModel(like=folder).hugging_face()
    same = ("model_type", "tie_word_embeddings", "rms_norm_eps")
    if big.model_type == "qwen3_moe":
        same += ("num_experts", "num_experts_per_tok", "norm_topk_prob", "decoder_sparse_step")
    for name in same:
        assert getattr(small, name) == getattr(big, name), name
    ratios = [c.num_attention_heads / c.num_key_value_heads for c in (big, small)]
    assert ratios[0] == ratios[1]
    assert memory.model_parameters(Sizes.of(small)) < 2e7
    layout = TrainConfig.of(tiny=TinyModel(like=folder)).layout(2)
    assert layout.ep == (1 if like[6:9] == "14b" else 2)


def test_a_stand_in_of_another_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(UserError, match="'mixtral' model"):
        TinyModel(like=tmp_path).hugging_face()


@pytest.mark.slow
@pytest.mark.parametrize("config", [MOE, DENSE], ids=lambda path: path.stem)
def test_a_config_runs_on_a_cpu_with_its_stand_in(config: Path, tmp_path, cache):
    cache = cache / "stand-in"
    words = ("--config", str(config), "--config", str(STAND_IN), "--cache-dir", str(cache))
    result = job(2, *words, "--output-dir", str(tmp_path / "run"), timeout_s=240)
    assert result.returncode == 0, result.stderr[-3000:]
    of_run = read_config(tmp_path / "run")
    layout, experts = ("TP2·EP2", 128) if config == MOE else ("TP2·EP1", 0)
    assert (of_run["layout"], of_run["num_experts"]) == (layout, experts)
    for name, value in {"loss": "up-grpo", "recompute": "full", "dtype": "bfloat16"}.items():
        assert of_run[name] == value
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["grad_norm"] > 0 for row in rows[1:])
