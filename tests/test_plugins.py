"""Plug-ins: losses, advantages, rewards, engines and families from outside of the package."""

import math
import sys
from dataclasses import replace

import pytest
import torch

from moe_upgrpo import plugins
from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import (
    BRANCHES,
    PRESETS,
    Advantage,
    Branch,
    Context,
    PolicyLossConfig,
    advantage_sums,
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
from moe_upgrpo.train.command_line import parsed
from moe_upgrpo.train.config import TrainConfig
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
        (
            "mine",
            replace(ppo, arguments=("statistics",)),
            {},
            "allowed: rollout_log_probs, groups, entropy, draws, token_weights$",
        ),
        (
            "mine",
            replace(ppo, refuses=("clip_low",)),
            {},
            "refuses .* allowed: correction, off_policy_limit, top_entropy",
        ),
        ("mine", replace(ppo, negative=abs), {}, "negative <built-in .* allowed: a Side"),
        (
            "mine",
            replace(ppo, negative=replace(ppo.negative, extra=abs)),
            {},
            "negative with extra .* and extra_slope None given; allowed: both, or none",
        ),
        ("mine", replace(ppo, refuses=("top_entropy",)), {"top_entropy": 0.5}, "takes none"),
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
    with pytest.raises(UserError, match=r"allowed: grpo, .* \(nearest: rloo"):
        group_advantages(torch.tensor([0.0, 1.0]), 2, "rlo")
    with pytest.raises(UserError, match="a name that is not taken"):
        register_advantage("grpo", torch.zeros_like)
    with pytest.raises(UserError, match="both of the others or none"):
        register_advantage("half", Advantage(torch.zeros_like, "0", "here", sums=torch.sum))
    with pytest.raises(UserError, match="7 given"):
        register_advantage("seven", 7)
    mine = replace(ENGINES["hf"], title="mine")
    register_engine("mine", mine)
    assert check_engine("mine") is mine
    with pytest.raises(UserError, match=r"'hf' given; allowed: a name that is not taken"):
        register_engine("hf", mine)
    with pytest.raises(UserError, match="nearest: mine"):
        check_engine("mina")
    register_family("mine", FAMILIES["qwen3"])
    with pytest.raises(UserError, match="a model_type that is not described"):
        register_family("qwen3_moe", FAMILIES["qwen3"])


def test_an_advantage_that_looks_at_lengths_and_at_the_whole_batch(tables):
    """R less the mean of the batch's tokens: (1·1 + 3·0 + 2·1 + 2·0)/8; by lengths 1, 3, 2, 2."""
    mine = Advantage(
        lambda rewards_PG: rewards_PG,
        "R − mean over tokens",
        "here",
        lengths=True,
        sums=lambda x, rewards, lengths: torch.stack([(lengths * x).sum(), lengths.sum()]).double(),
        of_batch=lambda x, rewards, sums: x - (sums[0] / sums[1]).to(x.dtype),
        whole_batch=True,
    )
    for _ in range(2):
        register_advantage("of-tokens", mine)
    rewards, lengths = torch.tensor([1.0, 0, 1, 0]), torch.tensor([1, 3, 2, 2])
    found = group_advantages(rewards, 2, "of-tokens", lengths=lengths)
    assert found.tolist() == [0.625, -0.375, 0.625, -0.375]
    assert advantage_sums(rewards, 2, "of-tokens", lengths=lengths).tolist() == [3, 8]
    with pytest.raises(UserError, match="a name that is not taken"):
        register_advantage("of-tokens", replace(mine, whole_batch=False))


def entropic(**more) -> Branch:
    """f = log π, with a penalty H·log π on negative tokens; it is no negative branch of UP's."""
    likelihood = BRANCHES["log-likelihood"].positive
    return Branch(
        positive=likelihood,
        negative=replace(
            likelihood,
            extra=lambda t, cfg: t.entropy_BT * t.log_probs_BT,
            extra_slope=lambda t, cfg: t.entropy_BT,
        ),
        c=("1", "1 − H/A"),
        arguments=("entropy",),
        source="here",
        **more,
    )


def test_a_loss_with_an_extra_term_an_input_of_the_context_and_no_form_under_up(tables):
    register_loss("entropic", entropic(up=False, refuses=("correction",)), top_entropy=0.5)
    assert "up-entropic" not in PRESETS and PRESETS["entropic"].top_entropy == 0.5
    register_loss("up-able", entropic())
    config = PRESETS["up-up-able"]
    assert config.arguments == {"entropy"}
    log_probs = torch.tensor([[-1.0], [-2.0]], requires_grad=True)
    advantages = torch.tensor([[1.0], [-2.0]])
    given = (log_probs.detach(), advantages, torch.ones(2, 1))
    context = Context(entropy=torch.tensor([[9.0], [0.5]]))
    loss = policy_loss(log_probs, *given, config=config, context=context)
    loss.loss.backward()
    # (−A, −A + H)/2 tokens: the term is that of the negative token alone.
    assert log_probs.grad.tolist() == [[-0.5], [(2 + 0.5) / 2]]
    assert loss.gradient_weight.tolist() == [[0.5], [1.25]]
    with pytest.raises(UserError, match=r"context\.entropy: None given, and 'up-able' needs it"):
        policy_loss(log_probs, *given, config=config)


@pytest.mark.parametrize("behind", [7.0, math.nan, math.inf])
def test_an_extra_term_counts_at_tokens_alone_whatever_it_is_at_padding(behind, tables):
    """e = H·log π − 1, of the negative token alone; f = log π."""
    likelihood = BRANCHES["log-likelihood"].positive
    mine = replace(
        entropic(),
        negative=replace(
            likelihood,
            extra=lambda t, cfg: torch.where(t.mask_BT, t.entropy_BT * t.log_probs_BT - 1, behind),
            extra_slope=lambda t, cfg: torch.where(t.mask_BT, t.entropy_BT, behind),
        ),
    )
    register_loss("offset", mine)
    register_loss("offset", mine)  # the same again is no error
    log_probs = torch.tensor([[-1.0, -4.0], [-2.0, -5.0]], requires_grad=True)
    advantages = torch.tensor([[-2.0, -2.0], [3.0, 3.0]])
    mask = torch.tensor([[1, 0], [1, 0]]).bool()
    context = Context(entropy=torch.full((2, 2), 0.5))
    loss = policy_loss(
        log_probs, log_probs.detach(), advantages, mask, config=PRESETS["offset"], context=context
    )
    loss.loss.backward()
    assert loss.loss.item() == pytest.approx((-2 - 0.5 - 1 + 6) / 2)
    assert log_probs.grad.tolist() == [[(2 + 0.5) / 2, 0], [-1.5, 0]]
    assert loss.gradient_weight.tolist() == [[1.25, 0], [1.5, 0]]


def test_a_plugin_s_names_are_options_as_the_others_are(plugin):
    """After plug-ins are loaded, as a command does first."""
    words = "--loss grpo --policy.negative capped --policy.ratio-cap 3 --advantage centred-ranks"
    config = parsed(TrainConfig, words.split(), "train")
    loss = config.objective.policy_loss()
    assert (loss.positive, loss.negative, loss.ratio_cap) == ("ppo", "capped", 3.0)
    for words, said in (
        ("--loss up-caped", "loss: 'up-caped' given; .*nearest: up-capped"),
        ("--policy.positive caped", "policy.positive: 'caped' given; .*nearest: capped"),
        ("--advantage centred-rank", "advantage: 'centred-rank' given; .*nearest: centred-ranks"),
        ("--loss capped --policy.sapo-tau-positive 2", "does not read it. It reads ratio_cap"),
    ):
        with pytest.raises(UserError, match=said):
            parsed(TrainConfig, words.split(), "train")


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
