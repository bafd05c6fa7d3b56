"""The codec: round trips as sets, bytes worked by hand, the byte budget, and damaged bytes.

Not covered here: how the columns lie in a Parquet file.
"""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_upgrpo.errors import UserError
from moe_upgrpo.routing import codec

MODELS = [(1, 1), (2, 1), (4, 4), (4, 2), (8, 5), (64, 63), (128, 8), (256, 8), (257, 8)]
MODELS += [(384, 8), (512, 10), (1024, 16), (1024, 24)]


def random_routes(rng, N, L, K, E):
    return rng.random((N, L, E)).argsort(axis=-1)[..., :K]


def two_sides(rng, N, L, K, E, rate, swaps):
    """Rollout routes, and training routes with `swaps` experts exchanged in `rate` of the rows."""
    chosen = random_routes(rng, N, L, min(K + swaps, E), E)
    rollout, train = chosen[..., :K], chosen[..., :K].copy()
    exchanged = chosen.shape[-1] - K
    flipped = rng.random((N, L)) < rate
    train[flipped, :exchanged] = chosen[flipped, K:]
    return rollout, rng.permuted(train, axis=-1)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_round_trip_keeps_every_set(data):
    """Any model, mismatch and block size; slots shuffled; what comes back is ascending."""
    E, K = data.draw(st.sampled_from(MODELS))
    N, L = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 5))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    swaps = data.draw(st.integers(0, K))
    rollout, train = two_sides(rng, N, L, K, E, data.draw(st.floats(0, 1)), swaps)
    dtype = data.draw(st.sampled_from([np.uint16, np.int16, np.int32, np.int64, np.uint64]))
    saved, codec._ROWS = codec._ROWS, data.draw(st.sampled_from([1, 7, codec._ROWS]))
    try:
        packed = codec.encode_sets(rollout.astype(dtype), num_experts=E)
        sets = codec.decode_sets(packed, num_layers=L, top_k=K, num_experts=E)
        pair = codec.encode_difference(rollout.astype(dtype), train, num_experts=E)
        # The difference does not depend on the order in which the rollout's routes are held.
        trained = codec.decode_difference(sets, *pair, num_experts=E)
    finally:
        codec._ROWS = saved
    assert packed.shape == (N, codec.set_bytes(L, K, E)) and packed.dtype == np.uint8
    assert sets.dtype == trained.dtype == (np.uint8 if E <= 256 else np.uint16)
    assert np.array_equal(sets, np.sort(rollout, axis=-1))
    assert np.array_equal(trained, np.sort(train, axis=-1))
    same = (np.sort(rollout, axis=-1) == np.sort(train, axis=-1)).all(axis=(1, 2))
    assert np.array_equal(np.diff(pair[1]) == 0, same), "a token costs bytes only if it differs"


@pytest.mark.parametrize(("E", "K"), [(8, 5), (128, 8), (257, 8), (1024, 24)])
@pytest.mark.parametrize("N", [0, 30])
def test_both_sides_at_once_are_each_of_them_and_their_overlap(E, K, N):
    """One expert of each swapped in some rows; the overlap counted by Python's sets."""
    rollout, train = two_sides(np.random.default_rng(0), N, 3, K, E, 0.3, 2)
    sides = codec.encode_sides(rollout, train, num_experts=E)
    assert np.array_equal(sides.sets_NB, codec.encode_sets(rollout, num_experts=E))
    data, offsets = codec.encode_difference(rollout, train, num_experts=E)
    assert np.array_equal(sides.data, data) and np.array_equal(sides.offsets, offsets)
    shared = [
        [len({*a} & {*b}) for a, b in zip(*of_token, strict=True)]
        for of_token in zip(rollout.tolist(), train.tolist(), strict=True)
    ]
    assert sides.overlap_NL.dtype == np.uint8 and sides.overlap_NL.tolist() == shared
    if N:
        train[7, 1, 0] = train[7, 1, 1]
        with pytest.raises(
            UserError, match=r"training routes, token 107, MoE layer 1.*got one twice"
        ):
            codec.encode_sides(rollout, train, num_experts=E, first_token=100)


