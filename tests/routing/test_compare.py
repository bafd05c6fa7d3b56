"""compare_routes against Python sets, against numbers worked by hand, and against bad input.

Not covered here: what the engines and the trainer record; GPU tensors run only where CUDA is.
"""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_upgrpo.errors import UserError
from moe_upgrpo.routing import ComparisonKind, RoutingCounts, compare, compare_routes

INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32]
INTEGERS += [torch.int64, torch.uint64]


def random_routes(T, L, K, num_experts, generator):
    scores = torch.rand(T, L, num_experts, generator=generator)
    return scores.argsort(dim=-1)[..., :K].contiguous()


def flip_some(routes, num_experts, rate, generator):
    """Exchange one slot of about `rate` of the rows for the lowest expert not in the row."""
    flipped = routes.clone()
    for row in flipped.view(-1, routes.shape[-1]):
        free = sorted(set(range(num_experts)) - set(row.tolist()))
        if free and torch.rand((), generator=generator) < rate:
            row[int(torch.randint(len(row), (), generator=generator))] = free[0]
    return flipped


def shuffled(routes, generator):
    order = torch.rand(routes.shape, generator=generator).argsort(dim=-1)
    return routes.gather(-1, order)


def reference(rollout, train, valid):
    """Every metric by Python sets and integer sums, straight from the definitions."""
    T, L, K = rollout.shape
    overlap = [[0] * L for _ in range(T)]
    differing, first, jaccards, slots_missing = [0] * T, [-1] * T, [], 0
    by_layer = [0] * L
    tokens = [t for t in range(T) if valid[t]]
    for t in tokens:
        for layer in range(L):
            ours, theirs = set(rollout[t, layer].tolist()), set(train[t, layer].tolist())
            overlap[t][layer] = len(ours & theirs)
            slots_missing += len(ours - theirs)
            jaccards.append(len(ours & theirs) / len(ours | theirs))
            if ours != theirs:
                differing[t] += 1
                by_layer[layer] += 1
                first[t] = layer if first[t] < 0 else first[t]
    pairs = len(tokens) * L
    return {
        "overlap": overlap,
        "routers_per_token": differing,
        "first_mismatched_layer": first,
        "tokens_compared": len(tokens),
        "tokens_mismatched": sum(d > 0 for d in differing),
        "routers_compared": pairs,
        "routers_mismatched": sum(differing),
        "slots_compared": pairs * K,
        "slots_mismatched": slots_missing,
        "router_mismatch_rate": pytest.approx(sum(differing) / pairs),
        "slot_mismatch_rate": pytest.approx(slots_missing / (pairs * K)),
        "jaccard": pytest.approx(sum(jaccards) / pairs),
        "token_any_rate": pytest.approx(sum(d > 0 for d in differing) / len(tokens)),
        "mean_routers_per_token": pytest.approx(sum(differing) / len(tokens)),
        "routers_mismatched_by_layer": by_layer,
        "router_mismatch_by_layer": pytest.approx([b / len(tokens) for b in by_layer]),
        "slot_mismatch_by_layer": pytest.approx(
            [sum(K - overlap[t][layer] for t in tokens) / (len(tokens) * K) for layer in range(L)]
        ),
        "jaccard_by_layer": pytest.approx(
            [sum(jaccards[layer::L]) / len(tokens) for layer in range(L)]
        ),
        "token_histogram": [sum(differing[t] == j for t in tokens) for j in range(L + 1)],
        "overlap_histogram": [
            [sum(overlap[t][layer] == k for t in tokens) for k in range(K + 1)]
            for layer in range(L)
        ],
    }


