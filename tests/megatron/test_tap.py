"""Refusals and counts of the router tap. That it records the right routes: test_layouts.py."""

import numpy as np
import pytest
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import groups, tap
from moe_upgrpo.megatron.batch import Sample, make_batch
from moe_upgrpo.megatron.families import read_model_config
from moe_upgrpo.megatron.head import Wanted
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.model import build_model
from moe_upgrpo.megatron.tap import NO_ROUTE, RouterTap
from moe_upgrpo.megatron.weights import load_weights
from moe_upgrpo.routing.margins import of_best_groups, top_k_margins

TOKENS = torch.arange(6)[None]


@pytest.fixture
def model(tiny_checkpoint):
    with groups.process_groups(Layout()):
        hf = read_model_config(tiny_checkpoint)
        chunks = build_model(hf, Layout(), torch.float32, "full")
        load_weights(chunks, hf, tiny_checkpoint)
        yield chunks[0].eval()


def routers(model):
    return [layer.mlp.router for layer in model.decoder.layers]


def forward(model, tokens=TOKENS):
    wanted = Wanted(
        targets_BS=tokens, mask_BS=torch.ones_like(tokens).bool(), temperature=1.0, entropy=True
    )
    return model(tokens, tokens, None, wanted=wanted)


def test_two_routers_with_one_layer_number_are_refused(model):
    routers(model)[1].set_layer_number(1)
    with pytest.raises(UserError, match="layer number 1"):
        RouterTap([model])


def test_the_fused_router_is_refused(model):
    model.config.moe_router_fusion = True
    with pytest.raises(UserError, match="moe_router_fusion"):
        RouterTap([model])


def test_a_router_that_drops_tokens_is_an_error(model):
    """As many as it should send, as dispatchers count them, but one of another token."""

    def drop(module, inputs, outputs):
        map_NE = outputs[1].clone()
        map_NE[0, map_NE[0].nonzero()[0]] = False
        map_NE[1, (~map_NE[1]).nonzero()[0]] = True
        return outputs[0], map_NE

    routers(model)[1].register_forward_hook(drop)
    recorder = RouterTap([model])
    visit = recorder.visit(0, 1)
    with recorder.installed(), visit:
        forward(model)
    assert "layers [1] did not send each token" in tap.wrong_uses([visit], 0)


def test_routes_that_name_an_expert_twice_are_refused():
    routes_TLK = np.tile(np.array([4, 5], dtype=np.uint8), (5, 2, 1))
    sample = Sample(tokens=np.arange(6), prompt_length=3, routes=routes_TLK)
    assert make_batch([sample]).routes_BSLK.shape == (1, 6, 2, 2)
    routes_TLK[3, 1] = 5
    with pytest.raises(UserError, match=r"row 3 .* MoE layer 1: \[5, 5\] names an expert twice"):
        make_batch([sample])


def test_a_router_that_is_skipped_is_an_error_that_names_it(model):
    """Sinkhorn routing has a top-k of its own, which asks nobody (router.py:247)."""
    recorder = RouterTap([model])
    routers(model)[1].routing_type = "sinkhorn"
    visit = recorder.visit(0, 1)
    with recorder.installed(), visit:
        forward(model)
    message = tap.wrong_uses([visit], 0)
    assert "routers of layers [1] did not run once" in message and "{1: (0, 0)}" in message


def test_a_router_that_runs_twice_is_an_error_that_names_it(model):
    recorder = RouterTap([model])
    visits = [recorder.visit(0, 1) for _ in range(2)]
    with recorder.installed():
        with visits[0]:
            forward(model)
        with visits[1]:
            forward(model)
            forward(model)
    assert tap.wrong_uses(visits[:1], 0) is None
    message = tap.wrong_uses(visits, 0)
    assert "layers [0, 1]" in message and "micro-batch 1" in message
    assert "{0: (2, 0), 1: (2, 0)}" in message


def test_a_router_that_runs_outside_its_micro_batch_is_an_error(model):
    recorder = RouterTap([model])
    with recorder.installed(), pytest.raises(RuntimeError, match="layer 0 ran outside"):
        forward(model)


def test_rows_without_a_route_are_routed_natively(model):
    """Padding and the last token of a sequence: not sent to expert 0."""
    routes_BSLK = torch.tensor([6, 7], dtype=torch.int16).repeat(1, 6, 2, 1)
    routes_BSLK[:, 4:] = NO_ROUTE
    recorder = RouterTap([model])
    visit = recorder.visit(0, 1, routes_BSLK, ("routes",))
    with recorder.installed(), visit:
        forward(model)
    ((layers, rows, arrays),) = tap.hand_over([visit], tap.Run(slice(1)), recorder.num_experts)
    assert layers == [1, 2] and rows == 6 and not visit.traces
    assert (arrays["routes"][:4] == [6, 7]).all()
    assert (arrays["routes"][4:] == arrays["own_routes"][4:]).all()
    assert not (arrays["own_routes"][:4] == [6, 7]).all(axis=(0, 1, 3)).any()


