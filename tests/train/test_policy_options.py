"""`--policy.NAME`: the loss's choices and numbers on the command line, in files and in arms."""

import json
from dataclasses import dataclass, field, fields, replace

import pytest
import tyro

from moe_upgrpo.cli import _parse_with_files
from moe_upgrpo.compare.plan import Run, from_values
from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import PRESETS, PolicyLossConfig, RolloutCorrection
from moe_upgrpo.tools.plan_options import PlanConfig
from moe_upgrpo.train.command_line import parsed
from moe_upgrpo.train.config import TrainConfig
from moe_upgrpo.train.options import changes, file_arguments, mapping_arguments, run_arguments
from moe_upgrpo.train.parts import ObjectiveOptions
from moe_upgrpo.train.policy_options import PRESET, PolicyOptions, _options


def objective(*words: str) -> ObjectiveOptions:
    """The part alone, whose options are those of the whole: that is a fifth of the time."""
    return parsed(ObjectiveOptions, list(words), "prog")


def test_every_field_of_the_loss_is_an_option_that_is_left_to_the_preset():
    options = {one.name: one.default for one in fields(PolicyOptions)}
    known = [one.name for one in fields(PolicyLossConfig) if one.name != "correction"]
    assert list(options) == known and {*options.values()} == {PRESET}
    for loss, preset in PRESETS.items():
        if not preset.arguments & {"router_log_probs", "groups", "token_weights"}:
            assert ObjectiveOptions(loss=loss).policy_loss() == preset


@pytest.mark.parametrize(
    ("words", "loss", "changed"),
    [
        ("--policy.clip-high .28", "up-grpo", {"clip_high": 0.28}),
        ("--loss up-dapo --policy.dual_clip=3", "up-dapo", {"dual_clip": 3.0}),
        ("--loss dapo --policy.dual-clip none", "dapo", {"dual_clip": None}),
        ("--loss dapo --policy.dual-clip NULL", "dapo", {"dual_clip": None}),
        ("--loss dapo --policy.dual-clip preset", "dapo", {}),
        ("--policy.clip-low None --policy.clip-low 0.1", "up-grpo", {"clip_low": 0.1}),
        ("--policy.positive self-ratio", "up-grpo", {"positive": "self-ratio"}),
        ("--policy.negative cispo --policy.clip-high 4 --policy.clip-low none", "up-grpo",
         {"negative": "cispo", "clip_high": 4.0, "clip_low": None}),
        ("--loss is-reshape --policy.power-negative=-0.5", "is-reshape", {"power_negative": -0.5}),
        ("--policy.aggregation seq-mean-token-sum-norm --policy.token-sum-norm 64", "up-grpo",
         {"aggregation": "seq-mean-token-sum-norm", "token_sum_norm": 64.0}),
        ("--policy.off-policy-limit 1e-4", "up-grpo", {"off_policy_limit": 1e-4}),
        ("--correction.weight token-tis --correction.high 4 --policy.clip-high none", "up-grpo",
         {"clip_high": None, "correction": RolloutCorrection(weight="token-tis", high=4.0)}),
    ],
)  # fmt: skip
def test_words_change_the_preset(words, loss, changed):
    found = objective(*words.split())
    assert found.policy_loss() == PolicyLossConfig.preset(loss, **changed)


@pytest.mark.parametrize("cls", [TrainConfig, PlanConfig])
def test_train_and_plan_have_them(cls):
    words = ["--loss", "dapo", "--policy.dual-clip", "none", "--advantage", "rloo"]
    found = _parse_with_files(cls, words, "prog").objective
    assert found.policy_loss() == PolicyLossConfig.preset("dapo", dual_clip=None)
    assert found.advantage == "rloo"


def test_what_is_changed_is_said_in_words():
    given = ("--loss", "dapo", "--policy.dual-clip", "none", "--policy.clip-low", ".1")
    assert objective(*given).loss_in_words == "dapo with clip_low 0.1, dual_clip none"
    assert objective("--loss", "dapo").loss_in_words == "dapo"


FILE = """
loss: gspo
policy: {clip-low: 1e-4, clip_high: null, positive: preset}
correction: {weight: sequence-tis, high: .inf}
advantage: rloo
"""


