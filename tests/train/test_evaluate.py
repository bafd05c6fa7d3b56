from itertools import combinations

import numpy as np
import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.rollout import Rollout, SamplingConfig
from moe_upgrpo.store.metrics import metric
from moe_upgrpo.tasks import ArithmeticTask
from moe_upgrpo.train.evaluate import (
    EvalCounts,
    by_problem,
    count_correct,
    evaluate,
    finish,
    majority_vote,
    pass_at_k,
)

TASK = ArithmeticTask()
SAMPLING = SamplingConfig(max_new_tokens=4)


class ScriptedEngine:
    """Right on the first `a % (n + 1)` samples of `a + b`; greedy is right where b is even."""

    weight_version = 0

    def generate(self, prompts, sampling, *, samples_per_prompt, seed):
        rollouts = []
        for prompt in prompts:
            a, b = (10 * prompt[i] + prompt[i + 1] - 33 for i in (0, 3))  # "0" has token id 3
            for sample in range(samples_per_prompt):
                if sampling.temperature == 0:
                    right = b % 2 == 0
                else:
                    right = sample < a % (samples_per_prompt + 1)
                ids = TASK.solution_ids(TASK.problem(int(a), int(b) + (not right)))
                rows = len(prompt) + len(ids) - 1
                rollouts.append(
                    Rollout(
                        prompt_ids=prompt,
                        response_ids=ids,
                        logp_rollout=np.zeros(len(ids), np.float32),
                        routes=np.zeros((rows, 0, 0), np.uint8),
                        weight_version=0,
                        finished=True,
                    )
                )
        return rollouts


# With 4 samples, c = a % 5: 0, 2, 4. Greedy is right on the second alone.
PROBLEMS = [TASK.problem(10, 3), TASK.problem(42, 8), TASK.problem(94, 5)]


def test_evaluate_by_hand():
    result = evaluate(
        ScriptedEngine(), PROBLEMS, TASK, sampling=SAMPLING, samples=4, seed=0, ks=[2]
    )
    # c/n: 0, 1/2, 1. For c = 2, k = 2 the only losing pair of 6 is the two wrong samples: 5/6.
    assert result == pytest.approx(
        {
            "eval/problems": 3,
            "eval/greedy": 1 / 3,
            "eval/pass@1": (0 + 1 / 2 + 1) / 3,
            "eval/pass@2": (0 + 5 / 6 + 1) / 3,
            "eval/pass@4": 2 / 3,
            "eval/avg@4": (0 + 1 / 2 + 1) / 3,
            "eval/best@4": 2 / 3,
            # Wrong answers are all the same one: 4 wrong, 2 against 2 (half a point), 4 right.
            "eval/maj@4": (0 + 1 / 2 + 1) / 3,
        }
    )
    for name in result:
        assert metric(name).meaning


@pytest.mark.parametrize(
    ("right", "classes", "expected"),
    [
        ([1, 1, 0], [0, 0, 1], 1),
        ([1, 0, 0], [0, 1, 1], 0),
        ([1, 0, 0], [0, 1, 2], 1 / 3),  # three tie, one is right
        ([0, 0, 1, 1], [0, 0, 1, 1], 1 / 2),
        ([0, 0, 1], [None, None, 0], 1),  # two say nothing
        ([0, 0], [None, None], 0),
        ([0, 1, 1, 0, 0], [0, 1, 1, 2, None], 1),
        ([1], [0], 1),
    ],
)
def test_majority_vote(right, classes, expected):
    assert majority_vote([bool(x) for x in right], classes) == pytest.approx(expected)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_give_what_the_whole_gives(world):
    """More ranks than problems too: a share may be empty."""
    shares = [
        count_correct(
            ScriptedEngine(), PROBLEMS[rank::world], TASK, sampling=SAMPLING, samples=4, seed=rank
        )
        for rank in range(world)
    ]
    whole = evaluate(ScriptedEngine(), PROBLEMS, TASK, sampling=SAMPLING, samples=4, seed=0)
    assert finish(shares) == pytest.approx(whole)
    assert sum(len(share.greedy_N) for share in shares) == 3


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 7):
        for k in range(1, n + 1):
            for c in range(n + 1):
                subsets = list(combinations([True] * c + [False] * (n - c), k))
                expected = sum(any(subset) for subset in subsets) / len(subsets)
                assert pass_at_k(n, np.array([c]), k) == pytest.approx([expected])


def test_best_of_n_takes_one_right_sample():
    once = np.array([1, 0])
    counts = EvalCounts(greedy_N=once, correct_N=once, majority_N=np.array([0.5, 0]), samples=4)
    result = finish([counts])
    assert (result["eval/best@4"], result["eval/maj@4"], result["eval/avg@4"]) == (0.5, 0.25, 0.125)


def test_no_success_without_data():
    def counts(problems, samples=4):
        ones = np.ones(problems)
        return EvalCounts(greedy_N=ones, correct_N=ones, majority_N=ones, samples=samples)

    none, one = counts(0), counts(1)
    for shares in ([], [none]):
        with pytest.raises(UserError, match="0 problems"):
            finish(shares)
    with pytest.raises(UserError, match=r"\[2, 4\] samples"):
        finish([one, counts(1, samples=2)])
    with pytest.raises(UserError, match="pass@5 from 4 samples"):
        finish([one], ks=[5])
    with pytest.raises(UserError, match="pass@0"):
        finish([one], ks=[0])


def test_the_ranks_shares_in_the_order_of_the_problems():
    """Three problems on two ranks: the first and the third, and the second."""
    shares = [
        count_correct(ScriptedEngine(), PROBLEMS[r::2], TASK, sampling=SAMPLING, samples=4, seed=0)
        for r in range(2)
    ]
    assert by_problem(shares, PROBLEMS) == {
        "problem": [0, 1, 2],
        "prompt": ["10+03=", "42+08=", "94+05="],
        "greedy": [False, True, False],
        "samples": [4, 4, 4],
        "correct": [0, 2, 4],
        "majority": [0.0, 0.5, 1.0],
    }
