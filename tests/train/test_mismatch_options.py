"""Options that make the engine and the verifier worse on purpose, seen in what a run leaves."""

from types import SimpleNamespace

import numpy as np
import pytest

from moe_upgrpo.store import read_config, read_metrics, read_tokens
from moe_upgrpo.tasks import Verdict
from moe_upgrpo.train.batch import Batch, Group, Rewarding
from tests.train.test_launch import job, options

STEPS = 4


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mismatch") / "run"
    result = job(
        1,
        *options(folder, cache),
        *("--loss", "symmetric-ratio", "--old-log-probs", "rollout", "--engine-every", "2"),
        *("--false-positives", "0.5", "--analyse-every", "0", "--steps", str(STEPS)),
        *("--eval-every", str(STEPS), "--save-every", "0", "--engine-weights", "fp8"),
        "--no-report",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def test_the_ratio_is_taken_to_the_rollout(run):
    """symmetric-ratio's gradient weight is |A| · ratio / tokens, the tokens of a mini-batch: a
    whole number comes out of it with the ratio to the rollout, and none with that to π_old."""
    rows = read_tokens(run).to_pandas()
    trained = rows[rows.advantage != 0]
    assert len(trained) > 50

    def tokens(policy: str) -> np.ndarray:
        ratio = np.exp(trained.logp_train - trained[policy])
        return (trained.advantage.abs() * ratio / trained.gradient_weight).to_numpy()

    def off(values: np.ndarray) -> float:
        return np.abs(values - values.round()).max()

    assert off(tokens("logp_rollout")) < 0.02 and tokens("logp_rollout").min() > 10
    assert off(tokens("logp_old")) > 0.1


def test_the_engine_takes_every_second_update(run):
    rows = read_tokens(run, columns=["step", "staleness"]).to_pandas()
    assert rows.groupby("step").staleness.unique().map(list).to_dict() == {
        1: [0], 2: [1], 3: [0], 4: [1],
    }  # fmt: skip


def test_wrong_answers_are_rewarded_half_the_time(run):
    """By the rewards; the verdicts that are reported are the true ones."""
    rows = read_metrics(run)[1:]
    wrong = sum((1 - row["reward/correct_rate"]) * 32 for row in rows)
    rewarded = sum((row["reward/mean"] - row["reward/correct_rate"]) * 32 for row in rows)
    assert wrong > 40
    assert abs(rewarded / wrong - 0.5) < 4 * 0.5 / np.sqrt(wrong)  # four standard errors
    assert all(row["reward/mean"] >= row["reward/correct_rate"] for row in rows)


def mistaken(rank: int, ranks: int, *, step: int = 1, group: int = 8, rate: float = 0.5) -> list:
    """Which of a rank's wrong responses to 12 problems are rewarded."""
    response = SimpleNamespace(sampled_or_all=np.array([True]))
    one = Group(rollouts=[response] * group, verdicts=[Verdict.of(0.0)] * group)
    batch = Batch(groups=[one] * (12 // ranks), sampled=None)
    rewarding = Rewarding(seed=0, max_length=4, false_positives=rate)
    return rewarding.rewards(batch, step, first_prompt=rank * (12 // ranks)).tolist()


def test_the_same_answers_are_mistaken_in_every_layout():
    """By problem and response: 12 problems on 1, 2, 3 and 12 ranks; each draw is another."""
    whole = mistaken(0, 1)
    for ranks in (2, 3, 12):
        parts = [mistaken(rank, ranks) for rank in range(ranks)]
        assert np.concatenate(parts).tolist() == whole
    rows = np.array(whole).reshape(12, 8)
    assert len({*map(tuple, rows)}) == 12 and len({*map(tuple, rows.T)}) == 8
    assert mistaken(0, 1, step=2) != whole
    # More responses to a problem leave the draws of the first ones as they are.
    assert (np.array(mistaken(0, 1, group=16)).reshape(12, 16)[:, :8] == rows).all()
    often = np.mean([mistaken(0, 1, step=step, rate=0.2) for step in range(50)])
    assert abs(often - 0.2) < 4 * np.sqrt(0.2 * 0.8 / (50 * 96))  # four standard errors


def test_no_report_where_none_is_asked_for(run):
    assert not (run / "report.html").exists()
    assert read_config(run)["engine_weights"] == "fp8"
