"""A replay's health figures with Megatron-Core's own routers, on two ranks, and in the stacks."""

import pytest
import torch

from moe_upgrpo.megatron import backend, groups
from moe_upgrpo.megatron.layout import Layout
from tests.ranks import run_ranks

E, K, N = 6, 2, 4
NATIVE = [[0, 1], [2, 3], [4, 5], [0, 5]]  # of every layer


def routers_of(kind: str) -> list:
    """Routers of the layers 0 and 2 that choose NATIVE, and one of multi-token prediction."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=4, hidden_size=E, num_attention_heads=1, num_moe_experts=E, moe_router_topk=K,
        moe_router_load_balancing_type="none", moe_enable_routing_replay=True,
        perform_initialization=False, moe_router_dtype="fp32", add_bias_linear=False,
    )  # fmt: skip
    of_ranks = {"pg_collection": get_default_pg_collection()}
    chunk = torch.nn.Module()
    chunk.layers = torch.nn.ModuleList([TopKRouter(config, **of_ranks) for _ in range(2)])
    chunk.mtp = torch.nn.ModuleList([TopKRouter(config, **of_ranks)])
    for number, router in zip((1, 3, 1), [*chunk.layers, *chunk.mtp], strict=True):
        router.set_layer_number(number)
        with torch.no_grad():
            router.weight.copy_(torch.eye(E))
        if kind == "verl":
            from verl.utils.megatron.router_replay_patch import RouterReplay

            router.router_replay = RouterReplay()
    return [chunk]


def tokens() -> torch.Tensor:
    """Hidden states [N, 1, E] whose router logits are largest at NATIVE."""
    x = torch.zeros(N, E).scatter(1, torch.tensor(NATIVE), torch.tensor([[2.0, 1.0]] * N))
    return x[:, None]


def set_action(router, name: str | None) -> None:
    from megatron.core.transformer.moe import router_replay

    module = router_replay
    if type(router.router_replay).__module__.startswith("verl"):
        from verl.utils.megatron import router_replay_patch as module
    action = name and module.RouterReplayAction[name]
    router.router_replay.set_router_replay_action(action)


def figures(kind: str) -> dict:
    """Figures that are reported of planted routes, on each rank the same."""
    from moe_upgrpo.integrations.kit.health import Health

    with groups.process_groups(Layout()), backend.apply():
        chunks = routers_of(kind)
        health, x = Health(chunks), tokens()
        rank = torch.distributed.get_rank()
        first, second = chunks[0].layers
        found = {}

        def forward(targets, **more) -> None:
            for router, target in zip((first, second), targets, strict=True):
                if target is None:
                    set_action(router, None)
                else:
                    router.router_replay.set_target_indices(torch.tensor(target), **more)
                    set_action(router, "REPLAY_FORWARD")
                router(x)
            chunks[0].mtp[0](x)

        forward([NATIVE, NATIVE])  # outside: nothing
        found["outside"] = health.take()
        with health.counting():
            forward([NATIVE, NATIVE])
        found["same"] = health.take()
        other = [[0, 1], [2, 4], [4, 5], [0, 5]]  # row 1 differs
        with health.counting():
            forward([other, NATIVE] if rank else [NATIVE, other])
            forward([NATIVE, [[0, 0], [3, 3], [4, 5], [5, 0]]])
            for router in (first, second):  # recomputed for the gradient: counted before
                set_action(router, "REPLAY_BACKWARD")
                router(x)
        found["planted"] = health.take()
        with health.counting():
            forward([NATIVE, None])  # the replay of a router that is not the model's was told
        found["orphan"] = health.take()
        if kind == "verl":
            held = torch.tensor([True, False, True, False])
            with health.counting():
                forward([other, other], replay_mask=held)
            found["mask"] = health.take()
        return found


@pytest.mark.parametrize("kind", ["megatron", "verl"])
def test_planted_routes_are_reported_by_all_ranks(kind):
    first, second = run_ranks(2, figures, kind)
    assert first == second
    assert first["outside"] == {"replay/rows": 0}
    nothing = {f"replay/{name}_rate": 0 for name in ("live", "zero_filled", "repeated")}
    assert first["same"] == nothing | {
        "replay/rows": 2 * 2 * N,
        "replay/applied_rate": 1,
        "replay/native_differs_rate": 0,
        "replay/native_differs/layer_0": 0,
        "replay/native_differs/layer_2": 0,
    }
    # Two forwards of two layers on two ranks: 32 rows. Layer 0: one row of 16 differs. Layer 2:
    # one does, of the 12 that are neither zero-filled nor repeated.
    assert first["planted"] == {
        "replay/rows": 32,
        "replay/applied_rate": 1,
        "replay/live_rate": 0,
        "replay/zero_filled_rate": 2 / 32,
        "replay/repeated_rate": 2 / 32,
        "replay/native_differs_rate": 2 / 28,
        "replay/native_differs/layer_0": 1 / 16,
        "replay/native_differs/layer_2": 1 / 12,
    }
    assert first["orphan"]["replay/live_rate"] == first["orphan"]["replay/applied_rate"] == 0.5
    assert "replay/native_differs/layer_2" not in first["orphan"]
    if kind == "verl":  # rows 0 and 2 are held; the row that differs is not
        mask = first["mask"]
        assert mask["replay/live_rate"] == mask["replay/applied_rate"] == 0.5
        assert mask["replay/native_differs_rate"] == 0


def outcome() -> list:
    """Outputs and gradients of a router with and without figures, and its hooks' own."""
    from moe_upgrpo.integrations.kit.health import Health

    with groups.process_groups(Layout()), backend.apply():
        found = []
        for watched in (False, True):
            (chunk,) = routers_of("megatron")
            router, x = chunk.layers[0], tokens().requires_grad_()
            if watched:
                counting = Health([chunk]).counting()
                counting.__enter__()
            router.router_replay.set_target_indices(torch.tensor([[0, 1], [2, 4], [4, 5], [5, 0]]))
            set_action(router, "REPLAY_FORWARD")
            probs, used = router(x)
            (probs**2).sum().backward()
            found.append([probs.tolist(), used.tolist(), x.grad.tolist()])
        return found


@pytest.mark.bits
def test_figures_change_nothing():
    ((without, with_figures),) = run_ranks(1, outcome)
    assert without == with_figures and any(v for row in without[2] for v in row[0])
