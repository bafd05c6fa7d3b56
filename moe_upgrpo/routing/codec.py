# SPDX-License-Identifier: Apache-2.0
"""Store expert sets exactly in few bytes: one side's by rank, the other's as a difference from it.

A K-subset of E experts has a rank in 0..C(E, K) − 1 (`routing.subsets`), which is written in
⌈log2 C(E, K)⌉ bits, most significant first: 41 bits for top-8 of 128, where eight bytes in an int8
array take 64 and in an int32 array 256. Where C(E, K) ≥ 2^63 it takes several ranks. The code is
lossless as sets: order within K is not kept.

Shape suffixes: N tokens, n tokens of a block, D those of them that differ, L MoE layers, K experts
per token (top-k), R rows = (token, layer) pairs, B bytes per token, W bits per row, M bytes in all.
E is the number of experts.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from moe_upgrpo.errors import UserError
from moe_upgrpo.routing.bits import as_bytes, blank, pack, padded, read, unpack, write
from moe_upgrpo.routing.sets import are_ascending, ascending, not_in, repeated, unequal, words
from moe_upgrpo.routing.subsets import id_type, members, rank_widths, ranks, set_width

# Rows handled at once: each takes some 40 bytes of memory meanwhile, each call a microsecond.
_ROWS = 1 << 17


def set_bytes(num_layers: int, top_k: int, num_experts: int) -> int:
    """Bytes for one token's expert sets: L ranks side by side, filled up to a whole byte.

    ⌈L · ⌈log2 C(E, K)⌉ / 8⌉ where C(E, K) < 2^63; 246 for 48 layers, top-8 of 128.

    Raises:
        UserError: not 1 ≤ K ≤ E, or L < 1.
    """
    _check_model(num_layers, top_k, num_experts)
    return -(-num_layers * set_width(top_k, num_experts) // 8)


def encode_sets(routes_NLK: ndarray, *, num_experts: int) -> ndarray:
    """Each token's expert sets as bytes: uint8 ``[N, set_bytes(L, K, E)]``.

    Args:
        routes_NLK: integers ``[N, L, K]``, the order within K carrying no meaning.

    Raises:
        UserError: not integers of three dimensions; an id outside [0, E) or an expert twice in a
            row, naming the token and the layer.
    """
    routes_NLK = _checked_shape("routes", routes_NLK, num_experts)
    N, L, K = routes_NLK.shape
    packed_NB = np.empty((N, set_bytes(L, K, num_experts)), dtype=np.uint8)
    for tokens in _blocks(N, L):
        sets_nLK = _ascending("routes", routes_NLK[tokens], tokens.start, num_experts)
        packed_NB[tokens] = _encode_sets(sets_nLK, num_experts)
    return packed_NB


def _encode_sets(sets_nLK: ndarray, num_experts: int) -> ndarray:
    _, L, K = sets_nLK.shape
    by_layer = zip(*(rank_nL.T.copy() for rank_nL in ranks(sets_nLK, num_experts)), strict=True)
    numbers = [rank_n for of_layer in by_layer for rank_n in of_layer]
    return pack(numbers, rank_widths(K, num_experts) * L)


def decode_sets(packed_NB: ndarray, *, num_layers: int, top_k: int, num_experts: int) -> ndarray:
    """Undo `encode_sets`: ``[N, L, K]``, ascending within K, uint8 for E ≤ 256 and uint16 above.

    Raises:
        UserError: not uint8 ``[N, set_bytes(L, K, E)]``; bits that encode no set, naming the token
            and, unless the bits are filling, the layer.
    """
    B = set_bytes(num_layers, top_k, num_experts)
    packed_NB = np.asarray(packed_NB)
    if packed_NB.dtype != np.uint8 or packed_NB.ndim != 2 or packed_NB.shape[1] != B:
        raise UserError(
            f"packed sets of {num_layers} MoE layers, top-{top_k} of {num_experts} are uint8 of "
            f"shape [tokens, {B}], got {packed_NB.dtype} of shape {list(packed_NB.shape)}: "
            "truncated, or of another model"
        )
    N, L, widths = len(packed_NB), num_layers, rank_widths(top_k, num_experts)
    filling = 8 * B - L * sum(widths)
    routes_NLK: ndarray = np.empty((N, num_layers, top_k), dtype=id_type(num_experts))
    for tokens in _blocks(N, num_layers):
        *numbers, filling_n = unpack(packed_NB[tokens], [*widths * L, filling])
        if filling_n.any():
            token = tokens.start + int((filling_n != 0).argmax())
            raise UserError(f"packed sets, token {token}: bits set behind the last layer: damaged")
        ranks_R = [np.concatenate(numbers[run :: len(widths)]) for run in range(len(widths))]
        sets_KR, bad_R = members(ranks_R, top_k, num_experts)
        if bad_R.any():
            token, layer = np.argwhere(bad_R.reshape(L, -1).T)[0]
            raise UserError(
                f"packed sets, token {tokens.start + token}, MoE layer {layer}: not the number of "
                f"any {top_k} of {num_experts} experts: damaged, or of another model"
            )
        # By rows, then layers, in whole rows: several times as quick as byte by byte.
        rows_LnK = np.ascontiguousarray(sets_KR.T).reshape(L, -1, top_k)
        words(routes_NLK[tokens])[:] = words(rows_LnK).swapaxes(0, 1)
    return routes_NLK


def encode_difference(
    rollout_NLK: ndarray, train_NLK: ndarray, *, num_experts: int
) -> tuple[ndarray, ndarray]:
    """The trainer's expert sets, written as changes to the rollout's.

    A token that is the same in all layers takes no byte. Any other is written, bit by bit, as: a
    mask of the L layers, 1 where S ≠ S'; for each of those the number m = |S ∖ S'| of experts
    exchanged, less one, in ⌈log2 min(K, E − K)⌉ bits; for each the rank of S ∖ S' among the
    m-subsets of the K ascending members of S and that of S' ∖ S among the m-subsets of the E − K
    ascending others; filled with 0 up to a whole byte.

    Args:
        rollout_NLK: integers ``[N, L, K]``: S, the rollout engine's expert sets.
        train_NLK: the same shape: S', the trainer's.

    Returns:
        uint8 ``[M]`` and int64 ``[N + 1]``: token t's bytes are data[offsets[t] : offsets[t + 1]].

    Raises:
        UserError: as `encode_sets`, naming the side; the two shapes differ.
    """
    parts = [part for _, part in _differences(rollout_NLK, train_NLK, num_experts)]
    return _joined(parts)


class Sides(NamedTuple):
    """Both sides of N tokens, as the token log keeps them.

    sets_NB: the rollout's, from `encode_sets`. data, offsets: from `encode_difference`. overlap_NL:
    |S ∩ S'|, uint8 (uint16 for K > 255).
    """

    sets_NB: ndarray
    data: ndarray
    offsets: ndarray
    overlap_NL: ndarray


def encode_sides(
    rollout_NLK: ndarray, train_NLK: ndarray, *, num_experts: int, first_token: int = 0
) -> Sides:
    """Both sides' sets in one pass, as `encode_sets` and `encode_difference`, and their overlaps.

    Args:
        first_token: the number that errors give to the first token.

    Raises:
        UserError: as `encode_difference`.
    """
    N, L, K = np.shape(rollout_NLK)
    sets_NB = np.empty((N, set_bytes(L, K, num_experts)), dtype=np.uint8)
    overlap_NL: ndarray = np.full((N, L), K, dtype=id_type(K + 1))
    parts, start = [], 0
    for rollout_nLK, part in _differences(rollout_NLK, train_NLK, num_experts, first_token):
        tokens = slice(start, start + len(rollout_nLK))
        sets_NB[tokens] = _encode_sets(rollout_nLK, num_experts)
        overlap_NL[tokens].reshape(-1)[part.rows_R] -= part.swaps_R.astype(overlap_NL.dtype)
        parts.append(part)
        start = tokens.stop
    return Sides(sets_NB, *_joined(parts), overlap_NL)


class _Part(NamedTuple):
    """A block's difference: its bytes, those of each token, and the rows and numbers of swaps."""

    data: ndarray
    bytes_n: ndarray
    rows_R: ndarray
    swaps_R: ndarray


