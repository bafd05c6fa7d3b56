# SPDX-License-Identifier: Apache-2.0
"""The places where each stack is hooked, as data: file, name, signature, checksum.

    python -m moe_upgrpo.integrations.hooks slime REVISION CHECKOUT   # stores them in hooks.json

hooks.json holds them for each revision that was tested, and for a few that were only read. A
revision counts as another one if one of them is gone, takes other arguments or computes otherwise;
`difference` says how. Files are read with ast: nothing of a stack is imported. `kit.revisions`
checks at start-up, `stack_doctor` on request.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_upgrpo.errors import UserError

FOUND = Path(__file__).with_name("hooks.json")

_MEGATRON = "backends/megatron_utils"
_TRAINING = "miles/backends/training_utils"
_WORKER = "nemo_rl/models/policy/workers/megatron_policy_worker.py"
_LOSSES = "nemo_rl/algorithms/loss/loss_functions.py"
_SWIFT = "swift/megatron/trainers/grpo_trainer.py"
_ENGINE = "verl/workers/engine/megatron/transformer_impl.py"
_LAYOUT = "verl/models/mcore/util.py"
_REPLAY = "verl/utils/megatron/router_replay_patch.py"
HOOKS: dict[str, list[tuple[str, str]]] = {
    "verl": [
        (_ENGINE, "MegatronEngine.initialize"),
        (_ENGINE, "MegatronEngine.forward_backward_batch"),
        (_ENGINE, "MegatronEngine.disable_adapter"),
        (_ENGINE, "MegatronEngine.is_mp_src_rank_with_outputs"),
        (_ENGINE, "MegatronEngine.get_data_parallel_group"),
        (_ENGINE, "MegatronEngine._get_context_parallel_layout"),
        (_ENGINE, "MegatronEngineWithLMHead.forward_step"),
        (_ENGINE, "MegatronEngineWithLMHead.postprocess_micro_batch_func"),
        (_LAYOUT, "preprocess_thd_engine"),
        (_LAYOUT, "postprocess_thd_engine"),
        (_LAYOUT, "preprocess_bshd_engine"),
        (_LAYOUT, "postprocess_bshd_engine"),
        (_REPLAY, "RouterReplay.get_replay_topk"),
        (_REPLAY, "patched_routing"),
        ("verl/utils/dynamic_cp_scheduler.py", "DynamicCPScheduler.schedule"),
        ("verl/workers/utils/losses.py", "ppo_loss"),
        ("verl/workers/engine_workers.py", "ActorRolloutRefWorker.init_model"),
        ("verl/trainer/ppo/core_algos.py", "register_policy_loss"),
        ("verl/trainer/ppo/core_algos.py", "get_policy_loss_fn"),
        ("verl/trainer/ppo/core_algos.py", "POLICY_LOSS_REGISTRY"),
        ("verl/workers/config/actor.py", "PolicyLossConfig"),
        ("verl/workers/utils/losses.py", "get_policy_loss_fn"),
        ("verl/utils/megatron_utils.py", "unwrap_model"),
        ("verl/utils/tensordict_utils.py", "assign_non_tensor"),
        ("verl/utils/tensordict_utils.py", "get_non_tensor_data"),
        ("verl/utils/metric/utils.py", "Metric"),
    ],
    "slime": [
        (f"slime/{_MEGATRON}/data.py", "get_data_iterator"),
        (f"slime/{_MEGATRON}/data.py", "get_batch"),
        ("slime/utils/data.py", "process_rollout_data"),
        (f"slime/{_MEGATRON}/model.py", "forward_only"),
        (f"slime/{_MEGATRON}/model.py", "train"),
        (f"slime/{_MEGATRON}/loss.py", "loss_function"),
        (f"slime/{_MEGATRON}/loss.py", "get_log_probs_and_entropy"),
        (f"slime/{_MEGATRON}/loss.py", "policy_loss_function"),
        ("slime/utils/ppo_utils.py", "compute_policy_loss"),
        (f"slime/{_MEGATRON}/cp_utils.py", "all_gather_with_cp"),
        (f"slime/{_MEGATRON}/cp_utils.py", "slice_log_prob_with_cp"),
        (f"slime/{_MEGATRON}/cp_utils.py", "get_sum_of_sample_mean"),
        ("slime/utils/routing_replay.py", "get_routing_replay_compute_topk"),
        ("slime/utils/routing_replay.py", "RoutingReplay.clear_all_forward"),
        ("slime/utils/misc.py", "load_function"),
        ("slime/observability/logging_utils.py", "log"),
        ("slime/observability/metric_utils.py", "compute_rollout_step"),
    ],
    "miles": [
        (f"{_TRAINING}/data.py", "get_data_iterator"),
        (f"{_TRAINING}/data.py", "get_batch"),
        (f"miles/{_MEGATRON}/model.py", "forward_only"),
        (f"miles/{_MEGATRON}/model.py", "train"),
        (f"{_TRAINING}/loss.py", "loss_function"),
        (f"{_TRAINING}/loss_hub/logit_processors.py", "get_log_probs_and_entropy"),
        (f"{_TRAINING}/loss_hub/losses.py", "policy_loss_function"),
        (f"{_TRAINING}/loss_hub/math_utils.py", "compute_policy_loss"),
        (f"{_TRAINING}/cp_utils.py", "all_gather_with_cp"),
        (f"{_TRAINING}/cp_utils.py", "slice_log_prob_with_cp"),
        (f"{_TRAINING}/cp_utils.py", "get_sum_of_sample_mean"),
        ("miles/ray/rollout/train_data_conversion.py", "process_rollout_data_shard"),
        ("miles/utils/replay_base.py", "BaseReplayManager.clear_all_forward"),
        ("miles/utils/replay_base.py", "BaseReplayManager.check_replay_result"),
        ("miles/utils/replay_base.py", "BaseReplayManager.get_topk_fn"),
        ("miles/utils/misc.py", "load_function"),
        ("miles/utils/metric_utils.py", "compute_rollout_step"),
        ("miles/utils/tracking_utils/tracking.py", "log"),
    ],
    "nemo-rl": [
        (_LOSSES, "ClippedPGLossFn.__init__"),
        (_LOSSES, "ClippedPGLossFn.__call__"),
        (_WORKER, "MegatronPolicyWorkerImpl.__init__"),
        (_WORKER, "MegatronPolicyWorkerImpl.get_logprobs"),
        (_WORKER, "MegatronPolicyWorkerImpl.train"),
        ("nemo_rl/models/policy/lm_policy.py", "Policy.__init__"),
        ("nemo_rl/models/megatron/train.py", "megatron_forward_backward"),
        ("nemo_rl/models/megatron/router_replay.py", "_unwrap_model_config"),
        ("nemo_rl/distributed/model_utils.py", "allgather_cp_sharded_tensor"),
    ],
    "megatron-lm": [
        ("megatron/rl/rl_utils.py", "calculate_grpo_loss"),
        ("megatron/rl/rl_utils.py", "prepare_data_for_update"),
        ("megatron/rl/rl_utils.py", "prepare_trajectories"),
        ("megatron/rl/rl_utils.py", "compute_logprobs_batch"),
        ("megatron/rl/rl_utils.py", "logprobs_forward_step"),
        ("megatron/rl/rl_utils.py", "rl_inference_interface_shutdown"),
        ("megatron/rl/rl_utils.py", "get_inference_interface"),
        ("megatron/rl/rl_utils.py", "_scatter_for_context_parallel"),
        ("megatron/rl/inference/megatron.py", "MegatronLocal.merge_global_request_ledgers"),
        ("megatron/training/global_vars.py", "set_args"),
        (
            "megatron/core/inference/inference_request.py",
            "FinishedRequestRecord.from_request",
        ),
        (
            "megatron/core/inference/engines/dynamic_engine.py",
            "DynamicInferenceEngine.post_process_requests",
        ),
    ],
    "ms-swift": [
        (_SWIFT, "MegatronGRPOTrainer._init_grpo_params"),
        (_SWIFT, "MegatronGRPOTrainer._prepare_vllm_engine"),
        (_SWIFT, "MegatronGRPOTrainer._colocate_rollout"),
        (_SWIFT, "MegatronGRPOTrainer._score_completions"),
        (_SWIFT, "MegatronGRPOTrainer._generate_and_score_completions"),
        (_SWIFT, "MegatronGRPOTrainer._maybe_compute_logps"),
        (_SWIFT, "MegatronGRPOTrainer._replace_data_iterator"),
        (_SWIFT, "MegatronGRPOTrainer._prepare_batch"),
        (_SWIFT, "MegatronGRPOTrainer.compute_per_token_logps"),
        (_SWIFT, "MegatronGRPOTrainer.forward_step"),
        (_SWIFT, "MegatronGRPOTrainer.loss_func"),
        (_SWIFT, "MegatronGRPOTrainer._apply_rollout_importance_sampling"),
        (_SWIFT, "MegatronGRPOTrainer._all_reduce_metric"),
        (_SWIFT, "MegatronGRPOTrainer.train_step"),
        (_SWIFT, "MegatronGRPOTrainer._aggregated_metrics"),
        (_SWIFT, "collate_to_grpo_micro_batch"),
        (_SWIFT, "pad_logps_back_to_batch"),
        (_SWIFT, "reconstruct_tensor_cp"),
        ("swift/megatron/trainers/utils.py", "compute_per_token_logps_fn"),
        ("swift/megatron/trainers/utils.py", "reconstruct_tensor_cp"),
        ("swift/rlhf_trainers/utils.py", "collate_to_grpo_micro_batch"),
        ("swift/rlhf_trainers/utils.py", "build_completion_mask_and_seq_lengths"),
        ("swift/rlhf_trainers/utils.py", "pad_logps_back_to_batch"),
        ("swift/rl_core/data.py", "GRPOBatch"),
        ("swift/rl_core/data.py", "GRPOSample"),
    ],
}  # fmt: skip
# Where a release has things that a later revision moved.
BEFORE: dict[tuple[str, str], tuple[str, str]] = {
    (f"{_TRAINING}/loss_hub/logit_processors.py", "get_log_probs_and_entropy"):
        (f"{_TRAINING}/loss.py", "get_log_probs_and_entropy"),
    (f"{_TRAINING}/loss_hub/losses.py", "policy_loss_function"):
        (f"{_TRAINING}/loss.py", "policy_loss_function"),
    (f"{_TRAINING}/loss_hub/math_utils.py", "compute_policy_loss"):
        ("miles/utils/ppo_utils.py", "compute_policy_loss"),
    ("miles/ray/rollout/train_data_conversion.py", "process_rollout_data_shard"):
        ("miles/utils/data.py", "process_rollout_data"),
    ("miles/utils/tracking_utils/tracking.py", "log"):
        ("miles/utils/tracking_utils/__init__.py", "log"),
    ("slime/observability/logging_utils.py", "log"): ("slime/utils/logging_utils.py", "log"),
    ("slime/observability/metric_utils.py", "compute_rollout_step"):
        ("slime/utils/metric_utils.py", "compute_rollout_step"),
}  # fmt: skip
# Those that the losses need; the routing log needs all hooks.
LOSS: dict[str, set[str]] = {
    "verl": {"register_policy_loss", "POLICY_LOSS_REGISTRY", "PolicyLossConfig"},
    "slime": {
        "get_log_probs_and_entropy", "policy_loss_function", "compute_policy_loss",
        "all_gather_with_cp", "slice_log_prob_with_cp", "get_sum_of_sample_mean", "load_function",
    },
    "miles": {
        "get_log_probs_and_entropy", "policy_loss_function", "compute_policy_loss",
        "all_gather_with_cp", "slice_log_prob_with_cp", "get_sum_of_sample_mean", "load_function",
    },
    "nemo-rl": {"ClippedPGLossFn.__init__", "ClippedPGLossFn.__call__"},
    "megatron-lm": {"calculate_grpo_loss", "prepare_data_for_update", "prepare_trajectories"},
    "ms-swift": {
        "MegatronGRPOTrainer._init_grpo_params", "MegatronGRPOTrainer.loss_func",
        "MegatronGRPOTrainer._apply_rollout_importance_sampling",
        "MegatronGRPOTrainer._all_reduce_metric", "MegatronGRPOTrainer._aggregated_metrics",
        "pad_logps_back_to_batch", "build_completion_mask_and_seq_lengths", "GRPOBatch",
    },
}  # fmt: skip
# Those that a replay's health figures need.
HEALTH: dict[str, set[str]] = {
    "verl": {
        "MegatronEngine.forward_backward_batch", "MegatronEngine.is_mp_src_rank_with_outputs",
        "RouterReplay.get_replay_topk", "unwrap_model", "get_non_tensor_data", "Metric",
    },
    "slime": {"train", "get_routing_replay_compute_topk", "log", "compute_rollout_step"},
    "miles": {"train", "BaseReplayManager.get_topk_fn", "log", "compute_rollout_step"},
    "nemo-rl": {"MegatronPolicyWorkerImpl.train"},
    "megatron-lm": set(),  # its trainer replays nothing
    "ms-swift": {
        "MegatronGRPOTrainer._replace_data_iterator", "MegatronGRPOTrainer.forward_step",
        "MegatronGRPOTrainer.train_step", "MegatronGRPOTrainer._aggregated_metrics",
    },
}  # fmt: skip
# Revisions in hooks.json that were read but never run.
NOT_RUN: dict[str, set[str]] = {"verl": {"0.9.0"}}
# Hooks that older revisions lack and the integration can do without.
NEWER: dict[str, list[tuple[str, str]]] = {
    "nemo-rl": [  # the single controller, which v0.7.0 does not have
        (_WORKER, f"MegatronPolicyWorkerImpl.{part}_train_step")
        for part in ("begin", "finish", "abort")
    ] + [(_WORKER, "MegatronPolicyWorkerImpl.train_microbatch")],
    "slime": [(f"slime/{_MEGATRON}/cp_utils.py", "prepare_routed_experts_for_routing_replay")],
}  # fmt: skip


def places(hook: tuple[str, str]) -> list[tuple[str, str]]:
    """File and name of a hook in each known place, the newest first."""
    return [hook, *([BEFORE[hook]] if hook in BEFORE else [])]


def found_in(checkout: Path, stack: str) -> dict[str, dict[str, str]]:
    """`FILE:NAME` → signature and checksum of every hook that the checkout has."""
    found, parsed = {}, functools.cache(_parsed)
    for hook in [*HOOKS[stack], *NEWER.get(stack, [])]:
        for file, name in places(hook):
            if about := _about(parsed, checkout, file, name):
                found[f"{file}:{name}"] = about
                break
    return found


def missing(stack: str, found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """File and name of the hooks that `found_in` did not find."""
    return [
        hook
        for hook in HOOKS[stack]
        if not any(f"{file}:{name}" in found for file, name in places(hook))
    ]


def _about(
    parsed: Callable[[Path], ast.Module], root: Path, file: str, name: str, seen: tuple = ()
) -> dict[str, str] | None:
    """Signature and checksum of a name in a file; None if it is not there.

    A method may also come from a base class, in whichever file of the checkout. parsed: a cache of
    `_parsed`.
    """
    path = root / file
    if (file, name) in seen or not path.is_file():
        return None
    owner = name.split(".")[0]
    for node, rest in _named(_statements(parsed(path).body), name.split(".")):
        if not rest:
            return _described(node)
        alias = next(x for x in node.names if (x.asname or x.name) == rest[0])
        there = _imported_from(root, file, node)
        if there is None:
            if rest[0] == owner:  # the class itself, from elsewhere: accepted
                return _described(node)
            continue
        inside = ".".join([alias.name, *rest[1:]])
        if about := _about(parsed, root, there, inside, (*seen, (file, name))):
            return about
    return None


def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:  # ValueError: not UTF-8, or a null byte
        here = ".".join(map(str, sys.version_info[:2]))
        raise UserError(
            f"{path}: not Python {here} ({error}); read it with the Python of the stack, or mend it"
        ) from error


def _described(node: ast.stmt) -> dict[str, str]:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            signature = f"({ast.unparse(node.args)})"
        case ast.ClassDef():
            signature = f"class ({', '.join(map(ast.unparse, node.bases))})"
        case ast.ImportFrom():
            signature = f"imported from {node.module}"
        case _:
            signature = "assigned"
    return {
        "signature": signature,
        "sha256": hashlib.sha256(_computed(node).encode()).hexdigest()[:16],
    }


def _imported_from(root: Path, file: str, node: ast.ImportFrom) -> str | None:
    """The file of the checkout that an import reads from; None if there is none."""
    package = list(Path(file).parent.parts)
    before = package[: len(package) + 1 - node.level] if node.level else []
    module = Path(*before, *(node.module or "").split("."))
    for there in (module.with_name(f"{module.name}.py"), module / "__init__.py"):
        if (root / there).is_file():
            return str(there)
    return None


def _statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements of a module or class, including those under its `if` and `try`."""
    found = []
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With):
            inside = [node.body, getattr(node, "orelse", []), getattr(node, "finalbody", [])]
            inside += [handler.body for handler in getattr(node, "handlers", [])]
            found += [one for part in inside for one in _statements(part)]
        else:
            found.append(node)
    return found