def test_records_are_joined_in_runs_of_at_most_so_many_tokens():
    limit = tap._TOGETHER // 48

    def runs(*tokens: int, layers: int = 48):
        return [(r.visits, r.part, r.parts) for r in tap.together(tokens, layers)]

    one, two = (slice(0, 1), 0, 1), (slice(3, 4), 0, 1)
    assert runs(limit, 1, limit - 1, 1) == [one, (slice(1, 3), 0, 1), two]
    halves = [(slice(0, 1), part, 2) for part in (0, 1)]
    assert runs(2 * limit, limit) == [*halves, (slice(1, 2), 0, 1)]
    assert runs() == [(slice(0, 0), 0, 1)] and runs(9, 9, layers=0) == [(slice(0, 2), 0, 1)]


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_of_ranks_and_chunks_join_by_tensor_rank_and_layer(parts):
    """Tokens 0 to 3 in two shards, layer 1 on one stage and layers 2 and 5 on another; the two
    rows of a shard at once, one after the other, and with a part that has none."""
    whole_BSL = np.arange(24).reshape(2, 4, 3)
    joined = [{}, {}]
    for part in range(parts):
        run = tap.Run(slice(0, 2), part, parts)
        shares = []
        for numbers, layers in (([1], [0]), ([5, 2], [2, 1])):
            for tp_rank in (1, 0):
                mine_BsL = whole_BSL[:, 2 * tp_rank : 2 * tp_rank + 2, layers][:, run.rows(2)]
                share = (numbers, 2, {"routes": mine_BsL.swapaxes(0, 1).astype(np.uint8)})
                shares.append((tp_rank, [[share, share], [([], 0, {}), ([], 0, {})]]))
        tap.join(shares, run, joined)
    for of_visit in joined:
        assert of_visit["routes"].dtype == np.uint8 and (of_visit["routes"] == whole_BSL).all()


def gradient(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def test_recomputed_layers_find_the_routes_of_their_own_micro_batch(model):
    """Three forwards, then their backwards in another order, as no queue could follow.

    Interleaved pipelines come near it (test_layouts.py); here the order is arbitrary, and the sum
    of gradients is that of one micro-batch after the other.
    """
    model.train()
    recorder = RouterTap([model])
    batches = [TOKENS, TOKENS + 7, TOKENS + 20]
    routes = [torch.tensor(ids, dtype=torch.int16).repeat(1, 6, 2, 1) for ids in ([0, 1], [4, 7])]
    routes.append(None)  # native

    def visits():
        return [recorder.visit(0, 1, r) for r in routes]

    def run(visit, tokens):
        with visit:
            output = forward(model, tokens)
        visit.backward_of(output)
        return output.square().mean()

    with recorder.installed():
        one_by_one = visits()
        for visit, tokens in zip(one_by_one, batches, strict=True):
            torch.autograd.backward(run(visit, tokens))
        expected = gradient(model)
        interleaved = visits()
        losses = [run(v, tokens) for v, tokens in zip(interleaved, batches, strict=True)]
        for i in (1, 2, 0):
            torch.autograd.backward(losses[i])
        actual = gradient(model)
    for of_run in (one_by_one, interleaved):
        assert tap.wrong_uses(of_run, 1) is None and tap.flips(of_run) == 0
        assert "1 times in the backward" not in tap.wrong_uses(of_run, 0)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor)


def test_a_recomputation_with_the_routes_of_another_micro_batch_is_noticed(model):
    """The planted fault: a queue that hands the routes of micro-batch 0 to micro-batch 1."""
    model.train()
    recorder = RouterTap([model])
    visits = [recorder.visit(0, 1) for _ in range(2)]
    with recorder.installed():
        outputs = []
        for visit, tokens in zip(visits, (TOKENS, TOKENS + 20), strict=True):
            with visit:
                outputs.append(forward(model, tokens))
        for visit, output in zip(visits, reversed(outputs), strict=True):
            visit.backward_of(output)
        for output in outputs:
            torch.autograd.backward(output.square().mean())
    assert tap.wrong_uses(visits, 1) is None  # each was used once: the counts cannot tell
    assert tap.flips(visits) > 12  # of 24 (token, layer) pairs


def test_margins_by_hand():
    scores_NE = torch.tensor([[1.0, 4.0, 2.5, -1.0], [0.0, 0.0, 0.0, 3.0]])
    assert top_k_margins(scores_NE, 1).tolist() == [1.5, 3.0]
    assert top_k_margins(scores_NE, 2).tolist() == [1.5, 0.0]
    assert top_k_margins(scores_NE, 4).tolist() == [float("inf")] * 2


def test_margins_of_group_limited_routing_by_hand():
    """Groups (5, 1), (4, 3), (6, −9): the first two have the larger sums, and the best expert of
    all is in neither. Top-2 of (5, 1, 4, 3) is (5, 4), and 3 the next."""
    scores_NE = torch.tensor([[5.0, 1.0, 4.0, 3.0, 6.0, -9.0]])
    ranked_NE = of_best_groups(scores_NE, 4, 3, 2)  # by their best 4 / 2
    assert ranked_NE.tolist() == [[5.0, 1.0, 4.0, 3.0, -torch.inf, -torch.inf]]
    assert top_k_margins(ranked_NE, 2).tolist() == [1.0]
    assert top_k_margins(ranked_NE, 4).tolist() == [torch.inf]
    by_best = of_best_groups(scores_NE, 2, 3, 2)  # by their best 2 / 2
    assert by_best.tolist() == [[5.0, 1.0, -torch.inf, -torch.inf, 6.0, -9.0]]


def test_the_hooks_are_gone_after_recording(model):
    recorder = RouterTap([model])
    visit = recorder.visit(0, 1, record=("routes",))
    before = [router.router_replay for router in routers(model)]
    with recorder.installed(), visit:
        forward(model)
        assert all(router.router_replay is not None for router in routers(model))
    taken = [tap.hand_over([visit], tap.Run(slice(1), part, 4), 8)[0][2] for part in range(4)]
    assert [part["routes"].shape for part in taken] == [(n, 1, 2, 2) for n in (1, 2, 1, 2)]
    assert [router.router_replay for router in routers(model)] == before == [None, None]
    assert not any(router._forward_hooks for router in routers(model))
