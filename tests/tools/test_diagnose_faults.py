"""Faults that two sides' records show: each injection is named first, clean pairs have none."""

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.diagnose.__main__ import named
from benchmarks.diagnose.faults import FAULTS, injected
from benchmarks.diagnose.pairs import CLEAN, Shape, make_pair
from moe_upgrpo.stats import ratio_interval
from moe_upgrpo.tools import diagnose
from moe_upgrpo.tools.diagnose import faults, matching, signs, verdict
from moe_upgrpo.tools.diagnose.causes import CAUSES
from moe_upgrpo.tools.diagnose.evidence import Evidence


@pytest.mark.fault(
    "Problems and routes",
    "rows off by one, exchanged axes, layers or experts under other numbers, rows that were never "
    "written, another temperature and thirty more, in two dumps or a run folder",
    "`moe-upgrpo diagnose` names it as the first cause, with the share that it explains",
)
@pytest.mark.parametrize("name", FAULTS)
def test_an_injected_fault_is_named_first(name):
    found = named(injected(name))
    assert found is not None and found.cause == FAULTS[name].cause, found
    assert found.share is None or 0.5 < found.share <= 1
    assert found.low is None or found.low <= found.share <= found.high


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_pair_raises_nothing(name):
    evidence = make_pair(CLEAN[name], seed=3).evidence
    assert named(evidence) is None
    assert (matching.rate(evidence) > 0.01) == (name != "fp32")


def by_hand(rollout, train, **more) -> Evidence:
    """Sequences of routes, a prompt for each."""
    return Evidence(
        prompt=list(range(len(rollout))),
        response=[slice(0, len(x)) for x in rollout],
        rollout_routes=list(rollout),
        train_routes=list(train),
        num_experts=32,
        layer_ids=list(range(rollout[0].shape[1])),
        **more,
    )


def distinct(sequences=9, tokens=12, layers=2) -> list[np.ndarray]:
    """Top-1 routes in which no two neighbours, layers or sequences have the same expert."""
    at = np.arange(tokens)[:, None, None]
    layer = np.arange(layers)[None, :, None]
    return [(7 * at + 3 * layer + 5 * i) % 31 + 1 for i in range(sequences)]


def test_the_share_of_a_shift_is_what_is_left_without_it():
    """Rows one late; in sequence i, i of its 22 routers that remain differ after the shift too."""
    rollout = distinct()
    train = [np.roll(x, 1, axis=0) for x in rollout]
    for i, x in enumerate(train):
        x[1 : 1 + i, 0] = 0
    found = faults.find(by_hand(rollout, train)).findings[0]
    assert found.cause == "row-off-by-one" and found.measure == "routers"
    # All 24 routers of a sequence differ before; the last row has no counterpart after, and its two
    # are taken to differ as the 198 do that have one.
    left = np.arange(9) + 2 * 36 / 198
    share, low, high = ratio_interval(24.0 - left, np.full(9, 24.0))
    assert (found.share, found.low, found.high) == pytest.approx((share, low, high))
    assert found.share == pytest.approx(1 - 36 / 198)
    assert "shifted by +1: 100.0% → 18.2% of routers differ" in found.shown_by  # 36 of 198


def test_faults_in_one_another_get_shares_of_their_own():
    """Two of twelve rows of each sequence were never written; experts have other numbers."""
    pair = make_pair(Shape(noise=1e-6))
    names = np.random.default_rng(0).permutation(16)
    rollout = [names[x].astype(np.int16) for x in pair.evidence.rollout_routes]
    for x in rollout:
        x[::6] = 0
    found = faults.find(replace(pair.evidence, rollout_routes=rollout)).findings
    assert [one.cause for one in found][:2] == ["experts-permuted", "zero-filled-rows"]
    assert found[0].share + found[1].share == pytest.approx(1, abs=0.02)


