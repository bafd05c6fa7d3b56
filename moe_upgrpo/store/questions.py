"""Questions to a token log: a quantity, group by group, with intervals by prompt.

``rate(table, "clipped", by="own")`` is the clip fraction as a function of the token's own
mismatched layers. Every answer is a ratio of sums over tokens (or routers), with an interval that
takes the prompt as what was drawn (`stats.clusters`); it describes the tokens of a group and does
not say what made them so: tokens with many mismatches are also late, rare or uncertain ones. It is
the decomposition, the columns gap_*, that isolates routing.

Shape suffixes: N rows (tokens), L MoE layers, P prompts, G groups, C columns of sums.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from moe_upgrpo.errors import UserError
from moe_upgrpo.stats import (
    TAILS,
    Rate,
    Scale,
    cluster_sums,
    jackknifed,
    position_bins,
    rates,
)
from moe_upgrpo.store.schema import TokenLayout
from moe_upgrpo.store.token_log import overlap_array

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Quantity:
    """``numerator(columns)`` ``[N]`` per token; ``counts(columns)`` are the tokens it is about."""

    meaning: str
    columns: tuple[str, ...]
    numerator: Callable[[Columns], np.ndarray]
    counts: Callable[[Columns], np.ndarray] | None = None
    scale: Scale = "share"


def _gap(c: Columns) -> np.ndarray:
    return np.abs(c["logp_old"] - c["logp_rollout"])


def _beyond(tau: float, log_ratio: Callable[[Columns], np.ndarray]) -> Callable[..., np.ndarray]:
    def beyond(c: Columns) -> np.ndarray:
        distance_N = np.abs(log_ratio(c))
        # A token whose ratio is NaN is on neither side of τ: the rate must show it.
        return np.where(np.isnan(distance_N), math.nan, distance_N > math.log(tau))

    return beyond


def _log_ratio(c: Columns) -> np.ndarray:
    with np.errstate(divide="ignore"):  # a ratio that underflowed to 0 is beyond every τ
        return np.log(c["ratio"])


def _itself(name: str) -> Callable[[Columns], np.ndarray]:
    return lambda c: c[name]


def _magnitude(name: str) -> Callable[[Columns], np.ndarray]:
    return lambda c: np.abs(c[name])


# Of the log-prob gap; the counterfactual ones are what replay keeps from the loss.
_TERMS = (
    "gap_numerics",
    "gap_staleness",
    "gap_engine_routing",
    "gap_update",
    "gap_routing_shift",
    "counterfactual_engine_routing",
    "counterfactual_routing_shift",
)
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
        for ending, meaning, measure, scale in (
            ("", f"{term}, sign kept", _itself, "signed"),
            ("_abs", f"|{term}|", _magnitude, "magnitude"),
        )
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
    if quantity not in QUANTITIES or by not in GROUPINGS:
        raise UserError(
            f"no question {quantity!r} by {by!r}: quantities are {', '.join(QUANTITIES)}; "
            f"groupings are {', '.join(GROUPINGS)}"
        )
    if by == "layer" and quantity != "mismatch":
        raise UserError(f"{quantity} is of a token, not of a layer: by='layer' needs 'mismatch'")
    if groups < 1:
        raise UserError(f"groups must be at least 1, got {groups}")
    asked = QUANTITIES[quantity]
    of_layers = {"mismatch", "mismatch_any", "conditional"}
    needs_layers = quantity in of_layers or by in ("own", "prefix", "layer")
    layout = _layout(table, needs_layers=needs_layers)
    counted = _rows(table, (*asked.columns, GROUPINGS[by][0]))
    if by == "layer":
        sums_PL, tokens_P = _mismatches_by_layer(counted, layout.top_k)
        tokens_PL = np.repeat(tokens_P[:, None], layout.num_layers, axis=1)
        return rates(sums_PL, tokens_PL, groups=layout.layer_ids, confidence=confidence)

    columns = {name: _numpy(counted, name) for name in {*asked.columns, GROUPINGS[by][0]}}
    numerator_N = asked.numerator(columns).astype(np.float64)
    per_router = quantity in ("mismatch", "conditional")
    weight_N = np.full(len(numerator_N), layout.num_layers if per_router else 1)
    keep_N = asked.counts(columns) if asked.counts else np.ones(len(numerator_N), dtype=bool)
    group_N, labels = _grouped(by, columns[GROUPINGS[by][0]], keep_N, groups)
    keep_N &= group_N >= 0
    if not keep_N.any():
        raise UserError(f"no token to count for {quantity}: {asked.meaning}")
    prompt_N, num_prompts = _clusters(counted, "prompt")
    at, shape = (prompt_N[keep_N], group_N[keep_N]), (num_prompts, len(labels))
    return rates(
        cluster_sums(numerator_N[keep_N], *at, shape),
        cluster_sums(weight_N[keep_N], *at, shape),
        groups=labels,
        scale=asked.scale,
        confidence=confidence,
    )


def clustering(table: pa.Table, *, confidence: float = 0.95) -> list[Rate]:
    """How clustered mismatches are, against independent layers and tokens of the same rates.

    With M a token's mismatched layers and r_l the mismatch rate of layer l:

    - ``any_layer``: share of tokens with M > 0
    - ``any_layer_independent``: 1 − Π_l (1 − r_l), what it were if layers were independent; above
      ``any_layer`` where mismatches come together
    - ``dispersion``: Var M / Σ_l r_l (1 − r_l); 1 if layers are independent, above 1 if they
      come together
    - ``consecutive_tokens``: Pearson's correlation of M at positions p and p + 1; 0 if tokens are
      independent. Sequences of different rates raise it too.

    The last two are NaN where nothing mismatched. The intervals leave out a prompt at a time.

    Raises:
        UserError: a dense model, or no rows.
    """
    layout = _layout(table, needs_layers=True)
    counted = _rows(table, ("position", "layers_mismatched", "overlap"))
    by_layer_PL, tokens_P = _mismatches_by_layer(counted, layout.top_k)
    prompt_N, num_prompts = _clusters(counted, "prompt")
    sequence_N, _ = _clusters(counted, "sequence")
    position_N = _numpy(counted, "position")
    m_N = _numpy(counted, "layers_mismatched").astype(np.float64)

    order_N = np.lexsort((position_N, sequence_N))
    first, second = order_N[:-1], order_N[1:]
    adjacent = (sequence_N[first] == sequence_N[second]) & (
        position_N[first] + 1 == position_N[second]
    )
    x, y, pair = m_N[first][adjacent], m_N[second][adjacent], prompt_N[first][adjacent]

    def summed(values: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        return np.bincount(prompts, weights=values, minlength=num_prompts)

    sums_PC = np.column_stack(
        [tokens_P]
        + [summed(v, prompt_N) for v in (m_N > 0, m_N, m_N**2)]
        + [summed(v, pair) for v in (np.ones_like(x), x, y, x * y, x**2, y**2)]
        + [by_layer_PL]
    )

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


def _layout(table: pa.Table, *, needs_layers: bool) -> TokenLayout:
    layout = TokenLayout.of(table.schema)
    if needs_layers and not layout.num_layers:
        raise UserError("this run's model has no MoE layer: there are no routes to mismatch")
    return layout


def _rows(table: pa.Table, names: tuple[str, ...]) -> pa.Table:
    """The columns of a question, rows with a null in them left out."""
    wanted = list(dict.fromkeys(("step", "prompt", "sequence", *names)))
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
    return counted


def _numpy(table: pa.Table, name: str) -> np.ndarray:
    values = table[name].to_numpy()
    return values.astype(np.float64) if values.dtype.kind == "f" else values


def _clusters(table: pa.Table, name: str) -> tuple[np.ndarray, int]:
    """The prompt or sequence of each row, 0..C-1 over all steps, and C."""
    _, step_N = np.unique(table["step"].to_numpy(), return_inverse=True)
    within, index_N = np.unique(table[name].to_numpy(), return_inverse=True)
    found, index_N = np.unique(step_N * len(within) + index_N, return_inverse=True)
    return index_N, len(found)


def _mismatches_by_layer(table: pa.Table, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Mismatched tokens ``[P, L]`` and tokens ``[P]`` of each prompt."""
    prompt_N, num_prompts = _clusters(table, "prompt")
    differs_NL = overlap_array(table) < top_k
    by_layer = [np.bincount(prompt_N, d_N, minlength=num_prompts) for d_N in differs_NL.T]
    return np.stack(by_layer, axis=1), np.bincount(prompt_N, minlength=num_prompts)


