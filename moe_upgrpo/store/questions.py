# SPDX-License-Identifier: Apache-2.0
"""Ask questions of a token log: a quantity in each group, with intervals by prompt.

``rate(table, "clipped", by="own")`` is the clip fraction as a function of the token's own
mismatched layers. Every answer is a ratio of sums over tokens (or routers), with an interval that
treats prompts as the sampled units (`stats.clusters`); it describes the tokens of a group and does
not say why they are so: tokens with many mismatches are also late, rare or uncertain ones. The
decomposition, the columns gap_*, isolates routing.

Shape suffixes: N rows (tokens), L MoE layers, P prompts, G groups, C columns of sums.
"""

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from moe_upgrpo.errors import UserError
from moe_upgrpo.stats import TAILS, Rate, Scale, jackknifed
from moe_upgrpo.store.schema import TokenLayout
from moe_upgrpo.store.streamed import Part, Question, answer, mismatches_by_layer

Columns = dict[str, np.ndarray]
Measure = Callable[[Columns], np.ndarray]


@dataclass(frozen=True)
class Quantity:
    """``numerator(columns)`` ``[N]`` per token; ``counts(columns)`` are the tokens it is about."""

    meaning: str
    columns: tuple[str, ...]
    numerator: Measure
    counts: Measure | None = None
    scale: Scale = "share"


def _gap(c: Columns) -> np.ndarray:
    return np.abs(c["logp_old"] - c["logp_rollout"])


def _beyond(tau: float, log_ratio: Measure) -> Measure:
    def beyond(c: Columns) -> np.ndarray:
        distance_N = np.abs(log_ratio(c))
        # A token whose ratio is NaN is on neither side of τ: the rate must show it.
        return np.where(np.isnan(distance_N), math.nan, distance_N > math.log(tau))

    return beyond


def _log_ratio(c: Columns) -> np.ndarray:
    # A ratio that underflowed to 0 is beyond every τ; an impossible one is NaN.
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(c["ratio"])


def _itself(name: str) -> Measure:
    return lambda c: c[name]


def _magnitude(name: str) -> Measure:
    return lambda c: np.abs(c[name])


# Terms of the log-prob gap; the counterfactual ones are what replay keeps out of the loss.
_TERMS = (
    "gap_numerics",
    "gap_staleness",
    "gap_engine_routing",
    "gap_update",
    "gap_routing_shift",
    "counterfactual_engine_routing",
    "counterfactual_routing_shift",
)


def _kept_and_absolute(term: str) -> list[tuple[str, str, Callable[[str], Measure], Scale]]:
    return [
        ("", f"{term}, sign kept", _itself, "signed"),
        ("_abs", f"|{term}|", _magnitude, "magnitude"),
    ]


_GAP = ("logp_old", "logp_rollout")
_WEIGHT = ("gradient_weight", "advantage")

QUANTITIES: dict[str, Quantity] = {
    "mismatch": Quantity(
        "share of (token, MoE layer) pairs with S ≠ S′",
        ("layers_mismatched",),
        lambda c: c["layers_mismatched"],
    ),
    "mismatch_any": Quantity(
        "share of tokens with S ≠ S′ in at least one layer",
        ("layers_mismatched",),
        lambda c: c["layers_mismatched"] > 0,
    ),
    "conditional": Quantity(
        "share of (token, MoE layer) pairs whose own top-k differs from S in a forward held to S",
        ("layers_mismatched_conditional",),
        lambda c: c["layers_mismatched_conditional"],
    ),
    "gap": Quantity(
        "mean |logp_old − logp_rollout|, trainer against engine", _GAP, _gap, scale="magnitude"
    ),
    **{
        f"gap_tail_{tau:g}": Quantity(
            f"share of tokens with max(p/q, q/p) > {tau:g}, p/q = exp(logp_old − logp_rollout)",
            _GAP,
            _beyond(tau, _gap),
        )
        for tau in TAILS
    },
    **{
        f"ratio_tail_{tau:g}": Quantity(
            f"share of tokens with max(r, 1/r) > {tau:g}, r = ratio, at the last optimizer visit",
            ("ratio",),
            _beyond(tau, _log_ratio),
        )
        for tau in TAILS
    },
    **{
        f"{term}{ending}": Quantity(f"mean {meaning}", (term,), measure(term), scale=scale)
        for term in _TERMS
        for ending, meaning, measure, scale in _kept_and_absolute(term)
    },
    "clipped": Quantity(
        "share of tokens whose gradient the loss's rule took away",
        ("clipped",),
        lambda c: c["clipped"],
    ),
    "gradient_weight_positive": Quantity(
        "mean |A| · c · w of tokens with A > 0",
        _WEIGHT,
        lambda c: c["gradient_weight"],
        lambda c: c["advantage"] > 0,
        scale="magnitude",
    ),
    "gradient_weight_negative": Quantity(
        "mean |A| · c · w of tokens with A < 0",
        _WEIGHT,
        lambda c: c["gradient_weight"],
        lambda c: c["advantage"] < 0,
        scale="magnitude",
    ),
}

