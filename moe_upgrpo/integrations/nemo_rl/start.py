# SPDX-License-Identifier: Apache-2.0
"""Warnings, at the start, about what a NeMo-RL job asks for and will not get.

NeMo-RL's config allows keys that it does not know, and its processes run our code only where the
launcher or the patch put it. Three places notice what is missing:

- the launcher, before the script runs (`main` in install.py);
- the driver, when it makes a policy: `watch_policies`, from the launcher, or from the loss that a
  patched checkout makes;
- the worker of a patched checkout (log.py).

Without launcher and patch none of this runs: docs/nemo-rl.md says how to notice that.
"""

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.kit.environment import RUN, run_folder

POLICY = "nemo_rl.models.policy.lm_policy"
WORKER = "models/policy/workers/megatron_policy_worker.py"
PATCHED = "moe_upgrpo.integrations.nemo_rl_worker"  # what a patched worker imports

NO_ROUTES = (
    f"{RUN} is set, and no routing log is written: no routes come without "
    "policy.router_replay.enabled=true (with policy.router_replay.observe_only=true beside it "
    "nothing is replayed)"
)
_said: set[str] = set()


def warn(message: str) -> None:
    """Print a line to stderr, once in this process."""
    if message not in _said:
        _said.add(message)
        print(f"moe_upgrpo WARNING: {message}", file=sys.stderr, flush=True)


def root() -> Path:
    """The folder that holds the `nemo_rl` of this process."""
    import nemo_rl

    return Path(nemo_rl.__file__).parents[1]


def is_patched() -> bool:
    """Whether the Megatron worker of this checkout imports the routing log."""
    file = root() / "nemo_rl" / WORKER
    return file.is_file() and PATCHED in file.read_text(encoding="utf-8")


def warn_of_missing_patch() -> None:
    """Warn if a run folder is named but the workers cannot write to it."""
    if run_folder() is not None and not is_patched():
        warn(
            f"{RUN} is set, and no routing log is written: {root()} is not patched; "
            f"moe-upgrpo patch apply nemo-rl --root {root()}"
        )


def warn_of_missing_forward() -> None:
    """Warn if a run folder is named but NeMo-RL may leave out the old log-probs."""
    if run_folder() is not None:
        warn(
            f"{RUN} is set: the routing log needs the forward of the old log-probs, which "
            "loss_fn.force_on_policy_ratio=true leaves out, so that the first update ends with an "
            "error, unless grpo.seq_logprob_error_threshold is set, too (a large one masks nothing)"
        )


def watch_policies() -> None:
    """Check the config of every policy that this process makes; repeating is harmless.

    If the module of `Policy` is not imported yet, it is left alone.
    """
    module = sys.modules.get(POLICY)
    policy_class = getattr(module, "Policy", None)
    if policy_class is None or hasattr(policy_class.__init__, "moe_upgrpo_watched"):
        return
    init = policy_class.__init__

    @functools.wraps(init)
    def __init__(self, cluster, config, *args, **kwargs):
        look_at(config)
        init(self, cluster, config, *args, **kwargs)

    __init__.moe_upgrpo_watched = True
    policy_class.__init__ = __init__


def look_at(config: Mapping[str, Any]) -> None:
    """Warn about what a policy's config keeps out of the routing log.

    Raises UserError if nothing would read `observe_only`: the routes would be replayed.
    """
    replay = config.get("router_replay") or {}
    if replay.get("enabled") and replay.get("observe_only") and not is_patched():
        raise UserError(
            "policy.router_replay.observe_only=true given; NeMo-RL does not know it and would "
            f"replay: {root()} is not patched. Run moe-upgrpo patch apply nemo-rl --root {root()}, "
            "or set policy.router_replay.enabled=false"
        )
    if run_folder() is None:
        return
    warn_of_missing_patch()
    if not (config.get("megatron_cfg") or {}).get("enabled"):
        warn(
            f"{RUN} is set, and no routing log is written: it is one of Megatron workers "
            "(policy.megatron_cfg.enabled=true)"
        )
    elif not replay.get("enabled"):
        warn(NO_ROUTES)


def not_covered(worker, model_config, replay: Mapping[str, Any]) -> dict[str, Any]:
    """Features that a worker's routing log cannot follow, by name → whether they are in use.

    replay: policy.router_replay as the user set it.
    """
    sizes = worker.cfg["megatron_cfg"]
    stages = sizes.get("virtual_pipeline_model_parallel_size")
    graphs = sizes.get("cuda_graph_impl") or "none"
    modules = sizes.get("cuda_graph_modules") or ["moe"]  # none named: whole layers
    return {
        "policy.router_replay.transport=ray, in which the routes do not come with the batch "
        "(transport=inline is covered)": replay.get("transport", "inline") != "inline",
        "policy.sequence_packing.enabled=true with a model that packs its inputs itself, to which "
        "NeMo-RL carries no routes (sequence_packing.enabled=false is covered)": (
            worker.delegate_pack_to_model and worker.cfg["sequence_packing"]["enabled"]
        ),
        "policy.megatron_cfg.virtual_pipeline_model_parallel_size": (stages or 1) > 1,
        f"policy.megatron_cfg.cuda_graph_impl={graphs} with routers in its graphs "
        "(cuda_graph_modules without moe is covered)": (
            graphs != "none" and any("moe" in str(name) for name in modules)
        ),
        "moe_router_fusion with replay (observe_only=true is covered)": (
            worker._router_replay_enabled and getattr(model_config, "moe_router_fusion", False)
        ),
    }
