"""What the router tap refuses. That it records the right routes: test_layouts.py."""

import pytest
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import groups, tap
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.model import build_model, read_model_config
from moe_upgrpo.megatron.tap import RouterTap

TOKENS = torch.arange(6)[None]


@pytest.fixture
def model(tiny_checkpoint):
    with groups.process_groups(Layout()):
        hf = read_model_config(tiny_checkpoint)
        yield build_model(hf, Layout(), torch.float32)[0]


def routers(model):
    return [layer.mlp.router for layer in model.decoder.layers]


def test_two_routers_with_one_layer_number_are_refused(model):
    routers(model)[1].set_layer_number(1)
    with pytest.raises(UserError, match="layer number 1"):
        RouterTap([model])


def test_the_fused_router_is_refused(model):
    model.config.moe_router_fusion = True
    with pytest.raises(UserError, match="moe_router_fusion"):
        RouterTap([model])


def test_a_router_that_drops_tokens_is_an_error(model):
    routers(model)[1].register_forward_hook(
        lambda module, inputs, outputs: (outputs[0], outputs[1] & (torch.arange(8) > 3))
    )
    recorder = RouterTap([model])
    visit = recorder.visit(0, 1)
    with recorder.installed(), visit:
        model(TOKENS, TOKENS, None)
    assert "layers [1] did not send each token" in tap.wrong_uses([visit], 0)


def test_the_hooks_are_gone_after_recording(model):
    recorder = RouterTap([model])
    visit = recorder.visit(0, 1, record=("routes",))
    before = [router.router_replay for router in routers(model)]
    with recorder.installed(), visit:
        model(TOKENS, TOKENS, None)
        assert all(router.router_replay is not None for router in routers(model))
    assert tap.local_arrays([visit])[0][2]["routes"].shape == (6, 1, 2)
    assert [router.router_replay for router in routers(model)] == before == [None, None]
    assert not any(router._forward_hooks for router in routers(model))
