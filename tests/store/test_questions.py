"""Questions to a token log: counted by hand, then with a planted dependence and independence."""

import math

import numpy as np
import pytest
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.routing import compare_routes
from moe_upgrpo.routing.clustering import clustering as routes_clustering
from moe_upgrpo.store import TokenLogWriter, overlap_array, read_tokens
from moe_upgrpo.store.questions import clustering, rate
from tests.store.rows import EXPERTS, FLOATS, full_columns

LAYER_IDS, TOP_K = (1, 3, 4), 2


def log(folder, columns, *, step=1, layer_ids=LAYER_IDS):
    """A token log with zeros where a test says nothing; read back."""
    N = len(columns["position"])
    overlap = np.asarray(columns.get("overlap", np.full((N, len(layer_ids)), TOP_K)))
    rows = {
        **{name: np.zeros(N) for name in FLOATS},
        "ratio": np.ones(N),
        **{name: np.zeros(N, int) for name in ("sequence", "token_id")},
        "clipped": np.zeros(N, bool),
        "layers_mismatched": (overlap < TOP_K).sum(axis=1),
        # A prompt for each sequence, where a test says no other.
        "prompt": np.asarray(columns.get("sequence", np.zeros(N, int))),
        **{name: np.asanyarray(values) for name, values in columns.items()},
        "overlap": overlap,
    }
    writer = TokenLogWriter(folder, rank=0, layer_ids=layer_ids, top_k=TOP_K, num_experts=8)
    writer.write(step, rows)
    return read_tokens(folder)


def counts(rows):
    return {row.group: (row.numerator, row.denominator) for row in rows}


