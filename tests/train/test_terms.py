"""KL and entropy terms over a run; updates that stop early or stay at the old weights."""

import json

import numpy as np
import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import LossTerms, Metric
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import Scored, Update
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.store import read_metrics
from moe_upgrpo.train.analysis import OldScores
from moe_upgrpo.train.config import TrainConfig
from moe_upgrpo.train.job import _terms
from moe_upgrpo.train.learner import Learner, for_update
from moe_upgrpo.train.place import Place
from moe_upgrpo.train.terms import Terms, term_sums


def f32(*values) -> np.ndarray:
    return np.array(values, np.float32)


def scored(*log_probs) -> Scored:
    routes = np.empty((len(log_probs), 0, 0), np.int16)
    values = f32(*log_probs)
    return Scored(log_probs=values, entropy=values * 0, routes=routes, own_routes=routes)


def test_the_kl_term_in_the_reward_by_hand():
    """β = .1; k1 = log π − log π_ref is (1, −.5) and (2): sums of .5 and 2."""
    terms = Terms(kl_coef=0.1, kl_in="reward", kl_estimator="k1")
    old, reference = [scored(-1, -2), scored(-3)], [scored(-2, -1.5), scored(-5)]
    rewards, sums = terms.penalised(f32(1, 0), old, reference)
    assert rewards.dtype == np.float32
    assert rewards.tolist() == pytest.approx([1 - 0.05, -0.2])
    assert sums["kl/reference"] == (pytest.approx(2.5), 3)
    assert sums["kl/reward_penalty"] == (pytest.approx(0.25), 2)
    # Not in the loss too; and in the loss, nothing is taken off the rewards.
    assert terms.needs_old and not terms.of_loss().active
    other = Terms(kl_coef=0.1)
    assert other.penalised(f32(1, 0), old, reference) == (pytest.approx([1, 0]), {})
    assert not other.needs_old and other.of_loss() == LossTerms(kl_coef=0.1)


def test_what_a_step_had_of_the_terms():
    updates = [
        Update(
            log_probs=[], clipped=[], gradient_weight=[], loss=1.0, metrics={}, grad_norm=0.0,
            terms={"kl": value, "entropy": -value},
            term_metrics={"kl": Metric(value, 2), "entropy": Metric(3.0, 2)},
        )
        for value in (0.5, 1.5)
    ]  # fmt: skip
    found = term_sums(LossTerms(kl_coef=1, entropy_coef=0.25), updates, counted=True)
    assert found == {
        "loss/kl": (2.0, 2), "kl/reference": (2.0, 4), "loss/entropy": (-2.0, 2),
        "entropy/visits": (6.0, 4), "entropy/coef": (0.5, 2),
    }  # fmt: skip
    # Of another data-parallel rank the shares of the loss are added, its steps are not counted.
    other = term_sums(LossTerms(kl_coef=1, entropy_coef=0.25), updates, counted=False)
    assert other["loss/kl"] == (2.0, 0) and other["entropy/coef"] == (0.0, 0)


def test_a_resumed_run_has_the_coefficient_of_the_unbroken_one(tmp_path):
    """From metrics.jsonl, whose numbers come back to the last bit."""
    config = TrainConfig.of(entropy_target=0.3, entropy_delta=1 / 3, entropy_coef_range=(0.0, 9.0))
    unbroken = _terms(config, None, None, 0)
    rows = [{"step": 0, "eval/greedy": 0.1}]
    for step in range(1, 6):
        rows.append({"step": step, "entropy/mean": 0.7 / step})
        unbroken.end_step(rows[-1])
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "metrics.jsonl").write_text(text)
        assert len(read_metrics(tmp_path)) == len(rows)
        with groups.process_groups(Layout()):
            run = type("Run", (), {"path": tmp_path})
            resumed = _terms(config, None, run, step)
        assert resumed.entropies == unbroken.entropies and len(resumed.entropies) == step
        assert resumed.of_loss() == unbroken.of_loss()
    # .7, .35 above; .233, .175, .14 below: 0 and down to 0 twice, then three times up
    assert unbroken.of_loss().entropy_coef == pytest.approx(1.0)