def test_a_file_says_the_same_and_null_is_a_value(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(FILE)
    found = objective(*file_arguments(file))
    assert found.policy == PolicyOptions(clip_low=1e-4, clip_high=None)
    assert found.policy_loss().upper == float("inf") and found.advantage == "rloo"
    found = objective(*file_arguments(file), "--policy.clip-high", "preset")
    assert found.policy_loss().clip_high == PRESETS["gspo"].clip_high == 4e-4
    file.write_text("policy: {clip_hihg: 1}")
    with pytest.raises(
        UserError, match=r"'policy.clip_hihg' is not a field; 'policy.clip_high' is"
    ):
        file_arguments(file)
    file.write_text("policy: 0.2")
    with pytest.raises(UserError, match=r"policy is 0.2; it is a group of the fields positive"):
        file_arguments(file)


def test_a_resumed_run_has_them_again_and_notices_others(tmp_path):
    """None, no bound, is told from what is left to the preset; an infinite bound stays one."""
    file = tmp_path / "config.yaml"
    file.write_text(FILE)
    config = parsed(TrainConfig, file_arguments(file), "prog")
    stored = json.loads(json.dumps(config.flat(), default=str, allow_nan=False))
    assert stored["policy"]["clip_high"] is None and stored["policy"]["dual_clip"] == PRESET
    (tmp_path / "config.json").write_text(json.dumps(stored))
    words = run_arguments(tmp_path)
    again = parsed(TrainConfig, words, "prog")
    assert again == config and not changes(stored, again.but(resume=tmp_path))
    policy = again.objective.policy
    for given, said in (
        ({"policy": replace(policy, clip_high=PRESET)}, "policy.clip_high was None, now preset"),
        ({"policy": replace(policy, clip_low=2e-4)}, "policy.clip_low was 0.0001, now 0.0002"),
        ({"policy": replace(policy, off_policy_limit=None)}, "limit was preset, now None"),
        ({"correction": RolloutCorrection(weight="sequence-tis", high=9)}, "high was inf, now 9"),
        ({"advantage": "grpo"}, "advantage was rloo, now grpo"),
    ):
        with pytest.raises(UserError, match=said):
            changes(stored, again.but(resume=tmp_path, **given))
    # A run of before these options left all to the preset.
    old = {name: value for name, value in stored.items() if name != "policy"}
    with pytest.raises(UserError, match=r"policy.clip_high was preset, now None"):
        changes(old, again.but(resume=tmp_path))


def test_an_arm_may_set_any_of_them():
    arms = {
        "dapo": {"loss": "dapo"},
        "dual-3": {"loss": "dapo", "policy": {"dual-clip": 3}},
        "no-dual": {"loss": "dapo", "policy": {"dual_clip": None, "clip_high": None}},
    }
    values = {
        "name": "one", "question": "?", "base": {"policy": {"clip_low": 0.1}}, "arms": arms,
        "seeds": [0, 1], "contrasts": [["dual-3", "dapo"], ["no-dual", "dapo"]],
    }  # fmt: skip
    plan = from_values(values)
    found = {arm: plan.config(Run(arm=arm, seed=0)).objective.policy_loss() for arm in arms}
    preset = PolicyLossConfig.preset
    assert found["dapo"] == preset("dapo", clip_low=0.1)
    assert found["dual-3"] == preset("dapo", clip_low=0.1, dual_clip=3.0)
    assert found["no-dual"] == preset("dapo", clip_low=0.1, dual_clip=None, clip_high=None)
    values["arms"]["dual-3"]["policy"]["dual-clip"] = 0.5
    with pytest.raises(UserError, match=r"arm dual-3: policy.dual_clip: 0.5 given; allowed: above"):
        from_values(values)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--policy.clip-hihg 1", "Unrecognized options: --policy.clip-hihg, 1. Near it: "
         "--policy.clip-high, --policy.clip-low"),
        ("--policy.clip-high x", "--policy.clip-high: 'x' given; allowed: FLOAT|none, or preset"),
        ("--policy.clip-high nan", "policy.clip_high: nan given; allowed: from 0 to inf"),
        ("--loss dppo-tv --policy.ratio-cap none",
         "--policy.ratio-cap: 'none' given; allowed: FLOAT, or preset"),
        ("--policy.clip-low 3", "policy.clip_low: 3.0 given; allowed: from 0 to 1"),
        ("--policy.positive self-ratioo", "policy.positive: 'self-ratioo' given; allowed: .*"
         "nearest: self-ratio"),
        ("--policy.negative pp", "policy.negative: 'pp' given; allowed: .*nearest: .*ppo"),
        ("--policy.aggregation token-meen",
         "policy.aggregation: 'token-meen' given; .*nearest: token-mean"),
        ("--loss gspo --policy.aggregation token-mean",
         "policy.aggregation: 'token-mean' given; allowed with positive 'gspo'"),
        ("--policy.aggregation seq-mean-token-sum-norm", "policy.token_sum_norm: None given"),
        ("--policy.token-sum-norm 9", "policy.token_sum_norm: 9.0 given; .* does not read it"),
        ("--policy.ratio-cap 3", "policy.ratio_cap: 3.0 given; loss 'up-grpo' with positive "
         "'log-likelihood', negative 'ppo' and aggregation 'token-mean' does not read it. It reads "
         "clip_high, clip_low, dual_clip"),
        ("--loss reinforce --policy.clip-high 1", "does not read it. It reads no number"),
        ("--policy.router-shift-floor .8", "'up-grpo with router_shift_floor 0.8' needs "
         "router_log_probs, which the trainer does not record; it serves grpo"),
        ("--loss gspo --correction.weight token-tis", "correction.weight: 'token-tis' given"),
        ("--advantage grp", "advantage: 'grp' given; allowed: grpo, .*nearest: grpo"),
        ("--loss dappo", "loss: 'dappo' given; allowed: .*nearest: .*dapo"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named_as_it_is_typed(words, said):
    with pytest.raises(UserError, match=said) as error:
        objective(*words.split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ((), {"clip-high": "0.2", "dual-clip": "3.0", "positive": "log-likelihood"}),
        (("--loss=dapo",), {"clip-high": "0.28", "dual-clip": "10.0", "token-sum-norm": "none"}),
        (("--loss", "grop"), {"clip-high": None}),
    ],
)
def test_help_shows_what_the_preset_comes_to(words, shown, capsys):
    with pytest.raises(SystemExit) as end:
        _parse_with_files(TrainConfig, [*words, "--help"], "prog")
    assert not end.value.code
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, value in shown.items():
        (of_option,) = text.split(f"--policy.{name} ")[1:]
        default = of_option.partition("(default: ")[2].partition(")")[0]
        assert default == ("the preset's" if value is None else f"the preset's, {value}")
    assert "εl: lower bound 1 - εl" in text  # the field's own text


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """Fields of the kinds that a loss may come to have."""

    flag: bool = False
    """A switch."""
    count: int | None = 3
    """A number."""
    pair: tuple[float, float] | None = None
    """Two or none."""
    bounds: tuple[float, float] = (1.0, 5.0)
    """Two."""


Made = _options(Kinds)


@dataclass(frozen=True, kw_only=True)
class Holder:
    policy: Made = field(default_factory=Made)


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("", {}),
        ("--policy.flag True --policy.count none", {"flag": True, "count": None}),
        ("--policy.flag false --policy.count 4", {"flag": False, "count": 4}),
        ("--policy.pair 1 5", {"pair": (1.0, 5.0)}),
        ("--policy.pair None", {"pair": None}),
        ("--policy.bounds 0.5 2", {"bounds": (0.5, 2.0)}),
    ],
)
def test_fields_of_every_kind(words, values):
    assert tyro.cli(Holder, args=words.split()).policy == Made(**values)


def test_a_switch_of_the_loss_in_a_file_is_an_option_with_a_value(monkeypatch):
    from moe_upgrpo.train import options

    one = next(f for f in fields(Holder))
    monkeypatch.setitem(options.OPTIONS, "policy", one)
    words = mapping_arguments({"policy": {"flag": True, "pair": [1, 5], "count": None}})
    made = Made(flag=True, pair=(1.0, 5.0), count=None)
    assert tyro.cli(Holder, args=words).policy == made