# name: (column, meaning)
GROUPINGS: dict[str, tuple[str, str]] = {
    "all": ("step", "every token in one group"),
    "layer": ("overlap", "each MoE layer by its number in the model; mismatch only"),
    "step": ("step", "each step"),
    "position": ("position", "bins of position with about equally many tokens"),
    "context": (
        "position",
        "bins of position that double, for long contexts: below 16, 16–31, … 16,384–32,767, above",
    ),
    "margin": ("margin_min", "bins of margin_min with about equally many tokens"),
    "token": ("token_id", "each of the most frequent token ids"),
    "own": ("layers_mismatched", "the token's own mismatched layers: 0, 1, 2, 3–4, 5–8, 9–16, …"),
    "prefix": ("prefix_mismatched", "bins of prefix_mismatched with about equally many tokens"),
    "sign": ("advantage", "positive, negative and zero advantage"),
}


def rate(
    table: pa.Table,
    quantity: str,
    *,
    by: str = "all",
    groups: int = 20,
    confidence: float = 0.95,
) -> list[Rate]:
    """One of `QUANTITIES` in each group of one of `GROUPINGS`, in the order of the groups.

    Rows with a null in a column that the question reads are left out; the denominators say how many
    were counted.

    Args:
        table: from `read_tokens`.
        groups: how many bins of position, margin or prefix (fewer where values repeat), and how
            many of the most frequent token ids.

    Returns:
        Rows whose ``group`` is a number (layer, step, token), a name (all, sign), or the smallest
        and largest value found in a bin.

    Raises:
        UserError: an unknown name, a column that the log does not have, no row to count, a dense
            model asked for mismatches, or a quantity by layer that has no layers.
    """
    question = ask(
        quantity, by=by, layout=TokenLayout.of(table.schema), groups=groups, confidence=confidence
    )
    _rows(table, question.columns)
    answer([question], lambda columns: [table])
    return question.rows()


def ask(
    quantity: str,
    *,
    layout: TokenLayout,
    by: str = "all",
    groups: int = 20,
    confidence: float = 0.95,
    counted: dict[Any, Any] | None = None,
) -> Question:
    """The question of `rate`, for `streamed.answer` to answer from a log of that layout."""
    if quantity not in QUANTITIES or by not in GROUPINGS:
        raise UserError(
            f"no question {quantity!r} by {by!r}: quantities are {', '.join(QUANTITIES)}; "
            f"groupings are {', '.join(GROUPINGS)}"
        )
    if by == "layer" and quantity != "mismatch":
        raise UserError(f"{quantity} is of a token, not of a layer: by='layer' needs 'mismatch'")
    if groups < 1:
        raise UserError(f"groups must be at least 1, got {groups}")
    of_layers = {"mismatch", "mismatch_any", "conditional"}
    if quantity in of_layers or by in ("own", "prefix", "layer"):
        _needs_layers(layout)
    return Question(
        quantity,
        QUANTITIES[quantity],
        by=by,
        column=GROUPINGS[by][0],
        per_router=quantity in ("mismatch", "conditional"),
        layout=layout,
        groups=groups,
        confidence=confidence,
        counted=counted,
    )


