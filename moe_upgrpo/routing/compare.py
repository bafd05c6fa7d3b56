# SPDX-License-Identifier: Apache-2.0
"""Compare the experts that the rollout engine chose with those that the trainer chose.

What was compared is part of the result (`ComparisonKind`): divergence with each side on its own
hidden states, divergence under replay, and the noise floor are different quantities.

Shape suffixes: T tokens, L MoE layers, K experts per token (top-k), R rows = (token, layer) pairs,
G groups. E is the number of experts. A batch has sequences B and tokens T of each; what is said
about `[T, …]` also holds for its `[B, T, …]`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from moe_upgrpo.errors import UserError
from moe_upgrpo.routing.shared import count_shared

# Rows handled at once; their temporaries take some 40 bytes each.
_ROWS_CPU = 1 << 17
_ROWS_GPU = 1 << 22


class ComparisonKind(StrEnum):
    """Kinds of comparison, by the two sets of routes; counts of different kinds cannot be added."""

    FREE_RUNNING = "free-running"
    """Rollout engine against trainer, each on its own hidden states: earlier flips carry on."""

    CONDITIONAL = "conditional"
    """Rollout engine against trainer under replay: a layer's input already used the engine's
    routes, so that only the flips of that layer itself show."""

    REPEAT = "repeat"
    """The noise floor: two passes of one side over the same batch."""

    BATCH_SHAPE = "batch shape"
    """The noise floor: two passes of one side over the same tokens in batches of other shapes."""

    @classmethod
    def _missing_(cls, value: object) -> "ComparisonKind":
        raise UserError(f"kind: {value!r} given; allowed: {', '.join(cls)}")

    @property
    def sides(self) -> tuple[str, str]:
        """Names of the two sides that `compare_routes` is given."""
        noise = self in (ComparisonKind.REPEAT, ComparisonKind.BATCH_SHAPE)
        return ("first pass", "second pass") if noise else ("rollout", "training")


@dataclass(frozen=True, kw_only=True)
class RoutingCounts:
    """Counts of the experts that two sides' sets share, as two histograms.

    With S the rollout's and S' the trainer's expert set of a (token, layer), |S| = |S'| = K (in a
    noise floor, the sets of the first and of the second pass of one side):

    - ``overlap_histogram`` ``[L, K+1]`` int64: tokens with |S ∩ S'| = k in layer l
    - ``token_histogram`` ``[L+1]`` int64: tokens with j layers in which S ≠ S'
    - ``kind``: what was compared; every figure made from the counts carries it

    Every rate below is a ratio of sums over these. So counts of micro-batches, ranks and steps add
    up (``a + b``, or an all-reduce of both tensors), where means would not. Rates are floats in [0,
    1]; those ``by_layer`` are float64 tensors ``[L]``.
    """

    overlap_histogram: Tensor
    token_histogram: Tensor
    kind: ComparisonKind = ComparisonKind.FREE_RUNNING

    def __add__(self, other: "RoutingCounts") -> "RoutingCounts":
        if self.kind != other.kind:
            raise UserError(
                f"counts of different kinds cannot be added: {self.kind} and {other.kind}. "
                "Report them apart"
            )
        if self.overlap_histogram.shape != other.overlap_histogram.shape:
            raise UserError(
                "counts of different models cannot be added: histograms of shape [L, K+1] = "
                f"{list(self.overlap_histogram.shape)} and {list(other.overlap_histogram.shape)}"
            )
        return RoutingCounts(
            overlap_histogram=self.overlap_histogram + other.overlap_histogram,
            token_histogram=self.token_histogram + other.token_histogram,
            kind=self.kind,
        )

    @property
    def num_layers(self) -> int:
        return self.overlap_histogram.shape[0]

    @property
    def top_k(self) -> int:
        return self.overlap_histogram.shape[1] - 1

    @property
    def tokens_compared(self) -> int:
        return int(self.token_histogram.sum())

    @property
    def tokens_mismatched(self) -> int:
        """Tokens with S ≠ S' in at least one layer."""
        return int(self.token_histogram[1:].sum())

    @property
    def routers_compared(self) -> int:
        """(token, layer) pairs compared."""
        return int(self.overlap_histogram.sum())

    @property
    def routers_mismatched(self) -> int:
        """(token, layer) pairs with S ≠ S'."""
        return int(self.overlap_histogram[:, :-1].sum())

    @property
    def slots_compared(self) -> int:
        """Expert slots compared: K for each (token, layer)."""
        return self.routers_compared * self.top_k

    @property
    def slots_mismatched(self) -> int:
        """Σ K − |S ∩ S'|."""
        return self.slots_compared - int(self._shared_by_layer().sum())

    @property
    def router_mismatch_rate(self) -> float:
        """mean over (token, layer) of 1[S ≠ S']."""
        return self.routers_mismatched / self.routers_compared

    @property
    def slot_mismatch_rate(self) -> float:
        """1 − mean over (token, layer) of |S ∩ S'| / K."""
        return self.slots_mismatched / self.slots_compared

    @property
    def jaccard(self) -> float:
        """mean over (token, layer) of |S ∩ S'| / |S ∪ S'|, where |S ∪ S'| = 2K − |S ∩ S'|."""
        return float(self._jaccard_sum_by_layer().sum()) / self.routers_compared

    @property
    def token_any_rate(self) -> float:
        """share of tokens with S ≠ S' in at least one layer."""
        return self.tokens_mismatched / self.tokens_compared

    @property
    def mean_routers_per_token(self) -> float:
        """mean over tokens of the number of layers with S ≠ S', in [0, L]."""
        return self.routers_mismatched / self.tokens_compared

    @property
    def routers_mismatched_by_layer(self) -> Tensor:
        """int64 ``[L]``; each layer's denominator is ``tokens_compared``."""
        return self.overlap_histogram[:, :-1].sum(dim=1)

    @property
    def router_mismatch_by_layer(self) -> Tensor:
        return self.routers_mismatched_by_layer.double() / self.tokens_compared

    @property
    def slot_mismatch_by_layer(self) -> Tensor:
        slots = self.tokens_compared * self.top_k
        return (slots - self._shared_by_layer()).double() / slots

    @property
    def jaccard_by_layer(self) -> Tensor:
        return self._jaccard_sum_by_layer() / self.tokens_compared

    def _shared_by_layer(self) -> Tensor:
        overlaps = torch.arange(self.top_k + 1, device=self.overlap_histogram.device)
        return (self.overlap_histogram * overlaps).sum(dim=1)

    def _jaccard_sum_by_layer(self) -> Tensor:
        overlaps = torch.arange(self.top_k + 1, device=self.overlap_histogram.device)
        return (self.overlap_histogram * (overlaps / (2 * self.top_k - overlaps)).double()).sum(1)


