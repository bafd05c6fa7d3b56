"""Presets, the command line made from the config, and what the package imports."""

import dataclasses
import json
import subprocess
import sys

import pytest
import tyro

from moe_upgrpo.losses import AGGREGATIONS, BRANCHES, PRESETS, PolicyLossConfig, RolloutCorrection
from moe_upgrpo.losses.side import ANY

PROMISED = [
    *("grpo", "dapo", "gspo", "tic-grpo", "up-grpo", "pro-grpo", "up-dapo", "up-gspo", "up-tic"),
    *("topr", "cispo", "reinforce", "no-upper-clip", "symmetric-ratio"),
]


@pytest.mark.parametrize("name", PROMISED)
def test_promised_presets_exist(name):
    assert PolicyLossConfig.preset(name) == PRESETS[name]


def test_pro_grpo_is_up_grpo_and_the_default():
    up = PolicyLossConfig.preset("up-grpo")
    assert up == PolicyLossConfig.preset("pro-grpo") == PolicyLossConfig()


def test_numbers_of_the_notes():
    """Defaults as published; sources in docs/losses.md."""
    bounds = {
        name: dataclasses.astuple(PRESETS[name])[4:7] for name in ("grpo", "dapo", "gspo", "gmpo")
    }
    assert bounds == {
        "grpo": (0.2, 0.2, 3.0),
        "dapo": (0.2, 0.28, 10.0),
        "gspo": (3e-4, 4e-4, 3.0),
        "gmpo": (0.4, 0.4, 3.0),
    }
    assert {PRESETS[n].aggregation for n in ("grpo", "dapo", "up-dapo")} == {"token-mean"}
    assert {PRESETS[n].aggregation for n in ("gspo", "up-gspo", "gmpo", "sapo")} == {
        "seq-mean-token-mean"
    }
    assert PRESETS["tic-grpo"].aggregation == PRESETS["up-tic"].aggregation == "seq-mean-token-sum"
    assert (PRESETS["dppo-tv"].divergence_limit, PRESETS["dppo-kl"].divergence_limit) == (0.2, 0.05)
    assert (PRESETS["sapo"].sapo_tau_positive, PRESETS["sapo"].sapo_tau_negative) == (1.0, 1.05)


def test_preset_takes_changes():
    config = PolicyLossConfig.preset("up-gspo", clip_low=0.01)
    assert (config.clip_low, config.clip_high, config.negative) == (0.01, 4e-4, "gspo")


def test_the_tables_are_consistent():
    assert set(ANY) == AGGREGATIONS.keys()
    known = {field.name for field in dataclasses.fields(PolicyLossConfig)}
    for branch in BRANCHES.values():
        assert set(branch.aggregations) <= AGGREGATIONS.keys() and branch.aggregations
        assert set(branch.fields) <= known
        assert branch.source


def test_every_number_of_a_preset_is_read_by_its_branches():
    """A preset does not set an option that its loss ignores."""
    default = PolicyLossConfig()
    numbers = {f for branch in BRANCHES.values() for f in branch.fields}
    for name, config in PRESETS.items():
        read = {*BRANCHES[config.positive].fields, *BRANCHES[config.negative].fields}
        changed = {f for f in numbers if getattr(config, f) != getattr(default, f)}
        assert changed <= read, name


def test_command_line():
    arguments = (
        "--negative gspo --aggregation seq-mean-token-mean --clip-low 3e-4 --dual-clip None "
        "--correction.weight sequence-tis --correction.geometric 0.99 1.01 --correction.positive"
    )
    config = tyro.cli(PolicyLossConfig, args=arguments.split())
    assert config == PolicyLossConfig(
        negative="gspo",
        aggregation="seq-mean-token-mean",
        clip_low=3e-4,
        dual_clip=None,
        correction=RolloutCorrection(weight="sequence-tis", geometric=(0.99, 1.01), positive=True),
    )


def test_configs_are_plain_json():
    for config in PRESETS.values():
        json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False))


def test_imports_without_megatron_or_an_engine():
    code = (
        "import sys, moe_upgrpo.losses\n"
        "heavy = {'megatron', 'vllm', 'sglang', 'transformers', 'verl', 'trl'}\n"
        "found = {name.split('.')[0] for name in sys.modules} & heavy\n"
        "others = {n for n in sys.modules if n.startswith('moe_upgrpo.')}\n"
        "others = {n for n in others if n.split('.')[1] not in ('losses', 'errors', 'lazy')}\n"
        "sys.exit(f'{found} {others}' if found or others else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
