"""The settings of verl's own replay example, kept as data, and whether the log follows each.

    python -m tests.integrations.verl_settings REVISION CHECKOUT

runs the script of a checkout of verl with commands in place of `uv` and `python3` that print what
they are given, and keeps that in verl_settings.json. docs/verl.md has it as a table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

KEPT = Path(__file__).with_name("verl_settings.json")
SCRIPT = "examples/router_replay/run_qwen3_30b_a3b_megatron.sh"
# The lines of docs/verl.md, which are all that a user adds.
OURS = [
    "actor_rollout_ref.actor.policy_loss._target_=moe_upgrpo.integrations.verl.LossConfig",
    "actor_rollout_ref.actor.policy_loss.loss_mode=moe_upgrpo/up-grpo",
    "+ray_kwargs.ray_init.runtime_env.env_vars.MOE_UPGRPO_RUN=/runs/one",
]
# Names of the script that the config of verl 0.9.1 does not have, so that verl ends there; the
# first is in that of no revision. And what to give in their place.
INSTEAD = {
    "actor_rollout_ref.actor.model_engine": "model_engine=megatron",
    "actor_rollout_ref.actor.megatron.grad_offload": None,
}
# What the log's own code meets, and where a test shows it; of the others it sees nothing.
_RUN = "`replay-example`: a run on two ranks, its token log that of the plain one"
_MODEL, _MEGATRON = "actor_rollout_ref.model", "actor_rollout_ref.actor.megatron"
_TRANSFORMER = f"{_MEGATRON}.override_transformer_config"
SHOWN = {
    f"{_MODEL}.use_remove_padding": _RUN,
    f"{_MODEL}.use_fused_kernels": f"{_RUN}; the Triton kernel by a stand-in",
    f"{_MEGATRON}.router_replay.mode": _RUN,
    f"{_MEGATRON}.pipeline_model_parallel_size": "two stages: `test_verl.py`, R2",
    f"{_MEGATRON}.expert_model_parallel_size": f"{_RUN}; two",
    f"{_MEGATRON}.expert_tensor_parallel_size": _RUN,
    f"{_TRANSFORMER}.moe_enable_deepep": f"{_RUN}; DeepEP's kernels by stand-ins",
    f"{_TRANSFORMER}.moe_token_dispatcher_type": _RUN,
    f"{_TRANSFORMER}.moe_router_dtype": _RUN,
    f"{_TRANSFORMER}.recompute_granularity": _RUN,
    f"{_TRANSFORMER}.recompute_method": _RUN,
    f"{_TRANSFORMER}.recompute_num_layers": _RUN,
    "actor_rollout_ref.rollout.calculate_log_probs": "needed; the log compares them",
    "actor_rollout_ref.rollout.enable_rollout_routing_replay": "needed; the log compares them",
    "ray_kwargs.ray_init.runtime_env.py_executable": "the workers' environment is uv's: install "
    "there (`uv pip install PATH_TO_THIS_REPOSITORY`)",
}


def read() -> dict[str, Any]:
    """script, revision, settings: [name, value, verdict, whether it is new to the config] each."""
    return json.loads(KEPT.read_text(encoding="utf-8"))


def given() -> list[str]:
    """The settings as the script gives them."""
    return [f"{'+' * new}{name}={value}" for name, value, _, new in read()["settings"]]


def printed(script: Path) -> list[str]:
    """Arguments NAME=VALUE that a script gives to verl, its variables at their defaults."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("uv", "python3"):
            command = Path(folder) / name
            command.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
            command.chmod(0o755)
        done = subprocess.run(
            ["bash", str(script)],
            env={"PATH": f"{folder}:{os.environ['PATH']}", "HOME": "$HOME"},
            capture_output=True,
            text=True,
            check=True,
        )
    lines = done.stdout.splitlines()
    return [line for line in lines[lines.index("verl.trainer.main_ppo") + 1 :] if line]


def composed(settings: list[str]):
    """verl's own config with these settings, as its trainer makes it."""
    from importlib.util import find_spec

    from hydra import compose, initialize_config_dir

    folder = Path(find_spec("verl").origin).parent / "trainer" / "config"
    with initialize_config_dir(str(folder), version_base=None):
        return compose("ppo_trainer", overrides=settings)


def as_verl_takes_them(settings: list[str]) -> list[str]:
    """With the names that verl has."""
    found = [INSTEAD.get(setting.split("=", 1)[0], setting) for setting in settings]
    return [setting for setting in found if setting]


def verdicts(settings: list[str], config) -> list[list[str]]:
    """[name, value, verdict] of each setting; config: `composed` of them and our own lines."""
    from moe_upgrpo.integrations.verl import settings as of_log

    problems = {name: f"refused: {why}" for name, why in
                of_log.refused(config.actor_rollout_ref).items()}  # fmt: skip
    problems |= {
        name: f"refused by verl 0.9.1 itself: {f'take `{right}`' if right else 'leave it out'}"
        for name, right in INSTEAD.items()
    }
    pairs = [setting.lstrip("+").split("=", 1) for setting in settings]
    return [[name, value, problems.get(name, "accepted")] for name, value in pairs]


def markdown_table() -> str:
    """The table of docs/verl.md."""
    kept = read()
    lines = ["| setting | value | | shown by |", "| --- | --- | --- | --- |"]
    for name, value, verdict, _ in kept["settings"]:
        lines.append(f"| `{name}` | `{value}` | {verdict} | {SHOWN.get(name, '')} |")
    return "\n".join(lines)


def main(revision: str, checkout: str) -> None:
    lines = printed(Path(checkout) / SCRIPT)
    config = composed([*as_verl_takes_them(lines), *OURS])
    settings = [
        [name, value, verdict, setting.startswith("+")]
        for (name, value, verdict), setting in zip(verdicts(lines, config), lines, strict=True)
    ]
    kept = {"script": SCRIPT, "revision": revision, "settings": settings}
    KEPT.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{SCRIPT} at {revision}: {len(settings)} settings")


if __name__ == "__main__":
    main(*sys.argv[1:])