def test_worked_by_hand():
    """2 layers, top-2 of 4. C(c1, 1) + C(c2, 2) numbers the sets 01 02 12 03 13 23 as 0..5.

    Sets of token 0: {2,3} is 5 = 101, {0,2} is 1 = 001, filled up: 10100100.

    Differences, the number of swaps in one bit (1 or 2 of min(2, 2)):
    token 0: {2,3} stays; {0,2} → {0,1}: mask 01, one swap 0, the member at index 1 of (0, 2)
        leaves: 1, the one at index 0 of (1, 3) comes: 0. 01010 filled up: 01010000.
    token 1: the same sets, in another order: nothing.
    token 2: {0,1} → {2,3}; {2,3} stays: mask 10, two swaps 1, and only one way to exchange all
        members for all others. 101 filled up: 10100000.
    """
    rollout = np.array([[[3, 2], [0, 2]], [[1, 0], [3, 0]], [[0, 1], [2, 3]]])
    train = np.array([[[2, 3], [1, 0]], [[0, 1], [0, 3]], [[3, 2], [3, 2]]])
    packed = codec.encode_sets(rollout, num_experts=4)
    assert packed.tolist() == [[0b10100100], [0b00001100], [0b00010100]]
    data, offsets = codec.encode_difference(rollout, train, num_experts=4)
    assert data.tolist() == [0b01010000, 0b10100000]
    assert offsets.tolist() == [0, 1, 1, 2] and offsets.dtype == np.int64


@pytest.mark.parametrize(("E", "K"), [(7, 3), (9, 1), (6, 6), (10, 5)])
def test_ranks_count_all_subsets_in_colexicographic_order(E, K):
    """Every subset once, sorted by its largest member first: the order the rank is defined by."""
    subsets = sorted(combinations(range(E), K), key=lambda subset: subset[::-1])
    packed = codec.encode_sets(np.array(subsets)[:, None], num_experts=E)
    spare = -len(f"{len(subsets) - 1:b}") % 8 if len(subsets) > 1 else 0
    ranks = [int.from_bytes(row.tobytes()) >> spare for row in packed]
    assert ranks == list(range(len(subsets)))


@pytest.mark.parametrize("swaps", [1, 8])
def test_byte_budget(swaps):
    """48 layers, top-8 of 128, 10% of the rows differing, by one expert or by all of them.

    log2 C(128, 8) = 40.38, so 48 ranks of 41 bits are 1968 bits or 246 bytes.
    """
    rng = np.random.default_rng(0)
    rollout, train = two_sides(rng, 400, 48, 8, 128, 0.1, swaps)
    assert codec.set_bytes(48, 8, 128) == 246
    data, _ = codec.encode_difference(rollout, train, num_experts=128)
    differing = (np.sort(rollout, axis=-1) != np.sort(train, axis=-1)).any(axis=-1).mean()
    assert 0.09 < differing < 0.11
    assert 246 + len(data) / 400 <= 300


def test_one_rank_where_it_fits_and_runs_where_it_does_not():
    """C(1024, 16) ≈ 2^115.7 takes runs of 6, 5 and 5: ⌈50.5⌉ + 2·⌈43.1⌉ = 139 bits, not 160."""
    assert codec.set_bytes(1, 8, 256) == 7  # log2 C(256, 8) = 48.6
    assert codec.set_bytes(1, 16, 1024) == 18
    assert codec.set_bytes(8, 16, 1024) == 139


@pytest.mark.parametrize(
    ("packed", "model", "message"),
    [
        ([[0b10100100, 0]], (2, 2, 4), r"shape \[tokens, 1\], got uint8 of shape \[1, 2\]: trunc"),
        ([0b10100100], (2, 2, 4), r"got uint8 of shape \[1\]"),
        ([[0b10100100], [0b00111000]], (2, 2, 4), "token 1, MoE layer 1: not the number of any 2"),
        ([[0b11100100]], (2, 2, 4), "token 0, MoE layer 0: not the number"),
        ([[0b10100100], [0b10100101]], (2, 2, 4), "token 1: bits set behind the last layer"),
        # three runs of rank 0: 0..5, 0..4, 0..4 do not ascend
        ([[0] * 18], (1, 16, 1024), "token 0, MoE layer 0: not the number of any 16 of 1024"),
        ([[0]], (0, 2, 4), "at least 1 MoE layer"),
        ([[0]], (2, 5, 4), "top-5 of 4"),
    ],
)
@pytest.mark.parametrize("rows", [1, 1 << 14])
def test_damaged_sets(packed, model, message, rows, monkeypatch):
    monkeypatch.setattr(codec, "_ROWS", rows)
    num_layers, top_k, num_experts = model
    with pytest.raises(UserError, match=message):
        codec.decode_sets(
            np.array(packed, dtype=np.uint8),
            num_layers=num_layers,
            top_k=top_k,
            num_experts=num_experts,
        )


ROLLOUT = np.array([[[0, 1, 2], [3, 4, 5]]] * 2)  # 2 tokens, 2 layers, top-3 of 8