# Sequence 0 has positions 4..7, sequence 1 has 4 and 5. Mismatched layers of the six tokens:
# 0, 1, 3, 0 and 2, 0.
BY_HAND = {
    "sequence": [0, 0, 0, 0, 1, 1],
    "position": [4, 5, 6, 7, 4, 5],
    "token_id": [9, 9, 8, 7, 9, 8],
    "advantage": [1.0, 1, 1, 1, -1, -1],
    "overlap": [[2, 2, 2], [1, 2, 2], [0, 1, 1], [2, 2, 2], [1, 1, 2], [2, 2, 2]],
    "logp_rollout": np.log([0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
    "logp_old": np.log([0.5, 0.6, 0.1, 0.5, 0.3, 0.5]),
    "ratio": [1.0, 1.0, 3.0, 1.0, 0.25, 1.05],
    "clipped": [False, False, True, False, True, False],
    "prefix_mismatched": [5, 5, 6, 9, 0, 2],
    "margin_min": [0.9, 0.4, 0.1, 0.8, 0.2, 0.7],
    "gradient_weight": [1.0, 2, 4, 8, 16, 32],
    "gap_update": [0.5, -0.25, 1, 0, -1, -2],
    "counterfactual_engine_routing": [1.0, -1, 0, 0.5, 0, 2],
    "layers_mismatched_conditional": [0, 1, 0, 0, 2, 0],
}


@pytest.fixture
def table(tmp_path):
    return log(tmp_path, BY_HAND)


@pytest.mark.parametrize(
    ("quantity", "by", "expected"),
    [
        ("mismatch", "all", {"all": (6, 18)}),
        ("mismatch_any", "all", {"all": (3, 6)}),
        # layer 1: tokens 1, 2, 4; layer 3: 2, 4; layer 4: 2
        ("mismatch", "layer", {1: (3, 6), 3: (2, 6), 4: (1, 6)}),
        ("mismatch", "token", {9: (3, 9), 8: (3, 6), 7: (0, 3)}),
        ("mismatch", "step", {1: (6, 18)}),
        ("mismatch", "sign", {"positive": (4, 12), "negative": (2, 6)}),
        ("clipped", "own", {(0, 0): (0, 3), (1, 1): (0, 1), (2, 2): (1, 1), (3, 3): (1, 1)}),
        (
            "clipped",
            "prefix",
            {(0, 0): (1, 1), (2, 2): (0, 1), (5, 5): (0, 2), (6, 6): (1, 1), (9, 9): (0, 1)},
        ),
        # |log of| 1, 1.2, 1/5, 1, 3/5, 1
        ("gap_tail_1.1", "all", {"all": (3, 6)}),
        ("gap_tail_1.5", "all", {"all": (2, 6)}),
        ("gap_tail_2", "own", {(0, 0): (0, 3), (1, 1): (0, 1), (2, 2): (0, 1), (3, 3): (1, 1)}),
        ("ratio_tail_2", "all", {"all": (2, 6)}),
        ("ratio_tail_1.1", "sign", {"positive": (1, 4), "negative": (1, 2)}),
        ("ratio_tail_5", "all", {"all": (0, 6)}),
        ("conditional", "sign", {"positive": (1, 12), "negative": (2, 6)}),
        ("counterfactual_engine_routing", "all", {"all": (2.5, 6)}),
        ("counterfactual_engine_routing_abs", "all", {"all": (4.5, 6)}),
        ("gap_update", "sign", {"positive": (1.25, 4), "negative": (-3, 2)}),
        ("gap_update_abs", "sign", {"positive": (1.75, 4), "negative": (3, 2)}),
        ("gradient_weight_positive", "all", {"all": (15, 4)}),
        ("gradient_weight_negative", "all", {"all": (48, 2)}),
        ("gradient_weight_negative", "own", {(0, 0): (32, 1), (2, 2): (16, 1)}),
    ],
)
def test_by_hand(table, quantity, by, expected):
    rows = rate(table, quantity, by=by)
    assert counts(rows) == expected
    assert list(counts(rows)) == list(expected)
    assert all(row.rate == row.numerator / row.denominator for row in rows)


def test_the_mean_gap_by_hand(table):
    (row,) = rate(table, "gap")
    gaps = [0, math.log(1.2), math.log(5), 0, math.log(5 / 3), 0]
    assert row.numerator == pytest.approx(sum(gaps), rel=1e-6)
    assert (row.denominator, row.prompts) == (6, 2)


def test_a_token_gone_nan_is_not_counted_as_near(tmp_path):
    """It has no side of τ; its group's rate is NaN, the others stay."""
    ratio = [1.0, 1.0, math.nan, 0.0, 0.25, 1.05]
    table = log(tmp_path, BY_HAND | {"ratio": ratio})
    positive, negative = rate(table, "ratio_tail_2", by="sign")
    assert math.isnan(positive.rate) and math.isnan(positive.low)
    assert (negative.numerator, negative.denominator) == (1, 2)
    by_token = counts(rate(table, "ratio_tail_2", by="token"))
    assert by_token[7] == (1, 1)  # a ratio that underflowed to 0


def test_bins_hold_equally_many_tokens(table):
    """Margins .1 .2 .4 | .7 .8 .9: mismatched layers 3 + 2 + 1 and none."""
    low, high = rate(table, "mismatch", by="margin", groups=2)
    assert low.group == pytest.approx((0.1, 0.4)) and high.group == pytest.approx((0.7, 0.9))
    assert (low.numerator, low.denominator) == (6, 9)
    assert (high.numerator, high.denominator) == (0, 9)
    early, late = rate(table, "mismatch", by="position", groups=2)
    assert (early.group, late.group) == ((4, 5), (6, 7))
    assert (early.numerator, early.denominator) == (3, 12)
    assert (late.numerator, late.denominator) == (3, 6)


def test_only_the_most_frequent_tokens(table):
    assert counts(rate(table, "mismatch", by="token", groups=1)) == {9: (3, 9)}


def test_wide_bins_double(tmp_path):
    """0, 1, 2, 3–4, 5–8, 9–16, 17–32 mismatches, by the values found in each."""
    values = np.array([0, 1, 2, 3, 4, 5, 8, 9, 16, 17])
    columns = {"position": values + 1, "overlap": np.arange(17) >= values[:, None]}
    table = log(tmp_path, columns | {"overlap": 2 * columns["overlap"]}, layer_ids=range(17))
    rows = rate(table, "gap", by="own")
    assert [(row.group, row.denominator) for row in rows] == [
        ((0, 0), 1), ((1, 1), 1), ((2, 2), 1), ((3, 4), 2), ((5, 8), 2), ((9, 16), 2), ((17, 17), 1)
    ]  # fmt: skip


def test_the_responses_to_a_prompt_are_one_draw(tmp_path):
    """Twice as many responses, each as its twin: the interval is that of the prompts, no narrower.

    With two columns of the same sums a prompt's share and weight are what they were.
    """
    once = simulated(tmp_path / "once", sequences=12)
    columns = {name: np.tile(once[name].to_numpy(), 2) for name in ("position", "clipped")}
    columns["overlap"] = np.tile(overlap_array(once), (2, 1))
    columns["sequence"] = np.concatenate([once["sequence"].to_numpy() + n for n in (0, 12)])
    columns["prompt"] = columns["sequence"] % 12
    twice = log(tmp_path / "twice", columns, layer_ids=tuple(range(16)))
    for question in ("clipped", "mismatch"):
        (one,), (two,) = rate(once, question), rate(twice, question)
        assert two.prompts == one.prompts == 12
        assert (two.low, two.high) == pytest.approx((one.low, one.high), rel=1e-2)
    one, two = clustering(once), clustering(twice)
    assert [r.low for r in two] == pytest.approx([r.low for r in one], rel=1e-2)
    apart = log(tmp_path / "apart", columns | {"prompt": columns["sequence"]}, layer_ids=range(16))
    (as_sequences,), (right,) = rate(apart, "clipped"), rate(twice, "clipped")
    assert as_sequences.high - as_sequences.low < 0.75 * (right.high - right.low)


def test_fewer_than_eight_prompts_have_no_interval(tmp_path):
    for prompts, known in ((7, False), (8, True)):
        table = simulated(tmp_path / str(prompts), sequences=prompts)
        rows = [*rate(table, "mismatch"), *rate(table, "gap"), *clustering(table)]
        assert {row.prompts for row in rows} == {prompts}
        assert all(math.isfinite(row.low) == math.isfinite(row.high) == known for row in rows)


def test_a_prompt_of_two_steps_is_two_prompts(tmp_path):
    log(tmp_path, BY_HAND, step=1)
    table = log(tmp_path, BY_HAND, step=2)
    rows = rate(table, "mismatch", by="step")
    assert counts(rows) == {1: (6, 18), 2: (6, 18)}
    assert [row.prompts for row in rows] == [2, 2]
    assert rate(table, "mismatch")[0].prompts == 4


def test_rows_with_nulls_are_left_out_and_counted(tmp_path):
    margin = np.ma.masked_array(BY_HAND["margin_min"], mask=[0, 0, 1, 0, 0, 0])
    table = log(tmp_path, BY_HAND | {"margin_min": margin})
    (row,) = rate(table, "mismatch", by="margin", groups=1)
    assert (row.numerator, row.denominator) == (3, 15)
    empty = np.ma.masked_array(BY_HAND["margin_min"], mask=True)
    nothing = log(tmp_path / "empty", BY_HAND | {"margin_min": empty})
    with pytest.raises(UserError, match="none of 6 rows has all of"):
        rate(nothing, "mismatch", by="margin")


def simulated(folder, *, seed=0, sequences=200, tokens=40, common=0.0):
    """200 sequences of 40 tokens, 16 layers; what depends on what is planted here.

    - mismatch: each (token, layer) with probability 0.05, layer 7 with 0.3; `common` is the chance
      that a token mismatches everywhere
    - clipped: probability 0.05 + 0.1 · min(own mismatches, 5); the prefix plays no part
    - gap: 0.01 · (1 + own) exactly
    - gradient weight: 1 for A > 0 and exp(0.01 · prefix) for A < 0
    - reward's sign: a coin per sequence
    """
    rng = np.random.default_rng(seed)
    N, L = sequences * tokens, 16
    rates_L = np.where(np.arange(L) == 7, 0.3, 0.05)
    differs = (rng.random((N, L)) < rates_L) | (rng.random((N, 1)) < common)
    own = differs.sum(axis=1)
    by_sequence = own.reshape(sequences, tokens)
    prefix = (by_sequence.cumsum(axis=1) - by_sequence).ravel()
    advantage = np.repeat(rng.choice([-1.0, 1.0], sequences), tokens)
    columns = {
        "sequence": np.repeat(np.arange(sequences), tokens),
        "position": np.tile(np.arange(tokens) + 5, sequences),
        "advantage": advantage,
        "overlap": np.where(differs, TOP_K - 1, TOP_K),
        "clipped": rng.random(N) < 0.05 + 0.1 * np.minimum(own, 5),
        "logp_old": 0.01 * (1 + own.astype(float)),
        "prefix_mismatched": prefix,
        "gradient_weight": np.where(advantage > 0, 1, np.exp(0.01 * prefix)),
    }
    return log(folder, columns, layer_ids=tuple(range(L)))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return simulated(tmp_path_factory.mktemp("planted"))


def test_a_planted_dependence_is_recovered(planted):
    rows = {row.group: row for row in rate(planted, "clipped", by="own")}
    for own in (0, 1, 2):
        row = rows[own, own]
        assert row.low < 0.05 + 0.1 * own < row.high
    assert rows[0, 0].high < rows[1, 1].low < rows[1, 1].high < rows[2, 2].low
    for row in rate(planted, "gap", by="own"):
        if row.group[0] == row.group[1]:
            assert row.rate == pytest.approx(0.01 * (1 + row.group[0]), rel=1e-5)
    weights = rate(planted, "gradient_weight_negative", by="prefix")
    assert weights[0].high < weights[-1].low


def test_a_planted_independence_shows_none(planted):
    """Clipping does not look at the prefix, nor mismatches at position or sign.

    Each group's 95% interval holds the pooled rate, but for one in twenty: of 36 intervals, more
    than 6 misses would come once in 500 runs if they were independent. One fixed seed.
    """
    misses = total = 0
    for quantity, by in (("clipped", "prefix"), ("mismatch", "position"), ("mismatch", "sign")):
        (pooled,) = rate(planted, quantity)
        for row in rate(planted, quantity, by=by, groups=24):
            total += 1
            misses += not row.low <= pooled.rate <= row.high
    assert total > 30
    assert misses <= 6
    flat = rate(planted, "gradient_weight_positive", by="prefix")
    assert all(row.rate == row.low == row.high == 1 for row in flat)


def test_a_planted_layer_is_found(planted):
    rows = rate(planted, "mismatch", by="layer")
    assert [row.group for row in rows] == list(range(16))
    assert rows[7].low < 0.3 < rows[7].high
    assert max(row.high for row in rows if row.group != 7) < 0.1
    inside = [row.low <= 0.05 <= row.high for row in rows if row.group != 7]
    assert sum(inside) >= 11


def test_independent_mismatches_are_not_clustered(planted):
    """15 layers of 0.05 and one of 0.3: 1 − .95^15 · .7 = 0.676."""
    any_layer, independent, dispersion, consecutive = clustering(planted)
    assert any_layer.low < 1 - 0.95**15 * 0.7 < any_layer.high
    assert independent.rate == pytest.approx(any_layer.rate, abs=0.015)
    assert dispersion.low < 1 < dispersion.high
    assert consecutive.low < 0 < consecutive.high
    assert any_layer.denominator == 200 * 40


def test_mismatches_that_come_together_are(tmp_path):
    """2% of the tokens mismatch in all 16 layers: the rate of any falls below independence."""
    any_layer, independent, dispersion, consecutive = clustering(simulated(tmp_path, common=0.02))
    assert any_layer.high < independent.low
    assert dispersion.low > 1.5
    assert consecutive.low < 0 < consecutive.high  # tokens are still independent


def test_tokens_that_follow_each_other(tmp_path):
    """M of a sequence: 1, 1, 0, 0, 1 and 0, 0: pairs 11 10 00 01 and 00.

    x: 1 1 0 0 0, y: 1 0 0 1 0: covariance 1/5 − (2/5)² = 1/25, variances 2/5 − 4/25 = 6/25:
    correlation 1/6. The pair across the gap of position (7 and 9) does not count, nor one across
    sequences; the rows are out of order.
    """
    own = np.array([1, 1, 0, 0, 1, 0, 0, 1])
    columns = {
        "sequence": np.array([0, 0, 0, 0, 0, 1, 1, 1]),
        "position": np.array([4, 5, 6, 7, 8, 6, 7, 9]),
        "overlap": np.stack([np.where(own, 1, 2), np.full(8, 2), np.full(8, 2)], axis=1),
    }
    shuffled = np.random.default_rng(1).permutation(8)
    table = log(tmp_path, {name: values[shuffled] for name, values in columns.items()})
    any_layer, independent, dispersion, consecutive = clustering(table)
    assert any_layer.rate == independent.rate == 0.5  # one layer alone mismatches
    assert dispersion.rate == pytest.approx(1)
    assert consecutive.rate == pytest.approx(1 / 6)


def test_clustering_is_that_of_the_routes(tmp_path):
    """From the log's overlaps as from the raw routes, by `moe_upgrpo.routing.clustering`."""
    columns = full_columns(200, sequences=20)
    sides = (torch.from_numpy(columns[f"{side}_routes"].copy()) for side in ("rollout", "train"))
    counted = compare_routes(*sides, num_experts=EXPERTS)
    expected = routes_clustering(counted)
    table = log(tmp_path, columns)
    any_layer, independent, dispersion, _ = clustering(table)
    assert any_layer.rate == pytest.approx(expected.token_any_rate)
    assert independent.rate == pytest.approx(expected.token_any_rate_independent)
    assert dispersion.rate == pytest.approx(expected.dispersion)
    assert rate(table, "mismatch")[0].rate == pytest.approx(counted.router_mismatch_rate)
    by_layer = [row.rate for row in rate(table, "mismatch", by="layer")]
    assert by_layer == pytest.approx(counted.router_mismatch_by_layer.tolist())


def test_no_mismatch_at_all(tmp_path):
    table = log(tmp_path, {"sequence": [0, 0, 1], "position": [1, 2, 1]})
    assert counts(rate(table, "mismatch", by="own")) == {(0, 0): (0, 9)}
    any_layer, independent, dispersion, consecutive = clustering(table)
    assert any_layer.rate == independent.rate == 0
    assert math.isnan(any_layer.low) and math.isnan(any_layer.high)
    assert math.isnan(dispersion.rate) and math.isnan(consecutive.rate)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantity": "clip"}, "no question 'clip' by 'all': quantities are mismatch, "),
        ({"quantity": "clipped", "by": "layers"}, "groupings are all, layer"),
        ({"quantity": "clipped", "by": "layer"}, "of a token, not of a layer"),
        ({"quantity": "clipped", "groups": 0}, "groups must be at least 1"),
        ({"quantity": "clipped", "confidence": 1}, "confidence must be between"),
    ],
)
def test_bad_questions(table, arguments, message):
    with pytest.raises(UserError, match=message):
        rate(table, **arguments)
    with pytest.raises(UserError, match="confidence must be between"):
        clustering(table, confidence=95)


