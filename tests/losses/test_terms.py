"""KL and entropy terms: hand-worked numbers, gradients, splits, bad input; entropy control."""

import math

import pytest
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import EntropyControl, LossTerms, PolicyLossConfig, loss_terms

NAN = float("nan")
# Two sequences, of 2 tokens and of 1; d = log π_ref − log π is −1, 2 and 0.5.
LOG_PROBS = torch.tensor([[-1.0, -3.0], [-2.0, NAN]], dtype=torch.float64)
REFERENCE = torch.tensor([[-2.0, -1.0], [-1.5, math.inf]], dtype=torch.float64)
ENTROPY = torch.tensor([[0.5, 1.5], [4.0, NAN]], dtype=torch.float64)
MASK = torch.tensor([[1, 1], [1, 0]])
D = (-1.0, 2.0, 0.5)
# estimator -> its values and the slopes by log π, both of d
BY_HAND = {
    "k1": ([1.0, -2.0, -0.5], [1.0, 1.0, 1.0]),
    "k2": ([0.5, 2.0, 0.125], [1.0, -2.0, -0.5]),
    "k3": ([math.exp(d) - d - 1 for d in D], [1 - math.exp(d) for d in D]),
}
# The weight of each of the three tokens: 1/3, or half of each sequence's mean.
WEIGHTS = {"token-mean": [1 / 3] * 3, "seq-mean-token-mean": [1 / 4, 1 / 4, 1 / 2]}


def found(terms, *, aggregation="token-mean", rows=slice(None), **more):
    log_probs, entropy = more.pop("log_probs", LOG_PROBS), more.pop("entropy", ENTROPY)
    return loss_terms(
        log_probs[rows],
        MASK[rows],
        terms=terms,
        config=PolicyLossConfig(aggregation=aggregation),
        reference_log_probs=REFERENCE[rows],
        entropy=entropy[rows],
        **more,
    )


@pytest.mark.parametrize("aggregation", WEIGHTS)
@pytest.mark.parametrize("kind", BY_HAND)
def test_values_and_gradients_by_hand(kind, aggregation):
    values, slopes = BY_HAND[kind]
    weights = WEIGHTS[aggregation]
    log_probs, entropy = (x.clone().requires_grad_() for x in (LOG_PROBS, ENTROPY))
    terms, sums = found(
        LossTerms(kl_coef=0.1, kl_estimator=kind, entropy_coef=0.5),
        aggregation=aggregation,
        log_probs=log_probs,
        entropy=entropy,
    )
    kl = 0.1 * sum(w * v for w, v in zip(weights, values, strict=True))
    bonus = -0.5 * sum(w * h for w, h in zip(weights, (0.5, 1.5, 4.0), strict=True))
    assert terms["kl"].item() == pytest.approx(kl, rel=1e-12)
    assert terms["entropy"].item() == pytest.approx(bonus, rel=1e-12)
    assert sums["kl"] == (pytest.approx(sum(values)), 3) and sums["entropy"] == (6.0, 3)
    sum(terms.values()).backward()
    expected = [0.1 * w * s for w, s in zip(weights, slopes, strict=True)]
    assert log_probs.grad[MASK.bool()].tolist() == pytest.approx(expected, rel=1e-12)
    assert entropy.grad[MASK.bool()].tolist() == pytest.approx([-0.5 * w for w in weights])
    assert log_probs.grad[1, 1] == entropy.grad[1, 1] == 0  # padding, whatever stands there


