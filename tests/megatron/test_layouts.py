"""Every layout computes what one process computes (and that what transformers computes).

From the same weights: log-probs, entropy, whole-sequence routes, margins and gates, the gradient of
the whole loss (UP-GRPO with all its branches active) with and without activation recomputation, and
the weights after one SGD step, under Megatron's plain optimizer and under its DistributedOptimizer.
Micro-batches of 3 sequences of mixed lengths and a last one of fewer, so that pipeline stages pad
and virtual ones are filled up. In fp32, where layouts differ in the order of sums only: TOLERANCE
is 80 units in the last place of fp32 (1.2e-7), relative to the largest entry of each tensor; 5e-6
was seen.

Not covered: a second node, NCCL, more than 4 ranks, more than 2 pipeline stages. Context
parallelism: test_context.py.
"""

import numpy as np
import pytest
import torch

from tests.megatron.compare import TOLERANCE, assert_close, cosine, flat, in_order
from tests.megatron.measured import LAYOUTS, LR, as_parameters, make_samples, uneven


@pytest.fixture(scope="module", params=as_parameters(LAYOUTS))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def ranks(name, measured):
    return measured(name)


@pytest.fixture(scope="module")
def one_process(name, measured):
    return measured(LAYOUTS[name][0])[0]


@pytest.mark.parametrize("part", ["scored", "one by one"])
def test_scores_and_recorded_routing_equal_one_process(part, ranks, one_process):
    """Part "one by one" scores the same sequences in micro-batches of 1 instead of 3."""
    expected = one_process["scored"]["native"]
    layers, top_k, *_ = one_process["about"]
    actual = in_order(ranks, lambda r: r["scored"]["native"] if part == "scored" else r[part])
    for a, e, sample in zip(actual, expected, make_samples(), strict=True):
        assert a.routes.shape == (len(sample.tokens) - 1, len(layers), top_k)
        assert a.routes.dtype == np.uint8 and a.own_routes is a.routes
        assert np.array_equal(a.routes, e.routes)
        for field in ("log_probs", "entropy", "margins", "gates"):
            assert getattr(a, field).shape == getattr(e, field).shape
            np.testing.assert_allclose(getattr(a, field), getattr(e, field), rtol=0, atol=1e-5)


def test_other_numbers_of_micro_batches_on_each_rank(ranks, one_process):
    """In micro-batches of 1: one on even data-parallel ranks, on odd ones two."""
    native = one_process["scored"]["native"]
    planted = one_process["scored"].get("planted", native)
    share = len(native) // len({rank["dp_rank"] for rank in ranks})
    for rank in ranks:
        mine = slice(rank["dp_rank"] * share, None)
        expected = uneven(native[mine], planted[mine], rank["dp_rank"])
        for a, e in zip(rank["uneven"], expected, strict=True):
            assert np.array_equal(a.routes, e.routes)
            assert np.array_equal(a.own_routes, e.own_routes)
            assert np.abs(a.log_probs - e.log_probs).max() <= 1e-5


@pytest.mark.bits
def test_all_ranks_of_a_copy_get_the_same(ranks):
    """Tensor-parallel ranks and pipeline stages, to the last bit."""
    for rank in ranks:
        twin = next(other for other in ranks if other["dp_rank"] == rank["dp_rank"])
        assert rank["about"] == twin["about"]
        for kind, scored in rank["scored"].items():
            for a, b in zip(scored, twin["scored"][kind], strict=True):
                for field in ("log_probs", "entropy", "routes", "own_routes", "margins", "gates"):
                    assert np.array_equal(getattr(a, field), getattr(b, field))
        for key, a in rank["update"].items():
            b = twin["update"][key]
            assert (a.loss, a.grad_norm, a.metrics) == (b.loss, b.grad_norm, b.metrics)
            for field in ("log_probs", "clipped", "gradient_weight"):
                for x, y in zip(getattr(a, field), getattr(b, field), strict=True):
                    assert np.array_equal(x, y)


def test_what_an_update_saw_equals_one_process(ranks, one_process):
    for key, expected in one_process["update"].items():
        for field in ("log_probs", "clipped", "gradient_weight"):
            actual = in_order(ranks, lambda r, f=field, k=key: getattr(r["update"][k], f))
            for a, e in zip(actual, getattr(expected, field), strict=True):
                assert a.shape == e.shape and a.dtype == e.dtype
                np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)
        loss = sum({r["dp_rank"]: r["update"][key].loss for r in ranks}.values())
        assert loss == pytest.approx(expected.loss, rel=1e-4, abs=1e-5)
        for rank in ranks:
            assert rank["update"][key].recompute_flips == 0


