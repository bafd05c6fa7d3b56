"""What the actor refuses. That it computes rightly: test_layouts.py."""

import numpy as np
import pytest
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import PolicyLossConfig
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.settings import OptimizerSettings


def test_a_log_prob_that_is_not_finite_stops_the_update_before_any_weight_changes(tiny_checkpoint):
    values = np.full(3, -1.0, np.float32)
    sample = Sample(
        tokens=np.array([5, 6, 7, 8, 9]),
        prompt_length=2,
        old_log_probs=values,
        rollout_log_probs=values,
        advantage=1.0,
    )
    loss = PolicyLossConfig.preset("up-grpo")
    with groups.process_groups(Layout()):
        actor = MegatronActor(tiny_checkpoint, Layout(), optimizer=OptimizerSettings())
        weights = dict(actor.chunks[0].module.named_parameters())
        with torch.no_grad():
            weights["output_layer.weight"][7] = float("nan")  # every softmax is then NaN
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        with pytest.raises(UserError, match=r"position 2 .*nan.*were not changed"):
            actor.update([sample], loss)
        for name, weight in weights.items():
            torch.testing.assert_close(
                weight.detach(), before[name], equal_nan=True, rtol=0, atol=0
            )
        with torch.no_grad():
            weights["output_layer.weight"][7] = 0.1
        actor.update([sample], loss)  # and it is the log-prob that stopped it
        assert not torch.equal(weights["output_layer.weight"], before["output_layer.weight"])


def test_no_samples_is_an_error(tiny_checkpoint):
    with groups.process_groups(Layout()), pytest.raises(UserError, match="No samples"):
        MegatronActor(tiny_checkpoint, Layout()).score([])