def test_columns_that_are_not_there(tmp_path):
    table = log(tmp_path, {"position": [4, 5]})
    with pytest.raises(UserError, match=r"no columns \['margin_min'\], which this question reads"):
        rate(table, "mismatch", by="margin")
    with pytest.raises(UserError, match="no columns"):
        rate(table, "gradient_weight_positive")


def test_zero_rows_and_empty_branches_are_errors(table, tmp_path):
    with pytest.raises(UserError, match="none of 0 rows"):
        rate(table.slice(0, 0), "mismatch")
    with pytest.raises(UserError, match="none of 0 rows"):
        clustering(table.slice(0, 0))
    only_positive = log(tmp_path / "p", BY_HAND | {"advantage": np.ones(6)})
    for by in ("all", "own", "sign", "token", "margin"):
        with pytest.raises(UserError, match="no token to count for gradient_weight_negative"):
            rate(only_positive, "gradient_weight_negative", by=by)


def test_a_dense_model_has_no_mismatches(tmp_path):
    table = log(tmp_path, {"position": [4, 5], "overlap": np.empty((2, 0), int)}, layer_ids=())
    for question in ({"quantity": "mismatch"}, {"quantity": "gap", "by": "own"}):
        with pytest.raises(UserError, match="no MoE layer"):
            rate(table, **question)
    with pytest.raises(UserError, match="no MoE layer"):
        clustering(table)
    assert rate(table, "gap")[0].denominator == 2
