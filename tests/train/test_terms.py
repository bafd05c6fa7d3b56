"""KL and entropy terms over a run; updates that stop early or stay at the old weights."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import LossTerms, Metric, PolicyLossConfig
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.actor import Scored, Update
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.store import read_config, read_metrics, read_tokens
from moe_upgrpo.train.advantages import advantages_of
from moe_upgrpo.train.analysis import OldScores
from moe_upgrpo.train.config import TrainConfig
from moe_upgrpo.train.job import _terms
from moe_upgrpo.train.learner import Learner, for_update
from moe_upgrpo.train.place import Place
from moe_upgrpo.train.terms import Terms, term_sums
from tests.ranks import run_ranks
from tests.train.test_launch import job, options
from tests.train.test_resume import as_of_step_2, assert_same_run, whole_run


def f32(*values) -> np.ndarray:
    return np.array(values, np.float32)


def scored(*log_probs) -> Scored:
    routes = np.empty((len(log_probs), 0, 0), np.int16)
    values = f32(*log_probs)
    return Scored(log_probs=values, entropy=values * 0, routes=routes, own_routes=routes)


def sample(responses, *, sampled=None) -> Sample:
    """A prompt of one token and so many response tokens."""
    return Sample(tokens=np.arange(1 + responses), prompt_length=1, sampled=sampled)


def test_the_kl_term_in_the_reward_by_hand():
    """β = .1; k1 = log π − log π_ref is (1, −.5) and (2): sums of .5 and 2."""
    terms = Terms(kl_coef=0.1, kl_in="reward", kl_estimator="k1")
    old, reference = [scored(-1, -2), scored(-3)], [scored(-2, -1.5), scored(-5)]
    samples = [sample(2), sample(1)]
    rewards, sums = terms.penalised(f32(1, 0), samples, old, reference)
    assert rewards.dtype == np.float32
    assert rewards.tolist() == pytest.approx([1 - 0.05, -0.2])
    assert sums["kl/reference"] == (pytest.approx(2.5), 3)
    assert sums["kl/reward_penalty"] == (pytest.approx(0.25), 2)
    # Of the second response's three tokens the middle one is a tool's.
    samples[1] = sample(3, sampled=np.array([True, False, True]))
    old, reference = [old[0], scored(-3, 0, -1)], [reference[0], scored(-5, -9, -1.5)]
    rewards, sums = terms.penalised(f32(1, 0), samples, old, reference)
    assert rewards.tolist() == pytest.approx([1 - 0.05, -0.25])
    assert sums["kl/reference"] == (pytest.approx(3.0), 4)
    # Not in the loss too; and in the loss, nothing is taken off the rewards.
    assert terms.needs_old and not terms.of_loss().active
    other = Terms(kl_coef=0.1)
    assert other.penalised(f32(1, 0), samples, old, reference) == (pytest.approx([1, 0]), {})
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


TERMS = ("--kl-coef", "0.5", "--reference-every", "1", "--entropy-target", "9")
TERMS = (*TERMS, "--entropy-delta", "0.01", "--entropy-coef-range", "0", "1")


@pytest.mark.slow
@pytest.mark.bits
def test_a_run_with_terms_resumed_equals_an_unbroken_one(cache, tmp_path):
    """The reference that is refreshed and the coefficient that is controlled come back."""
    whole = whole_run(tmp_path / "whole", cache, *TERMS)
    run = as_of_step_2(whole, tmp_path / "run")
    result = job(2, "--resume", str(run), "--keep", "1", timeout_s=240)
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_run(run, whole)
    rows = read_metrics(whole)[1:]
    assert [row["entropy/coef"] for row in rows] == pytest.approx([0, 0.01, 0.02, 0.03])
    for row in rows:
        assert row["kl/reference"] > 0 and "kl/warm_start" not in row
        assert row["loss/kl"] == pytest.approx(0.5 * row["kl/reference"], rel=0.05)
    assert ["loss/entropy" in row for row in rows] == [False, True, True, True]
    assert read_config(whole)["entropy_coef_range"] == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "optimizer_steps", "said"),
    [
        (("--kl-coef", "0.5", "--kl-in", "reward", "--minibatches", "1"), 1, "kl/reward_penalty"),
        (("--gradient-at", "old", "--epochs", "2"), 4, "kl/warm_start"),
        (("--stop-ratio", "1e-9", "--epochs", "3"), 2, "kl/warm_start"),
    ],
    ids=["KL in the reward", "old gradients", "stopped epochs"],
)
def test_runs(more, optimizer_steps, said, cache, tmp_path):
    run = tmp_path / "run"
    result = job(2, *options(run, cache, "--save-every", "0", "--analyse-every", "0", *more))
    assert result.returncode == 0, result.stderr[-3000:]
    rows = read_metrics(run)[1:]
    assert len(rows) == 3 and all(said in row for row in rows)
    tokens = read_tokens(run).to_pandas()
    if "old" in more:  # every visit is at the weights that the step began with
        assert (tokens.ratio - 1).abs().max() < 1e-3
    epochs = {row["tokens/visited"] / row["tokens/sampled"] for row in rows}
    assert epochs == {2} if "old" in more else {1}
    if "reward" in more:
        # After the first step the policy is no longer the start model: groups that are all right
        # have advantages by their KL. The rewards that are reported are the verdicts.
        assert set(tokens.reward) <= {0.0, 1.0} and rows[-1]["kl/reward_penalty"] != 0
        assert rows[-1]["advantage/nonzero_rate"] > 0.99


@pytest.mark.slow
def test_the_recipe_with_groups_of_64_and_a_kl_penalty_on_its_stand_in(tmp_path, cache):
    config = "examples/configs/pro-grpo.yaml"
    small = ("--config", "examples/configs/stand-in.yaml", "--prompts", "2", "--steps", "2")
    result = job(
        2, "--config", config, *small, "--output-dir", str(tmp_path / "run"), "--no-report",
        "--cache-dir", str(cache), "--dtype", "float32", "--eval-every", "2", timeout_s=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    stored, rows = read_config(tmp_path / "run"), read_metrics(tmp_path / "run")[1:]
    assert (stored["group"], stored["kl_coef"], stored["loss"]) == (64, 0.04, "up-grpo")
    assert len(rows) == 2 and rows[-1]["loss/kl"] > 0


class FakeActor:
    """The n-th update finds every log-prob n tenths above the old ones."""

    chunks = ()

    def __init__(self):
        self.at, self.terms, self.started = [], [], 0

    def weights_now(self) -> list:
        self.started += 1
        return ["old weights"]

    def update(self, samples, loss, *, record, terms, at, seed) -> Update:
        self.at.append(at)
        self.terms.append(terms)
        moved = f32(0.1 * len(self.at))
        return Update(
            log_probs=[s.old_log_probs + moved for s in samples],
            clipped=[np.array([False]) for _ in samples],
            gradient_weight=[f32(1) for _ in samples],
            loss=0.0, metrics={}, grad_norm=0.0,
        )  # fmt: skip


def learner(**options) -> Learner:
    return Learner(
        actor=FakeActor(), reference=None, behind=None, place=Place(), seed=0, epochs=4,
        **{"terms": Terms(), "loss": PolicyLossConfig(), "minibatches": 2} | options,
    )  # fmt: skip


def updated(**options):
    mine = learner(**options)
    samples = [Sample(tokens=np.array([i, 1]), prompt_length=1) for i in range(4)]
    samples = for_update(samples, f32(1, -1, 1, -1), None, 8)
    scores = [scored(-9) for _ in samples]
    return mine.actor, mine.update(samples, [], OldScores(native=scores, held=None), step=1)


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


def test_the_results_of_tools_are_no_tokens_of_the_distance():
    """|r − 1| is e^.1 − 1 = .105 at both tokens that were sampled, 0 at the eight others."""
    sampled = np.array([True] + [False] * 8 + [True])
    mine = [replace(sample(10, sampled=sampled), old_log_probs=f32(*[-1] * 10))]
    visited = [np.where(sampled, -0.9, -1).astype(np.float32)]
    with groups.process_groups(Layout()):
        for limit, stops in ((0.1, True), (0.11, False)):
            assert learner(stop_ratio=limit)._stops(mine, visited) == stops


def test_the_loss_that_stops_early_does_so():
    """ESPO's δ is .25, unless another is asked for, or none."""
    for loss, asked, found in (
        ("ppo-early-stop", None, 0.25),
        ("up-ppo-early-stop", 0.1, 0.1),
        ("ppo-early-stop", math.inf, None),
        ("grpo", None, None),
        ("grpo", 0.5, 0.5),
    ):
        assert TrainConfig.of(loss=loss, stop_ratio=asked, epochs=2).stop_ratio == found
    with pytest.raises(UserError, match="no loss of its own: give --loss reinforce --gradient-at"):
        TrainConfig.of(loss="fixed-old-policy")


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