def _named(body: list[ast.stmt], parts: list[str]) -> Iterator[tuple[ast.stmt, list[str]]]:
    """Statements that bind a name there; for a method, in its own class first, then in its bases.
    With an import also come the names to look up in the imported file."""
    bound = [node for node in body if parts[0] in _names(node)]
    if not bound:
        return
    if len(parts) == 1:
        yield bound[-1], []
        return
    match bound[-1]:
        case ast.ClassDef() as owner:
            yield from _named(_statements(owner.body), parts[1:])
            others = [node for node in body if node is not owner]  # ends circular bases
            for base in owner.bases:
                if isinstance(base, ast.Name):
                    yield from _named(others, [base.id, *parts[1:]])
        case ast.ImportFrom() as imported:
            yield imported, parts
        case assigned:
            yield assigned, []


def _names(node: ast.stmt) -> set[str]:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return {node.name}
        case ast.ImportFrom():
            return {alias.asname or alias.name for alias in node.names}
        case ast.Assign():
            return {target.id for target in node.targets if isinstance(target, ast.Name)}
        case ast.AnnAssign() if isinstance(node.target, ast.Name):
            return {node.target.id}
    return set()


def _computed(node: Any) -> str:
    """A function's syntax tree without comments and layout: the same text on every Python.

    ast.dump's is not: 3.12 has more empty fields than earlier ones, and 3.13 shows none.
    """
    if isinstance(node, list):
        return f"[{','.join(map(_computed, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = (f"{k}={_computed(v)}" for k, v in ast.iter_fields(node) if v not in (None, []))
    return f"{type(node).__name__}({','.join(fields)})"