def clustering(table: pa.Table, *, confidence: float = 0.95) -> list[Rate]:
    """Clustering of mismatches, against independent layers and tokens of the same rates.

    With M a token's mismatched layers and r_l the mismatch rate of layer l:

    - ``any_layer``: share of tokens with M > 0
    - ``any_layer_independent``: 1 − Π_l (1 − r_l), the share if layers were independent; above
      ``any_layer`` where mismatches come together
    - ``dispersion``: Var M / Σ_l r_l (1 − r_l); 1 if layers are independent, above 1 if they
      come together
    - ``consecutive_tokens``: Pearson's correlation of M at positions p and p + 1; 0 if tokens are
      independent. Sequences with different rates raise it too.

    The last two are NaN where nothing mismatched. The intervals leave out one prompt at a time.

    Raises:
        UserError: a dense model, or no rows.
    """
    _needs_layers(TokenLayout.of(table.schema))
    _rows(table, ("step", "prompt", "sequence", "position", "layers_mismatched", "overlap"))
    found = Clustered()
    found.add(Part(table))
    return found.rows(confidence=confidence)


class Clustered:
    """The sums of `clustering`, part by part."""

    columns = ("step", "prompt", "sequence", "position", "layers_mismatched", "overlap")

    def __init__(self) -> None:
        self._keys: list[np.ndarray] = []
        self._sums: list[np.ndarray] = []
        self.tokens_M = np.zeros(0, np.int64)
        """Tokens by their number of mismatched layers."""

    def add(self, part: Part) -> None:
        """Add a part, of whole sequences."""
        names = part.nullable(self.columns)
        layout = TokenLayout.of(part.table.schema)
        keys_P, by_layer_PL, tokens_P = mismatches_by_layer(part, names, layout)
        _, prompt_N = part.prompts(names)
        step_N, own_N, position_N = (
            part.array(names, name).astype(np.int64) for name in ("step", "sequence", "position")
        )
        _, sequence_N = np.unique((step_N << 40) + own_N, return_inverse=True)
        whole_N = part.array(names, "layers_mismatched")
        counts_M = np.bincount(whole_N)
        longer = max(len(counts_M), len(self.tokens_M))
        self.tokens_M = np.pad(self.tokens_M, (0, longer - len(self.tokens_M)))
        self.tokens_M[: len(counts_M)] += counts_M
        m_N = whole_N.astype(np.float64)

        order_N = np.lexsort((position_N, sequence_N))
        first, second = order_N[:-1], order_N[1:]
        adjacent = (sequence_N[first] == sequence_N[second]) & (
            position_N[first] + 1 == position_N[second]
        )
        x, y, pair = m_N[first][adjacent], m_N[second][adjacent], prompt_N[first][adjacent]

        def summed(values: np.ndarray, prompts: np.ndarray) -> np.ndarray:
            return np.bincount(prompts, weights=values, minlength=len(keys_P))

        self._keys.append(keys_P)
        self._sums.append(
            np.column_stack(
                [tokens_P]
                + [summed(v, prompt_N) for v in (m_N > 0, m_N, m_N**2)]
                + [summed(v, pair) for v in (np.ones_like(x), x, y, x * y, x**2, y**2)]
                + [by_layer_PL]
            )
        )

    def sums(self) -> np.ndarray:
        """``[P, C]``: the parts of a prompt added up."""
        if not self._keys:
            raise UserError("no token to count: nothing to answer from")
        keys, at = np.unique(np.concatenate(self._keys), return_inverse=True)
        parts = np.concatenate(self._sums)
        if len(keys) == len(parts):
            return parts
        return np.column_stack(
            [np.bincount(at, weights=column, minlength=len(keys)) for column in parts.T]
        )

    def rates_by_layer(self) -> np.ndarray:
        """``[L]``"""
        total_C = self.sums().sum(axis=0)
        return total_C[10:] / total_C[0]

    def rows(self, *, confidence: float = 0.95) -> list[Rate]:
        """Rows as `clustering` describes them."""
        return _clustering_rows(self.sums(), confidence)


