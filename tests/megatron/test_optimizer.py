"""Which of torch's forms of an optimizer step is asked for. Not covered: CUDA's kernels."""

import numpy as np
import pytest
import torch

from moe_upgrpo.losses import PolicyLossConfig
from moe_upgrpo.megatron import groups, optimizer
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.settings import OptimizerSettings

SAMPLE = Sample(tokens=np.arange(2, 9), prompt_length=3, advantage=1.0)


def stepped(checkpoint, algorithm: str) -> tuple[set, torch.Tensor]:
    """The options that are set, and the change of all weights by two steps."""
    with groups.process_groups(Layout()):
        settings = OptimizerSettings(algorithm=algorithm, lr=1e-2, warmup_steps=0)
        actor = MegatronActor(checkpoint, Layout(), optimizer=settings)
        before = torch.cat([t.flatten().clone() for _, t in actor.export_weights()])
        for _ in range(2):
            actor.update([SAMPLE], PolicyLossConfig.preset("grpo"))
        after = torch.cat([tensor.flatten() for _, tensor in actor.export_weights()])
        parts = getattr(actor.optimizer, "chained_optimizers", [actor.optimizer])
        found = {
            (type(part.optimizer), option)
            for part in parts
            for group in part.optimizer.param_groups
            for option in ("fused", "foreach")
            if group[option]
        }
        return found, after - before


@pytest.mark.parametrize("algorithm", ["adam", "sgd"])
def test_fused_where_cuda_is_there_and_the_same_step(algorithm, tiny_checkpoint, monkeypatch):
    """torch has a fused form on the CPU too, so that the option can be tried here."""
    kind = torch.optim.AdamW if algorithm == "adam" else torch.optim.SGD
    options, expected = stepped(tiny_checkpoint, algorithm)
    assert options == {(kind, "foreach")} and expected.abs().max() > 1e-4
    monkeypatch.setattr(optimizer, "has_cuda", lambda: True)
    options, found = stepped(tiny_checkpoint, algorithm)
    assert options == {(kind, "fused")}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_optimizers_of_others_are_left_alone():
    class FusedAdam(torch.optim.AdamW):
        """As Transformer Engine's and Apex's: without the options of torch's."""

    class Part:
        optimizer = FusedAdam([torch.nn.Parameter(torch.zeros(2))])

    optimizer._step_in_one_call(Part())
    assert not Part.optimizer.param_groups[0]["foreach"]