@pytest.mark.parametrize(
    ("data", "offsets", "message"),
    [
        ([], [0, 0], "offsets must be 3 integers for 2 tokens"),
        ([], [0.0, 0.0, 0.0], "got float64"),
        ([64], [0, 1, 0], "token 1 ends at 0, before it begins at 1"),
        ([64], [0, 0, 2], "the 1 bytes of data, got 0 to 2: truncated"),
        ([64], [1, 1, 1], "the 1 bytes of data, got 1 to 1"),
        # Mask 2 bits, swaps 2 bits (1, 2 or 3 experts), one of 3 in 2 bits, one of 5 in 3 bits.
        ([0b00000000], [0, 0, 1], "token 1: bytes without a differing layer"),
        ([0b01110000], [0, 0, 1], "token 1, MoE layer 1: more than 3 experts exchanged"),
        ([0b01001100, 0], [0, 2, 2], "token 0, MoE layer 1: not the number of any exchange of 1"),
        ([0b01000010, 0b10000000], [0, 0, 2], "token 1, MoE layer 1: not the number of any exch"),
        ([0b01000000], [0, 1, 1], "token 0: truncated"),
        ([0b01000000, 0, 0], [0, 3, 3], "token 0: more bytes than its difference takes"),
        ([0b01000000, 1], [0, 2, 2], "token 0: bits set behind its last layer"),
    ],
)
@pytest.mark.parametrize("rows", [1, 1 << 14])
def test_damaged_differences(data, offsets, message, rows, monkeypatch):
    monkeypatch.setattr(codec, "_ROWS", rows)
    data, offsets = np.array(data, dtype=np.uint8), np.array(offsets)
    with pytest.raises(UserError, match=message):
        codec.decode_difference(ROLLOUT, data, offsets, num_experts=8)


def test_mask_of_many_layers_truncated():
    rng = np.random.default_rng(1)
    rollout, train = two_sides(rng, 1, 40, 2, 8, 0.5, 1)
    data, _ = codec.encode_difference(rollout, train, num_experts=8)
    for kept in range(1, len(data)):
        with pytest.raises(UserError, match="token 0: truncated"):
            codec.decode_difference(rollout, data[:kept], np.array([0, kept]), num_experts=8)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_noise_gives_an_error_or_expert_sets(data):
    """Bytes at random: refused, or K different ids in range; never another exception."""
    E, K = data.draw(st.sampled_from([(8, 3), (16, 4), (1024, 16), (4, 4)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rollout, train = two_sides(rng, 3, 4, K, E, 0.5, 1)
    noise, offsets = codec.encode_difference(rollout, train, num_experts=E)
    if len(noise):
        noise[data.draw(st.integers(0, len(noise) - 1))] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        noise = rng.integers(0, 256, offsets[-1], dtype=np.uint8)
    packed = rng.integers(0, 256, (3, codec.set_bytes(4, K, E)), dtype=np.uint8)
    for decode in (
        lambda: codec.decode_difference(rollout, noise, offsets, num_experts=E),
        lambda: codec.decode_sets(packed, num_layers=4, top_k=K, num_experts=E),
    ):
        try:
            sets = decode().astype(int)
        except UserError:
            continue
        assert sets.shape == rollout.shape and sets.max() < E
        assert (np.diff(sets, axis=-1) > 0).all()


GOOD = np.array([[[0, 1], [2, 3]]] * 3)


def changed(token, layer, experts):
    routes = GOOD.copy()
    routes[token, layer] = experts
    return routes


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (changed(2, 1, [1, 4]), r"training routes, token 2, MoE layer 1: experts \[1, 4\]: .*0..3"),
        (changed(1, 0, [-1, 2]), r"token 1, MoE layer 0: experts \[-1, 2\]"),
        (changed(2, 0, [3, 3]), "token 2, MoE layer 0.*2 different experts, got one twice"),
        (GOOD[:2], r"rollout \[3, 2, 2\], training \[2, 2, 2\]"),
        (GOOD.astype(float), "must be integers of shape"),
        (GOOD[0], r"got int64 of shape \[2, 2\]"),
        (GOOD[:, :0], "at least 1 MoE layer"),
    ],
)
def test_bad_routes(train, message, monkeypatch):
    monkeypatch.setattr(codec, "_ROWS", 2)
    with pytest.raises(UserError, match=message):
        codec.encode_difference(GOOD, train, num_experts=4)
    if train.ndim == 3 and train.shape != GOOD[:2].shape:
        with pytest.raises(UserError, match=message.replace("training routes", "routes")):
            codec.encode_sets(train, num_experts=4)