class AboveFloors:
    """Mismatched routers minus those of noise floors, by prompt, part by part."""

    def __init__(self, floors: Iterable[str]) -> None:
        """floors: columns noise_SIDE_KIND of the token log; only steps analysed have them."""
        self.columns = ("step", "prompt", "layers_mismatched", *floors)
        self._sums: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in floors}

    def add(self, part: Part) -> None:
        for floor, sums in self._sums.items():
            names = part.nullable(("layers_mismatched", floor))
            more_N = part.array(names, "layers_mismatched").astype(np.int64)
            if len(more_N):
                more_N -= part.array(names, floor)
                keys_P, prompt_N = part.prompts(names)
                sums.append((keys_P, np.bincount(prompt_N, more_N, minlength=len(keys_P))))

    def of(self, floor: str, steps: Collection[int]) -> np.ndarray | None:
        """The prompts' differences in some steps ``[P]``; None where no row has both counts."""
        if not self._sums[floor]:
            return None
        keys, sums = (np.concatenate(x) for x in zip(*self._sums[floor], strict=True))
        wanted = np.isin(keys >> 32, list(steps))
        found, prompt = np.unique(keys[wanted], return_inverse=True)
        return np.bincount(prompt, sums[wanted]) if len(found) else None


def _clustering_rows(sums_PC: np.ndarray, confidence: float) -> list[Rate]:
    num_prompts = len(sums_PC)

    def parts(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numerators and denominators ``[…, 4]`` from sums ``[…, C]``."""
        n, any_layer, m, m2, pairs, x, y, xy, x2, y2 = np.moveaxis(sums[..., :10], -1, 0)
        r_L = sums[..., 10:] / n[..., None]
        independent = 1 - (1 - r_L).prod(axis=-1)
        variance = m2 / n - (m / n) ** 2
        mean_x, mean_y = x / pairs, y / pairs
        spread = np.sqrt((x2 / pairs - mean_x**2) * (y2 / pairs - mean_y**2))
        return (
            np.stack([any_layer, independent * n, variance, xy / pairs - mean_x * mean_y], axis=-1),
            np.stack([n, n, (r_L * (1 - r_L)).sum(axis=-1), spread], axis=-1),
        )

    def figure(i: int) -> Callable[[np.ndarray], np.ndarray]:
        def of(sums: np.ndarray) -> np.ndarray:
            above, below = (part[..., i] for part in parts(sums))
            return np.where(below > 0, above / below, math.nan)

        return of

    rows = []
    with np.errstate(invalid="ignore", divide="ignore"):
        numerators, denominators = parts(sums_PC.sum(axis=0))
        for i, (name, scale) in enumerate(_CLUSTERING.items()):
            found, low, high = jackknifed(figure(i), sums_PC, scale=scale, confidence=confidence)
            rows.append(
                Rate(
                    group=name,
                    numerator=float(numerators[i]),
                    denominator=float(denominators[i]),
                    rate=found,
                    low=low,
                    high=high,
                    prompts=num_prompts,
                )
            )
    return rows


_CLUSTERING: dict[str, Scale] = {
    "any_layer": "share",
    "any_layer_independent": "share",
    "dispersion": "magnitude",
    "consecutive_tokens": "signed",
}


def _needs_layers(layout: TokenLayout) -> None:
    if not layout.num_layers:
        raise UserError("this run's model has no MoE layer: there are no routes to mismatch")


def _rows(table: pa.Table, names: tuple[str, ...]) -> None:
    """Raise UserError where a question's column is missing, or no row has all of them."""
    wanted = list(dict.fromkeys(names))
    if missing := [name for name in wanted if name not in table.column_names]:
        raise UserError(
            f"the token log has no columns {missing}, which this question reads; it has "
            f"{table.column_names}"
        )
    counted = table.select(wanted).drop_null()
    if counted.num_rows == 0:
        raise UserError(
            f"none of {table.num_rows} rows has all of {wanted}: nothing to answer from"
        )