class FakeActor:
    """The n-th update finds every log-prob n tenths above the old ones."""

    chunks = ()

    def __init__(self):
        self.at, self.terms, self.started = [], [], 0

    def weights_now(self) -> list:
        self.started += 1
        return ["old weights"]

    def update(self, samples, loss, *, record, terms, at) -> Update:
        self.at.append(at)
        self.terms.append(terms)
        moved = f32(0.1 * len(self.at))
        return Update(
            log_probs=[s.old_log_probs + moved for s in samples],
            clipped=[np.array([False]) for _ in samples],
            gradient_weight=[f32(1) for _ in samples],
            loss=0.0, metrics={}, grad_norm=0.0,
        )  # fmt: skip


def updated(**options):
    learner = Learner(
        actor=FakeActor(), reference=None, behind=None, loss=None, place=Place(), seed=0,
        minibatches=2, epochs=4, **{"terms": Terms()} | options,
    )  # fmt: skip
    samples = [Sample(tokens=np.array([i, 1]), prompt_length=1) for i in range(4)]
    samples = for_update(samples, f32(1, -1, 1, -1), None)
    scores = [scored(-9) for _ in samples]
    return learner.actor, learner.update(samples, [], OldScores(native=scores, held=None), step=1)


@pytest.mark.parametrize(
    ("limit", "epochs"),
    # |r − 1| of an epoch's two mini-batches: e^.1 − 1 and e^.2 − 1, a mean of .163; .42; .73
    [(None, 4), (0.16, 1), (0.17, 2), (0.41, 2), (0.43, 3), (9.0, 4)],
)
def test_no_epoch_follows_one_that_is_too_far_from_the_old_policy(limit, epochs):
    with groups.process_groups(Layout()):
        actor, result = updated(stop_ratio=limit)
    assert result.epochs == epochs and len(actor.at) == len(result.updates) == 2 * epochs
    assert all(values is not None for values in result.last.logp_train)


def test_every_gradient_of_a_step_is_taken_at_the_weights_it_began_with():
    actor, result = updated(gradient_at="old")
    assert actor.started == 1 and actor.at == [["old weights"]] * 8 and result.epochs == 4
    actor, _ = updated()
    assert actor.started == 0 and actor.at == [None] * 8


def test_the_reference_is_refreshed_after_the_steps_where_it_is_due():
    taken = []
    reference = type("Reference", (), {"take_weights": lambda self, actor: taken.append(actor)})()
    terms = Terms(reference=reference, reference_every=3, kl_coef=1.0)
    for step in range(1, 8):
        terms.refresh(step, step)
    assert taken == [3, 6]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kl_coef": -0.1}, "kl_coef: -0.1 given; allowed: 0 or more"),
        ({"kl_in": "reward"}, "kl_in='reward' without kl_coef: .* Give --kl-coef too"),
        ({"kl_estimator": "k1"}, "kl_estimator='k1' without kl_coef"),
        ({"reference_every": 5}, "reference_every=5 without kl_coef"),
        ({"reference_every": -5, "kl_coef": 1.0}, "reference_every=-5: 0 or more"),
        ({"entropy_delta": 1e-3}, "entropy_delta=0.001 without entropy_target"),
        ({"entropy_coef_range": (0.0, 1.0)}, "entropy_coef_range=.* without entropy_target"),
        ({"entropy_target": 0.2, "entropy_coef": 0.1}, "entropy_coef=0.1 is outside of .*=0 0.005"),
        ({"entropy_target": 0.2, "entropy_coef_range": (2.0, 1.0)}, "entropy_coef_range: 2.0 1.0"),
        ({"stop_ratio": 0.25}, "stop_ratio=0.25 with epochs=1.* Give --epochs"),
        ({"stop_ratio": 0.0, "epochs": 2}, "stop_ratio=0.0: a number above 0"),
        ({"gradient_at": "old", "minibatches": 1}, "gradient_at=old with one optimizer step"),
        ({"gradient_at": "old", "epochs": 2, "stop_ratio": 1.0}, "every ratio is 1 at the old"),
    ],
)
def test_terms_that_cannot_be(options, said):
    with pytest.raises(UserError, match=said):
        TrainConfig.of(**options)
