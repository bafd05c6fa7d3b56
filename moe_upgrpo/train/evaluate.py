# SPDX-License-Identifier: Apache-2.0
"""Accuracy on problems, greedy and sampled, computed in shares by as many ranks as there are.

N problems, n samples of each, c correct ones among them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_upgrpo.errors import UserError
from moe_upgrpo.rollout.base import Engine, Rollout, SamplingConfig
from moe_upgrpo.rollout.turns import converse
from moe_upgrpo.tasks.base import Problem, Task, judged


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalCounts:
    """Per problem: whether greedy decoding was right `[N]`, how many of n samples were `[N]`, and
    whether their majority was `[N]` (`majority_vote`)."""

    greedy_N: np.ndarray
    correct_N: np.ndarray
    majority_N: np.ndarray
    samples: int


def count_correct(
    engine: Engine,
    problems: Sequence[Problem],
    task: Task,
    *,
    sampling: SamplingConfig,
    samples: int,
    seed: int,
) -> EvalCounts:
    """Decode each problem once greedily and `samples` times with `sampling`, and verify.

    A share without problems (more ranks than problems) gives empty counts.
    """
    if not problems:
        nothing = np.zeros(0)
        return EvalCounts(greedy_N=nothing, correct_N=nothing, majority_N=nothing, samples=samples)

    def responses(config: SamplingConfig, each: int) -> list[list[Rollout]]:
        """Responses by problem."""
        rollouts = converse(engine, task, problems, config, samples_per_prompt=each, seed=seed)
        return [rollouts[start : start + each] for start in range(0, len(rollouts), each)]

    def right_ones(of_problems: list[list[Rollout]]) -> list[list[bool]]:
        asked = [p for p, of in zip(problems, of_problems, strict=True) for _ in of]
        given = [rollout for of in of_problems for rollout in of]
        ids, sampled = ([getattr(r, name) for r in given] for name in ("response_ids", "sampled"))
        verdicts = iter(judged(task, asked, ids, sampled))
        return [[next(verdicts).correct == 1 for _ in of] for of in of_problems]

    greedy = [right for (right,) in right_ones(responses(replace(sampling, temperature=0.0), 1))]
    correct, majority = [], []
    of_problems = responses(sampling, samples)
    for of_problem, right in zip(of_problems, right_ones(of_problems), strict=True):
        correct.append(sum(right))
        classes = task.answer_classes([rollout.response_ids for rollout in of_problem])
        majority.append(majority_vote(right, classes))
    return EvalCounts(
        greedy_N=np.array(greedy, dtype=np.int64),
        correct_N=np.array(correct),
        majority_N=np.array(majority),
        samples=samples,
    )


def finish(shares: Sequence[EvalCounts], *, ks: Sequence[int] = ()) -> dict[str, float]:
    """The metrics of all shares together; their order and sizes do not matter.

    Means over problems: eval/greedy, right under greedy decoding; eval/pass@k, `pass_at_k`, for
    k = 1, each of `ks` and the number of samples n; eval/avg@n, c/n; eval/maj@n, `majority_vote`;
    eval/best@n, 1[c >= 1]. By their formulas avg@n is pass@1 and best@n is pass@n: they are here
    under the names by which results are published. eval/problems = N.

    Raises UserError if there are no problems, the shares' numbers of samples differ, or k > n.
    """
    counts = {share.samples for share in shares}
    greedy_N = np.concatenate([[], *(share.greedy_N for share in shares)])
    correct_N = np.concatenate([[], *(share.correct_N for share in shares)])
    majority_N = np.concatenate([[], *(share.majority_N for share in shares)])
    if not len(greedy_N) or len(counts) != 1:
        raise UserError(
            f"{len(greedy_N)} problems in {len(shares)} shares with {sorted(counts)} samples each; "
            "at least one problem and one number of samples are needed."
        )
    samples = counts.pop()
    return {
        "eval/problems": len(greedy_N),
        "eval/greedy": float(greedy_N.mean()),
        f"eval/avg@{samples}": float((correct_N / samples).mean()),
        f"eval/maj@{samples}": float(majority_N.mean()),
        f"eval/best@{samples}": float((correct_N >= 1).mean()),
    } | {
        f"eval/pass@{k}": float(pass_at_k(samples, correct_N, k).mean())
        for k in sorted({1, *ks, samples})
    }


def by_problem(shares: Sequence[EvalCounts], problems: Sequence[Problem]) -> dict[str, list]:
    """The columns of `moe_upgrpo.store.write_evaluation`, in the order of `problems`.

    Share r of R has problems r, r + R, r + 2R, ...
    """
    rows = {}
    for rank, share in enumerate(shares):
        places = range(rank, len(problems), len(shares))
        counts = zip(share.greedy_N, share.correct_N, share.majority_N, strict=True)
        for place, (greedy, correct, majority) in zip(places, counts, strict=True):
            rows[place] = (bool(greedy), share.samples, int(correct), float(majority))
    ordered = [(place, problem.prompt, *rows[place]) for place, problem in enumerate(problems)]
    names = ("problem", "prompt", "greedy", "samples", "correct", "majority")
    return dict(zip(names, map(list, zip(*ordered, strict=True)), strict=True))


def majority_vote(right: Sequence[bool], classes: Sequence[int | None]) -> float:
    """Whether the answer that most samples of a problem give is right.

    Each sample votes for the class of its answer (`Task.answer_classes`); one without an answer
    does not vote. A class is right if its first sample is. Where t classes tie for most votes, one
    of them is drawn: the result is the share of right ones among the t, the chance of a right
    draw. Without any vote 0.
    """
    votes = Counter(answer for answer in classes if answer is not None)
    tied = [answer for answer, count in votes.items() if count == max(votes.values())]
    return sum(right[classes.index(answer)] for answer in tied) / len(tied) if tied else 0.0


def pass_at_k(samples: int, correct_N: np.ndarray, k: int) -> np.ndarray:
    """The unbiased estimate, per problem, of the chance that one of k samples is right.

    1 - C(n-c, k) / C(n, k), the share of k-subsets of the n samples with a right one (Chen et al.
    2021, arXiv 2107.03374, eq. 1), as the product 1 - Π_{i=n-c+1..n} (1 - k/i).

    Raises UserError unless 1 <= k <= n.
    """
    if not 1 <= k <= samples:
        raise UserError(f"pass@{k} from {samples} samples; 1 to {samples} are allowed for k.")
    return np.array(
        [
            1.0 - np.prod(np.maximum(0.0, 1.0 - k / np.arange(samples - int(c) + 1, samples + 1)))
            for c in correct_N
        ]
    )


def evaluate(
    engine: Engine,
    problems: Sequence[Problem],
    task: Task,
    *,
    sampling: SamplingConfig,
    samples: int,
    seed: int,
    ks: Sequence[int] = (),
) -> dict[str, float]:
    """`count_correct` and `finish` in one process."""
    counts = count_correct(engine, problems, task, sampling=sampling, samples=samples, seed=seed)
    return finish([counts], ks=ks)