@pytest.mark.bits
def test_an_update_hands_over_what_its_forward_saw_as_a_score_does(ranks):
    for rank in ranks:
        assert {recompute for _, recompute, _ in rank["update"]} >= {"none"}
        for (kind, *_), update in rank["update"].items():
            for a, e in zip(update.scored, rank["scored"][kind], strict=True):
                for field in ("log_probs", "entropy", "routes", "own_routes", "margins", "gates"):
                    assert np.array_equal(getattr(a, field), getattr(e, field)), (kind, field)


@pytest.mark.parametrize(
    ("loss", "recompute"), [("up-grpo", "none"), ("up-gspo", "none"), ("up-grpo", "full")]
)
def test_the_gradient_equals_one_process(loss, recompute, ranks, one_process):
    expected = one_process["gradient"]["native", "none", loss]
    for rank in ranks:
        assert_close(rank["gradient"]["native", recompute, loss], expected)
        norm = one_process["update"]["native", "none", loss].grad_norm
        assert rank["update"]["native", recompute, loss].grad_norm == pytest.approx(norm, rel=1e-5)


def test_kl_and_entropy_terms_equal_one_process(ranks, one_process):
    """Their values, summed over the data-parallel ranks, and the gradient of the whole loss."""
    expected, gradient = one_process["terms"]
    assert {*expected.terms} == {"kl", "entropy"} and expected.terms["kl"] > 1e-3
    without = one_process["gradient"]["native", "none", "up-grpo"]
    assert cosine(flat(gradient), flat(without)) < 0.999
    for name, value in expected.terms.items():
        shares = {rank["dp_rank"]: rank["terms"][0] for rank in ranks}.values()
        assert sum(share.terms[name] for share in shares) == pytest.approx(value, rel=1e-5)
        counted = [share.term_metrics[name] for share in shares]
        assert sum(one.numerator for one in counted) == pytest.approx(
            expected.term_metrics[name].numerator, rel=1e-5
        )
        assert sum(c.denominator for c in counted) == expected.term_metrics[name].denominator
    for rank in ranks:
        assert_close(rank["terms"][1], gradient)


@pytest.mark.parametrize("optimizer", ["sgd", "distributed"])
def test_the_weights_after_one_step_equal_one_process(optimizer, ranks, one_process):
    for rank in ranks:
        assert_close(rank[optimizer], one_process["sgd"])


@pytest.mark.parametrize("bf16", ["TP2", "EP2", "TP2·EP2", "DP2", "TP2·EP2·DP2", "PP2·VPP2"])
def test_bf16_layouts_agree_to_bf16(bf16, measured):
    """bf16 keeps 8 bits (relative 4e-3) and routes may flip: directions are compared."""
    ranks, (one,) = measured(bf16, "bfloat16"), measured(LAYOUTS[bf16][0], "bfloat16")
    expected = np.concatenate([s.log_probs for s in one["scored"]["native"]])
    actual = np.concatenate([s.log_probs for s in in_order(ranks, lambda r: r["scored"]["native"])])
    assert np.abs(actual).mean() > 0 and np.abs(actual - expected).mean() < 0.1
    for key in ("sgd", "distributed"):
        assert all(tensor.dtype == torch.bfloat16 for tensor in ranks[0][key].values())
    key = ("native", "none", "up-grpo")
    assert cosine(*(flat(r["gradient"][key]) for r in (ranks[0], one))) > 0.99
    before = flat(one["weights"])
    moved = flat(one["sgd"]) - before
    assert moved.norm() > 0
    for key in ("sgd", "distributed"):
        assert cosine(flat(ranks[0][key]) - before, moved) > 0.98


def test_one_sgd_step_moves_the_weights_by_the_gradient(measured):
    """Ties the tests above: none could pass with an update that does nothing."""
    for checkpoint in ("tiny", "mixed", "dense"):
        (one,) = measured(checkpoint)
        gradient = one["gradient"]["native", "none", "up-grpo"]
        assert max((LR * g).abs().max() for g in gradient.values()) > 1e-3
        expected = {name: w - LR * gradient[name] for name, w in one["weights"].items()}
        assert_close(one["sgd"], expected, TOLERANCE)