def assert_matches(divergence, expected):
    for name, value in expected.items():
        actual = getattr(divergence, name)
        actual = actual.tolist() if isinstance(actual, torch.Tensor) else actual
        assert actual == value, name


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_metric_equals_python_sets(data):
    """Random routes with padding rows of garbage, shuffled slots, all block sizes."""
    T, L = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    num_experts = data.draw(st.sampled_from([1, 2, 3, 8, 20, 256, 257, 1024]))
    K = data.draw(st.integers(1, min(num_experts, 9)))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    rollout = random_routes(T, L, K, num_experts, g)
    train = shuffled(flip_some(rollout, num_experts, data.draw(st.floats(0, 1)), g), g)
    if data.draw(st.booleans()):
        train = random_routes(T, L, K, num_experts, g)
    valid = torch.rand(T, generator=g) < 0.7
    valid[int(torch.randint(T, (), generator=g))] = True
    expected = reference(rollout, train, valid)
    fitting = [d for d in INTEGERS if torch.iinfo(d).max >= num_experts - 1]
    rollout[~valid], train[~valid] = -1, 0
    rollout = rollout.to(data.draw(st.sampled_from(fitting)))
    train = train.to(data.draw(st.sampled_from(fitting)))
    saved = compare._ROWS_CPU
    compare._ROWS_CPU = data.draw(st.sampled_from([1, 7, saved]))
    try:
        divergence = compare_routes(rollout, train, num_experts=num_experts, valid=valid)
    finally:
        compare._ROWS_CPU = saved
    assert_matches(divergence, expected)


def test_worked_by_hand():
    """3 tokens, 2 layers, top-2 of 4 experts; token 2 is padding.

    token 0: layer 0 {0,1} and {1,0}: shared 2. layer 1 {2,3} and {2,1}: shared 1.
    token 1: layer 0 {0,1} and {2,3}: shared 0. layer 1 {0,3} and {3,0}: shared 2.
    Differing routers: 2 of 4. Slots missing: 0 + 1 + 2 + 0 = 3 of 8.
    Jaccard: (2/2 + 1/3 + 0/4 + 2/2) / 4 = 7/12. Both tokens differ somewhere: 2 of 2.
    """
    rollout = torch.tensor([[[0, 1], [2, 3]], [[0, 1], [0, 3]], [[0, 0], [0, 0]]])
    train = torch.tensor([[[1, 0], [2, 1]], [[2, 3], [3, 0]], [[9, 9], [9, 9]]])
    valid = torch.tensor([True, True, False])
    d = compare_routes(rollout, train, num_experts=4, valid=valid)
    assert d.overlap.tolist() == [[2, 1], [0, 2], [0, 0]]
    assert d.routers_per_token.tolist() == [1, 1, 0]
    assert d.first_mismatched_layer.tolist() == [1, 0, -1]
    assert (d.routers_mismatched, d.routers_compared) == (2, 4)
    assert (d.slots_mismatched, d.slots_compared) == (3, 8)
    assert (d.tokens_mismatched, d.tokens_compared) == (2, 2)
    assert d.router_mismatch_rate == 0.5
    assert d.slot_mismatch_rate == 0.375
    assert d.jaccard == pytest.approx(7 / 12)
    assert d.token_any_rate == 1.0
    assert d.mean_routers_per_token == 1.0
    assert d.router_mismatch_by_layer.tolist() == [0.5, 0.5]
    assert d.slot_mismatch_by_layer.tolist() == [0.5, 0.25]
    assert d.overlap_histogram.tolist() == [[1, 0, 1], [0, 1, 1]]
    assert d.token_histogram.tolist() == [0, 2, 0]
    mismatched, compared = d.routers_mismatched_by(torch.tensor([3, 1, 1]))
    assert mismatched.tolist() == [0, 1, 0, 1]
    assert compared.tolist() == [0, 2, 0, 2]


