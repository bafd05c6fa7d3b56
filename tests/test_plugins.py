"""Plug-ins: losses, advantages, rewards, engines and families from outside of the package."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from moe_upgrpo import plugins
from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import (
    BRANCHES,
    PRESETS,
    PolicyLossConfig,
    gradient_coefficients,
    group_advantages,
    policy_loss,
    register_advantage,
    register_loss,
)
from moe_upgrpo.megatron.families import FAMILIES, register_family
from moe_upgrpo.rewards import REWARDS
from moe_upgrpo.rollout.engines import ENGINES, check_engine, register_engine
from moe_upgrpo.store import read_config, read_metrics, read_tokens
from tests.plugin import install
from tests.ranks import run_command
from tests.train.test_launch import GROUP, options


@pytest.fixture
def plugin(tables, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(install(tmp_path / "outside")))
    yield plugins.load()
    sys.modules.pop("my_moe", None)


def test_a_plugin_brings_a_loss_with_ups_positive_branch(plugin):
    assert plugin == ["my_moe (my-moe 1.2)"] or plugin == ["my_moe (my_moe 1.2)"]
    assert plugins.load() == plugin  # once
    config = PolicyLossConfig.preset("up-capped")
    assert (config.positive, config.negative, config.ratio_cap) == ("log-likelihood", "capped", 2)
    log_probs = torch.tensor([[-1.0, -2.0]] * 2, requires_grad=True)
    old = log_probs.detach() - torch.tensor([[0.5, 1.0]])  # ratios e^.5 = 1.65 and e = 2.72
    advantages, mask = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), torch.ones(2, 2)
    policy_loss(log_probs, old, advantages, mask, config=config).loss.backward()
    # −A·c/4: c = 1 for the positive sequence, min(r, 2) for the negative one.
    by_hand = torch.tensor([[-1, -1], [1.6487213, 2]]) / 4
    torch.testing.assert_close(log_probs.grad, by_hand)
    c = gradient_coefficients(log_probs.detach(), old, advantages, mask, config=config)
    torch.testing.assert_close(c, torch.tensor([[1, 1], [1.6487213, 2]]))


def test_a_plugin_brings_advantages_and_a_reward(plugin):
    rewards = torch.tensor([0.1, 0.9, 0.5, 1.0])
    assert group_advantages(rewards, 4, "centred-ranks").tolist() == [-1.5, 0.5, -0.5, 1.5]
    assert group_advantages(torch.ones(4), 4, "centred-ranks").tolist() == [0] * 4
    assert REWARDS["close"] == "my_moe:close"


@pytest.mark.parametrize(
    ("module", "value", "words"),
    [
        ("import not_there", "", r"plug-in bad \(bad 1.2\), bad: ModuleNotFoundError: No module "
         r"named 'not_there' \(bad.py, line 1\)"),
        ("1 / 0", "", r"ZeroDivisionError: division by zero \(bad.py, line 1\). Mend it"),
        ("x = 1", "bad:absent", "AttributeError: .*absent"),
        ("def f(x): pass", "bad:f", "TypeError: f.. missing 1"),
        ("raise SystemExit('no')", "", "SystemExit: no"),
    ],
)  # fmt: skip
def test_a_plugin_that_cannot_be_loaded_is_named(
    module, value, words, tables, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(install(tmp_path, name="bad", module=module, value=value)))
    for _ in range(2):  # again the second time
        with pytest.raises(UserError, match=words):
            plugins.load()
    sys.modules.pop("bad", None)


def test_a_command_ends_with_the_plugin_s_error(tmp_path, monkeypatch):
    install(tmp_path, name="bad", module="import not_there")
    done = run_command("plan", first=AtPath(str(tmp_path)))
    assert done.returncode == 2 and "plug-in bad (bad 1.2), bad: ModuleNotFoundError" in done.stderr


class AtPath:
    """Puts a folder on the path of a command's process."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self):
        sys.path.insert(0, self.folder)


