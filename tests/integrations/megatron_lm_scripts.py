"""The settings of Megatron-LM's own RL scripts for MoE models, and what becomes of each with ours.

    python -m tests.integrations.megatron_lm_scripts CHECKOUT   # keeps them in its .json

A script is the command of examples/rl/README.md with the options of one of its model_configs, as
bash makes them out for DAPO. The table of docs/megatron-lm.md is made from this.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.megatron_lm import settings
from moe_upgrpo.losses import PRESETS, PolicyLossConfig

FOUND = Path(__file__).with_suffix(".json")
README = "examples/rl/README.md"
CONFIGS = "examples/rl/model_configs"
SCRIPTS = ("qwen3_30b_a3b_moe.sh", "nemotron6_3b_moe.sh")
VARIABLES = {  # of the shell; what a user has to name stays a name
    "ENV_CONFIG": "examples/rl/environment_configs/dapo.yaml",
    **{name: f"${name}" for name in ("CHECKPOINT", "TOKENIZER_MODEL")},
}
# Our line in such a script, besides the variables.
ADDED = [["--moe-enable-routing-replay", ""]]
# How what they set is followed; the loss and the log do not look at the other settings.
FOLLOWED = {
    "--tensor-model-parallel-size": "joined where sequence parallelism splits the tokens",
    "--sequence-parallel": "joined over the tensor-parallel ranks",
    "--pipeline-model-parallel-size": "routes joined over the stages, of trainer and inference",
    "--expert-model-parallel-size": "nothing to do: a router chooses among all experts",
    "--cuda-graph-impl": "graphs of inference: `local`; the trainer's forward runs eagerly",
    "--decode-only-cuda-graphs": "requests are recorded with a graph or without",
    "--rl-persist-cuda-graphs": "the recorders' buffers stay with the graphs of inference",
    "--rl-partial-rollouts": "`staleness` of the sequence's oldest token",
    "--calculate-per-token-loss": "the loss is scaled to this normalisation",
    "--grpo-iterations": "one step of the log, however often it is trained on",
    "--grpo-clamp-eps-lower": "`clip_low` of a loss with the branch `ppo`",
    "--grpo-clamp-eps-upper": "`clip_high` of a loss with the branch `ppo`",
    "--grpo-kl-beta": "as in Megatron-LM",
    "--rl-inference-logprobs-is-correction": "weights both signs, or the loss's own correction",
    "--rl-importance-sampling-truncation-coef": "bounds those weights",
    "--moe-router-score-function": "margins of the scores that the top-k is taken over",
    "--moe-router-enable-expert-bias": "margins with the bias",
    "--moe-pad-experts-for-cuda-graph-inference": "padding tokens have no row",
    "--moe-router-dtype": "margins in its precision, kept in single",
    "--use-checkpoint-args": "checked after the checkpoint's arguments are read",
    "--num-experts": "a model with MoE layers",
    "--micro-batch-size": "rows taken apart by position",
}

Settings = list[list[str]]  # flag, value; "" of a flag without one


def pairs(words: list[str]) -> Settings:
    """Flags with their values, each once: the last one holds, as argparse has it."""
    found: dict[str, list[str]] = {}
    flag = None
    for word in words:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            found[flag] = [value] if value else []
        elif flag is not None:
            found[flag].append(word)
    return [[flag, " ".join(values)] for flag, values in found.items()]


def found_in(checkout: Path) -> dict[str, Settings]:
    """Settings of the command with each script of a checkout."""
    text = (checkout / README).read_text()
    command = re.search(
        r"^ *train_rl\.py \\\n(.*?)\$\{MODEL_OPTIONS\}", text, re.DOTALL | re.MULTILINE
    )[1]
    words = command.replace("\\", " ").split()
    scripts = {}
    for name in SCRIPTS:
        told = (
            f"source {CONFIGS}/{name} > /dev/null; "
            "printf '%s\\n' $MODEL_OPTIONS $COMMON_OPTIONS $ENV_DEPENDENT"
        )
        done = subprocess.run(
            ["bash", "-c", told],
            cwd=checkout,
            env={"PATH": "/usr/bin:/bin"} | VARIABLES,
            capture_output=True,
            text=True,
            check=True,
        )
        scripts[f"{CONFIGS}/{name}"] = pairs(words + done.stdout.split())
    return scripts


def read() -> dict[str, Any]:
    """Revision, and by script its settings."""
    return json.loads(FOUND.read_text())


def arguments(given: Settings) -> SimpleNamespace:
    """Settings as Megatron-LM's parser has them, as far as ours look at it."""
    args = {
        "grpo_clamp_eps_lower": settings.CLAMP_DEFAULT,
        "grpo_clamp_eps_upper": settings.CLAMP_DEFAULT,
        "rl_inference_logprobs_is_correction": False,
        "rl_importance_sampling_truncation_coef": None,
    }
    for flag, value in given:
        name = flag.removeprefix("--").replace("-", "_")
        if not value and name.startswith("no_"):
            args[name.removeprefix("no_")] = False
        elif not value:
            args[name] = True
        else:
            try:
                args[name] = json.loads(value)
            except json.JSONDecodeError:
                args[name] = value
    if args.get("use_checkpoint_args"):
        args.setdefault("num_experts", "those of the checkpoint")
    return SimpleNamespace(**args)