def read() -> dict[str, dict[str, dict[str, dict[str, str]]]]:
    """Stack → revision → hook → its signature and checksum."""
    return json.loads(FOUND.read_text(encoding="utf-8"))


def tested(stack: str) -> dict[str, dict[str, dict[str, str]]]:
    """Revision → hook → its signature and checksum, for the revisions that were run."""
    not_run = NOT_RUN.get(stack, set())
    return {name: found for name, found in read().get(stack, {}).items() if name not in not_run}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Hook of a tested revision → how another revision has it; equal ones are left out."""
    found = {}
    for hook, of_before in before.items():
        of_now = now.get(hook)
        if of_now is None:
            found[hook] = "gone"
        elif of_now["signature"] != of_before["signature"]:
            found[hook] = f"takes {of_now['signature']}, before {of_before['signature']}"
        elif of_now != of_before:
            found[hook] = "computes otherwise"
    return found


def difference(stack: str, checkout: Path, revision: str) -> list[str]:
    """Hooks of a checkout that differ from a tested revision, one line each."""
    found = differences(read()[stack][revision], found_in(checkout, stack))
    return [f"{hook}: {how}" for hook, how in found.items()]


def main(stack: str, revision: str, checkout: str) -> None:
    found = found_in(Path(checkout), stack)
    if gone := missing(stack, found):
        sys.exit(f"{checkout}: no {', '.join(name for _, name in gone)}")
    kept = read() if FOUND.exists() else {}
    kept.setdefault(stack, {})[revision] = found
    FOUND.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{stack} {revision}: {len(found)} hooks")


if __name__ == "__main__":
    main(*sys.argv[1:])