def _joined(parts: list[_Part]) -> tuple[ndarray, ndarray]:
    data = np.concatenate([np.zeros(0, dtype=np.uint8), *(part.data for part in parts)])
    ends_N = np.concatenate([np.zeros(1, dtype=np.int64), *(part.bytes_n for part in parts)])
    return data, ends_N.cumsum()


def _differences(
    rollout_NLK: ndarray, train_NLK: ndarray, num_experts: int, first_token: int = 0
) -> Iterator[tuple[ndarray, _Part]]:
    """The rollout's sets, ascending, and the trainer's difference from them, block by block."""
    rollout_NLK = _checked_shape("rollout routes", rollout_NLK, num_experts)
    train_NLK = _checked_shape("training routes", train_NLK, num_experts)
    if rollout_NLK.shape != train_NLK.shape:
        raise UserError(
            "a difference needs routes of the same tokens, MoE layers and top-k: rollout "
            f"{list(rollout_NLK.shape)}, training {list(train_NLK.shape)}"
        )
    N, L, _ = rollout_NLK.shape
    for tokens in _blocks(N, L):
        first = first_token + tokens.start
        rollout_nLK = _ascending("rollout routes", rollout_NLK[tokens], first, num_experts)
        train_nLK = _ascending("training routes", train_NLK[tokens], first, num_experts)
        yield rollout_nLK, _encode_block(rollout_nLK, train_nLK, num_experts)