def answer(given: Settings, config: PolicyLossConfig | None = None) -> str:
    """Message about settings at start-up; "" where they are accepted."""
    try:
        settings.check(arguments(given), config, set(), log=True)
    except UserError as error:
        return str(error)
    return ""


def losses(given: Settings) -> dict[str, str]:
    """Message about each preset with these settings, by name."""
    served = (n for n, p in PRESETS.items() if not p.arguments & {*settings.NOT_HANDED_OVER})
    return {name: answer([*given, *ADDED], PRESETS[name]) for name in served}


def alone(flag: str, value: str) -> str:
    """Message about one setting in a job that is otherwise accepted."""
    return answer([["--num-experts", "8"], *ADDED, [flag, value]])


def markdown() -> str:
    """The table of the settings and the lists of the losses, for docs/megatron-lm.md."""
    scripts = read()["scripts"]
    names = [Path(name).name for name in scripts]
    values = [dict(given) for given in scripts.values()]
    flags = list(dict.fromkeys(flag for given in values for flag in given))
    rows, others = [], []
    for flag in flags:
        said = "; ".join(
            dict.fromkeys(alone(flag, given[flag]) for given in values if flag in given)
        )
        if said or flag in FOLLOWED:
            cells = [
                ("set" if given[flag] == "" else f"`{given[flag]}`") if flag in given else ""
                for given in values
            ]
            rows.append([f"`{flag}`", *cells, said or f"accepted: {FOLLOWED[flag]}"])
        else:
            others.append(f"`{flag}`")
    lines = [
        ["setting", *(f"`{name}`" for name in names), "the log and the losses"],
        ["---"] * (len(names) + 2),
        *rows,
    ]
    text = ["| " + " | ".join(x.replace("|", "\\|") for x in row) + " |" for row in lines]
    text += ["", f"Accepted, and not looked at: {', '.join(others)}.", ""]
    for name, given in zip(names, scripts.values(), strict=True):
        said = losses(given)
        taken = [f"`{loss}`" for loss, problem in said.items() if not problem]
        text.append(f"Losses that take the flags of `{name}` as they are: {', '.join(taken)}.")
    return "\n".join(text)


def main(checkout: str) -> None:
    root = Path(checkout)
    git = ["git", "-C", str(root), "rev-parse", "HEAD"]
    revision = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    made = {"revision": revision, "scripts": found_in(root)}
    text = json.dumps(made, indent=1)
    # A setting on a line of its own.
    FOUND.write_text(re.sub(r'\[\n\s+("[^"]*"),\n\s+("[^"]*")\n\s+\]', r"[\1, \2]", text) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