def test_no_mismatch_is_exactly_zero():
    g = torch.Generator().manual_seed(0)
    routes = random_routes(50, 3, 4, 16, g)
    d = compare_routes(routes, shuffled(routes, g), num_experts=16)
    assert d.router_mismatch_rate == d.slot_mismatch_rate == d.token_any_rate == 0.0
    assert d.jaccard == 1.0
    assert bool((d.overlap == 4).all()) and not bool(d.routers_per_token.any())


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
def test_injected_mismatch_is_recovered(rate):
    """Flips planted in layer 2 only, at a known rate, come back exactly there."""
    g = torch.Generator().manual_seed(1)
    rollout = random_routes(400, 4, 2, 8, g)
    train = rollout.clone()
    flipped = torch.randperm(400, generator=g)[: int(400 * rate)]
    train[flipped, 2] = (rollout[flipped, 2] + 1) % 8
    same_set = (train[:, 2].sort(-1).values == rollout[:, 2].sort(-1).values).all(-1)
    planted = 400 - int(same_set.sum())
    d = compare_routes(rollout, train, num_experts=8)
    assert d.routers_mismatched_by_layer.tolist() == [0, 0, planted, 0]
    assert d.router_mismatch_by_layer[2] == pytest.approx(rate, rel=0.2)


@pytest.mark.fault(
    "Problems and routes",
    "routes joined to tokens one row off",
    "the alarm for it",
)
def test_planted_off_by_one_row_join_is_caught():
    """The right join of two equal sides gives 0; one row late, it looks like a broken model.

    Random routes agree by chance in 1/C(16,2) = 1/120 of the rows, so the rate must be near 1.
    """
    g = torch.Generator().manual_seed(2)
    rows = random_routes(300, 4, 2, 16, g)  # row p-1 belongs to the token at position p
    assert compare_routes(rows, rows, num_experts=16).router_mismatch_rate == 0.0
    shifted = compare_routes(rows[1:], rows[:-1], num_experts=16)
    assert shifted.router_mismatch_rate > 0.9


def test_renaming_the_experts_changes_nothing():
    g = torch.Generator().manual_seed(3)
    rollout = random_routes(40, 3, 4, 32, g)
    train = flip_some(rollout, 32, 0.3, g)
    names = torch.randperm(32, generator=g)
    plain = compare_routes(rollout, train, num_experts=32)
    renamed = compare_routes(names[rollout], names[train], num_experts=32)
    assert torch.equal(plain.overlap, renamed.overlap)
    assert plain.jaccard == renamed.jaccard


def test_counts_of_parts_add_up_to_the_whole():
    g = torch.Generator().manual_seed(4)
    rollout = random_routes(30, 3, 2, 8, g)
    train = flip_some(rollout, 8, 0.3, g)
    whole = compare_routes(rollout, train, num_experts=8)
    parts = [
        compare_routes(rollout[s], train[s], num_experts=8) for s in (slice(0, 7), slice(7, 30))
    ]
    pooled = parts[0] + parts[1]
    assert isinstance(pooled, RoutingCounts)
    assert torch.equal(pooled.overlap_histogram, whole.overlap_histogram)
    assert torch.equal(pooled.token_histogram, whole.token_histogram)
    assert pooled.jaccard == pytest.approx(whole.jaccard)
    other = compare_routes(rollout[:, :2], train[:, :2], num_experts=8)
    with pytest.raises(UserError, match="different models"):
        pooled + other


def test_a_selection_is_the_comparison_of_those_tokens_alone():
    generator = torch.Generator().manual_seed(8)
    rollout = random_routes(40, 3, 2, 8, generator)
    train = flip_some(rollout, 8, 0.4, generator)
    valid, tokens = torch.rand(2, 40, generator=generator) > torch.tensor([[0.2], [0.5]])
    whole = compare_routes(rollout, train, num_experts=8, valid=valid, kind="conditional")
    part = whole.select(tokens)
    alone = compare_routes(
        rollout[tokens], train[tokens], num_experts=8, valid=valid[tokens], kind="conditional"
    )
    assert 0 < alone.routers_mismatched < whole.routers_mismatched and part.kind == alone.kind
    for name in ("overlap", "routers_per_token", "valid", "overlap_histogram", "token_histogram"):
        assert torch.equal(getattr(part, name), getattr(alone, name)), name
    with pytest.raises(UserError, match="no valid token"):
        whole.select(~valid)
    with pytest.raises(UserError, match="bool of shape"):
        whole.select(tokens[:-1])