def test_a_shift_that_is_none_is_not_named():
    """Rows of other tokens that agree no better under any shift."""
    rng = np.random.default_rng(0)
    sides = [[rng.integers(0, 32, (40, 4, 1)) for _ in range(9)] for _ in range(2)]
    found = faults.find(by_hand(*sides)).findings
    assert [one.cause for one in found] == ["unrelated-tokens"]


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_few_tokens_raise_nothing(tokens):
    """A single flip among few rows is no fault, whatever shift or order might mend it."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rollout = [rng.permuted(np.tile(np.arange(8), (tokens, 3, 1)), axis=2)[..., :2]]
        train = [rollout[0].copy()]
        train[0][0, 1, 0] = next(e for e in range(8) if e not in train[0][0, 1])
        assert not faults.find(replace(by_hand(rollout, train), num_experts=8)).findings, seed


def test_near_ties_and_a_mismatch_at_any_margin():
    """A quarter of 100 routers differ: those with the smallest margins, or any."""
    margins = [np.arange(100.0).reshape(50, 2)]
    rollout = [np.zeros((50, 2, 1), int)]
    near, anywhere = (np.zeros((50, 2), bool) for _ in range(2))
    near.flat[:25], anywhere.flat[::4] = True, True
    found = signs.near_ties(by_hand(rollout, [near[..., None] * 1], margins=margins))
    assert (found.cause, found.share) == ("near-ties", 1.0)
    evidence = by_hand(rollout, [anywhere[..., None] * 1], margins=margins)
    # 12 of 25 are above the median: were all margins like those, there would be 24.
    assert signs.near_ties(evidence).share == pytest.approx(1 / 25)
    assert signs.large_margins(evidence, 0.25).cause == "not-rounding"
    assert (
        signs.large_margins(by_hand(rollout, [near[..., None] * 1], margins=margins), 0.25) is None
    )
    tied = [np.where(near, 0, margins[0])]
    assert signs.near_ties(by_hand(rollout, [near[..., None] * 1], margins=tied)).cause == (
        "top-k-ties"
    )


COLUMNS = {
    "layers_mismatched": [np.array([2.0, 2, 0, 4])] * 9,
    "layers_mismatched_conditional": [np.array([1.0, 0, 0, 1])] * 9,
    "noise_engine_batch_shape": [np.array([1.0, 0, 0, np.nan])] * 9,
    "gap_numerics": [np.array([0.1, -0.1, 0.0, 0.1])] * 9,
    "gap_engine_routing": [np.array([0.3, -0.3, 0.0, 0.3])] * 9,
    "counterfactual_engine_routing": [np.zeros(4)] * 9,
}


def test_shares_of_columns():
    """Conditional 2 of 8; a floor of 1 of 4 where it was measured; 0.9 of 1.2 nats are routing."""
    evidence = by_hand(distinct(tokens=4), distinct(tokens=4), columns=COLUMNS)
    found = {one.cause: one for one in signs.numerics(evidence)}
    assert found["carried-on"].share == pytest.approx(6 / 8)
    assert found["batch-shape"].share == pytest.approx(1 / 4)
    assert found["engine-routing"].share == pytest.approx(0.9 / 1.2)
    assert found["arithmetic"].share == pytest.approx(0.3 / 1.2)
    assert signs.replay_unused(evidence, "R3").cause == "replay-not-used"
    assert signs.replay_unused(evidence, "none") is None
    moved = evidence.columns | {"counterfactual_engine_routing": [np.array([0, 0, 0, 1e-3])] * 9}
    assert signs.replay_unused(replace(evidence, columns=moved), "R3") is None


def test_every_cause_that_code_names_has_a_remedy_and_the_other_way_round():
    texts = [file.read_text() for file in Path(diagnose.__file__).parent.glob("*.py")]
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    written = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    given = {
        word.value.value
        for node in nodes
        if isinstance(node, ast.Call)
        for word in node.keywords
        if word.arg == "cause" and isinstance(word.value, ast.Constant)
    }
    given -= {None}
    assert len(given) > 20 and given <= CAUSES.keys(), given - CAUSES.keys()
    assert {fault.cause for fault in FAULTS.values()} <= CAUSES.keys()
    uses = [n.value for n in nodes if isinstance(n, ast.Constant)]
    assert all(uses.count(name) > 1 for name in CAUSES), "a cause that nothing names"
    assert all(cause.remedy and cause.says for cause in CAUSES.values()) and written


def test_always_three_sentences_and_strict_json():
    for name in ("rows one late", "a multi-token-prediction router", "log-probs to base 2"):
        evidence = injected(name)
        looked = verdict.look(evidence)
        measured = verdict.measure(evidence, looked.left, None)
        said = verdict.sentences(measured, looked.findings, looked.tried, None, "no reason")
        assert len(said) == 3 and all(text.endswith(".") and ". " not in text for text in said)
