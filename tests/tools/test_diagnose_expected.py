"""The expected range: the rule on rows made by a known one, and the project's own table."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.diagnose.calibrate import rule_lines
from moe_upgrpo.errors import UserError
from moe_upgrpo.tools.diagnose import expected
from moe_upgrpo.tools.diagnose.expected import contribute, expected_rate, fit, rule, table

ROW = {
    "engine": "hf",
    "precision": "bf16",
    "trainer": "fp32",
    "layers": 4,
    "experts": 64,
    "top_k": 8,
    "trained": False,
    "margin": 0.01,
    "differ": 10,
    "pairs": 1000,
    "gap": 0.006,
    "model": "a",
    "source": "test",
}


def rows_of_a_rule(noise: float) -> list[dict]:
    """r = .001 · E^.5 · K^.25 · L^.125, thrice as much in FP8, half where trained."""
    rng, rows = np.random.default_rng(0), []
    for i in range(60):
        E, K, L = rng.choice([8, 16, 64]), rng.choice([1, 2, 4]), rng.choice([2, 4, 8])
        fp8, trained = bool(i % 2), bool(i % 3 == 0)
        rate = 0.001 * E**0.5 * K**0.25 * L**0.125 * (3 if fp8 else 1) * (0.5 if trained else 1)
        rate *= math.exp(noise * rng.standard_normal())
        pairs = 10**9
        rows.append(
            ROW
            | {"experts": int(E), "top_k": int(K), "layers": int(L), "trained": trained}
            | {"precision": "fp8" if fp8 else "bf16", "trainer": ["fp32", "bf16"][i % 5 == 0]}
            | {"differ": round(rate * pairs), "pairs": pairs, "model": str(i // 2)}
        )
    return rows


def test_the_rule_is_found_again_with_its_error():
    exact = fit(rows_of_a_rule(0), with_margin=False)
    b = [math.log(0.001), 0.5, 0.25, 0.125, math.log(3), 0, math.log(0.5), 0]
    np.testing.assert_allclose(exact.coefficients, b, atol=1e-6)
    assert exact.error() < 1e-6 and len(exact.misses) == 30
    noisy = fit(rows_of_a_rule(0.2), with_margin=False)
    assert 0.15 < noisy.error() < 0.35  # 0.2, and what 60 rows leave open of 8 coefficients
    # Rows that do not say it take no part, but for the margins.
    silent = [*rows_of_a_rule(0), ROW | {"trained": None, "model": "silent"}]
    np.testing.assert_array_equal(fit(silent, with_margin=False).coefficients, exact.coefficients)
    assert fit(silent, with_margin=True).rows == 61
    with pytest.raises(UserError, match="too few"):
        fit(rows_of_a_rule(0)[:8], with_margin=False)


def test_the_table_of_the_project():
    """Every row has what a row has, and predicts itself: 95% ranges hold 9 of 10 at least."""
    rows = table()
    assert len(rows) > 200 and len({row["model"] for row in rows}) > 25
    for row in rows:
        assert row.keys() == expected.FIELDS.keys()
    within = [
        expected.expected_of(row, trained=row["trained"]).says(row["differ"] / row["pairs"])
        == "within"
        for row in rows
    ]
    assert np.mean(within) > 0.9
    assert rule(False).error() < math.log(1.5)


def test_the_page_has_the_rule_of_the_table():
    page = Path("docs/diagnose.md").read_text(encoding="utf-8")
    lines = [*rule_lines()]
    assert len(lines) == 5 and all(line in page for line in lines)


def test_a_range_by_hand():
    """middle = exp(b · x), ends a factor exp(t · error) away; exact beside exact sees nothing."""
    of = rule(False)
    found = expected_rate(64, 8, 4, "bf16", trained=False)
    x = [1, math.log(64), math.log(8), math.log(4), 0, 0, 0, 0]
    assert math.isclose(found.middle, math.exp(of.coefficients @ x))
    assert math.isclose(found.high / found.middle, found.middle / found.low)
    assert found.low < 0.07 < found.high  # docs/routing-mismatch.md: 7% with this very model
    assert found.says(0.5) == "above" and found.says(1e-5) == "below"
    fp32 = expected_rate(64, 8, 4, "fp32")
    assert fp32.low == fp32.middle == 0 < fp32.high < 1e-3
    assert expected_rate(64, 8, 4, "fp8", trained=False).middle > 3 * found.middle


def test_what_is_not_known_makes_it_wider():
    known = [expected_rate(64, 8, 4, "bf16", trained=of) for of in (True, False)]
    unknown = expected_rate(64, 8, 4, "bf16")
    assert unknown.low == known[0].low and unknown.high == known[1].high
    by_margins = expected_rate(64, 8, 4, "bf16", margins=0.01)
    assert "margins" in by_margins.source and by_margins.source != unknown.source
    far = expected_rate(512, 8, 61, "bf16", trained=True)
    assert "layers 61 where the rows have 4 of trained routers" in far.source
    assert "extrapolated: experts 512 where the rows have 8–64, " in far.source
    random = expected_rate(128, 8, 48, "bf16", trained=False).source
    assert "extrapolated" not in random  # of random routers as large are in the table
    assert "experts 128 where the rows have 8–64" in expected_rate(128, 8, 48, "bf16").source


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((64, 8, 4, "int4"), "precision='int4'"),
        ((64, 80, 4, "bf16"), "top-80 of 64"),
        ((64, 8, 0, "bf16"), "0 MoE layers"),
    ],
)
def test_numbers_that_no_model_has(given, words):
    with pytest.raises(UserError, match=words):
        expected_rate(*given)


def test_a_row_is_contributed(tmp_path):
    file = tmp_path / "row.jsonl"
    contribute(file, ROW | {"prompts": "never written"})
    contribute(file, ROW)
    contribute(file, ROW | {"trained": None})
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert lines == [ROW, ROW, ROW | {"trained": None}]
    for wrong, words in (
        ({"layers": None}, "layers: int"),
        ({"differ": 2000}, "2000 of 1000"),
        ({"trained": "yes"}, "trained: bool or null; got 'yes'"),
    ):
        with pytest.raises(UserError, match=words):
            contribute(file, ROW | wrong)
    with pytest.raises(UserError, match="--contribute"):
        contribute(tmp_path, ROW)