@pytest.mark.parametrize("kind", BY_HAND)
def test_the_gradient_is_the_finite_difference(kind):
    terms = LossTerms(kl_coef=0.7, kl_estimator=kind)

    def value(log_probs):
        return loss_terms(
            log_probs,
            torch.ones(2, 3),
            terms=terms,
            config=PolicyLossConfig(aggregation="seq-mean-token-sum"),
            reference_log_probs=torch.linspace(-4, -0.1, 6, dtype=torch.float64).view(2, 3),
        )[0]["kl"]

    start = torch.linspace(-0.2, -3, 6, dtype=torch.float64).view(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(value, start, eps=1e-6, atol=1e-8)


def test_only_k2_has_the_gradient_of_the_kl():
    """Over all of a vocabulary, each token with its probability: the head of the file says so."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([1.0, 0.5, -0.3, 0.0], dtype=torch.float64).log_softmax(-1)
    log_probs = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad(
        (log_probs.exp() * (log_probs - reference)).sum(), logits, retain_graph=True
    )
    gradients = {}
    for kind in BY_HAND:
        expectation = 0
        for v, probability in enumerate(log_probs.exp().tolist()):
            terms, _ = loss_terms(
                log_probs[v].view(1, 1),
                torch.ones(1, 1),
                terms=LossTerms(kl_coef=1.0, kl_estimator=kind),
                config=PolicyLossConfig(),
                reference_log_probs=reference[v].view(1, 1),
            )
            expectation = expectation + probability * terms["kl"]
        (gradients[kind],) = torch.autograd.grad(expectation, logits, retain_graph=True)
    assert torch.allclose(gradients["k2"], exact, atol=1e-12)
    assert gradients["k1"].abs().max() < 1e-12
    assert not torch.allclose(gradients["k3"], exact, atol=1e-3)


@pytest.mark.parametrize("aggregation", WEIGHTS)
def test_parts_add_up_with_the_denominators_of_the_whole(aggregation):
    terms = LossTerms(kl_coef=0.2, entropy_coef=0.1)
    whole, _ = found(terms, aggregation=aggregation)
    counts = {"global_tokens": 3, "global_sequences": 2}
    parts = [found(terms, aggregation=aggregation, rows=[i], **counts)[0] for i in range(2)]
    for name, value in whole.items():
        assert sum(part[name] for part in parts).item() == pytest.approx(value.item(), rel=1e-12)


def test_a_coefficient_of_0_computes_nothing_and_needs_nothing():
    nothing = loss_terms(LOG_PROBS, MASK, terms=LossTerms(), config=PolicyLossConfig())
    assert nothing == ({}, {}) and not LossTerms().active
    only_kl, _ = found(LossTerms(kl_coef=1.0))
    assert {*only_kl} == {"kl"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kl_coef": -1.0}, "kl_coef: -1.0 given; allowed: 0 or more"),
        ({"entropy_coef": NAN}, "entropy_coef: nan given"),
        ({"kl_estimator": "k4"}, r"kl_estimator: 'k4' given; allowed: k1, k2, k3 \(nearest: k"),
    ],
)
def test_coefficients_that_cannot_be(options, said):
    with pytest.raises(UserError, match=said):
        LossTerms(**options)


@pytest.mark.parametrize(
    ("coefficient", "missing"), [("kl_coef", "reference_log_probs"), ("entropy_coef", "entropy")]
)
def test_what_a_term_needs_is_named(coefficient, missing):
    terms = LossTerms(**{coefficient: 0.5})
    with pytest.raises(UserError, match=f"{missing}: None given, {coefficient} is 0.5"):
        loss_terms(LOG_PROBS, MASK, terms=terms, config=PolicyLossConfig())
    given = {missing: torch.zeros(1, 2)}
    with pytest.raises(UserError, match=rf"{missing}: shape \(1, 2\) given; allowed: \(2, 2\)"):
        loss_terms(LOG_PROBS, MASK, terms=terms, config=PolicyLossConfig(), **given)


def test_the_entropy_is_controlled_by_the_steps_before():
    """α up by Δ after a step below the target, else down, in its bounds; none after a step above.

    By hand, target 1, Δ = .1 in [0, .25]: below, below, below (at the bound), above, at it, below.
    """
    control = EntropyControl(target=1.0, delta=0.1, least=0.0, most=0.25)
    entropies = [0.5, 0.9, 0.2, 1.5, 1.0, 0.3]
    found = [control.coefficient(0.05, entropies[:i]) for i in range(7)]
    # The α behind them: .05, .15, .25, .25, .15, .05, .15
    assert found == pytest.approx([0.05, 0.15, 0.25, 0.25, 0.0, 0.0, 0.15])
    assert control.coefficient(0.05, [NAN]) == 0.0  # no number is not below


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": -1.0}, "entropy_target: -1.0 given"),
        ({"target": 1.0, "delta": 0.0}, "entropy_delta: 0.0 given; allowed: above 0"),
        ({"target": 1.0, "least": 2.0, "most": 1.0}, "entropy_coef_range: 2.0 1.0 given"),
        ({"target": 1.0, "least": -1.0}, "entropy_coef_range: -1.0 0.005 given"),
    ],
)
def test_controls_that_cannot_be(options, said):
    with pytest.raises(UserError, match=said):
        EntropyControl(**options)
