"""The three sentences that a page opens with: their verdicts and numbers, by hand."""

import numpy as np
import pyarrow as pa
import pytest

from moe_upgrpo.report.alt import alt
from moe_upgrpo.report.figures import brief
from moe_upgrpo.report.opening import opening
from moe_upgrpo.report.runs import Run
from moe_upgrpo.report.tokens import TokenLog
from moe_upgrpo.store.questions import AboveFloors, Clustered
from moe_upgrpo.store.streamed import Part

QUESTIONS = ["Is routing to blame?", "Where?", "Does it matter?"]


FLOOR = "noise_trainer_batch_shape"


def run_of(row, *, config=None, answers=None, by_prompt=None):
    """A run of one step; ``answers`` are rows of the token log's questions.

    ``by_prompt``: a token for each prompt, mismatched layers and those of the noise floor.
    """
    tokens = TokenLog(note="no rows", column_names=(FLOOR,) if by_prompt else ())
    if by_prompt:
        differ, floor = (np.array(x, np.int16) for x in by_prompt)
        rows = {"step": np.ones(len(differ), np.int32), "prompt": np.arange(len(differ))}
        above = AboveFloors([FLOOR])
        above.add(Part(pa.table(rows | {"layers_mismatched": differ, FLOOR: floor})))
        tokens._summed.append((Clustered(), above))
    if answers is not None:
        asked = {key: rows for key, rows in answers.items()}
        for name in ("mismatch", "mismatch_any", "gap_tail_2", "gap_numerics_abs"):
            asked.setdefault((name, "all"), "left out")
        for key in (("mismatch", "layer"), ("mismatch", "position"), ("gap", "own")):
            asked.setdefault(key, "left out")
        asked.setdefault(("gap_engine_routing_abs", "all"), "left out")
        tokens._answered.update(asked)
    return Run(
        label="run",
        path=None,
        config=config or {},
        environment={},
        rows=[{"step": 1} | row],
        tokens=tokens,
    )


def floors(mismatched, floor, tokens=1000):
    """One MoE layer: so many of the tokens differ, and within the trainer so many."""
    return {
        "mismatch/router_rate": mismatched / tokens,
        "mismatch/router_denominator": tokens,
        "mismatch/by_layer": [mismatched / tokens],
        "mismatch/histogram": [tokens - mismatched, mismatched],
        "noise/trainer_batch_shape/router_rate": floor / tokens,
        "noise/trainer_batch_shape/histogram": [tokens - floor, floor],
    }


def parts(routing, numerics):
    return {"gap/engine_routing/mean_abs": routing, "gap/numerics/mean_abs": numerics}


CLEAR = [1] * 10 + [0] * 2, [0] * 12  # p = 2^-10


@pytest.mark.parametrize(
    ("row", "config", "by_prompt", "verdict", "text"),
    [
        ({}, {"moe_layers": []}, None, "No", "the model has no MoE layer"),
        ({}, {}, None, "Not known", "no routes were compared"),
        (floors(0, 0), {}, None, "No", "0 of 1,000 (token, layer) pairs differ"),
        (floors(10, 20), {}, None, "No", "1%: no more than a side differs from itself (2%)"),
        (floors(12, 10), {}, ([1] + [0] * 8, [0] * 9), "Not shown", "against 1%; more in 1 of 9 "
         "prompts and fewer in 0; sign flips by prompt, p = 0.5)"),
        (floors(200, 20), {}, ([2] * 7, [0] * 7), "Not shown", "too few prompts (7) to tell"),
        (floors(200, 20), {}, CLEAR, "Possibly", "20% (no token log, no interval) of routers "
         "differ, 10 times the noise floor of 2% (sign flips by prompt, p = 0.001)"),
        (floors(200, 0), {}, CLEAR, "Possibly", "differ, above the noise floor of 0% (sign flips"),
        (floors(200, 20) | parts(0.2, 0.1), {}, CLEAR, "Mostly", "by 0.2 (no token log, no "),
        (floors(200, 20) | parts(0.1, 0.2), {}, CLEAR, "In part", "arithmetic by 0.2"),
        # Without token rows nothing tests it.
        (floors(200, 20) | parts(0.2, 0.1), {}, None, "Possibly", "which no token rows test by "),
        ({"mismatch/router_rate": 0.2}, {}, None, "Not known", "no noise floor was measured"),
        (floors(200, 20) | {"staleness/mean": 1.0}, {}, None, "Not told apart", "with an update"),
        (
            floors(200, 20)
            | {"counterfactual/engine_routing/mean_abs": 0.3, "gap/numerics/mean_abs": 0.1},
            {"replay": "R3"},
            None,
            "Not under R3",
            "of which the loss sees the second alone",
        ),
    ],
)  # fmt: skip
def test_whether_routing_is_to_blame(row, config, by_prompt, verdict, text):
    first, *_ = found = opening(run_of(row, config=config, by_prompt=by_prompt))
    assert [one.question for one in found] == QUESTIONS
    assert first.verdict == verdict and text in first.text