def test_kinds_are_carried_and_never_added_to_each_other():
    counts = {
        kind: compare_routes(GOOD, GOOD.flip(0), num_experts=4, kind=kind)
        for kind in ComparisonKind
    }
    unnamed = compare_routes(GOOD, GOOD, num_experts=4)
    assert unnamed.kind is ComparisonKind.FREE_RUNNING
    for kind, one in counts.items():
        assert one.kind is kind and (one + one + one).kind is kind
        assert (one + one).routers_mismatched == 2 * one.routers_mismatched == 4
        for other in set(counts) - {kind}:
            with pytest.raises(UserError, match=f"different kinds .*: {kind} and {other}"):
                one + counts[other]


def test_noise_floor_between_two_passes_of_one_side():
    """One of 3 tokens flips between two passes; the message of a bad row names the pass."""
    again = routes_of([1, 0], [2, 3], [1, 3])
    floor = compare_routes(GOOD, again, num_experts=4, kind="repeat")
    assert floor.kind is ComparisonKind.REPEAT
    assert (floor.routers_mismatched, floor.routers_compared) == (1, 3)
    with pytest.raises(UserError, match=r"second pass routes, token row 0.*\[1, 4\]"):
        compare_routes(GOOD, routes_of([1, 4], [2, 3], [1, 3]), num_experts=4, kind="batch shape")
    with pytest.raises(UserError, match=r"first pass \[3, 1, 2\], second pass \[2, 1, 2\]"):
        compare_routes(GOOD, again[:2], num_experts=4, kind="batch shape")
    allowed = "allowed: free-running, conditional, repeat, batch shape"
    with pytest.raises(UserError, match=f"'noise' given; {allowed}"):
        compare_routes(GOOD, again, num_experts=4, kind="noise")