# The last response's failed, and so has none.
KINDS = [dict(a=1.0, b=0.0), dict(a=0.0, b=1.0), dict(b=0.0, a=0.5), {}]
WEIGHTS = dict(a=1.0, b=0.5)


def advantages(kind: str) -> list[float]:
    """Those of 2 prompts × 2 responses over the data-parallel ranks, in their order."""
    with groups.process_groups(Layout()):
        rank, ranks = groups.data_parallel()
        mine = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
        sampled = [[True] * n for n in (1, 3, 2, 2)]
        sampled[3][1:1] = [False] * 9  # a tool's
        rollouts = [SimpleNamespace(sampled_or_all=np.array(s)) for s in sampled[mine]]
        terms = [{n: (WEIGHTS[n], v) for n, v in one.items()} for one in KINDS[mine]]
        given = dict(group=2, kind=kind, terms_B=terms)
        return advantages_of(f32(1, 0, 0.5, 0)[mine], rollouts, **given).tolist()


# By hand. opo: baselines 1·1/4 and .5·2/4. gpg: R − mean, times 4 responses over the 2 rewarded.
# reinforce++: over the 8 tokens R sums to 2 and R² to 1.5, a variance of (1.5 − 4/8)/7.
BY_HAND = {
    "opo": [0.75, -0.25, 0.25, -0.25],
    "gpg": [1.0, -1.0, 0.5, -0.5],
    "reinforce++": [(r - 0.25) * math.sqrt(7) for r in (1, 0, 0.5, 0)],
    # gdpo: two rewards that differ are at ±√.5, two equal ones at 0. a + b/2 is √.5 times ½, −½,
    # 1, −1, which over 1, 3, 2 and 2 tokens sums to −√.5 and, squared, to 2.5.
    "gdpo": [
        (math.sqrt(0.5) * x + math.sqrt(0.5) / 8) / math.sqrt((2.5 - 0.5 / 8) / 7)
        for x in (0.5, -0.5, 1, -1)
    ],
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", BY_HAND)
def test_advantages_that_need_lengths_or_the_whole_batch(kind, ranks):
    found = [value for part in run_ranks(ranks, advantages, kind) for value in part]
    assert found == pytest.approx(BY_HAND[kind], rel=1e-5)


@pytest.mark.parametrize("terms", [{}, {"format": (1.0, 0.5)}])
def test_gdpo_of_one_reward_is_refused(terms):
    found = ", ".join(terms) or "one number"
    with groups.process_groups(Layout()), pytest.raises(UserError, match=f"have {found} alone"):
        rollouts = [SimpleNamespace(sampled_or_all=np.array([True]))] * 2
        advantages_of(f32(1, 0), rollouts, group=2, kind="gdpo", terms_B=[terms] * 2)


def test_gtpos_weights_and_advantages_are_made_of_the_groups_responses():
    """Both begin with 5, a conflict token, and end differently. Entropies .2 and .9 in the mean:
    1 − .1·.2, and above .7 none. The second prompt's responses share nothing."""
    made = [
        ([1, 5, 6, 7], 1, 1.0, (0.1, 0.2, 0.3), [2, 1, 1], 0.98),
        ([1, 5, 8], 1, -1.0, (0.9, 0.9), [0, 1], 0.0),
        ([1, 2, 5], 2, 1.0, (0.5,), [1], 0.95),
        ([1, 2, 8], 2, -1.0, (0.5,), [1], -1.05),
    ]
    samples = [
        Sample(tokens=np.array(ids), prompt_length=prompt, advantage=a)
        for ids, prompt, a, *_ in made
    ]
    scores = [SimpleNamespace(entropy=f32(*entropy)) for *_, entropy, _, _ in made]
    mine = learner(loss=PolicyLossConfig.preset("gtpo"), group=2)
    found = mine.weighed(samples, OldScores(native=scores, held=None))
    for one, (*_, weights, advantage) in zip(found, made, strict=True):
        assert one.token_weights.tolist() == weights
        assert one.advantage == pytest.approx(advantage, abs=1e-7)
    assert learner().weighed(samples, None) is samples


@pytest.mark.parametrize(("loss", "whole"), [("real", True), ("grpo", False)])
def test_a_loss_of_groups_gets_whole_groups_in_its_mini_batches(loss, whole):
    mine = learner(loss=PolicyLossConfig.preset(loss), group=4, minibatches=3)
    parts = mine._mini_batches(np.random.default_rng(0), 24)
    assert [len(part) for part in parts] == [8] * 3
    assert sorted(np.concatenate(parts)) == [*range(24)]
    blocks = np.concatenate(parts).reshape(6, 4)
    assert (np.ptp(blocks // 4, axis=1) == 0).all() == whole
    assert blocks[:, 0].tolist() != [*range(0, 24, 4)]  # shuffled
    config = TrainConfig.of(loss=loss, group=5, micro_batch=128)
    assert config.micro_batches(10).sequences == (125 if whole else 128)
    if whole:
        with pytest.raises(UserError, match=r"micro_batch_tokens=512 .*whole groups"):
            TrainConfig.of(loss=loss, group=5, micro_batch_tokens=512)


NEEDY = {
    "real": (("--loss", "real", "--micro-batch", "13"), None),
    "gtpo": (("--loss", "gtpo", "--analyse-every", "0"), None),
    "gdpo": (("--advantage", "gdpo", "--reward", "exact", "0.5*length:4"), "reward/of/length"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDY)
def test_runs_with_what_needs_more(name, cache, tmp_path):
    run, (more, said) = tmp_path / "run", NEEDY[name]
    result = job(2, *options(run, cache, "--save-every", "0", *more))
    assert result.returncode == 0, result.stderr[-3000:]
    rows = read_metrics(run)[1:]
    assert len(rows) == 3 and all(row["grad_norm"] > 0 for row in rows)
    assert said is None or all(said in row for row in rows)


TWO = {"advantage": "gdpo", "reward": ("exact", "length:4")}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"advantage": "bnpo", "reward_wrong": -1.0}, "'bnpo' is defined for rewards from 0 to 1"),
        ({"advantage": "maxrl", "overlong_buffer": 1}, "'maxrl' is defined for rewards from 0 to"),
        ({"advantage": "bnpo", "kl_coef": 0.1, "kl_in": "reward"}, "kl_in=reward give others"),
        ({"advantage": "gdpo"}, "'gdpo' takes several rewards .* --reward several words"),
        ({"advantage": "gdpo", "reward": ("exact",)}, "with one reward take grpo, dr-grpo"),
        (TWO | {"reward_wrong": -1.0}, "reward_wrong with advantage='gdpo'"),
        (
            TWO | {"overlong_buffer": 1, "kl_coef": 1.0, "kl_in": "reward"},
            "overlong_buffer, kl_in=reward with advantage='gdpo'.*--kl-in loss",
        ),
        ({"loss": "real", "micro_batch": 7}, "whole groups in a micro-batch: at least group=8"),
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
