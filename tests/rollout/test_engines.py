"""Engines by name, as far as the base install has them; the others: tests/engines."""

import pytest
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.rollout.engines import VLLMSettings, make_engine

CPU = torch.device("cpu")


def test_hf(tiny_checkpoint):
    engine = make_engine("hf", tiny_checkpoint, dtype="float32", device=CPU, max_tokens=8)
    assert engine.moe_layer_ids == (0, 1)
    engine.close()


def test_a_url_goes_with_servers_only(tiny_checkpoint):
    with pytest.raises(UserError, match="engine=hf: only vllm and sglang have servers"):
        make_engine(
            "hf", tiny_checkpoint, dtype="float32", device=CPU, max_tokens=8, url="http://x"
        )


@pytest.mark.parametrize("settings", [{"sequences": 0}, {"kv_cache_gib": 0}])
def test_bad_settings(settings):
    with pytest.raises(UserError, match=f"vllm.{next(iter(settings))}=0"):
        VLLMSettings(**settings)
