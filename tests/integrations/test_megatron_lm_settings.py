"""Settings of a job that are accepted, Megatron-LM's own scripts first. Without Megatron-LM."""

import pytest

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.megatron_lm import settings
from moe_upgrpo.losses import PRESETS
from tests.integrations import megatron_lm_scripts as scripts

FOUND = scripts.read()["scripts"]


def test_the_scripts_are_of_the_patched_revision():
    assert scripts.read()["revision"].startswith("d98e8a6")
    assert [len(given) for given in FOUND.values()] == [108, 114]
    named = {flag for given in FOUND.values() for flag, _ in given}
    assert named >= scripts.FOLLOWED.keys()


@pytest.mark.parametrize("name", FOUND)
def test_each_setting_of_the_scripts_is_accepted(name):
    """Alone in a job that is otherwise accepted, and all of them with our one line."""
    said = {flag: scripts.alone(flag, value) for flag, value in FOUND[name]}
    assert len(said) == len(FOUND[name]) > 100
    assert {flag: text for flag, text in said.items() if text} == {}
    assert scripts.answer([*FOUND[name], *scripts.ADDED]) == ""
    assert "needs --moe-enable-routing-replay" in scripts.answer(FOUND[name])


@pytest.mark.parametrize("name", FOUND)
def test_losses_that_take_the_scripts_flags(name):
    """Its clips of GRPO (0.2) go to the losses with that branch; the others say what to change."""
    said = scripts.losses(FOUND[name])
    taken = {loss for loss, problem in said.items() if not problem}
    clipped = {n for n in said if "ppo" in (PRESETS[n].positive, PRESETS[n].negative)}
    assert taken == {n for n in clipped if "rollout_log_probs" not in PRESETS[n].arguments}
    assert {"grpo", "up-grpo", "dapo"} <= taken < said.keys()
    for loss in said.keys() - taken:
        assert "Leave both at 0.01" in said[loss] or "it needs --rl-inference" in said[loss]


REFUSED = [
    (["--num-experts", "0"], "a model without MoE layers. Take a model with experts"),
    (["--moe-router-fusion", ""], "the fused router records no routes. Leave the flag out"),
    (["--rl-training-cuda-graphs", ""], "Leave the flag out: inference keeps its graphs"),
    (["--cuda-graph-impl", "full_iteration"], "Set it to local or none"),
    (["--virtual-pipeline-model-parallel-size", "2"], "does not cover interleaved pipeline stages"),
    (["--hybrid-context-parallel", ""], "Take --context-parallel-size alone"),
    (["--inference-dynamic-batching-async-sched-mode", "async"], "Set it to legacy"),
]


@pytest.mark.parametrize(("setting", "message"), REFUSED)
def test_what_the_log_cannot_follow_is_refused_by_name(setting, message):
    said = scripts.alone(*setting)
    assert said.startswith("MOE_UPGRPO_RUN: the routing log ") and message in said
    assert said.endswith(", or unset MOE_UPGRPO_RUN")
    args = scripts.arguments([["--num-experts", "8"], *scripts.ADDED, setting])
    settings.check(args, PRESETS["up-grpo"], set(), log=False)  # the losses take it


def test_every_refusal_has_its_test():
    assert len(settings.NOT_COVERED) == len(REFUSED) + 1  # and the flag that is to be added


WIDE = [
    ["--pipeline-model-parallel-size", "4"],
    ["--context-parallel-size", "2"],
    ["--cuda-graph-impl", "local"],
    ["--rl-inference-tensor-model-parallel-size", "1"],
    ["--rl-inference-pipeline-model-parallel-size", "2"],
    ["--rl-inference-expert-model-parallel-size", "8"],
]


@pytest.mark.parametrize("setting", WIDE)
def test_wide_configurations_are_accepted(setting):
    assert scripts.alone(*setting) == ""


@pytest.mark.parametrize(
    ("given", "named"), [(None, set()), ("null", set()), ('{"clip_low": 0.1}', {"clip_low"})]
)
def test_the_fields_that_the_environment_names_are_kept_from_the_flags(given, named, monkeypatch):
    monkeypatch.setenv(settings.LOSS, "grpo")
    monkeypatch.delenv(settings.SETTINGS, raising=False)
    if given:
        monkeypatch.setenv(settings.SETTINGS, given)
    config, found = settings.asked()
    assert found == named
    clips = settings.with_clamps(config, found, clip_low=0.3, clip_high=0.4)
    assert (clips.clip_low, clips.clip_high) == (0.1 if named else 0.3, 0.4)
    monkeypatch.delenv(settings.LOSS)
    if given:
        with pytest.raises(UserError, match="MOE_UPGRPO_LOSS is not: name a preset"):
            settings.asked()
    else:
        assert settings.asked() == (None, set())


def test_a_correction_is_checked_at_start():
    args = scripts.arguments([["--rl-inference-logprobs-is-correction", ""]])
    with pytest.raises(UserError, match="the loss is one of whole sequences"):
        settings.check(args, PRESETS["gspo"], set(), log=False)
    settings.check(args, PRESETS["gspo-token"], set(), log=False)
