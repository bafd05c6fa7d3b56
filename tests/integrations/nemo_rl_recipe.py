"""The settings of NeMo-RL's published R3 recipe, as data, and which of them are accepted.

    python -m tests.integrations.nemo_rl_recipe REVISION CHECKOUT   # keeps them in the JSON file

By revision: what the recipe sets itself, and what it inherits from the files that it names as its
defaults, where the loss or the log looks at that section. An interpolation stays as it is written.
"""

import json
import sys
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import yaml

from moe_upgrpo.errors import UserError
from moe_upgrpo.patching import of_stack
from tests.integrations import hooks, nemo_rl_double

RECIPE = "examples/configs/recipes/llm/grpo-qwen3-30ba3b-8n8g-megatron-cp2-r3.yaml"
KEPT = Path(__file__).with_name("nemo_rl_recipe.json")
ALL = "all of them together"
SECTIONS = ("policy", "loss_fn", "data_plane")  # of what is inherited

# Settings of the recipe → how they are shown: what of test_nemo_rl.py has them.
SHOWN = {
    "policy.router_replay.enabled": "replayed in `R3`, `replicas`, `cp`; observed in `observe`",
    "policy.sequence_packing.enabled": "all runs but `unpacked`",
    "policy.megatron_cfg.context_parallel_size": "`cp`: the token log of `R3`, row for row",
    "policy.megatron_cfg.tensor_model_parallel_size": "`R3`, with 2 and sequence parallelism",
    "policy.megatron_cfg.expert_model_parallel_size": "`R3`, `replicas`, with 2",
    "policy.megatron_cfg.pipeline_model_parallel_size": "`stages`",
    "policy.train_global_batch_size": "two optimizer steps of a batch, and one",
    "policy.make_sequence_length_divisible_by": "padding of 4 and, with context parallelism, 8",
}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names → values."""
    found = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def of(checkout: Path) -> dict[str, dict[str, Any]]:
    """`own` and `inherited` settings of the recipe in a checkout."""
    own, inherited = None, {}
    file = checkout / RECIPE
    while file is not None:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        defaults = config.pop("defaults", None)
        here = flat(config)
        if own is None:
            own = here
        inherited = here | inherited
        file = None if defaults is None else (file.parent / defaults).resolve()
    mine = {n: v for n, v in inherited.items() if n not in own and n.split(".")[0] in SECTIONS}
    return {"own": own, "inherited": mine}


def read() -> dict[str, dict[str, dict[str, Any]]]:
    """Revision → `own` and `inherited`."""
    return json.loads(KEPT.read_text(encoding="utf-8"))


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for name, value in settings.items():
        *outer, last = name.split(".")
        place = config
        for part in outer:
            if not isinstance(place.get(part), dict):
                place[part] = {}
            place = place[part]
        place[last] = deepcopy(value)
    return config


def policy(revision: str) -> dict[str, Any]:
    """The recipe's section of that name, as a worker is handed it."""
    kept = read()[revision]
    return nested(kept["inherited"] | kept["own"])["policy"]


def verdicts(revision: str, changes: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Each setting → why it is not accepted, "" where it is.

    A setting is tried alone, in a patched checkout, beside what the integration asks for: a preset,
    and `router_replay`. changes: settings of another value.
    """
    kept = read()[revision]
    settings = kept["inherited"] | kept["own"] | (changes or {})
    needed = {
        "policy.router_replay.enabled": True,
        "policy.megatron_cfg.enabled": True,
        "policy.sequence_packing.enabled": True,
    }
    with TemporaryDirectory() as folder, nemo_rl_double.installed(revision, Path(folder)):
        nemo_rl_double.write_worker(Path(folder), patched=True)
        found = {name: refusal(needed | {name: value}) for name, value in settings.items()}
        return found | {ALL: refusal(needed | settings)}


def refusal(settings: Mapping[str, Any]) -> str:
    """Give what the integration says of a job with these settings, "" where it takes it."""
    from nemo_rl.algorithms.loss import ClippedPGLossConfig

    from moe_upgrpo.integrations.kit import environment
    from moe_upgrpo.integrations.nemo_rl import start
    from moe_upgrpo.integrations.nemo_rl.loss import PolicyLossFn

    config, said = nested(settings), []
    of_policy, of_loss = config.get("policy", {}), config.get("loss_fn", {})
    of_policy.setdefault("sequence_packing", {"enabled": True})
    worker = SimpleNamespace(
        cfg=of_policy, delegate_pack_to_model=False, _router_replay_enabled=True
    )
    kept = start.warn, start.run_folder
    start.warn, start.run_folder = said.append, lambda: Path("run")
    try:
        start.look_at(of_policy)
        environment.refuse(
            start.not_covered(worker, SimpleNamespace(), of_policy.get("router_replay", {}))
        )
        PolicyLossFn(_loss_config(ClippedPGLossConfig, of_loss))
    except UserError as error:
        said.append(str(error))
    finally:
        start.warn, start.run_folder = kept
    return "; ".join(said)


def _loss_config(kind, given: Mapping[str, Any]):
    """The recipe's loss with a preset; what the double's config does not name goes beside."""
    known = {name: value for name, value in given.items() if hasattr(kind, name)}
    return kind(moe_upgrpo={"preset": "up-grpo"}, **known)


def rows(revision: str) -> list[list[str]]:
    """Setting, value, and whether it is accepted, of what the recipe sets itself."""
    found = verdicts(revision)
    kept = read()[revision]

    def verdict(name: str) -> str:
        if found[name]:
            return f"no: {found[name]}"
        return f"yes; {SHOWN[name]}" if name in SHOWN else "yes; nothing of ours reads it"

    return [[f"`{n}`", f"`{json.dumps(value)}`", verdict(n)] for n, value in kept["own"].items()]


def revisions() -> list[list[str]]:
    """Revision, functions that are hooked into, single controller, patches."""
    patched = {series.version for series in of_stack("nemo-rl")}
    every = [*hooks.HOOKS["nemo-rl"], *hooks.NEWER["nemo-rl"]]
    return [
        [
            revision,
            f"{len(found)} of {len(every)}",
            "yes" if nemo_rl_double.splits(revision) else "has none",
            "yes" if revision in patched else "none",
        ]
        for revision, found in sorted(hooks.read()["nemo-rl"].items(), reverse=True)
    ]


def main(revision: str, checkout: str) -> None:
    kept = read() if KEPT.exists() else {}
    kept[revision] = of(Path(checkout))
    KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(f"{revision}: { ({part: len(settings) for part, settings in kept[revision].items()}) }")


if __name__ == "__main__":
    main(*sys.argv[1:])
