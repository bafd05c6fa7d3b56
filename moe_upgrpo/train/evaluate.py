"""Accuracy on problems, greedy and sampled, computed in shares by as many ranks as there are.

N problems, n samples of each, c correct ones among them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_upgrpo.errors import UserError
from moe_upgrpo.rollout.base import Engine, SamplingConfig
from moe_upgrpo.tasks.base import Problem, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalCounts:
    """Per problem: whether greedy decoding was right `[N]` and how many of n samples `[N]`."""

    greedy_N: np.ndarray
    correct_N: np.ndarray
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
        nothing = np.zeros(0, dtype=np.int64)
        return EvalCounts(greedy_N=nothing, correct_N=nothing, samples=samples)
    prompts = [problem.prompt_ids for problem in problems]

    def right(config: SamplingConfig, each: int) -> np.ndarray:
        rollouts = engine.generate(prompts, config, samples_per_prompt=each, seed=seed)
        rewards = [
            task.reward(problems[index // each], rollout.response_ids) == 1.0
            for index, rollout in enumerate(rollouts)
        ]
        return np.array(rewards, dtype=np.int64).reshape(len(problems), each).sum(axis=1)

    return EvalCounts(
        greedy_N=right(replace(sampling, temperature=0.0), 1),
        correct_N=right(sampling, samples),
        samples=samples,
    )


def finish(shares: Sequence[EvalCounts], *, ks: Sequence[int] = ()) -> dict[str, float]:
    """The metrics of all shares together; their order and sizes do not matter.

    eval/greedy = share of problems right under greedy decoding; eval/pass@k = mean of `pass_at_k`
    over problems, for k = 1, each of `ks` and the number of samples; eval/problems = N.

    Raises UserError if there are no problems, the shares' numbers of samples differ, or k > n.
    """
    counts = {share.samples for share in shares}
    greedy_N = np.concatenate([[], *(share.greedy_N for share in shares)])
    correct_N = np.concatenate([[], *(share.correct_N for share in shares)])
    if not len(greedy_N) or len(counts) != 1:
        raise UserError(
            f"{len(greedy_N)} problems in {len(shares)} shares with {sorted(counts)} samples each; "
            "at least one problem and one number of samples are needed."
        )
    samples = counts.pop()
    return {
        "eval/problems": len(greedy_N),
        "eval/greedy": float(greedy_N.mean()),
    } | {
        f"eval/pass@{k}": float(pass_at_k(samples, correct_N, k).mean())
        for k in sorted({1, *ks, samples})
    }


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
