"""What the router tap refuses. That it records the right routes: test_layouts.py."""

import pytest
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.model import build_model, read_model_config
from moe_upgrpo.megatron.tap import RouterTap


@pytest.fixture
def model(tiny_checkpoint):
    with groups.process_groups(Layout()):
        hf = read_model_config(tiny_checkpoint)
        yield build_model(hf, Layout(), torch.float32)


def forward(model):
    tokens = torch.arange(6)[None]
    return model(tokens, tokens, None)


def test_nothing_recorded_is_an_error(model):
    tap = RouterTap(model)
    forward(model)
    with pytest.raises(RuntimeError, match=r"layers \[0, 1\] never ran"):
        tap.take(1)


def test_a_second_forward_without_take_is_an_error(model):
    with RouterTap(model) as tap, pytest.raises(RuntimeError, match="layer 0 ran twice"):
        forward(model)
        forward(model)
    assert tap


def test_two_routers_with_one_layer_number_are_refused(model):
    model.decoder.layers[1].mlp.router.set_layer_number(1)
    with pytest.raises(UserError, match="layer number 1"):
        RouterTap(model)


def test_the_fused_router_is_refused(model):
    model.config.moe_router_fusion = True
    with pytest.raises(UserError, match="moe_router_fusion"):
        RouterTap(model)


def test_a_router_that_drops_tokens_is_an_error(model):
    model.decoder.layers[1].mlp.router.register_forward_hook(
        lambda module, inputs, outputs: (outputs[0], outputs[1] & (torch.arange(8) > 3))
    )
    with RouterTap(model) as tap:
        forward(model)
        with pytest.raises(RuntimeError, match="layer 1 did not choose exactly 2"):
            tap.take(1)


def test_the_hooks_are_gone_after_recording(model):
    with RouterTap(model) as tap:
        forward(model)
        routes_BSLK = tap.take(1)
    assert routes_BSLK.shape == (1, 6, 2, 2)
    assert not model.decoder.layers[0].mlp.router._forward_hooks
