"""The blocks of docs/extending.md, installed as the plug-in that the page makes of them."""

import re
import sys

import numpy as np
import pytest
import torch

from moe_upgrpo import plugins
from moe_upgrpo.losses import PolicyLossConfig, gradient_coefficients, group_advantages
from moe_upgrpo.rewards import REWARDS, Question
from moe_upgrpo.rewards.worker import called, load
from moe_upgrpo.rollout.base import SamplingConfig
from moe_upgrpo.rollout.engines import make_engine
from moe_upgrpo.store import read_config, read_metrics, read_tokens
from moe_upgrpo.tasks.arithmetic import EOS_ID, encode
from moe_upgrpo.tasks.named import make_task
from tests.plugin import FILES, PAGE, install
from tests.ranks import run_command
from tests.test_plugins import AtPath
from tests.train.test_launch import options


def test_every_block_is_short():
    assert FILES.keys() == {
        *("__init__.py", "reward.py", "task.py", "loss.py", "advantage.py", "engine.py")
    }
    assert "```python" not in re.sub(
        r"```python\n# \w+\.py\n", "", PAGE.read_text(encoding="utf-8")
    )
    for name, text in FILES.items():
        assert len([line for line in text.splitlines() if line]) <= 20, name


@pytest.fixture
def page(tables, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(install(tmp_path / "outside", files=FILES)))
    assert len(plugins.load()) == 1
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "my_moe"]:
        del sys.modules[name]


def test_the_blocks_do_what_the_page_says(page, tiny_checkpoint):
    close = called(load(REWARDS["close"]))
    question = Question(prompt="12+34=", answer="46")
    assert close(question, "46", {}) == {"score": 1, "acc": True}
    assert close(question, "3 6", {}) == {"score": 0.49, "acc": False}

    ones = torch.ones(1, 2)
    up = PolicyLossConfig.preset("up-capped")
    for sign, c in ((1, [[1, 1]]), (-1, [[2, 0.5]])):  # ratios e and 1/2
        old = torch.tensor([[-2.0, -1.0]])
        log_probs = old + torch.tensor([[1.0, float(np.log(0.5))]])
        found = gradient_coefficients(log_probs, old, sign * ones, ones, config=up)
        torch.testing.assert_close(found, torch.tensor(c, dtype=torch.float32))

    rewards = torch.tensor([0.1, 0.9, 0.5, 1.0])
    assert group_advantages(rewards, 4, "centred-ranks").tolist() == [-1.5, 0.5, -0.5, 1.5]

    engine = make_engine("timed", tiny_checkpoint, dtype="float32", device="cpu", max_tokens=8)
    (rollout,) = engine.generate(
        [np.array([3, 4])], SamplingConfig(max_new_tokens=2), samples_per_prompt=1, seed=0
    )
    assert engine.seconds > 0 and engine.weight_version == rollout.weight_version == 0
    engine.close()


def test_a_second_try(page, tmp_path):
    task = make_task("second-try", tmp_path, '{"digits": 1}')
    problem = task.problem(3, 4)
    right, small, large = (np.array([*encode(text), EOS_ID]) for text in ("7", "6", "8"))
    assert task.observe(problem, right) is None
    again = np.concatenate([small, result := task.observe(problem, small), right])
    assert result.tolist() == encode("<").tolist()
    assert task.observe(problem, large).tolist() == encode(">").tolist()
    rewards = [task.reward(problem, ids) for ids in (right, small, again)]
    assert rewards == [1, 0, 1]


@pytest.mark.slow
def test_the_page_s_package_trains(tmp_path):
    """Two turns, the page's loss, advantages and engine, on two ranks, with replay; the tool's
    tokens are in no row of the token log, and those of second turns are."""
    outside = install(tmp_path / "outside", files=FILES)
    run = tmp_path / "run"
    words = options(run, tmp_path / "cache", "--task", "second-try")
    words += ["--task-options", '{"digits": 1}']
    words += ["--loss", "up-capped", "--advantage", "centred-ranks", "--engine", "timed"]
    words += ["--engine-dtype", "float32", "--analyse-every", "1", "--replay", "R3"]
    done = run_command("train", *words, ranks=2, first=AtPath(str(outside)), timeout_s=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_config(run)["policy_loss"]["negative"] == "capped"
    rows = [row for row in read_metrics(run) if "reward/mean" in row]
    assert all(row["reward/failed_rate"] == 0 for row in rows)
    # In fp32 engine and trainer agree on every token that was sampled, second turns among them.
    tokens = read_tokens(run).to_pandas()
    assert (tokens.logp_old - tokens.logp_rollout).abs().max() < 1e-4
    of_sequence = tokens.groupby(["step", "sequence"]).position
    gaps = of_sequence.agg(lambda p: int((np.diff(np.sort(p)) > 1).sum()))
    assert {*gaps} == {0, 1}  # one token of the tool, in conversations of two turns
    assert all(np.diff(np.sort(p)).max(initial=1) <= 2 for _, p in of_sequence)
    assert rows[0]["tokens/sampled"] == (tokens.step == 1).sum()