def test_memory_layout_does_not_matter():
    g = torch.Generator().manual_seed(5)
    rollout = random_routes(20, 3, 4, 16, g)
    train = flip_some(rollout, 16, 0.5, g)
    layer_major = train.permute(1, 0, 2).contiguous().permute(1, 0, 2)
    expected = compare_routes(rollout, train, num_experts=16).overlap
    assert torch.equal(compare_routes(rollout, layer_major, num_experts=16).overlap, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpu_equals_cpu():
    g = torch.Generator().manual_seed(6)
    rollout = random_routes(200, 3, 4, 16, g)
    train = flip_some(rollout, 16, 0.5, g)
    valid = torch.rand(200, generator=g) < 0.8
    cpu = compare_routes(rollout, train, num_experts=16, valid=valid)
    gpu = compare_routes(rollout.cuda(), train.cuda(), num_experts=16, valid=valid.cuda())
    assert_matches(gpu, reference(rollout, train, valid))
    assert torch.equal(gpu.overlap.cpu(), cpu.overlap)


NUMPY = [np.dtype(c) for c in ("i1", "u1", "<i2", ">i2", "<u2", ">i4", "u4", ">i8", "u8")]


@pytest.mark.fault(
    "Problems and routes",
    "routes as numpy arrays or batches",
    "compared as tensors are",
)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_numpy_arrays_and_batches(data):
    """[B, T, L, K] is B·T tokens, whichever library, byte order and memory layout it comes in."""
    B, T, L = (data.draw(st.integers(1, 5)) for _ in "BTL")
    K = data.draw(st.integers(1, 4))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    rollout = random_routes(B * T, L, K, 100, g)
    train = shuffled(flip_some(rollout, 100, 0.5, g), g)
    valid = torch.rand(B * T, generator=g) < 0.7
    valid[int(torch.randint(B * T, (), generator=g))] = True
    expected = reference(rollout, train, valid)

    def given(flat, *inner):
        shaped = flat.view(B, T, *inner)
        how = data.draw(st.sampled_from(["torch", "numpy", "read-only", "reversed", "layer-major"]))
        if how == "torch":
            return shaped
        array = shaped.numpy().astype(data.draw(st.sampled_from(NUMPY)) if inner else bool)
        if how == "reversed":
            return array[::-1].copy()[::-1]
        if how == "layer-major":
            return np.asfortranarray(array)
        array.flags.writeable = how == "numpy"
        return array

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        routes = (given(rollout, L, K), given(train, L, K))
        divergence = compare_routes(*routes, num_experts=100, valid=given(valid))
    assert divergence.overlap.shape == (B, T, L)
    assert divergence.routers_per_token.shape == divergence.valid.shape == (B, T)
    assert divergence.first_mismatched_layer.shape == (B, T)
    flat = ("overlap", "routers_per_token", "first_mismatched_layer")
    for name in flat:
        values = getattr(divergence, name).flatten(0, 1).tolist()
        assert values == expected.pop(name), name
    assert_matches(divergence, expected)
    first = torch.zeros(B, T, dtype=torch.bool)
    first[:, 0] = True
    if (first & divergence.valid).any():
        chosen = divergence.select(first)
        of_flat = torch.arange(B * T) % T == 0
        assert chosen.overlap.tolist() == divergence.overlap.flatten(0, 1)[of_flat].tolist()
    position = torch.arange(T).expand(B, T)
    mismatched_G, compared_G = divergence.routers_mismatched_by(position)
    assert mismatched_G.tolist() == divergence.routers_per_token.sum(0).tolist()
    assert compared_G.tolist() == (divergence.valid.sum(0) * L).tolist()


def routes_of(*rows):
    """One token per row, one layer."""
    return torch.tensor(rows)[:, None, :]


GOOD = routes_of([0, 1], [2, 3], [1, 2])


@pytest.mark.parametrize(
    ("rollout", "train", "message"),
    [
        (GOOD, GOOD[:2], r"rollout \[3, 1, 2\], training \[2, 1, 2\].*row p−1"),
        (GOOD, GOOD[:, 0], r"training routes must have shape \[tokens, MoE layers, top-k\]"),
        (GOOD.float(), GOOD, "rollout routes must be integers, got torch.float32"),
        (GOOD > 0, GOOD, "rollout routes must be integers, got torch.bool"),
        (GOOD.numpy() / 1, GOOD, "rollout routes must be integers, got torch.float64"),
        (GOOD.numpy().astype(object), GOOD, "rollout routes must be an array of numbers, got obj"),
        (GOOD, GOOD.tolist(), "training routes must be a tensor or a numpy array, got list"),
        (
            GOOD[None, None],
            GOOD,
            r"\[sequences, tokens, MoE layers, top-k\], got \[1, 1, 3, 1, 2\]",
        ),
        (GOOD[None], GOOD, r"rollout \[1, 3, 1, 2\], training \[3, 1, 2\].*row p−1"),
        (
            torch.stack([GOOD, GOOD]).numpy(),
            torch.stack([GOOD, routes_of([0, 1], [2, 3], [1, 4])]),
            r"training routes, sequence 1, token row 2, MoE layer 0: experts \[1, 4\]",
        ),
        (GOOD[:0], GOOD[:0], "nothing to compare: routes of 0 tokens"),
        (GOOD[:, :0], GOOD[:, :0], "0 MoE layers"),
        (GOOD[..., :0], GOOD[..., :0], "top-k must be in 1"),
        (
            GOOD,
            routes_of([0, 1], [2, 4], [1, 2]),
            r"training routes, token row 1, MoE layer 0: experts \[2, 4\]: expected 2 ids in 0..3",
        ),
        (routes_of([0, 1], [2, -1], [1, 2]), GOOD, "rollout .* row 1, .*padding inside `valid`"),
        (GOOD, routes_of([0, 1], [2, 3], [2, 2]), "row 2, MoE layer 0.*different experts"),
        (GOOD, routes_of([0, 1], [2, 3], [0, 0]), "training .* row 2, .*zero-filled"),
    ],
)
def test_bad_routes(rollout, train, message):
    with pytest.raises(UserError, match=message):
        compare_routes(rollout, train, num_experts=4)


def test_error_names_the_original_row_and_layer_behind_padding_and_blocks(monkeypatch):
    g = torch.Generator().manual_seed(7)
    rollout = random_routes(30, 5, 2, 8, g)
    train = rollout.clone()
    train[23, 4] = 6
    valid = torch.ones(30, dtype=torch.bool)
    monkeypatch.setattr(compare, "_ROWS_CPU", 20)
    for padding in ([], [0, 3, 11, 22]):
        valid[padding] = False
        with pytest.raises(UserError, match=r"token row 23, MoE layer 4: experts \[6, 6\]"):
            compare_routes(rollout, train, num_experts=8, valid=valid)


def test_read_only_arrays_leave_the_warning_filters_alone(monkeypatch):
    """They are the process's: a thread that writes the token log would change its main thread's."""
    rollout, train = np.array([[[0, 3]], [[1, 2]]]), np.array([[[3, 0]], [[1, 5]]])
    rollout.flags.writeable = False
    with monkeypatch.context() as patched:
        patched.setattr(warnings, "catch_warnings", None)
        overlap = compare_routes(rollout, train, num_experts=8).overlap
    assert overlap.tolist() == [[2], [1]]
    assert not rollout.flags.writeable


def test_int8_ids_that_overflowed():
    """Expert 200 stored in int8 reads −56; int8 cannot hold 160 experts to begin with."""
    overflowed = torch.tensor([[[3, 200 - 256]]])
    with pytest.raises(UserError, match=r"\[3, -56\].*overflowed.*int16"):
        compare_routes(overflowed, torch.tensor([[[3, 100]]]), num_experts=256)
    with pytest.raises(UserError, match=r"torch.int8, which cannot hold the ids 0..159"):
        compare_routes(overflowed.to(torch.int8), overflowed, num_experts=160)
    with pytest.raises(UserError, match=r"torch.uint8, which cannot hold the ids 0..1023"):
        compare_routes(overflowed, overflowed.to(torch.uint8), num_experts=1024)


def test_ids_that_agree_in_their_low_bits_are_different():
    """0, 256 and 512 are one byte value; 1 and 2^32 + 1 one int32 value."""
    rollout = torch.tensor([[[0, 256]], [[0, 256]]])
    train = torch.tensor([[[256, 0]], [[512, 1]]])
    assert compare_routes(rollout, train, num_experts=1024).overlap.tolist() == [[2], [0]]
    for wide in (torch.int64, torch.uint64):
        with pytest.raises(UserError, match="expected 2 ids in 0"):
            compare_routes(GOOD, routes_of([0, 2**32 + 1], [2, 3], [1, 2]).to(wide), num_experts=4)


def test_every_pair_of_slots_is_checked_for_duplicates():
    for K in range(2, 9):
        for i in range(K):
            for j in range(i):
                routes = torch.arange(K)[None, None]
                twice = routes.clone()
                twice[0, 0, i] = twice[0, 0, j]
                with pytest.raises(UserError, match=r"one twice|zero-filled"):
                    compare_routes(routes, twice, num_experts=16)


@pytest.mark.parametrize(
    ("valid", "message"),
    [
        (torch.zeros(3, dtype=torch.bool), "none of the 3 tokens is valid"),
        (torch.ones(2, dtype=torch.bool), r"valid must be bool of shape \[3\]"),
        (torch.ones(3), "got torch.float32"),
        (np.ones(3), "got torch.float64"),
        (np.ones((1, 3), bool), r"valid must be bool of shape \[3\]"),
        ([True] * 3, "valid must be a tensor or a numpy array, got list"),
    ],
)
def test_bad_valid(valid, message):
    with pytest.raises(UserError, match=message):
        compare_routes(GOOD, GOOD, num_experts=4, valid=valid)


def test_bad_groups():
    d = compare_routes(GOOD, GOOD, num_experts=4)
    with pytest.raises(UserError, match="one integer for each of the 3 tokens"):
        d.routers_mismatched_by(torch.zeros(2, dtype=torch.long))
    with pytest.raises(UserError, match="≥ 0, got -1"):
        d.routers_mismatched_by(torch.tensor([0, -1, 0]))
