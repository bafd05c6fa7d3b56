"""Groups, dynamic sampling, shaped rewards, and a job's batches from a scripted engine.

Whole runs with them are in test_data_runs.py.
"""

from dataclasses import replace

import numpy as np
import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.tasks import ArithmeticTask, Verdict
from moe_upgrpo.train import rollouts as rollouts_module
from moe_upgrpo.train.batch import Group, collect, shaped_rewards
from moe_upgrpo.train.place import SAMPLING, Place, seed_of
from moe_upgrpo.train.rollouts import Rollouts
from moe_upgrpo.train.stopping import Stopping
from tests.train.test_evaluate import ScriptedEngine


def group(*rewards, **first):
    """Two responses with their verdicts; `first`: what else is said of the first."""
    verdicts = [Verdict.of(r, **(first if i == 0 else {})) for i, r in enumerate(rewards)]
    return Group(rollouts=[f"{rewards}{i}" for i in range(2)], verdicts=verdicts)


RIGHT, WRONG, MIXED, OTHER = group(1, 1), group(0, 0), group(1, 0), group(0, 1)


def test_without_refills_every_group_is_kept():
    slow = group(1, 1, killed=1)
    batch = collect(lambda refill: [slow, MIXED], groups=2, max_refills=0)
    assert batch.groups == [slow, MIXED]
    assert batch.rollouts == [*slow.rollouts, *MIXED.rollouts]
    assert batch.correct_B.tolist() == [1, 1, 1, 0]
    assert batch.sampled.shares() == {
        "reward/correct_rate": (3, 4),
        "reward/failed_rate": (0, 4),
        "verifier/killed_rate": (1, 4),
        "groups/mixed_rate": (1, 2),
        "groups/kept": (2, 2),
    }


def test_refills_take_the_place_of_groups_that_teach_nothing():
    batches = [[RIGHT, MIXED], [group(0, 0, failed="raised"), RIGHT], [OTHER, MIXED]]
    asked = []

    def sample(refill):
        asked.append(refill)
        return batches[refill]

    batch = collect(sample, groups=2, max_refills=5)
    assert batch.groups == [MIXED, OTHER]  # the last one's surplus is dropped
    assert asked == [0, 1, 2]
    # 6 groups, 3 of them mixed, 2 trained on; right: 2+1, 0+2, 1+1 of 12.
    assert batch.sampled.shares() == {
        "reward/correct_rate": (7, 12),
        "reward/failed_rate": (1, 12),
        "verifier/killed_rate": (0, 12),
        "groups/mixed_rate": (3, 6),
        "groups/kept": (2, 6),
    }


def test_refills_are_bounded():
    asked = []
    words = "max_refills=2: 6 groups were sampled, 0 of them have right and wrong .*; 1 are needed"
    with pytest.raises(UserError, match=words):
        collect(lambda r: (asked.append(r), [RIGHT, WRONG])[1], groups=1, max_refills=2)
    assert asked == [0, 1, 2]


def test_rewards_that_are_no_verdicts():
    """Groups whose rewards differ teach something, though no response is right."""
    same, apart = group(0.25, 0.25), group(0.25, 0.75, parts={"form": 0.5, "code": 1.0})
    batch = collect(lambda refill: [same, apart], groups=1, max_refills=1)
    assert batch.groups == [apart] and batch.earned_B.tolist() == [0.25, 0.75]
    shares = batch.sampled.shares()
    assert shares["reward/correct_rate"] == (0, 4) and shares["groups/mixed_rate"] == (1, 2)
    assert shares["reward/of/form"] == (0.5, 1) and shares["reward/of/code"] == (1.0, 1)
    earned, lengths = np.array([0.0, 0.25, 1.0, 2.0]), np.ones(4)
    shaped = shaped_rewards(earned, lengths, wrong=-1, max_length=20)
    assert shaped.tolist() == [-1, -0.5, 1, 3]


def test_shaped_rewards():
    """At most 20 tokens, the last 4 of them dear: nothing at 16, half of the penalty at 18."""
    correct, lengths = np.float32([1, 0, 1, 0, 1]), np.array([16, 16, 18, 20, 20])
    assert shaped_rewards(correct, lengths, max_length=20).tolist() == [1, 0, 1, 0, 1]
    shaped = shaped_rewards(correct, lengths, wrong=-1, max_length=20, overlong_buffer=4)
    assert shaped.tolist() == [1, -1, 0.5, -2, 0]
    assert shaped.dtype == np.float32
    half = shaped_rewards(correct, lengths, max_length=20, overlong_buffer=4, overlong_factor=0.5)
    assert half.tolist() == [1, 0, 0.75, -0.5, 0.5]


class Sampling:
    temperature, max_new_tokens = 1.0, 4


