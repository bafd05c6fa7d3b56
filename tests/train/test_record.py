"""A step's token rows and sums, by hand: two sequences, two MoE layers, two optimizer visits."""

import numpy as np
import pytest
import torch

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import Metric
from moe_upgrpo.megatron.actor import Scored, Update
from moe_upgrpo.megatron.batch import Sample
from moe_upgrpo.rollout.base import Rollout
from moe_upgrpo.train import record
from moe_upgrpo.train.analysis import Gap
from moe_upgrpo.train.config import TrainConfig
from moe_upgrpo.train.loop import verified
from moe_upgrpo.train.start import Job


def f32(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def routes(*rows) -> np.ndarray:
    """One row for each token fed in; each row gives the experts of layer 0 and of layer 1."""
    return np.array(rows, dtype=np.uint8)


A, B, C = (0, 1), (2, 3), (1, 2)
FIRST = Rollout(  # positions 0 1 | 2 3 4: rows 1, 2, 3 belong to the response
    prompt_ids=np.array([5, 6]),
    response_ids=np.array([7, 8, 1]),
    logp_rollout=f32(-1.0, -2.0, -0.5),
    routes=routes((B, B), (A, B), (A, B), (A, A)),
    weight_version=0,
    finished=True,
)
SECOND = Rollout(  # positions 0 | 1 2: rows 0, 1
    prompt_ids=np.array([4]),
    response_ids=np.array([9, 9]),
    logp_rollout=f32(-3.0, -1.0),
    routes=routes((B, A), (C, A)),
    weight_version=0,
    finished=False,
)
OLD = [
    Scored(
        log_probs=f32(-1.1, -2.0, -0.5),
        entropy=f32(1.0, 2.0, 3.0),
        # row 0 differs, which is the prompt's; row 1 agrees in another order; row 2 differs in
        # layer 1, row 3 in both.
        routes=np.array([(A, A), ((1, 0), B), (A, C), (C, B)], dtype=np.int16),
    ),
    Scored(
        log_probs=f32(-3.0, -1.2),
        entropy=f32(0.5, 0.5),
        routes=np.array([(B, A), (C, A)], dtype=np.int16),
    ),
]


@pytest.fixture
def step() -> record.StepRecord:
    update = Update(
        log_probs=[], clipped=[], loss=0.5, metrics={"m": Metric(1.0, 2.0)}, grad_norm=1.0
    )
    return record.StepRecord(
        first_sequence=6,
        group=2,
        rollouts=[FIRST, SECOND],
        rewards=f32(1, 0),
        advantages=f32(0.7, -0.7),
        old=OLD,
        reference=None,
        updates=[update, update],
        logp_train=[f32(-1.0, -1.0, -0.5), f32(-4.0, -1.2)],
        clipped=[np.array([False, True, False]), np.array([True, False])],
        gap=Gap(
            on_rollout_routes=[f32(-1.05, -2.0, -0.5), f32(-3.0, -1.1)],
            native_routes=[],
            on_old_routes=[f32(-1.0, -1.5, -0.5), f32(-3.5, -1.2)],
        ),
        noise={"noise/repeat/k3": Metric(0.0, 5)},
        num_experts=4,
        updates_counted=2,
    )


def test_token_rows(step):
    rows = step.token_rows()
    expected = {
        "sequence": [6, 6, 6, 7, 7],
        "prompt": [3, 3, 3, 3, 3],
        "position": [2, 3, 4, 1, 2],
        "token_id": [7, 8, 1, 9, 9],
        "reward": [1, 1, 1, 0, 0],
        "advantage": f32(0.7, 0.7, 0.7, -0.7, -0.7),
        "logp_rollout": f32(-1.0, -2.0, -0.5, -3.0, -1.0),
        "logp_old": f32(-1.1, -2.0, -0.5, -3.0, -1.2),
        "logp_train": f32(-1.0, -1.0, -0.5, -4.0, -1.2),
        "ratio": np.exp(f32(0.1, 1.0, 0.0, -1.0, 0.0)),
        "clipped": [False, True, False, True, False],
        "layers_mismatched": [0, 1, 2, 0, 0],
        # |{2,3} ∩ {1,2}| = 1; |{0,1} ∩ {1,2}| = 1; |{0,1} ∩ {2,3}| = 0
        "overlap": [(2, 2), (2, 1), (1, 0), (2, 2), (2, 2)],
        "rollout_routes": [(A, B), (A, B), (A, A), (B, A), (C, A)],
        "train_routes": [((1, 0), B), (A, C), (C, B), (B, A), (C, A)],
        "entropy": [1, 2, 3, 0.5, 0.5],
        "gap_numerics": [-0.05, 0, 0, 0, -0.1],
        "gap_engine_routing": [-0.05, 0, 0, 0, -0.1],
        "gap_update": [0.1, 0.5, 0, -0.5, 0],
        "gap_routing_shift": [0, 0.5, 0, -0.5, 0],
    }
    assert rows.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(rows[name], values, rtol=1e-6, atol=1e-6, err_msg=name)


def test_sums(step):
    sums = {name: tuple(pair) for name, pair in step.sums().items()}
    assert sums["loss/policy"] == (1.0, 2)
    assert sums["reward/mean"] == (1.0, 2)
    assert sums["response/length_mean"] == (5, 2)
    assert sums["response/finished_rate"] == (1, 2)
    assert sums["entropy/mean"] == (7.0, 5)
    assert sums["mismatch/router_rate"] == (3, 10)
    assert sums["mismatch/slot_rate"] == (4, 20)
    assert sums["mismatch/token_any_rate"] == (2, 5)
    assert sums["mismatch/by_layer/0"] == (1, 5) and sums["mismatch/by_layer/1"] == (2, 5)
    assert sums["logp_gap/mean_abs"] == (pytest.approx(0.3), 5)
    # k3 of KL(rollout || trainer): e^gap - 1 - gap at gaps -0.1 and -0.2
    by_hand = (np.exp(-0.1) - 1 + 0.1) + (np.exp(-0.2) - 1 + 0.2)
    assert sums["logp_gap/k3"] == (pytest.approx(by_hand, rel=1e-5), 5)
    assert sums["gap/update/mean"] == (pytest.approx(0.1, abs=1e-6), 5)
    assert sums["gap/update/mean_abs"] == (pytest.approx(1.1, abs=1e-6), 5)
    assert sums["noise/repeat/k3"] == (0.0, 5)
    maxima = step.maxima()
    assert maxima["logp_gap/max_abs"] == pytest.approx(0.2, rel=1e-5)
    assert maxima["ratio/max"] == pytest.approx(np.e, rel=1e-5)


class FakeActor:
    """Numbers the visits: the n-th update reports log-prob -n and clips odd visits."""

    def __init__(self):
        self.seen: list[list[int]] = []

    def update(self, samples, loss) -> Update:
        self.seen.append([int(s.tokens[0]) for s in samples])
        visit = len(self.seen)
        return Update(
            log_probs=[f32(-visit) for _ in samples],
            clipped=[np.array([visit % 2 == 1]) for _ in samples],
            loss=0.0,
            metrics={},
            grad_norm=0.0,
        )


def test_every_epoch_visits_each_sequence_once_and_the_last_visit_counts():
    job = object.__new__(Job)
    job.config = TrainConfig(epochs=2, minibatches=2)
    job.actor, job.loss, job.dp_rank = FakeActor(), None, 0
    samples = [Sample(tokens=np.array([i, 1]), prompt_length=1) for i in range(4)]
    old = [Scored(log_probs=f32(-9), entropy=f32(0), routes=np.empty((1, 0, 0))) for _ in samples]
    result = job.update(samples, old, step=1)
    seen = job.actor.seen
    assert [len(batch) for batch in seen] == [2, 2, 2, 2]
    for epoch in (seen[:2], seen[2:]):
        assert sorted(epoch[0] + epoch[1]) == [0, 1, 2, 3]
    for i in range(4):
        last = 3 if i in seen[2] else 4
        assert result["logp_train"][i].tolist() == [-last]
        assert result["clipped"][i].tolist() == [last % 2 == 1]


def test_a_reward_that_is_not_finite_names_its_prompt():
    class Task:
        def reward(self, problem, response_ids):
            return float("nan") if problem.prompt == "1+1=" else 1.0

    class Problem:
        def __init__(self, prompt):
            self.prompt = prompt

    job = object.__new__(Job)
    job.config, job.task = TrainConfig(group=2), Task()
    problems = [Problem("0+0="), Problem("1+1=")]
    with pytest.raises(UserError, match=r"reward nan .*'1\+1='"):
        verified(job, problems, [FIRST] * 4)
    assert verified(job, problems[:1], [FIRST] * 2).tolist() == [1.0, 1.0]
    assert torch.from_numpy(verified(job, problems[:1], [FIRST] * 2)).dtype == torch.float32