def decode_difference(
    rollout_NLK: ndarray, data: ndarray, offsets: ndarray, *, num_experts: int
) -> ndarray:
    """Undo `encode_difference`: the trainer's sets ``[N, L, K]``, ascending, as `decode_sets`.

    Raises:
        UserError: as `encode_sets` for the rollout's routes; offsets that are not N + 1 ascending
            integers from 0 to M; bytes that encode no difference, naming the token and, where
            possible, the layer.
    """
    rollout_NLK = _checked_shape("rollout routes", rollout_NLK, num_experts)
    N, L, _ = rollout_NLK.shape
    data, offsets = np.asarray(data), np.asarray(offsets)
    _check_offsets(data, offsets, N)
    train_NLK: ndarray = np.empty(rollout_NLK.shape, dtype=id_type(num_experts))
    for tokens in _blocks(N, L):
        first = tokens.start
        rollout_nLK = _ascending("rollout routes", rollout_NLK[tokens], first, num_experts)
        offsets_n = offsets[first : first + len(rollout_nLK) + 1].astype(np.int64)
        part = data[offsets_n[0] : offsets_n[-1]]
        train_NLK[tokens] = _decode_block(
            rollout_nLK, part, offsets_n - offsets_n[0], first, num_experts
        )
    return train_NLK