def test_losses_that_cannot_be_registered(tables):
    ppo = BRANCHES["ppo"]
    for name, branch, numbers, words in (
        ("gspo", ppo, {}, r"'gspo' given; .* taken \(gspo, up-gspo\)"),
        ("Mine!", ppo, {}, "small letters"),
        ("mine", "ppo", {}, "allowed: a Branch"),
        (
            "mine",
            replace(ppo, aggregations=()),
            {},
            r"aggregations \(\) given; allowed: token",
        ),
        ("mine", replace(ppo, fields=("cap",)), {}, r"fields \('cap',\) given; allowed: positive"),
        ("mine", replace(ppo, arguments=("x",)), {}, "allowed: rollout_log_probs, router_log_prob"),
        ("mine", replace(ppo), {"clip_low": -1}, "clip_low: -1 given"),
        ("mine", replace(ppo), {"clip": 1}, "unexpected keyword argument 'clip'"),
    ):
        with pytest.raises(UserError, match=words):
            register_loss(name, branch, **numbers)
    assert "mine" not in BRANCHES and "mine" not in PRESETS and "up-mine" not in PRESETS
    register_loss("mine", ppo := replace(ppo))
    register_loss("mine", ppo)
    with pytest.raises(UserError, match="taken"):
        register_loss("mine", replace(ppo))
    with pytest.raises(UserError, match=r"allowed with positive 'gspo': seq-mean-token-mean"):
        PolicyLossConfig(positive="gspo", negative="mine")


def test_advantages_engines_and_families(tables):
    register_advantage("short", lambda rewards: rewards[:, :1])
    register_advantage("broken", lambda rewards: rewards / 0)
    for name in ("short", "broken"):
        with pytest.raises(UserError, match=f"advantages '{name}' of rewards \\(1, 2\\)"):
            group_advantages(torch.tensor([0.0, 1.0]), 2, name)
    with pytest.raises(UserError, match=r"allowed: grpo, .* Nearest: rloo"):
        group_advantages(torch.tensor([0.0, 1.0]), 2, "rlo")
    with pytest.raises(UserError, match="a name that is not taken"):
        register_advantage("grpo", torch.zeros_like)
    mine = replace(ENGINES["hf"], title="mine")
    register_engine("mine", mine)
    assert check_engine("mine") is mine
    with pytest.raises(UserError, match=r"'hf' given; allowed: a name that is not taken"):
        register_engine("hf", mine)
    with pytest.raises(UserError, match="Nearest: mine"):
        check_engine("mina")
    register_family("mine", FAMILIES["qwen3"])
    with pytest.raises(UserError, match="a model_type that is not described"):
        register_family("qwen3_moe", FAMILIES["qwen3"])


@pytest.mark.slow
def test_a_run_with_a_plugin_s_reward_loss_and_advantages(tmp_path):
    """From outside: only the folder on the path. UP's positive branch, the plug-in's negative one;
    what the rewards were is seen in the token log."""
    outside = install(tmp_path / "outside")
    run = tmp_path / "run"
    words = options(run, tmp_path / "cache", "--loss", "up-capped", "--advantage", "centred-ranks")
    done = run_command(
        "train", *words, "--reward", "close", ranks=2, first=AtPath(str(outside)), timeout_s=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    config, rows = read_config(run), read_metrics(run)
    assert config["plugins"] == ["my_moe (my_moe 1.2)"]
    assert config["policy_loss"]["negative"] == "capped"
    assert config["policy_loss"]["positive"] == "log-likelihood"
    tokens = read_tokens(run).to_pandas()
    assert set(tokens.reward) <= {0, 0.5, 1} and len(set(tokens.reward)) > 1
    # Ranks less their mean, or 0 for a group of equal rewards.
    found = {*tokens.advantage}
    assert found <= {i - (GROUP - 1) / 2 for i in range(GROUP)} | {0} and len(found) > 1
    for row in rows[1:]:  # those of which it raised are wrong
        judged = 1 - row["reward/failed_rate"]
        assert row["reward/of/close.acc"] * judged == pytest.approx(row["reward/correct_rate"])


@pytest.mark.slow
def test_the_same_plugin_s_loss_is_one_of_verls(tmp_path):
    """In an interpreter of its own: verl registers losses as it is imported."""
    pytest.importorskip("verl")
    outside = install(tmp_path / "outside")
    program = (
        "import json, moe_upgrpo.integrations.verl\nfrom verl.trainer.ppo import core_algos\n"
        "print(json.dumps([n for n in core_algos.POLICY_LOSS_REGISTRY if 'capped' in n]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(outside)!r})\n{program}"],
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [
        "moe_upgrpo/capped", "moe_upgrpo/up-capped",
    ]  # fmt: skip
