"""Gates, router distributions and margins against plain Python, token by token.

Not covered here: which of a router's scores an engine hands out.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_upgrpo.errors import UserError
from moe_upgrpo.routing import gates


def sides(T, L, K, E, g):
    """Routes and gates of two sides: few experts, so that sets meet; gates with many ties."""
    both = []
    for _ in range(2):
        routes = torch.rand(T, L, E, generator=g).argsort(dim=-1)[..., :K]
        both += [routes, torch.randint(0, 5, (T, L, K), generator=g) / 4]
    return both


def as_dicts(routes, side_gates):
    """One dict from expert to gate for each (token, layer)."""
    return [
        [dict(zip(experts, row, strict=True)) for experts, row in zip(es, rows, strict=True)]
        for es, rows in zip(routes.tolist(), side_gates.tolist(), strict=True)
    ]


def everywhere(function, first, second):
    """function(a, b) at each (token, layer) of two nested lists."""
    return [
        pytest.approx([function(a, b) for a, b in zip(xs, ys, strict=True)], abs=1e-6)
        for xs, ys in zip(first, second, strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_gates_equal_dicts(data):
    T, L, E = (
        data.draw(st.integers(1, 6)),
        data.draw(st.integers(1, 4)),
        data.draw(st.integers(1, 9)),
    )
    K = data.draw(st.integers(1, E))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    rollout_routes, rollout_gates, train_routes, train_gates = sides(T, L, K, E, g)
    rollout, train = as_dicts(rollout_routes, rollout_gates), as_dicts(train_routes, train_gates)
    inputs = (rollout_routes, rollout_gates, train_routes.to(torch.int16), train_gates)
    assert gates.gate_overlap(*inputs).tolist() == everywhere(
        lambda a, b: sum(min(a[e], b[e]) for e in a.keys() & b.keys()), rollout, train
    )
    assert gates.gate_total_variation(*inputs).tolist() == everywhere(
        lambda a, b: sum(abs(a.get(e, 0) - b.get(e, 0)) for e in range(E)) / 2, rollout, train
    )


def test_gates_by_hand():
    """Experts 0, 1 with 3/4, 1/4 against 2, 0 with 1/2, 1/2: shared 0 with min(3/4, 1/2).

    TV = (|3/4 − 1/2| + 1/4 + 1/2)/2 = 1/2 = 1 − overlap, since both sides sum to 1.
    """
    inputs = (
        torch.tensor([[[0, 1]]]),
        torch.tensor([[[0.75, 0.25]]]),
        torch.tensor([[[2, 0]]]),
        torch.tensor([[[0.5, 0.5]]]),
    )
    assert gates.gate_overlap(*inputs).tolist() == [[0.5]]
    assert gates.gate_total_variation(*inputs).tolist() == [[0.5]]


def test_the_same_side_twice_differs_by_exactly_nothing():
    g = torch.Generator().manual_seed(0)
    routes = torch.rand(50, 3, 16, generator=g).argsort(dim=-1)[..., :4]
    weights = torch.rand(50, 3, 4, generator=g).softmax(dim=-1)
    logits = 5 * torch.randn(50, 3, 16, generator=g)
    assert not gates.gate_total_variation(routes, weights, routes, weights).any()
    assert torch.allclose(gates.gate_overlap(routes, weights, routes, weights), torch.ones(50, 3))
    assert not gates.router_kl(logits, logits).any()
    assert not gates.router_js(logits, logits).any()
    shift = gates.router_shift(logits, logits, floor=0.1)
    assert not shift.by_layer.any() and bool((shift.weight == 1).all())


def distribution(logits):
    weights = [math.exp(x - max(logits)) for x in logits]
    return [w / sum(weights) for w in weights]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def js(p, q):
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return (kl(p, m) + kl(q, m)) / 2


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_router_divergences_equal_the_definitions(data):
    T, L, E = (data.draw(st.integers(1, n)) for n in (4, 3, 9))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    spread = data.draw(st.sampled_from([0.1, 1, 10]))
    logits = spread * torch.randn(2, T, L, E, generator=g, dtype=torch.float64)
    if E > 1 and data.draw(st.booleans()):
        logits[..., 0] = -torch.inf  # masked on both sides
    p, q = ([[distribution(row) for row in rows] for rows in side.tolist()] for side in logits)
    assert gates.router_kl(logits[0], logits[1]).tolist() == everywhere(kl, p, q)
    assert gates.router_kl(logits[1], logits[0]).tolist() == everywhere(kl, q, p)
    assert gates.router_js(logits[0], logits[1]).tolist() == everywhere(js, p, q)


def test_router_divergences_by_hand():
    """p = (1/2, 1/2), q = (1/4, 3/4): KL(p‖q) = ½ log 2 + ½ log ⅔ = ½ log 4/3.

    KL(q‖p) = ¼ log ½ + ¾ log 3/2. Of distributions without a common expert, JS = log 2, KL = ∞.
    """
    p, q = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.25, 0.75]]]).log()
    assert gates.router_kl(p, q).item() == pytest.approx(math.log(4 / 3) / 2)
    expected = math.log(0.5) / 4 + 3 * math.log(1.5) / 4
    assert gates.router_kl(q, p).item() == pytest.approx(expected)
    one, other = torch.tensor([[[1.0, 0.0]]]).log(), torch.tensor([[[0.0, 1.0]]]).log()
    assert gates.router_kl(one, other).item() == torch.inf
    assert gates.router_js(one, other).item() == pytest.approx(math.log(2))
    for spread in (40.0, 95.0, 200.0):  # q/p beyond float32 while p is not yet 0, and p = 0
        far = torch.tensor([[[0.0, spread]]])
        assert gates.router_js(far, -far).item() == pytest.approx(math.log(2))
    assert gates.router_kl(far.bfloat16(), -far).dtype == torch.float32


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_margin_equals_sorting_with_ties(data):
    T, L, E = (
        data.draw(st.integers(1, 5)),
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(2, 9)),
    )
    K = data.draw(st.integers(1, E - 1))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    scores = torch.randint(-4, 4, (T, L, E), generator=g).float()
    expected = [
        [sorted(row, reverse=True)[K - 1] - sorted(row, reverse=True)[K] for row in rows]
        for rows in scores.tolist()
    ]
    assert gates.top_k_margin(scores, top_k=K).tolist() == expected


def test_margin_is_the_smallest_change_that_flips():
    """Top-2 of (3, 1, 0.25, 2): 2 is kept, 1 is not."""
    scores = torch.tensor([[[3.0, 1.0, 0.25, 2.0]]])
    assert gates.top_k_margin(scores, top_k=2).item() == 1.0
    for raised, chosen in ((0.99, [0, 3]), (1.01, [0, 1])):
        moved = scores + torch.tensor([0, raised, 0, 0])
        assert sorted(moved.topk(2).indices[0, 0].tolist()) == chosen


def test_router_shift_by_hand():
    """Layer 0: (0.5 + 0.1)/2 = 0.3; layer 1: (0.3 + 0.5)/2 = 0.4; Δ = 0.35. Token 1: floored."""
    old = torch.tensor([[[-1.0, -2.0], [-3.0, -1.0]], [[-1.0, -1.0], [-1.0, -1.0]]])
    current = old + torch.tensor([[[0.5, -0.1], [-0.3, 0.5]], [[-9.0, 9.0], [9.0, -9.0]]])
    shift = gates.router_shift(current.requires_grad_(), old, floor=0.25)
    assert shift.by_layer.flatten().tolist() == pytest.approx([0.3, 0.4, 9, 9])
    assert shift.mean.tolist() == pytest.approx([0.35, 9])
    assert shift.weight.tolist() == pytest.approx([math.exp(-0.35), 0.25])
    assert not any(x.requires_grad for x in (shift.by_layer, shift.mean, shift.weight))


def test_sums_leave_padding_out_and_add_up():
    """Tokens 0 and 2 count; token 1 is padding full of NaN."""
    values = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan], [0.5, 4.0]])
    valid = torch.tensor([True, False, True])
    sums, tokens = gates.layer_sums(values, valid)
    assert (sums.tolist(), sums.dtype, tokens) == ([1.5, 6.0], torch.float64, 2)
    assert gates.layer_sums(values[:1])[0].tolist() == [1.0, 2.0]
    ones = torch.ones(3, dtype=torch.bool)
    for bad, message in ((~ones, "no valid token"), (ones[:2], r"bool of shape \[3\]")):
        with pytest.raises(UserError, match=message):
            gates.layer_sums(values, bad)
    with pytest.raises(UserError, match=r"got torch.float32"):
        gates.layer_sums(values, valid.float())


ROUTES, GATES = torch.zeros(2, 3, 4, dtype=torch.long), torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gates.gate_overlap(ROUTES, GATES, ROUTES[:1], GATES), r"training \[1, 3, 4\] and"),
        (lambda: gates.gate_overlap(ROUTES, GATES, ROUTES, ROUTES), "training gates .*torch.int64"),
        (lambda: gates.gate_total_variation(*[ROUTES[0], GATES[0]] * 2), "one shape"),
        (lambda: gates.router_kl(GATES, GATES[..., :2]), r"\[2, 3, 4\] and .*\[2, 3, 2\]"),
        (lambda: gates.router_js(GATES, ROUTES), "floating point"),
        (lambda: gates.top_k_margin(GATES, top_k=4), "got top-4 of 4"),
        (lambda: gates.router_shift(GATES[0], GATES[0], floor=0.1), "two equal shapes"),
        (lambda: gates.router_shift(GATES, GATES, floor=0.0), r"\(0, 1\], got 0.0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message):
        call()