def _encode_block(rollout_nLK: ndarray, train_nLK: ndarray, num_experts: int) -> _Part:
    n, L, K = rollout_nLK.shape
    bytes_n = np.zeros(n, dtype=np.int64)
    mask_nL = unequal(rollout_nLK, train_nLK)
    differing_D = np.flatnonzero(mask_nL.any(axis=1))
    rows_R = np.flatnonzero(mask_nL)
    if not len(differing_D):
        return _Part(np.zeros(0, dtype=np.uint8), bytes_n, rows_R, rows_R)
    rollout_RK, train_RK = (x.reshape(-1, K)[rows_R] for x in (rollout_nLK, train_nLK))
    leaves_RK, comes_RK = not_in(rollout_RK, train_RK), not_in(train_RK, rollout_RK)
    swaps_R = leaves_RK.sum(axis=1)

    mask_DL = mask_nL[differing_D]
    token_R, _ = mask_DL.nonzero()
    layers_D, swap_width = mask_DL.sum(axis=1), _swap_width(K, num_experts)
    width_R = _payload_widths(K, num_experts)[swaps_R]
    payload_D = np.bincount(token_R, width_R).astype(np.int64)
    bytes_n[differing_D] = -(-(L + layers_D * swap_width + payload_D) // 8)
    start_D = 8 * (bytes_n.cumsum() - bytes_n)[differing_D]

    bits = blank(int(bytes_n.sum()))
    swap_at_R, payload_at_R = _row_positions(start_D + L, token_R, layers_D, swap_width, width_R)
    write(bits, swap_at_R, swaps_R - 1, swap_width)
    for m in np.unique(swaps_R):
        rows = (swaps_R == m).nonzero()[0]
        left_Rm = leaves_RK[rows].nonzero()[1].reshape(-1, m)
        came_Rm = train_RK[rows][comes_RK[rows]].reshape(-1, m).astype(np.int64)
        # The index of an expert among those outside S: its id minus the number of members of S
        # below it.
        came_Rm -= _members_below(rollout_RK[rows], came_Rm)
        at_R = payload_at_R[rows]
        for subsets_Rm, universe in ((left_Rm, K), (came_Rm, num_experts - K)):
            of_runs = zip(ranks(subsets_Rm, universe), rank_widths(m, universe), strict=True)
            for rank_R, bits_of_rank in of_runs:
                write(bits, at_R, rank_R, bits_of_rank)
                at_R = at_R + bits_of_rank
    data = as_bytes(bits, int(bytes_n.sum()))
    masks = np.packbits(mask_DL, axis=1)  # a token's bits begin at a byte
    data[_spans(start_D // 8, masks.shape[1])] |= masks
    return _Part(data, bytes_n, rows_R, swaps_R)


def _decode_block(
    rollout_nLK: ndarray, data: ndarray, offsets: ndarray, first_token: int, num_experts: int
) -> ndarray:
    _, L, K = rollout_nLK.shape
    train_nLK = rollout_nLK.copy()
    differing_D = np.diff(offsets).nonzero()[0]
    if not len(differing_D):
        return train_nLK
    start_D, end_D = 8 * offsets[differing_D], 8 * offsets[differing_D + 1]
    swap_width, widths = _swap_width(K, num_experts), _payload_widths(K, num_experts)
    # Padded, so that a truncated token's apparent content can be read before it is refused.
    whole = padded(data, L + (L * (swap_width + max(widths)) + 7) // 8)

    def refuse(bad_D: ndarray, what: str) -> None:
        if bad_D.any():
            token = first_token + int(differing_D[bad_D.argmax()])
            raise UserError(f"route difference, token {token}: {what}")

    refuse(end_D - start_D < L, f"truncated in the mask of {L} MoE layers")
    mask_bytes_D = whole[_spans(start_D // 8, -(-L // 8))]
    mask_DL = np.unpackbits(mask_bytes_D, axis=1, count=L).view(bool)
    layers_D = mask_DL.sum(axis=1)
    refuse(layers_D == 0, "bytes without a differing layer: damaged, or of another model")
    token_R, layer_R = mask_DL.nonzero()

    def refuse_rows(bad_R: ndarray, what: str) -> None:
        if bad_R.any():
            row = bad_R.argmax()
            token = first_token + int(differing_D[token_R[row]])
            raise UserError(f"route difference, token {token}, MoE layer {layer_R[row]}: {what}")

    no_width_R = np.zeros(len(token_R), dtype=np.int64)
    swap_at_R, _ = _row_positions(start_D + L, token_R, layers_D, swap_width, no_width_R)
    swaps_R = read(whole, swap_at_R, swap_width) + 1
    most = min(K, num_experts - K)
    refuse_rows(swaps_R > most, f"more than {most} experts exchanged: damaged or of another model")
    width_R = widths[swaps_R]
    _, payload_at_R = _row_positions(start_D + L, token_R, layers_D, swap_width, width_R)
    used_D = L + layers_D * swap_width + np.bincount(token_R, width_R).astype(np.int64)
    needed_D = -(-used_D // 8) * 8
    refuse(end_D - start_D < needed_D, "truncated, or of another model")
    refuse(end_D - start_D > needed_D, "more bytes than its difference takes: damaged")
    filling_D = read(whole, start_D + used_D, 7) >> (7 - (needed_D - used_D))
    refuse(filling_D > 0, "bits set behind its last layer: damaged")

    rows_R = differing_D[token_R] * L + layer_R
    rollout_RK = rollout_nLK.reshape(-1, K)[rows_R]
    train_RK = rollout_RK.copy()
    for m in np.unique(swaps_R):
        rows = (swaps_R == m).nonzero()[0]
        at_R = payload_at_R[rows]
        left_mR, bad_left_R, at_R = _read_subsets(whole, at_R, m, K)
        came_mR, bad_came_R, _ = _read_subsets(whole, at_R, m, num_experts - K)
        left_Rm, came_Rm = left_mR.T.astype(np.int64), came_mR.T.astype(np.int64)
        bad_R = np.zeros(len(swaps_R), dtype=bool)
        bad_R[rows] = bad_left_R | bad_came_R
        refuse_rows(bad_R, f"not the number of any exchange of {m} experts: damaged")
        # Undo the index among the others: S_i − i of them lie below the i-th member of S (from 0).
        others_below_RK = rollout_RK[rows] - np.arange(K, dtype=rollout_RK.dtype)
        came_Rm = came_Rm + _members_below(others_below_RK, came_Rm + 1)
        changed_RK = train_RK[rows]
        np.put_along_axis(changed_RK, left_Rm, came_Rm.astype(changed_RK.dtype), axis=1)
        train_RK[rows] = ascending(changed_RK)
    train_nLK.reshape(-1, K)[rows_R] = train_RK
    return train_nLK


def _read_subsets(
    whole: ndarray, at_R: ndarray, size: int, universe: int
) -> tuple[ndarray, ndarray, ndarray]:
    """Subsets that begin at these bits, as from `members`, and where each ends."""
    ranks_R = []
    for width in rank_widths(size, universe):
        ranks_R.append(read(whole, at_R, width))
        at_R = at_R + width
    return *members(ranks_R, size, universe), at_R


def _members_below(members_RK: ndarray, ids_Rm: ndarray) -> ndarray:
    """Count the members of its row below each id: int64 ``[R, m]``. Ids fit the members' type."""
    columns_KR = np.ascontiguousarray(members_RK.T)
    ids_mR = np.ascontiguousarray(ids_Rm.T).astype(members_RK.dtype)
    below_mR = np.zeros_like(ids_mR)
    for member_R in columns_KR:
        below_mR += member_R < ids_mR
    return below_mR.T.astype(np.int64)


def _row_positions(
    start_D: ndarray, token_R: ndarray, layers_D: ndarray, swap_width: int, width_R: ndarray
) -> tuple[ndarray, ndarray]:
    """Bit positions of each differing row's number of swaps and of its payload.

    A token's numbers of swaps all come first, since they say how wide the payloads are.
    """
    first_row_D = layers_D.cumsum() - layers_D
    before_R = width_R.cumsum() - width_R
    row_in_token_R = np.arange(len(token_R)) - first_row_D[token_R]
    swap_at_R = start_D[token_R] + row_in_token_R * swap_width
    payload_at_R = (start_D + layers_D * swap_width)[token_R]
    return swap_at_R, payload_at_R + before_R - before_R[first_row_D][token_R]


def _spans(start: ndarray, width: int) -> ndarray:
    return start[:, None] + np.arange(width)


def _swap_width(top_k: int, num_experts: int) -> int:
    return max(0, min(top_k, num_experts - top_k) - 1).bit_length()


@cache
def _payload_widths(top_k: int, num_experts: int) -> ndarray:
    """Bits that say which m experts left and which came, for m = 0..min(K, E − K)."""
    swaps = range(1, min(top_k, num_experts - top_k) + 1)
    return np.array([0] + [set_width(m, top_k) + set_width(m, num_experts - top_k) for m in swaps])


def _blocks(num_tokens: int, num_layers: int) -> Iterator[slice]:
    step = max(1, _ROWS // num_layers)
    for start in range(0, num_tokens, step):
        yield slice(start, min(start + step, num_tokens))


def _check_model(num_layers: int, top_k: int, num_experts: int) -> None:
    if num_layers < 1 or not 1 <= top_k <= num_experts or num_experts > 1 << 16:
        raise UserError(
            "expected at least 1 MoE layer and 1 ≤ top-k ≤ experts ≤ 65536, "
            f"got {num_layers} layers, top-{top_k} of {num_experts}"
        )


def _checked_shape(name: str, routes: ndarray, num_experts: int) -> ndarray:
    routes = np.asarray(routes)
    if routes.ndim != 3 or not np.issubdtype(routes.dtype, np.integer):
        raise UserError(
            f"{name} must be integers of shape [tokens, MoE layers, top-k], "
            f"got {routes.dtype} of shape {list(routes.shape)}"
        )
    _check_model(routes.shape[1], routes.shape[2], num_experts)
    return routes


def _check_offsets(data: ndarray, offsets: ndarray, num_tokens: int) -> None:
    if data.dtype != np.uint8 or data.ndim != 1:
        raise UserError(f"data must be uint8 [bytes], got {data.dtype} {list(data.shape)}")
    if offsets.shape != (num_tokens + 1,) or not np.issubdtype(offsets.dtype, np.integer):
        raise UserError(
            f"offsets must be {num_tokens + 1} integers for {num_tokens} tokens, "
            f"got {offsets.dtype} of shape {list(offsets.shape)}"
        )
    falls_N = offsets[1:] < offsets[:-1]
    if falls_N.any():
        token = int(falls_N.argmax())
        raise UserError(
            f"offsets must ascend: token {token} ends at {offsets[token + 1]}, before it begins "
            f"at {offsets[token]}"
        )
    if offsets[0] != 0 or offsets[-1] != len(data):
        raise UserError(
            f"offsets must go from 0 to the {len(data)} bytes of data, got {offsets[0]} to "
            f"{offsets[-1]}: truncated, or cut from a larger array without its offsets"
        )


def _ascending(name: str, routes_nLK: ndarray, first_token: int, num_experts: int) -> ndarray:
    """Check a block of routes and sort each row, in the narrowest type."""
    if routes_nLK.min() < 0 or routes_nLK.max() >= num_experts:
        outside_nL = ((routes_nLK < 0) | (routes_nLK >= num_experts)).any(axis=-1)
        where = _where(name, routes_nLK, np.asarray(outside_nL), first_token)
        raise UserError(f"{where}: expected ids in 0..{num_experts - 1}")
    sets_nLK: ndarray = routes_nLK.astype(id_type(num_experts), copy=False)
    if are_ascending(sets_nLK):
        return sets_nLK
    sets_nLK = ascending(sets_nLK)
    twice_nL = repeated(sets_nLK)
    if twice_nL.any():
        where = _where(name, routes_nLK, twice_nL, first_token)
        raise UserError(f"{where}: expected {sets_nLK.shape[-1]} different experts, got one twice")
    return sets_nLK


def _where(name: str, routes_nLK: ndarray, bad_nL: ndarray, first_token: int) -> str:
    token, layer = np.argwhere(bad_nL)[0]
    ids = routes_nLK[token, layer].tolist()
    return f"{name}, token {first_token + token}, MoE layer {layer}: experts {ids}"