def interval(group, rate, half, numerator=5):
    row = {"group": group, "rate": rate, "low": rate - half, "high": rate + half}
    return row | {"numerator": numerator, "denominator": 100, "prompts": 9}


@pytest.mark.parametrize(
    ("rates", "half", "verdict", "text"),
    [
        ([0.1, 0.2], 0.01, "Most in layer 1", "layer 1 differs most, 20% (19% to 21%), layer 0"),
        ([0.1, 0.2], 0.06, "In all layers alike", "10% (4% to 16%)"),
        ([0.3], 0.1, "Layer 0", "it is the only MoE layer"),
        # 0.5 of 0.9 are in layer 4.
        ([0.1] * 4 + [0.5] + [0.0] * 5, 0.01, "In 1 of 10 layers", "half of all mismatches are in"),
    ],
)
def test_where(rates, half, verdict, text):
    layers = [interval(i, rate, half) for i, rate in enumerate(rates)]
    _, where, _ = opening(run_of(floors(200, 20), answers={("mismatch", "layer"): layers}))
    assert where.verdict == verdict and text in where.text


def test_a_layer_in_which_none_was_seen_is_told_apart_from_no_other():
    none = interval(1, 0.0, 0, numerator=0) | {"low": None, "high": None}
    layers = [interval(0, 0.1, 0.01), none]
    _, where, _ = opening(run_of(floors(200, 20), answers={("mismatch", "layer"): layers}))
    assert where.verdict == "Not told apart" and "layer 1 least, 0% (none seen)" in where.text


@pytest.mark.parametrize(
    ("kl", "verdict"),
    [(0.0005, "Hardly"), (0.02, "Somewhat"), (0.5, "Much"), (None, "Not known")],
)
def test_whether_it_matters(kl, verdict):
    own = [interval((0, 0), 0.01, 0.001), interval((1, 1), 0.2, 0.1)]
    row = floors(200, 20) | {"logp_gap/k3": kl, "alarms": ["hot", "cold"], "alarms/hot": 2.5}
    *_, last = opening(run_of(row, answers={("gap", "own"): own}))
    assert last.verdict == verdict
    if not kl:
        assert last.text == "KL between engine and trainer is no number, at 1 step."
    else:
        assert last.text == (
            f"KL between engine and trainer is {kl} per token; mean |gap| is 0.2 (0.1 to 0.3) "
            "where 1 layer differs and 0.01 (0.009 to 0.011) where none does; alarms rang: hot "
            "(2.5 at the last), cold."
        )


def test_a_step_without_a_number_is_not_left_out_of_the_verdict():
    """null is what the store makes of NaN and infinity."""
    run = run_of(floors(200, 20) | {"logp_gap/k3": 0.0005})
    run.rows.append({"step": 2, "logp_gap/k3": None})
    *_, last = opening(run)
    assert last.verdict == "Much"
    assert (
        last.text == "KL between engine and trainer is 0.0005 per token, and no number at 1 step."
    )


def test_a_long_finding_is_cut_between_its_parts():
    assert brief("One. Two. Three.") == "One. Two."
    assert brief("A rate of 0.5 falls. B.") == "A rate of 0.5 falls. B."
    long = "; ".join(["x" * 100] * 5) + "."
    assert brief(long) == "x" * 100 + "; " + "x" * 100 + "."


def test_alternative_texts_say_what_is_seen():
    curve = {"run": "a", "label": "reward", "steps": [1, 2, 3], "values": [0.5, 0.9, 0.25]}
    told = "reward: 0.5 at step 1, 0.25 at step 3; lowest 0.25 at step 3, highest 0.9 at step 2."
    assert alt("Reward", [curve], is_share=False, several=False) == f"Reward. {told}"
    other = curve | {"run": "b", "values": [0.1, None, None]}
    assert alt("Reward", [curve, other], is_share=True, several=True) == (
        "Reward. a, reward: 50% at step 1, 25% at step 3; lowest 25% at step 3, highest 90% at "
        "step 2. b, reward: 10% at step 1."
    )
    layers = {"run": "a", "layer_ids": [3, 7], "rates": [0.1, 0.2], "label": "routers"}
    assert alt("By depth", [layers], is_share=True, several=False) == (
        "By depth. routers: 10% at layer 3, 20% at layer 7."
    )
    heat = {"run": "a", "layer_ids": [3, 7], "steps": [1, 2], "rates": [[0.1, None], [0.3, 0.2]]}
    assert alt("Map", [heat], is_share=True, several=False) == (
        "Map. From 10% to 30%, highest in layer 3 at step 2."
    )
    assert alt("Many", [curve] * 20, is_share=False, several=False).endswith("And 12 more.")
