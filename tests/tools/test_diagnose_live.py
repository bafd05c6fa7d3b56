"""`moe-upgrpo diagnose` on a checkpoint: faults put into running engines, and the bisection.

The full list in three models: `python -m benchmarks.diagnose.engines`.
"""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.diagnose.engine_faults import CLEAN, ENGINE_FAULTS, Wrapped, options
from benchmarks.diagnose.engines import SHAPES, examined, saved_model, write_prompts
from moe_upgrpo.errors import UserError
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.rollout.base import SamplingConfig
from moe_upgrpo.rollout.hf import HFEngine, fp8_rounded
from moe_upgrpo.tools.diagnose import bisection, live_faults, models, tensors
from moe_upgrpo.tools.diagnose import knobs as all_knobs
from moe_upgrpo.tools.diagnose.differences import Seen, differences, removed
from moe_upgrpo.tools.diagnose.examine import examine
from moe_upgrpo.tools.diagnose.knobs import KNOBS, Knob, order
from moe_upgrpo.tools.diagnose.live import opened

QUICK = dict(samples=4, max_new_tokens=12)
# One of each way of telling, and the words that say it; the others are slow.
IN_MAIN = {
    "a layer that was not loaded, of an engine that shows none": "routes agree before MoE layer 1",
    "routers in bf16, of an engine that shows none": "routers in bf16 give the engine's experts",
    "a temperature of its own": "logits divided by 0.7",
    "a token put before each prompt": "with the special token of a beginning",
    "rows one late": "rows shifted by -1",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small model that decides as random ones do, and ten prompts."""
    folder = tmp_path_factory.mktemp("diagnose")
    sizes = dict(layers=2, hidden=64, experts=16, expert_intermediate=32, top_k=4)
    model = saved_model(folder / "model", **sizes)
    return model, write_prompts(folder / "prompts.txt", 10)


def put_in(name: str, checkpoint, **given):
    fault = (ENGINE_FAULTS | CLEAN)[name]
    return examined(fault, *checkpoint, **QUICK, **given)


@pytest.mark.parametrize("name", IN_MAIN)
def test_a_fault_in_an_engine_is_named_first(name, checkpoint):
    found = put_in(name, checkpoint)
    assert found.findings[0].cause == ENGINE_FAULTS[name].cause
    assert IN_MAIN[name] in found.findings[0].shown_by
    assert found.findings[0].kind == "fault" and found.findings[0].share > 0.8
    assert found.bisection is None and found.row is None
    assert found.not_tried["engine-dtype"].endswith(f"mend {found.findings[0].cause} first")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ENGINE_FAULTS if name not in IN_MAIN])
def test_more_faults(name, checkpoint):
    found = put_in(name, checkpoint)
    assert found.findings[0].cause == ENGINE_FAULTS[name].cause


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CLEAN)
def test_a_pair_without_a_fault_has_none(name, shape, tmp_path):
    model = saved_model(tmp_path / "model", seed=1, **SHAPES[shape])
    found = examined(CLEAN[name], model, write_prompts(tmp_path / "p.txt", 10), **QUICK)
    assert not [one for one in found.findings if one.kind == "fault"]
    assert found.bisection is not None and found.row["pairs"] > 0


def raising(error: Exception | str):
    def fails(_):
        raise error if isinstance(error, Exception) else ValueError(error)

    return fails


def refused_knob(error: Exception) -> Knob:
    """A knob that transformers refuses to turn."""
    turned = partial(all_knobs._twin_with, prepare=raising(error))
    return Knob(name="refused", does="what is refused", cost=1.0, turned=turned)


def test_the_bisection_of_an_engine_in_bf16(checkpoint, tmp_path):
    """bf16 against fp32: float32 takes all of it away, and nothing else does; budget and machine
    say why what is left out is."""
    quick = ("engine-dtype", "prefill-decode", "cuda-graphs", "parallelism", "fp8")
    knobs = tuple(knob for knob in KNOBS if knob.name in quick)
    pair = options(*checkpoint, **QUICK)
    with groups.process_groups(Layout()), opened(pair, server_log=tmp_path / "log") as live:
        assert live_faults.live_faults(live) == ([], {})
        assert live_faults.temperature(live) is None and live_faults.router_dtype(live) is None
        found = bisection.bisect(live, knobs=knobs)
        hurried = bisection.bisect(live, minutes=1e-9, knobs=knobs)
        refusal = refused_knob(NotImplementedError("no such experts\nmore"))
        assert bisection.bisect(live, knobs=(refusal,)).not_tried == {
            "refused": "transformers: no such experts"
        }
        with pytest.raises(ValueError, match="a fault of ours"):  # no reason not to have tried
            bisection.bisect(live, knobs=(replace(refusal, turned=raising("a fault of ours")),))
    (cause,) = found.findings
    assert (cause.cause, cause.kind, cause.measure) == ("engine-dtype", "numerics", "routers")
    assert cause.share > 0.99 and cause.low > 0.9
    assert found.base["routers"] > 0.005 > found.base["gap"] / 10 > 0
    turned = {one.knob.name: one for one in found.turned}
    assert turned.keys() == {"engine-dtype", "prefill-decode"}
    assert turned["engine-dtype"].stands_out and not turned["prefill-decode"].stands_out
    assert found.not_tried.keys() == {"cuda-graphs", "parallelism", "fp8"}
    assert found.not_tried["fp8"] == "the engine's weights are not rounded"
    assert "torchrun" in found.not_tried["parallelism"]
    assert not hurried.turned and "of --minutes 1e-09" in hurried.not_tried["engine-dtype"]
    rows = bisection.as_table(found)["rows"]
    assert rows[0][0] == "the engine in float32" and rows[0][3] == "yes"


@pytest.mark.slow
def test_the_bisection_of_an_engine_rounded_to_fp8(checkpoint, tmp_path):
    pair = options(*checkpoint, **QUICK)
    found = examine(pair, server_log=tmp_path / "log", weights="fp8")
    assert found.findings[0].cause == "fp8" and found.findings[0].share > 0.6
    assert found.row["precision"] == "fp8" and found.row["pairs"] > 0


def test_cheap_and_likely_knobs_are_turned_first():
    names = [knob.name for knob in order()]
    assert names.index("fp8") < names.index("engine-dtype") < names.index("experts-backend")
    assert {*names[-2:]} == {"cuda-graphs", "parallelism"}


def test_a_server_that_may_have_others_keeps_its_weights(checkpoint):
    """No test replaces the weights behind a URL: it is said instead."""
    live = SimpleNamespace(options=SimpleNamespace(engine_url="http://h:1"), engine=object())
    assert live_faults.given_again(live) is None


# --- sums by prompt, by hand


def test_differences_and_what_a_change_removed():
    """Two prompts of one sequence each, two tokens, two layers, top-1. Prompt 0 differs in two
    routers, prompt 1 in one, of four each; |gap| .5 + .25 and 0 + 1."""
    train = Seen(routes=[np.zeros((2, 2, 1), int)] * 2, log_probs=[np.zeros(2), np.zeros(2)])
    first = np.array([[[1], [0]], [[0], [1]]])
    second = np.array([[[0], [0]], [[0], [1]]])
    engine = Seen(routes=[first, second], log_probs=[np.array([-0.5, 0.25]), np.array([0.0, -1.0])])
    found = differences(engine, train, prompt=[0, 1], num_experts=2)
    assert found.routers_P.tolist() == [2, 1] and found.pairs_P.tolist() == [4, 4]
    assert found.gap_P.tolist() == [0.75, 1.0] and found.tokens_P.tolist() == [2, 2]
    assert found.rate("routers") == 3 / 8 and found.rate("gap") == 1.75 / 4
    assert found.by_layer.tolist() == [0.25, 0.5]
    mended = Seen(routes=[first, train.routes[1]], log_probs=engine.log_probs)
    of = removed(found, differences(mended, train, prompt=[0, 1], num_experts=2), "routers")
    assert (of.before, of.after) == (3 / 8, 2 / 8) and math.isclose(of.share, 1 / 3)
    assert of.p == 0.5 and of.low is None  # one prompt of two fell; fewer than 8 have no interval
    assert str(of) == "37.50% → 25.00% of routers differ"


def test_a_prompt_may_have_more_sequences_than_another():
    """Prompt 3 has two sequences of one and two tokens, prompt 7 one: sums are by prompt."""
    ids = [np.ones((n, 1, 1), int) for n in (1, 2, 1)]
    zeros = [x * 0 for x in ids]
    found = differences(
        Seen(routes=ids, log_probs=None),
        Seen(routes=zeros, log_probs=None),
        prompt=[3, 3, 7],
        num_experts=2,
    )
    assert found.routers_P.tolist() == [3, 1] and found.gap_P is None
    assert found.rate("gap") is None and not found.has("gap")


# --- the tensors of an engine


def test_rows_that_nobody_wrote_are_not_compared():
    train = Seen(routes=[np.array([[[0, 1]], [[1, 2]], [[0, 2]]])], log_probs=None)
    engine = Seen(routes=[np.array([[[0, 0]], [[2, 1]], [[1, 2]]])], log_probs=None)
    found = differences(engine, train, prompt=[0], num_experts=3)
    assert found.routers_P.tolist() == [1] and found.pairs_P.tolist() == [2]
    assert found.rate("routers") == 1 / 2


def test_tensors_are_told_apart(tiny_checkpoint):
    right = HFEngine(tiny_checkpoint, "float32", "cpu")

    def held(change):
        engine = HFEngine(tiny_checkpoint, "float32", "cpu")
        change(engine.model)
        found = tensors.compare(engine.model, right.model, 8)
        return found and found.cause

    def layer(model):
        return model.model.layers[1]

    assert held(lambda model: None) is None
    assert held(models.tie_head) == "tied-head"
    assert held(lambda model: model.lm_head.weight.data.mul_(2)) == "other-head"
    assert held(lambda model: layer(model).mlp.gate.to(torch.bfloat16)) == "router-dtype"
    assert held(lambda model: layer(model).self_attn.q_proj.weight.data.zero_()) == (
        "half-loaded-weights"
    )

    def turned(model):
        experts = layer(model).mlp.experts
        for weight in (experts.gate_up_proj, experts.down_proj):
            weight.data.copy_(weight.data.flip(0))

    def rounded(model):
        weight = layer(model).mlp.experts.down_proj
        weight.data.copy_(fp8_rounded(weight.data))

    def all_of_them(model):
        for weight in model.parameters():
            weight.data.add_(0.01)

    assert held(turned) == "experts-permuted" and held(rounded) == "fp8"
    assert held(all_of_them) == "stale-weights"


def test_routers_in_another_precision_leave_the_rest(tiny_checkpoint):
    """Expected: a linear map of inputs and weights rounded to bf16; gates in the experts' type."""
    engine = HFEngine(tiny_checkpoint, "float32", "cpu")
    router = engine.model.model.layers[0].mlp.gate
    x = torch.randn(5, 64)
    models.route_in(engine.model, torch.bfloat16)
    logits, gates, chosen = router(x)
    weight = load_file(tiny_checkpoint / "model.safetensors")["model.layers.0.mlp.gate.weight"]
    expected = torch.nn.functional.linear(x.bfloat16(), weight.bfloat16())
    assert torch.equal(logits, expected.float()) and gates.dtype == torch.float32
    best = expected.float().softmax(-1).topk(2).indices
    assert torch.equal(chosen.sort().values, best.sort().values)
    others = {p.dtype for n, p in engine.model.named_parameters() if ".gate." not in n}
    assert others == {torch.float32}


def test_whole_sequences_are_scored_as_they_were_sampled(tiny_checkpoint):
    """In fp32 the log-probs of `score`, one sequence or all at once, are those of `generate`."""
    engine = HFEngine(tiny_checkpoint, "float32", "cpu")
    prompts = [np.array([5, 9, 3]), np.array([7])]
    sampling = Wrapped(engine, temperature=0.7)
    rollouts = sampling.generate(
        prompts, SamplingConfig(max_new_tokens=6), samples_per_prompt=2, seed=0
    )
    sequences = [np.concatenate([r.prompt_ids, r.response_ids]) for r in rollouts]
    for at_once in (None, 1):
        scored = engine.score(sequences, temperature=0.7, at_once=at_once)
        for rollout, (logp, routes) in zip(rollouts, scored, strict=True):
            np.testing.assert_allclose(
                logp[len(rollout.prompt_ids) - 1 :], rollout.logp_rollout, atol=2e-5
            )
            np.testing.assert_array_equal(np.sort(routes), np.sort(rollout.routes))
    with pytest.raises(UserError, match="2 tokens or more"):
        engine.score([np.array([1])])


@pytest.mark.slow
def test_a_dense_checkpoint_is_asked_for_its_log_probs(tmp_path):
    """No routes, no row of the table; the engine's precision makes the gap."""
    model = saved_model(tmp_path / "model", layers=2, hidden=64, experts=0)
    pair = options(model, write_prompts(tmp_path / "p.txt", 10), **QUICK)
    found = examine(pair, server_log=tmp_path / "log")
    (cause,) = found.findings
    assert cause.cause == "engine-dtype" and cause.measure == "gap" and cause.share > 0.9
    assert found.row is None and found.not_tried["router-dtype"] == "a dense model has no routers"