@dataclass(frozen=True, kw_only=True)
class RoutingDivergence(RoutingCounts):
    """`RoutingCounts` of the valid tokens, and where each of them differs.

    - ``overlap`` ``[T, L]`` uint8: |S ∩ S'|; 0 where the token is not valid
    - ``routers_per_token`` ``[T]`` int32: layers with S ≠ S'; 0 where the token is not valid
    - ``valid`` ``[T]`` bool

    For a batch ``[B, T, L, K]``, they are ``[B, T, L]``, ``[B, T]`` and ``[B, T]``.
    """

    overlap: Tensor
    routers_per_token: Tensor
    valid: Tensor

    @property
    def first_mismatched_layer(self) -> Tensor:
        """int64 ``[T]``: lowest layer index with S ≠ S'; −1 if there is none or not valid."""
        mismatch_TL = (self.overlap != self.top_k) & self.valid[..., None]
        # argmax of a 0/1 row is its first 1
        return torch.where(mismatch_TL.any(dim=-1), mismatch_TL.byte().argmax(dim=-1), -1)

    def select(self, tokens: Tensor) -> "RoutingDivergence":
        """The comparison of a selection of tokens, in one row: ``tokens`` ``[T]`` bool.

        Raises:
            UserError: a mask of another shape, or one that leaves no valid token.
        """
        if tokens.shape != self.valid.shape or tokens.dtype != torch.bool:
            raise UserError(
                f"tokens must be bool of shape {list(self.valid.shape)}, got {tokens.dtype} of "
                f"shape {list(tokens.shape)}"
            )
        if not (tokens & self.valid).any():
            raise UserError("nothing to compare: the selection has no valid token")
        overlap_TL, valid_T = self.overlap[tokens], self.valid[tokens]
        routers_per_token_T = self.routers_per_token[tokens]
        L, K = self.num_layers, self.top_k
        offset_L = torch.arange(L, device=overlap_TL.device) * (K + 1)
        histogram_LK = torch.zeros(L * (K + 1), dtype=torch.int64, device=overlap_TL.device)
        for block_tL in overlap_TL[valid_T].split(max(1, _ROWS_CPU // max(1, L))):
            bins = (block_tL + offset_L).flatten()
            histogram_LK += torch.bincount(bins, minlength=L * (K + 1))
        return RoutingDivergence(
            overlap_histogram=histogram_LK.view(L, K + 1),
            token_histogram=torch.bincount(routers_per_token_T[valid_T], minlength=L + 1),
            kind=self.kind,
            overlap=overlap_TL,
            routers_per_token=routers_per_token_T,
            valid=valid_T,
        )

    def routers_mismatched_by(self, group: Tensor) -> tuple[Tensor, Tensor]:
        """Routers mismatched and compared for each group of tokens, e.g. by position.

        Args:
            group: integers ≥ 0 ``[T]``, such as the token's position in its response.

        Returns:
            int64 ``[G]`` numerator and denominator, G = largest group + 1. A group without valid
            tokens has denominator 0.
        """
        if group.shape != self.valid.shape or group.is_floating_point():
            raise UserError(
                f"group must hold one integer for each of the {self.valid.numel()} tokens, "
                f"got shape {list(group.shape)} of {group.dtype}"
            )
        if int(group.min()) < 0:
            raise UserError(f"group must be ≥ 0, got {int(group.min())}")
        group = group.long()
        zeros_G = torch.zeros(int(group.max()) + 1, dtype=torch.int64, device=group.device)
        group = group.flatten()
        mismatched_G = zeros_G.index_add(0, group, self.routers_per_token.flatten().long())
        compared_G = zeros_G.index_add(0, group, self.valid.flatten().long() * self.num_layers)
        return mismatched_G, compared_G


def concatenated(parts: "Sequence[RoutingDivergence]") -> RoutingDivergence:
    """The comparison of all tokens, joined from comparisons of consecutive parts."""
    return RoutingDivergence(
        overlap_histogram=torch.stack([part.overlap_histogram for part in parts]).sum(dim=0),
        token_histogram=torch.stack([part.token_histogram for part in parts]).sum(dim=0),
        kind=parts[0].kind,
        overlap=torch.cat([part.overlap for part in parts]),
        routers_per_token=torch.cat([part.routers_per_token for part in parts]),
        valid=torch.cat([part.valid for part in parts]),
    )


def compare_routes(
    rollout_routes: Tensor | np.ndarray,
    train_routes: Tensor | np.ndarray,
    *,
    num_experts: int,
    valid: Tensor | np.ndarray | None = None,
    kind: ComparisonKind = ComparisonKind.FREE_RUNNING,
) -> RoutingDivergence:
    """Compare two sides' expert sets, token by token and layer by layer.

    Row t of both must belong to the same token. Engines give a row for each *input*: the token at
    position p pairs with row p − 1, which produced its log-prob. The order of the experts within a
    row carries no meaning and is ignored. Definitions 1-6 of the routing metrics; the router
    mismatch rate and the mean number per token are those of R3 (arXiv 2510.11370, §3).

    Args:
        rollout_routes: ``[T, L, K]``, or a padded batch ``[B, T, L, K]``, as a tensor or a numpy
            array of any integer dtype that can hold ``num_experts − 1``.
        train_routes: the same shape; the dtype and the library may differ.
        num_experts: routed experts in each layer, shared experts not counted.
        valid: ``[T]`` (``[B, T]``) bool, False for padding, whose ids are not looked at; None: all
            valid.
        kind: what is compared. For a noise floor, pass the routes of one side's two passes.

    Raises:
        UserError: the shapes, dtypes or devices do not fit; no such kind; no token is valid; a
            valid row has an id outside [0, num_experts) or an expert twice (which is how a
            zero-filled row shows when K > 1; with K = 1 it cannot be told from a choice of expert
            0). The token (row number), layer and side are named.
    """
    kind = ComparisonKind(kind)
    first_side, second_side = kind.sides
    rollout_routes = _tensor(f"{first_side} routes", rollout_routes)
    train_routes = _tensor(f"{second_side} routes", train_routes)
    valid = None if valid is None else _tensor("valid", valid)
    sides = {first_side: rollout_routes, second_side: train_routes}
    _check_shapes(sides, num_experts, valid)
    *tokens_shape, L, K = rollout_routes.shape
    device = rollout_routes.device
    if valid is None:
        valid = torch.ones(tokens_shape, dtype=torch.bool, device=device)
    # One row of tokens: views, except for a batch whose memory is in another order.
    given = [(side, routes.reshape(-1, L, K)) for side, routes in sides.items()]
    valid, T = valid.reshape(-1), valid.numel()
    num_valid = int(valid.sum())
    if num_valid == 0:
        raise UserError(
            f"nothing to compare: none of the {T} tokens is valid. Pass the rows of response "
            "tokens, and a `valid` mask that is True for them"
        )

    overlap_TL = torch.zeros(T, L, dtype=torch.uint8, device=device)
    routers_per_token_T = torch.zeros(T, dtype=torch.int32, device=device)
    histogram_LK = torch.zeros(L * (K + 1), dtype=torch.int64, device=device)
    layer_offset_L = torch.arange(L, device=device) * (K + 1)
    for tokens in _blocks(valid, all_valid=num_valid == T, num_layers=L):
        blocks = {side: _signed(routes_TLK[tokens]) for side, routes_TLK in given}
        rows = (block_tLK.reshape(-1, K) for block_tLK in blocks.values())
        overlap_R, all_sets = count_shared(*rows, num_experts=num_experts)
        if not all_sets:
            raise _refusal(blocks, tokens, num_experts, tokens_shape)
        overlap_tL = overlap_R.view(-1, L)
        overlap_TL[tokens] = overlap_tL
        routers_per_token_T[tokens] = (overlap_tL != K).sum(dim=1, dtype=torch.int32)
        bins = (overlap_tL + layer_offset_L).flatten()
        histogram_LK += torch.bincount(bins, minlength=L * (K + 1))

    return RoutingDivergence(
        overlap_histogram=histogram_LK.view(L, K + 1),
        token_histogram=torch.bincount(routers_per_token_T[valid], minlength=L + 1),
        kind=kind,
        overlap=overlap_TL.view(*tokens_shape, L),
        routers_per_token=routers_per_token_T.view(tokens_shape),
        valid=valid.view(tokens_shape),
    )


def _tensor(name: str, given: Tensor | np.ndarray) -> Tensor:
    """A numpy array as a tensor of the same memory where its layout allows that."""
    if isinstance(given, Tensor):
        return given
    if not isinstance(given, np.ndarray):
        raise UserError(f"{name} must be a tensor or a numpy array, got {type(given).__name__}")
    if given.dtype.kind not in "biuf":
        raise UserError(f"{name} must be an array of numbers, got {given.dtype}")
    native = given.astype(given.dtype.newbyteorder("="), copy=False)
    if any(step < 0 or step % native.itemsize for step in native.strides):
        native = native.copy()  # torch has no such views
    return torch.from_numpy(native if native.flags.writeable else _as_if_writable(native))


def _as_if_writable(array: np.ndarray) -> np.ndarray:
    """The same memory, without torch's warning that it is read-only: nothing is written to it.

    Silencing the warning would change the filters of the whole process, and this runs in threads.
    """
    interface = array.__array_interface__ | {"data": (array.ctypes.data, False)}
    return np.asarray(SimpleNamespace(__array_interface__=interface, kept=array))


def _check_shapes(sides: dict[str, Tensor], num_experts: int, valid: Tensor | None) -> None:
    for side, routes in sides.items():
        if routes.is_floating_point() or routes.is_complex() or routes.dtype == torch.bool:
            raise UserError(f"{side} routes must be integers, got {routes.dtype}")
        if routes.dim() not in (3, 4):
            raise UserError(
                f"{side} routes must have shape [tokens, MoE layers, top-k], or [sequences, "
                f"tokens, MoE layers, top-k], got {list(routes.shape)}"
            )
        if torch.iinfo(routes.dtype).max < num_experts - 1:
            raise UserError(
                f"{side} routes are {routes.dtype}, which cannot hold the ids 0..{num_experts - 1} "
                f"of {num_experts} experts: ids above {torch.iinfo(routes.dtype).max} have "
                "overflowed. Record them in a wider type, e.g. int16"
            )
    shapes = [routes.shape for routes in sides.values()]
    if shapes[0] != shapes[1]:
        given = ", ".join(f"{side} {list(routes.shape)}" for side, routes in sides.items())
        raise UserError(
            f"the two sides must have routes of the same tokens, MoE layers and top-k: {given}. "
            "The token at position p pairs with row p−1, so a sequence of S tokens has S−1 rows"
        )
    *tokens_shape, L, K = shapes[0]
    T = math.prod(tokens_shape)
    if T == 0 or L == 0:
        raise UserError(f"nothing to compare: routes of {T} tokens and {L} MoE layers")
    if not 1 <= K <= min(num_experts, 255):
        raise UserError(f"top-k must be in 1..min(num_experts={num_experts}, 255), got {K}")
    if num_experts > torch.iinfo(torch.int16).max:
        raise UserError(f"num_experts must be at most {torch.iinfo(torch.int16).max}")
    if valid is not None and (list(valid.shape) != tokens_shape or valid.dtype != torch.bool):
        raise UserError(
            f"valid must be bool of shape {tokens_shape}, one for each token, "
            f"got {valid.dtype} of shape {list(valid.shape)}"
        )
    devices = {str(x.device) for x in (*sides.values(), valid) if x is not None}
    if len(devices) > 1:
        raise UserError(f"routes and valid must be on one device, got {sorted(devices)}")


def _blocks(valid_T: Tensor, *, all_valid: bool, num_layers: int) -> Iterator[slice | Tensor]:
    """Index the valid tokens block by block; a slice saves the copy where all are valid."""
    rows = _ROWS_CPU if valid_T.device.type == "cpu" else _ROWS_GPU
    step = max(1, rows // num_layers)
    if all_valid:
        for start in range(0, valid_T.numel(), step):
            yield slice(start, start + step)
    else:
        yield from valid_T.nonzero().squeeze(1).split(step)


def _signed(block_tLK: Tensor) -> Tensor:
    wide = (torch.uint16, torch.uint32, torch.uint64)  # torch has few operations for these
    return block_tLK.long() if block_tLK.dtype in wide else block_tLK


def _refusal(
    blocks: dict[str, Tensor],
    tokens: slice | Tensor,
    num_experts: int,
    tokens_shape: Sequence[int],
) -> UserError:
    """The error that names the first row of a side that is not a set."""
    for side, block_tLK in blocks.items():
        ids_RK = block_tLK.reshape(-1, block_tLK.shape[-1]).long()
        outside_R = ((ids_RK < 0) | (ids_RK >= num_experts)).any(dim=1)
        ascending_RK = ids_RK.sort(dim=1).values
        twice_R = (ascending_RK[:, 1:] == ascending_RK[:, :-1]).any(dim=1)
        for bad_R in (outside_R, twice_R):
            if bad_R.any():
                return _bad_row(side, block_tLK, tokens, bad_R, num_experts, tokens_shape)
    raise AssertionError("a row that is no set was counted and is not found")


def _bad_row(
    side: str,
    block_tLK: Tensor,
    tokens: slice | Tensor,
    bad_R: Tensor,
    num_experts: int,
    tokens_shape: Sequence[int],
) -> UserError:
    L = block_tLK.shape[1]
    in_block, layer = divmod(int(bad_R.nonzero()[0]), L)
    token = tokens.start + in_block if isinstance(tokens, slice) else int(tokens[in_block])
    ids = block_tLK[in_block, layer].tolist()
    place = f"token row {token}"
    if len(tokens_shape) == 2:
        sequence, row = divmod(token, tokens_shape[1])
        place = f"sequence {sequence}, token row {row}"
    where = f"{side} routes, {place}, MoE layer {layer}: experts {ids}"
    if len(ids) > 1 and not any(ids):
        return UserError(
            f"{where}: the row is zero-filled, so the routes of this token were never written. "
            "Mark padding in `valid`; a response token must have its routes"
        )
    if min(ids) < 0 or max(ids) >= num_experts:
        hint = ""
        if min(ids) < 0:
            hint = "; negative ids come from padding inside `valid`, or from ids that overflowed "
            hint += "an 8-bit type on the way (record them as int16)"
        return UserError(f"{where}: expected {len(ids)} ids in 0..{num_experts - 1}{hint}")
    return UserError(f"{where}: expected {len(ids)} different experts, got one twice")