def _grouped(
    by: str, values_N: np.ndarray, keep_N: np.ndarray, groups: int
) -> tuple[np.ndarray, list[Any]]:
    """Each row's group, -1 where it is in none, and the groups' labels."""
    kept = values_N[keep_N]
    if by == "all":
        group, labels = np.zeros(len(kept), dtype=np.int64), ["all"]
    elif by == "sign":
        names = {1: "positive", -1: "negative", 0: "zero"}
        signs, group = np.unique(-np.sign(kept), return_inverse=True)
        labels = [names[-int(sign)] for sign in signs]
    elif by == "step":
        found, group = np.unique(kept, return_inverse=True)
        labels = found.tolist()
    elif by == "token":
        found, group, counts = np.unique(kept, return_inverse=True, return_counts=True)
        largest = np.argsort(-counts, kind="stable")[:groups]
        place = np.full(len(found), -1)
        place[largest] = np.arange(len(largest))
        group, labels = place[group], found[largest].tolist()
    else:
        if by == "own":  # 0, 1, 2, 3–4, 5–8, ...: each bin ends at a power of two
            ends = np.concatenate([[0], 2.0 ** np.arange(32)])
        else:
            ends = np.quantile(kept, np.arange(1, groups) / groups) if len(kept) else np.empty(0)
        bin_N = position_bins(kept) if by == "context" else np.searchsorted(ends, kept)
        bins, group = np.unique(bin_N, return_inverse=True)
        inside = [kept[group == i] for i in range(len(bins))]
        labels = [(found.min().item(), found.max().item()) for found in inside]
    group_N = np.full(len(values_N), -1)
    group_N[keep_N] = group
    return group_N, labels
