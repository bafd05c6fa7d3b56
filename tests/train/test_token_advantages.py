"""Advantages of single tokens: by hand, as options, and in runs."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moe_upgrpo.compare.plan import Run, from_values
from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import group_advantages
from moe_upgrpo.megatron import groups
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.store import read_config, read_metrics, read_tokens
from moe_upgrpo.tools.plan import _passes
from moe_upgrpo.tools.plan_options import PlanConfig
from moe_upgrpo.train.advantages import advantages_of, with_nthr
from moe_upgrpo.train.analysis import OldScores
from moe_upgrpo.train.config import TrainConfig
from moe_upgrpo.train.learner import for_update
from tests.compare.test_plan import VALUES
from tests.train.test_launch import job
from tests.train.test_resume import as_of_step_2, assert_same_run, whole_run
from tests.train.test_terms import f32, learner


def old(probabilities, squares) -> SimpleNamespace:
    return SimpleNamespace(log_probs=np.log(f32(*probabilities)), sum_pi_squared=f32(*squares))


def otb(rewards, masks, scores) -> list[list[float]]:
    rollouts = [SimpleNamespace(sampled_or_all=np.array(mask, bool)) for mask in masks]
    found = advantages_of(f32(*rewards), rollouts, group=2, kind="otb", old=scores)
    assert all(one.dtype == np.float32 for one in found)
    return [one.tolist() for one in found]


def test_otb_by_hand():
    """Steps of W: 1 − 2·.5 + .5 = .5 and 1 − .5 + .75 = 1.25. At the first token b = .5/1.75; at
    the second, whose W are 1 and 1.25 + .5, b = 1/2.75; the third is alone. The second group's
    first token is a tool's in one of them, where the other one is alone."""
    half, quarter = (0.5, 0.5), (0.25, 0.75)
    scores = [
        old([half[0]] * 3, [half[1]] * 3),
        old([quarter[0], half[0]], [quarter[1], half[1]]),
        old([half[0]] * 2, [half[1]] * 2),
        old([half[0]] * 2, [half[1]] * 2),
    ]
    found = otb([1, 0, 0, 2], [[1, 1, 1], [1, 1], [0, 1], [1, 1]], scores)
    assert found[0] == pytest.approx([1 - 2 / 7, 1 - 4 / 11, 1])
    assert found[1] == pytest.approx([-2 / 7, -4 / 11])
    # W of the second token: .5 and 1, b = 2·1/1.5.
    assert found[2] == pytest.approx([0, -4 / 3]) and found[3] == pytest.approx([2, 2 / 3])
    samples = [Sample(tokens=np.arange(1 + len(a)), prompt_length=1) for a in found]
    for one, expected in zip(
        for_update(samples, list(map(np.array, found)), None, 0), found, strict=True
    ):
        assert one.advantage.tolist() == expected


def test_otb_of_equal_rewards_and_of_certain_tokens():
    """Exactly 0 where several are left. A certain token's Σπ² may round to below 1: its W is 0."""
    certain = old([1.0, 0.5], [1 - 1e-7, 0.5])
    found = otb([1, 1], [[1, 1], [1]], [certain, old([1.0], [1 - 1e-7])])
    assert found == [[0, 1], [0]]
    found = otb([1, 0], [[1, 1], [1, 1]], [certain, certain])
    assert found[0] == pytest.approx([1, 0.5]) and found[1] == pytest.approx([0, -0.5])


def test_group_advantages_names_the_function_for_tokens():
    with pytest.raises(UserError, match=r"'otb' given, .*needs π_old and Σπ².*or one of grpo, dr-"):
        group_advantages(torch.ones(4), 2, "otb")


def made(ids, advantage, hidden, sampled=None):
    """A response to a prompt of one token; hidden states of H = 1 at the tokens that count."""
    one = Sample(tokens=np.array([9, *ids]), prompt_length=1, advantage=advantage, sampled=sampled)
    log_probs = np.full(len(ids), np.log(0.5), np.float32)
    return one, SimpleNamespace(log_probs=log_probs, hidden=torch.tensor(hidden)[:, None])


def test_nthr_by_hand():
    """Every id has π = .5: g is (.5, −.5) of id 3 and (−.5, .5) of id 5. The right response has
    M = (.5, −.5)·(1 + 2) and so s = 1.5·h at id 3, −1.5·h at id 5: its mean is 2.25. Of the wrong
    ones 3 is above, 2.1 and −3 are not; a tool's token is left as it is. η = 2·|.5 − 1/3|."""
    tool = np.array([True, False, True])
    of_group = [
        made([3, 3], 2.0, [1.0, 2.0]),
        made([3, 7, 5], -3.0, [2.0, 2.0], sampled=tool),
        made([3], -1.0, [1.4]),
    ]
    right_ones = [made([3], 1.0, [1.0])] * 3  # a group of one sign stays
    samples, scored = zip(*of_group, *right_ones, strict=True)
    asked = []

    def head_rows(ids_V):
        asked.append(ids_V.tolist())
        return torch.zeros(len(ids_V), 1)

    actor = SimpleNamespace(temperature=0.7, head_rows=head_rows)
    with groups.process_groups(Layout()):
        for beta, eta, expected in (
            (1.0, None, [[-1, -3, -3], [-1]]),
            (0.9, 0.5, [[-1.5, -3, -3], [-0.5]]),
        ):
            found = with_nthr(samples, scored, actor, group=3, beta=beta, eta=eta)
            assert found[0] is samples[0] and found[3:] == [*samples[3:]]
            for one, advantages in zip(found[1:3], expected, strict=True):
                assert one.advantage.dtype == np.float32
                assert one.advantage.tolist() == pytest.approx(advantages)
    assert asked == [[3, 5]] * 2


