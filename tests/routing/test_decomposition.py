"""The terms on a small MoE model with planted causes: each cause must land in its own term.

Not covered here: the forwards of the real trainer, and that they share layout and temperature.
"""

from dataclasses import astuple

import pytest
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.routing.decomposition import decompose, decompose_under_replay

TOKENS, WIDTH, EXPERTS, VOCABULARY = 40, 6, 5, 11


class TinyMoE:
    """Top-1 of 5 linear experts with gate 1, so that the router's weights act by choice alone."""

    def __init__(self, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.router = torch.randn(WIDTH, EXPERTS, generator=g, dtype=torch.float64)
        self.experts = torch.randn(EXPERTS, WIDTH, WIDTH, generator=g, dtype=torch.float64)
        self.head = torch.randn(WIDTH, VOCABULARY, generator=g, dtype=torch.float64)
        self.inputs = torch.randn(TOKENS, WIDTH, generator=g, dtype=torch.float64)
        self.sampled = torch.randint(VOCABULARY, (TOKENS,), generator=g)

    def native(self):
        return (self.inputs @ self.router).argmax(dim=1)

    def log_prob(self, routes=None):
        routes = self.native() if routes is None else routes
        hidden = torch.einsum("tw,twv->tv", self.inputs, self.experts[routes])
        log_probs = (hidden @ self.head).log_softmax(dim=1)
        return log_probs.gather(1, self.sampled[:, None]).squeeze(1)


def taken_apart(old, current, engine_routes, engine_noise=0.0):
    rollout = old.log_prob(engine_routes) + engine_noise
    forwards = {
        "rollout": rollout,
        "old_on_rollout_routes": old.log_prob(engine_routes),
        "old_native": old.log_prob(),
        "current_on_old_routes": current.log_prob(old.native()),
        "current_native": current.log_prob(),
    }
    return decompose(**forwards), current.log_prob() - rollout


def only(decomposition, name, where):
    """`name` is what is not 0, exactly at the tokens `where`."""
    for field in ("numerics", "engine_routing", "update", "routing_shift"):
        nonzero = getattr(decomposition, field) != 0
        assert torch.equal(nonzero, where if field == name else torch.zeros_like(where)), field


def test_nothing_changed_is_zero():
    decomposition, _ = taken_apart(TinyMoE(), TinyMoE(), TinyMoE().native())
    only(decomposition, "numerics", torch.zeros(TOKENS, dtype=torch.bool))


def test_a_planted_flip_of_the_engine_goes_to_engine_routing():
    model = TinyMoE()
    routes = model.native()
    flipped = torch.zeros(TOKENS, dtype=torch.bool)
    flipped[[3, 17, 31]] = True
    routes[flipped] = (routes[flipped] + 1) % EXPERTS
    decomposition, gap = taken_apart(model, TinyMoE(), routes)
    only(decomposition, "engine_routing", flipped)
    assert torch.equal(decomposition.engine_routing, gap)


def test_a_change_behind_the_last_router_goes_to_the_update():
    current = TinyMoE()
    current.head *= 1.1
    decomposition, gap = taken_apart(TinyMoE(), current, TinyMoE().native())
    only(decomposition, "update", torch.ones(TOKENS, dtype=torch.bool))
    assert torch.equal(decomposition.update, gap)


def test_a_change_of_the_router_goes_to_the_routing_shift():
    current = TinyMoE()
    current.router += 0.3 * torch.randn(
        WIDTH, EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    moved = current.native() != TinyMoE().native()
    assert 0 < int(moved.sum()) < TOKENS
    decomposition, gap = taken_apart(TinyMoE(), current, TinyMoE().native())
    only(decomposition, "routing_shift", moved)
    assert torch.equal(decomposition.routing_shift, gap)


def test_noise_of_the_engine_goes_to_numerics_with_its_sign():
    """An engine that finds every token e^0.25 times as likely leaves numerics of −0.25."""
    decomposition, _ = taken_apart(TinyMoE(), TinyMoE(), TinyMoE().native(), engine_noise=0.25)
    only(decomposition, "numerics", torch.ones(TOKENS, dtype=torch.bool))
    assert decomposition.numerics.tolist() == pytest.approx([-0.25] * TOKENS)


def test_everything_at_once_adds_up():
    current = TinyMoE(seed=5)
    current.inputs, current.sampled = TinyMoE().inputs, TinyMoE().sampled
    noise = 0.01 * torch.randn(TOKENS, dtype=torch.float64)
    engine_routes = (TinyMoE().native() + torch.arange(TOKENS) % 2) % EXPERTS
    decomposition, gap = taken_apart(TinyMoE(), current, engine_routes, noise)
    assert all(bool((term != 0).any()) for term in astuple(decomposition))
    assert torch.allclose(decomposition.total, gap, rtol=0, atol=1e-13)


def test_worked_by_hand_and_single_precision_adds_up():
    """log μ −1, then −1.25, −0.75, −0.5, −0.625: terms −0.25, 0.5, 0.25, −0.125, gap 0.375."""
    values = [-1.0, -1.25, -0.75, -0.5, -0.625]
    names = ("rollout", "old_on_rollout_routes", "old_native")
    names += ("current_on_old_routes", "current_native")
    forwards = {name: torch.tensor([[value]]) for name, value in zip(names, values, strict=True)}
    d = decompose(**forwards)
    assert [term.item() for term in astuple(d)] == [-0.25, 0.5, 0.25, -0.125]
    assert d.total.item() == 0.375 and d.total.dtype == torch.float64
    g = torch.Generator().manual_seed(2)
    forwards = {name: -10 * torch.rand(2, 500, generator=g) for name in names}
    gap = forwards["current_native"].double() - forwards["rollout"].double()
    assert torch.allclose(decompose(**forwards).total, gap, rtol=0, atol=1e-14)


def test_under_replay_routing_has_no_share():
    """Flips of the engine and a moved router change nothing; the head and the noise do."""
    old, current = TinyMoE(), TinyMoE()
    current.router += 1.0
    current.head *= 1.1
    engine_routes = (old.native() + 1) % EXPERTS
    rollout = old.log_prob(engine_routes) - 0.5
    d = decompose_under_replay(
        rollout=rollout,
        old_on_rollout_routes=old.log_prob(engine_routes),
        current_on_rollout_routes=current.log_prob(engine_routes),
    )
    assert d.numerics.tolist() == pytest.approx([0.5] * TOKENS)
    behind_router = current.log_prob(engine_routes) - old.log_prob(engine_routes)
    assert torch.equal(d.update, behind_router)
    assert torch.allclose(d.total, current.log_prob(engine_routes) - rollout, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("rollout", "old", "message"),
    [
        (torch.zeros(0), torch.zeros(0), "nothing to decompose"),
        (torch.zeros(3), torch.zeros(2), r"old_on_rollout_routes must hold .* \[3\] .*got .*\[2\]"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.long), "got torch.int64"),
        (torch.zeros(3), torch.tensor([0, -torch.inf, 0]), r"at \[1\] is -inf: .*finite"),
    ],
)
def test_bad_input(rollout, old, message):
    with pytest.raises(UserError, match=message):
        decompose_under_replay(
            rollout=rollout, old_on_rollout_routes=old, current_on_rollout_routes=rollout
        )