def sampler(monkeypatch, *, task=None, place=None, **options) -> Rollouts:
    """One rank's rollouts by the scripted engine: a + b is right a % 5 times of 4."""
    monkeypatch.setattr(rollouts_module.groups, "gather_in_model_copy", lambda items: list(items))
    made = Rollouts(
        task=task or ArithmeticTask(),
        engine=ScriptedEngine(),
        sampling=Sampling(),
        place=place or Place(),
        stopping=Stopping(1),
        seed=0,
        steps=60,
        **({"group": 4, "prompts": 6} | options),
    )
    made._check_versions = lambda rollouts, step: None  # the scripted engine's is always 0
    return made


def prompts(batch):
    return [bytes(group.rollouts[0].prompt_ids) for group in batch.groups]


def test_a_job_keeps_mixed_groups_and_does_it_again_the_same_way(monkeypatch):
    dynamic = sampler(monkeypatch, max_refills=20)
    batch = dynamic.batch(3)
    assert len(batch.groups) == 6 and len(set(prompts(batch))) == 6
    for group in batch.groups:
        a = 10 * group.rollouts[0].prompt_ids[0] + group.rollouts[0].prompt_ids[1] - 33
        assert group.correct_G.tolist() == [i < a % 5 for i in range(4)]
        assert a % 5 not in (0, 4)
    assert prompts(dynamic.batch(3)) == prompts(batch)
    assert prompts(dynamic.batch(4)) != prompts(batch)
    # Two ranks share the step's problems and fill their shares for themselves.
    shares = []
    for rank in (0, 1):
        place = Place(dp_rank=rank, dp_size=2)
        shares.append(prompts(sampler(monkeypatch, max_refills=20, place=place).batch(3)))
    assert [len(share) for share in shares] == [3, 3]
    assert not set(shares[0]) & set(shares[1])


def test_a_refill_samples_with_seeds_of_its_own():
    seeds = [seed_of(0, SAMPLING, 1, 0, refill) for refill in range(3)]
    assert len(set(seeds)) == 3
    assert seeds[0] == seed_of(0, SAMPLING, 1, 0)


def test_what_a_job_says_where_refills_do_not_suffice(monkeypatch):
    short = sampler(monkeypatch, max_refills=1, prompts=5000, group=2)  # of 8,999
    with pytest.raises(UserError, match=r"max_refills=1: 5000 groups .* All problems were tried"):
        short.batch(1)

    class Never(ArithmeticTask):
        def reward(self, problem, response_ids):
            return 0.0

    never = sampler(monkeypatch, max_refills=1, task=Never())
    with pytest.raises(
        UserError, match=r"12 groups were sampled, 0 of them .*; 6 are needed\. Allow"
    ):
        never.batch(1)


def test_what_a_batch_itself_says_is_not_hidden(monkeypatch):
    broken = sampler(monkeypatch, max_refills=1)

    def check(rollouts, step):
        raise UserError("another weight version")

    broken._check_versions = check
    with pytest.raises(UserError, match=r"^another weight version$"):
        broken.batch(1)


def test_a_verdict_that_is_none_names_its_prompt(monkeypatch):
    class Broken(ArithmeticTask):
        def reward(self, problem, response_ids):
            return float("nan")

    broken = sampler(monkeypatch, task=Broken())
    with pytest.raises(UserError, match=r"gave nan to a response to '\d\d\+\d\d='"):
        broken.batch(1)


def test_a_reward_that_fails_for_all_responses_ends_the_run(monkeypatch):
    class Broken(ArithmeticTask):
        def judge(self, problems, responses, sampled):
            return [Verdict(reward=0.0, correct=0.0, failed="mine: no key")] * len(problems)

    broken = sampler(monkeypatch, task=Broken())
    words = r"failed for all 24 responses .* problem '\d\d\+\d\d=': mine: no key"
    with pytest.raises(UserError, match=words):
        broken.batch(1)


def test_each_rank_of_a_model_copy_judges_its_part_and_has_all_verdicts(monkeypatch):
    whole = sampler(monkeypatch)
    problems = whole.problems(1)
    rollouts = whole._generated(problems, 1)
    expected = whole._judged(problems, rollouts)
    parts = []
    monkeypatch.setattr(
        rollouts_module.groups,
        "gather_in_model_copy",
        lambda items: parts.append(list(items)) or list(items),
    )
    for rank in (0, 1):
        place = Place(rank=rank, size=2, copy_rank=rank, copy_size=2)
        replace(whole, place=place, ahead=None)._judged(problems, rollouts)
    assert [len(part) for part in parts] == [12, 12]
    assert [*parts[0], *parts[1]] == [x for group in expected for x in group.verdicts]
