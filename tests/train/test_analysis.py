"""Planted differences, found again through the real Megatron model and a step's whole record.

A routing flip, a weight change behind the last router, an engine whose experts carry other numbers,
a record without any difference. One process, fp32; other layouts: tests/megatron.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import MegatronActor
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.record import StepRecord, gap_terms, measured
from moe_upgrpo.rollout.base import Rollout, SamplingConfig
from moe_upgrpo.rollout.hf import HFEngine
from moe_upgrpo.train import analysis
from moe_upgrpo.train.analysis import OldScores
from moe_upgrpo.train.record import record_without_update
from tests.ranks import run_ranks

LAYERS, EXPERTS = 2, 8


def make_samples() -> list[Sample]:
    rng = np.random.default_rng(4)
    shapes = [(3, 5), (2, 8), (5, 1), (4, 6)]
    return [Sample(tokens=rng.integers(2, 64, p + t), prompt_length=p) for p, t in shapes]


def changed(checkpoint, folder, change):
    """A copy of the checkpoint with its tensors changed."""
    folder.mkdir()
    (folder / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    (folder / "generation_config.json").write_bytes(
        (checkpoint / "generation_config.json").read_bytes()
    )
    state = load_file(checkpoint / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def flat(scored) -> np.ndarray:
    return np.concatenate([s.log_probs for s in scored])


def measure_flip(checkpoint) -> dict:
    """The engine is the trainer itself, sent to other experts at known places."""
    with groups.process_groups(Layout()):
        actor = MegatronActor(checkpoint, Layout())
        samples = make_samples()
        native = actor.score(samples)
        flipped = [n.routes.copy() for n in native]
        flipped[1][4, 1] = (flipped[1][4, 1] + 3) % EXPERTS  # row 4 of layer 1: position 5
        held = actor.score([replace(s, routes=r) for s, r in zip(samples, flipped, strict=True)])
        terms = gap_terms(
            "none",
            rollout=flat(held),
            native=flat(native),
            held=flat(held),
            counterpart=flat(actor.score([replace(s, routes=n.routes) for s, n in
                                          zip(samples, native, strict=True)])),
            train=flat(actor.score(samples)),
        )  # fmt: skip
        return {"terms": terms, "gap": flat(native).astype(np.float64) - flat(held)}


@pytest.mark.bits
def test_a_planted_routing_flip_is_given_to_routing(tiny_checkpoint):
    result = run_ranks(1, measure_flip, tiny_checkpoint)[0]
    terms, gap = result["terms"], result["gap"]
    # Sequence 1 has responses at rows 1..8 after the 5 tokens of sequence 0: row 4 is token 8, and
    # what comes after it in that sequence attends to it. Elsewhere there is at most the rounding of
    # experts that multiply another number of rows (on CPUs whose kernel goes by that number).
    moved = np.flatnonzero(np.abs(gap) > 1e-5)
    assert moved.min() == 8 and gap[8] != 0 and moved.max() <= 12
    np.testing.assert_array_equal(terms["gap_engine_routing"], gap)
    for name in ("gap_numerics", "gap_update", "gap_routing_shift"):
        assert not terms[name].any(), name


def measure_update(old_checkpoint, new_checkpoint) -> dict:
    """θ_old and θ as two actors; the engine is the trainer at θ_old."""
    with groups.process_groups(Layout()):
        old, new = (MegatronActor(path, Layout()) for path in (old_checkpoint, new_checkpoint))
        samples = make_samples()
        native = old.score(samples)
        held = [replace(s, routes=n.routes) for s, n in zip(samples, native, strict=True)]
        train = new.score(samples)
        return {
            "terms": gap_terms(
                "none",
                rollout=flat(native),
                native=flat(native),
                held=flat(old.score(held)),
                counterpart=flat(new.score(held)),
                train=flat(train),
            ),
            "same_routes": all(
                np.array_equal(a.routes, b.routes) for a, b in zip(native, train, strict=True)
            ),
        }


def test_a_weight_change_behind_the_last_router_is_given_to_the_update(tiny_checkpoint, tmp_path):
    def change(state):
        state["lm_head.weight"] += 0.05 * torch.randn(64, 64, generator=torch.manual_seed(0))

    new = changed(tiny_checkpoint, tmp_path / "new", change)
    result = run_ranks(1, measure_update, tiny_checkpoint, new)[0]
    assert result["same_routes"]
    assert np.abs(result["terms"]["gap_update"]).min() > 0
    for name in ("gap_numerics", "gap_engine_routing", "gap_routing_shift"):
        assert not result["terms"][name].any(), name


def test_a_change_of_a_router_alone_moves_both_update_and_routing_shift(tiny_checkpoint, tmp_path):
    """The other side of the test above: with other routers the routes at θ are others, and the
    gates on the old ones too."""

    def change(state):
        state["model.layers.1.mlp.gate.weight"] += 0.3 * torch.randn(
            EXPERTS, 64, generator=torch.manual_seed(0)
        )

    new = changed(tiny_checkpoint, tmp_path / "new", change)
    result = run_ranks(1, measure_update, tiny_checkpoint, new)[0]
    assert not result["same_routes"]
    assert np.abs(result["terms"]["gap_routing_shift"]).max() > 1e-3
    assert np.abs(result["terms"]["gap_update"]).max() > 1e-3
    assert not result["terms"]["gap_engine_routing"].any()


def swap_experts(state) -> None:
    """Experts 0 and 1 of layer 1 exchange their numbers; the function stays the same."""
    stem = "model.layers.1.mlp."
    router = state[f"{stem}gate.weight"]
    router[[0, 1]] = router[[1, 0]]
    for part in ("gate_proj", "up_proj", "down_proj"):
        a, b = (f"{stem}experts.{e}.{part}.weight" for e in (0, 1))
        state[a], state[b] = state[b], state[a]


def record_of(actor, samples, rollouts) -> StepRecord:
    native = actor.score(samples, record=("routes", "margins", "gates"))
    held = [replace(s, routes=r.routes) for s, r in zip(samples, rollouts, strict=True)]
    old = OldScores(
        native=native,
        held=actor.score(held, record=("routes", "gates")),
        analysed=True,
        counterpart=[s.log_probs for s in native],
    )
    return record_without_update(rollouts=rollouts, old=old, group=2, num_experts=EXPERTS)


def measure_engine(checkpoint, engine_checkpoint) -> dict:
    with groups.process_groups(Layout()):
        actor = MegatronActor(checkpoint, Layout())
        engine = HFEngine(engine_checkpoint, "float32")
        rollouts = engine.generate(
            [np.array([5, 9, 4]), np.array([7, 3])],
            SamplingConfig(max_new_tokens=12),
            samples_per_prompt=8,
            seed=0,
        )
        samples = [
            Sample(tokens=np.concatenate([r.prompt_ids, r.response_ids]), prompt_length=p)
            for r in rollouts
            for p in [len(r.prompt_ids)]
        ]
        passes = list(zip(*analysis.engine_passes(engine, samples), strict=True))
        noise = analysis.trainer_noise_floor(actor, samples) | analysis.engine_noise_floor(
            passes, samples, rollouts, num_experts=EXPERTS
        )
        assert set(noise.layers) == {
            f"noise_{s}_{k}" for s in ("trainer", "engine") for k in ("repeat", "batch_shape")
        }
        record = record_of(actor, samples, rollouts)
        return {
            "metrics": measured(record.sums() | noise.sums),
            "rows": record.token_rows(),
            "train": [s.train_routes for s in record.sequences],
            "samples": samples,
        }


def test_mismatch_of_known_rate_and_place_is_recovered(tiny_checkpoint, tmp_path):
    """An engine whose experts 0 and 1 of layer 1 carry each other's numbers: the same log-probs,
    and a mismatch exactly where the trainer takes one of the two."""
    engine = changed(tiny_checkpoint, tmp_path / "engine", swap_experts)
    result = run_ranks(1, measure_engine, tiny_checkpoint, engine)[0]
    metrics, rows = result["metrics"], result["rows"]
    one_of_two = [((r[:, 1] < 2).sum(axis=-1) == 1).astype(int) for r in result["train"]]
    own = np.concatenate(
        [m[s.response_rows] for m, s in zip(one_of_two, result["samples"], strict=True)]
    )
    prefix = np.concatenate(
        [
            (m.cumsum() - m)[s.response_rows]
            for m, s in zip(one_of_two, result["samples"], strict=True)
        ]
    )
    assert 0.1 < own.mean() < 0.9
    np.testing.assert_array_equal(rows["layers_mismatched"], own)
    np.testing.assert_array_equal(rows["prefix_mismatched"], prefix)
    assert metrics["mismatch/by_layer"] == [0, pytest.approx(own.mean())]
    assert metrics["mismatch/router_rate"] == pytest.approx(own.mean() / 2)
    assert metrics["mismatch/slot_rate"] == pytest.approx(own.mean() / 4)
    assert metrics["mismatch/histogram"] == [(own == 0).sum(), (own == 1).sum(), 0]
    # Layer 0 is before the swap; what layer 1 would choose by itself does not depend on its routes.
    np.testing.assert_array_equal(rows["layers_mismatched_conditional"], own)
    # The same function: no gap in all, made of routing one way and "numerics" the other.
    assert metrics["logp_gap/mean_abs"] < 1e-5
    assert metrics["gap/engine_routing/mean_abs"] > 1e-2
    np.testing.assert_allclose(rows["gap_numerics"], -rows["gap_engine_routing"], atol=1e-4)
    for kind in ("trainer_repeat", "trainer_batch_shape", "engine_repeat", "engine_batch_shape"):
        assert metrics[f"noise/{kind}/router_rate"] == 0
        assert metrics[f"noise/{kind}/histogram"] == [len(own), 0, 0]


def measure_nothing_differs(checkpoint) -> dict:
    with groups.process_groups(Layout()):
        actor = MegatronActor(checkpoint, Layout())
        samples = make_samples()
        rollouts = [
            Rollout(
                prompt_ids=s.tokens[: s.prompt_length],
                response_ids=s.tokens[s.prompt_length :],
                logp_rollout=n.log_probs,
                routes=n.routes[:, :, ::-1].astype(np.uint8),
                weight_version=0,
                finished=True,
            )
            for s, n in zip(samples, actor.score(samples), strict=True)
        ]
        return measured(record_of(actor, samples, rollouts).sums())


@pytest.mark.bits
def test_a_run_without_mismatch_reports_zeros_of_what_it_compared(tiny_checkpoint):
    metrics = run_ranks(1, measure_nothing_differs, tiny_checkpoint)[0]
    tokens = sum(len(s.tokens) - s.prompt_length for s in make_samples())
    assert metrics["mismatch/router_denominator"] == tokens * LAYERS > 0
    assert metrics["mismatch/histogram"] == [tokens, 0, 0]
    zero = ("router_rate", "slot_rate", "token_any_rate", "routers_per_token", "router_numerator")
    for name in (*(f"mismatch/{n}" for n in zero), "conditional/router_rate", "logp_gap/max_abs"):
        assert metrics.get(name, 0) == 0, name
    assert metrics["conditional/gate_overlap"] == pytest.approx(1, abs=1e-6)
    for term in ("numerics", "engine_routing", "update", "routing_shift"):
        assert metrics[f"gap/{term}/mean_abs"] == 0