class Recording:
    """An actor that says what was to be recorded."""

    layer_ids = (0,)

    def __init__(self):
        self.asked = []

    def score(self, samples, *, record):
        self.asked.append(record)
        return [SimpleNamespace(routes=None) for _ in samples]


@pytest.mark.parametrize("replay", ["none", "R2", "R3"])
def test_the_old_policys_pass_runs_where_the_advantages_need_it(replay):
    """And records of the head only for the policy that the loss has as the old one."""
    samples = [Sample(tokens=np.arange(3), prompt_length=1)]
    rollouts = [SimpleNamespace(routes=None)]

    def asked(**more):
        mine = learner(replay=replay, minibatches=1, **more)
        mine.actor, mine.epochs = Recording(), 1
        return mine.score_old(1, samples, rollouts), mine.actor.asked

    assert (asked()[0] is None) == (replay == "none")
    scores, records = asked(head_records=("sum_pi_squared",))
    assert isinstance(scores, OldScores)
    of_head = ["sum_pi_squared" in record for record in records]
    assert of_head == ([False, True] if replay == "R3" else [True])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"nthr_eta": 0.5}, "nthr_eta=0.5 without nthr_beta: there is no mask"),
        ({"nthr_beta": -1.0}, "nthr_beta=-1.0: 0 or more"),
        ({"nthr_beta": float("nan")}, "nthr_beta=nan: 0 or more"),
        ({"nthr_beta": 1.0, "nthr_eta": 1.5}, "nthr_eta=1.5: from 0 to 1"),
        ({"nthr_beta": 1.0, "advantage": "otb"}, "nthr_beta=1.0 with advantage='otb': .*one out"),
        ({"nthr_beta": 1.0, "loss": "up-gspo"}, "nthr_beta=1.0 with loss='up-gspo': .*gspo-token"),
        (
            {"advantage": "otb", "loss": "gtpo"},
            "advantage='otb' with loss='gtpo': .*goes with grpo",
        ),
        ({"advantage": "otb", "loss": "real"}, "with loss='real': each token gets an advantage"),
    ],
)
def test_options_that_cannot_be(given, said):
    with pytest.raises(UserError, match=said) as error:
        TrainConfig.of(**given)
    assert "gspo," not in str(error.value).partition("goes with")[2]


def test_a_plan_counts_the_old_policys_pass():
    passes = {
        name: _passes(PlanConfig.of(minibatches=1, reference_kl=False, **given))
        for name, given in {
            "none": {},
            "otb": {"advantage": "otb"},
            "nthr": {"nthr_beta": 1.0},
        }.items()
    }
    assert passes == {"none": (1, 1), "otb": (2, 1), "nthr": (2, 1)}


def test_arms_of_a_comparison():
    arms = {"otb": {"advantage": "otb"}, "nthr": {"nthr_beta": 1.0, "nthr_eta": 0.0}}
    plan = from_values(VALUES | {"arms": arms, "contrasts": [["nthr", "otb"]]})
    found = {arm: plan.config(Run(arm=arm, seed=0)).objective for arm in arms}
    assert found["otb"].head_records == ("sum_pi_squared",)
    assert found["nthr"].head_records == ("hidden",) and found["nthr"].nthr_eta == 0
    wrong = copy.deepcopy(arms) | {"otb": {"advantage": "otb", "loss": "gspo"}}
    with pytest.raises(UserError, match="arm otb: advantage='otb' with loss='gspo'"):
        from_values(VALUES | {"arms": wrong, "contrasts": [["nthr", "otb"]]})


KINDS = {
    "otb": ("--advantage", "otb"),
    "nthr": ("--nthr-beta", "0.5", "--nthr-eta", "0.5"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_run_and_the_run_resumed(name, cache, tmp_path):
    """On two ranks, TP2·EP2. Tokens of a response have different advantages in the log."""
    whole = whole_run(tmp_path / "whole", cache, *KINDS[name])
    run = as_of_step_2(whole, tmp_path / "run")
    result = job(2, "--resume", str(run), "--keep", "1", timeout_s=240)
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_run(run, whole)
    rows = read_tokens(whole, columns=["step", "sequence", "advantage"]).to_pandas()
    different = rows.groupby(["step", "sequence"]).advantage.nunique()
    assert 0 < (different > 1).sum() < len(different)
    assert all(row["grad_norm"] > 0 for row in read_metrics(whole)[1:])
    assert read_config(whole)["nthr_beta"] == (0.5 if name == "nthr" else None)
