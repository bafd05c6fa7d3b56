"""The routing-mismatch benchmark on a tiny model: what is planted is found at its rate.

The metrics themselves are tested in tests/routing, tests/train and tests/stats. Not covered: vLLM,
SGLang, training and the committed figures, which the command makes.
"""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from benchmarks.studies import routing_mismatch as bench
from benchmarks.studies.routing_mismatch_report import SECTIONS, Report, figure
from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.layout import Layout

TINY = bench.Model(layers=2, hidden=32, heads=2, experts=8, intermediate=16, top_k=2)
STUDY = bench.Study(
    axis="depth",
    models=(("2", TINY),),
    sides=(bench.FP32,),
    seeds=1,
    prompts=2,
    samples=2,
    prompt_tokens=3,
    new_tokens=5,
)
SEQUENCES, TOKENS, LAYERS = 4, 5, 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """An actor and what an fp32 engine with the same weights sampled."""
    folder = bench.saved_model(TINY, 0, tmp_path_factory.mktemp("models"), 64)
    with groups.process_groups(Layout()):
        [play] = bench._plays(STUDY, TINY, bench.FP32, [folder])
        yield MegatronActor(folder, Layout()), play


@pytest.fixture(scope="module")
def same(tiny):
    actor, play = tiny
    return bench.compared(actor, play, noise=True)


def sums(found: bench.Measured, comparison: str = "free-running") -> pd.Series:
    frame = found.tables["sequences"]
    return frame[frame["comparison"] == comparison].sum(numeric_only=True)


def test_fp32_against_fp32_is_the_noise_floor(same):
    step, found = same
    assert found.row["tokens"] == SEQUENCES * TOKENS
    counted = sums(found)
    assert (counted["tokens"], counted["pairs"]) == (20, 40)
    assert (counted["routers"], counted["slots"], counted["any"]) == (0, 0, 0)
    assert counted["gap"] / 20 < 1e-5
    for side in ("trainer", "engine"):
        for kind in ("repeat", "batch_shape"):
            assert found.row[f"noise/{side}_{kind}/router_rate"] == 0
    assert step.divergence.tokens_compared == 20


def test_a_planted_mismatch_is_found_at_its_rate(tiny):
    """One slot of layer 1 in the first response token of every sequence, and both slots of layer 0
    in the last token of the first sequence."""
    actor, play = tiny

    def others(row):
        return [e for e in range(TINY.experts) if e not in row]

    planted = []
    for i, rollout in enumerate(play.rollouts):
        routes = rollout.routes.copy()
        first = len(rollout.prompt_ids) - 1  # the row whose output is the first response token
        routes[first, 1, 0] = others(routes[first, 1])[0]
        if i == 0:
            routes[-1, 0] = others(routes[-1, 0])[:2]
        planted.append(replace(rollout, routes=routes))
    play = bench.Played(rollouts=planted, passes=play.passes, group=play.group)
    _, found = bench.compared(actor, play, noise=False)
    counted = sums(found)
    assert (counted["routers"], counted["any"]) == (5, 5)  # 4 sequences, and one more
    assert counted["slots"] == 4 * 1 + 2
    assert found.row["mismatch/router_rate"] == 5 / 40
    assert found.row["mismatch/slot_rate"] == 6 / 80
    assert found.row["mismatch/token_any_rate"] == 5 / 20
    by_layer = found.tables["layers"]["free_running"].tolist()
    assert by_layer == [1, 4]
    positions = found.tables["positions"]
    assert positions.loc[positions["first"] == 0, "routers"].sum() == 4
    # Held to other experts the trainer gives other log-probs: the routing's part of the gap.
    assert counted["gap_engine_routing"] > 100 * sums_of_numerics_in_fp32(tiny)
    assert counted["gap"] < 1e-4  # the sampled log-probs were not touched


def sums_of_numerics_in_fp32(tiny) -> float:
    return sums(bench.compared(*tiny, noise=False)[1])["gap_numerics"]


def test_sums_of_a_gap_by_hand():
    found = bench.gap_sums([np.array([math.log(2.1), 0.0]), np.array([-math.log(4)])])
    assert found["gap"] == pytest.approx([math.log(2.1), math.log(4)])
    # k3 of rollout and trainer: e^d − 1 − d
    assert found["k3"] == pytest.approx([1.1 - math.log(2.1), -0.75 + math.log(4)])
    assert found["above_2"] == [1, 1]


def test_a_figure_is_a_ratio_of_sums_over_seeds():
    frame = pd.DataFrame(
        {  # 3/20 and 0/20
            "run": ["a", "a", "b"],
            "prompt": [0, 0, 0],
            "routers": [1, 2, 0],
            "pairs": [10, 10, 20],
        }
    )
    found = figure(frame, "routers")
    assert found.rate.rate == 3 / 40
    assert found.seeds == (0, 3 / 20)
    assert found.rate.prompts == 2 and "(2 prompts: no interval)" in found.text
    many = pd.concat([frame.assign(prompt=p) for p in range(5)])
    assert figure(many, "routers").rate.low < 3 / 40 < figure(many, "routers").rate.high


def test_nothing_measured_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no run was made"):
        bench.save([], tmp_path, {})
    with pytest.raises(UserError, match="nothing was measured"):
        figure(pd.DataFrame({"run": [], "routers": [], "pairs": []}), "routers")
    with pytest.raises(UserError, match="holds no axis"):
        Report.read(tmp_path)


def test_tables_from_saved_runs_and_what_was_not_run_is_named(same, tmp_path):
    _, found = same
    about = dict(layers=2, setting="2", axis="depth", seed=0, engine="hf", rollout="fp32")
    found.row |= about | dict(trainer="fp32", updates=0, parameters=12345, cpu_s=1.0)
    save_about = dict(cpu="a processor", threads=1, clock_s=1, cpu_s=1, runs=1)
    bench.save([found], tmp_path / "depth", save_about)
    report = Report.read(tmp_path)
    sections = {name: make() for name, make in report.sections().items()}
    assert tuple(sections) == SECTIONS
    assert "| 2 | 0.0M | fp32 | fp32 | 1 | 0 of 40 | 0.00%" in sections["depth"]
    assert sections["finding"] == "Not run."  # fp32 against fp32 is none of its settings
    assert "Not run: HF transformers, vLLM, SGLang" in sections["engines"]
    assert sections["staleness"] == "Not run."
    report.draw(tmp_path)
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        "axes.svg",
        "layers.svg",
        "staleness.svg",
    }
