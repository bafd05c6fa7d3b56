"""Where each stack is hooked into, as data: file, name, signature, checksum.

    python -m tests.integrations.hooks slime REVISION CHECKOUT   # keeps them in hooks.json

A release in which one of them is gone, takes other arguments or computes otherwise is one that the
integration was not tested with; `difference` says which. Read with ast: nothing is imported.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

FOUND = Path(__file__).with_name("hooks.json")

_MEGATRON = "backends/megatron_utils"
_TRAINING = "miles/backends/training_utils"
_WORKER = "nemo_rl/models/policy/workers/megatron_policy_worker.py"
_LOSSES = "nemo_rl/algorithms/loss/loss_functions.py"
_SWIFT = "swift/megatron/trainers/grpo_trainer.py"
HOOKS: dict[str, list[tuple[str, str]]] = {
    "slime": [
        (f"slime/{_MEGATRON}/data.py", "get_data_iterator"),
        (f"slime/{_MEGATRON}/model.py", "forward_only"),
        (f"slime/{_MEGATRON}/model.py", "train"),
        (f"slime/{_MEGATRON}/loss.py", "loss_function"),
        (f"slime/{_MEGATRON}/loss.py", "get_log_probs_and_entropy"),
        (f"slime/{_MEGATRON}/loss.py", "policy_loss_function"),
        ("slime/utils/ppo_utils.py", "compute_policy_loss"),
        (f"slime/{_MEGATRON}/cp_utils.py", "all_gather_with_cp"),
        (f"slime/{_MEGATRON}/cp_utils.py", "slice_log_prob_with_cp"),
        (f"slime/{_MEGATRON}/cp_utils.py", "get_sum_of_sample_mean"),
        (f"slime/{_MEGATRON}/cp_utils.py", "prepare_routed_experts_for_routing_replay"),
        ("slime/utils/routing_replay.py", "get_routing_replay_compute_topk"),
        ("slime/utils/routing_replay.py", "RoutingReplay.clear_all_forward"),
        ("slime/utils/misc.py", "load_function"),
        ("slime/observability/logging_utils.py", "log"),
        ("slime/observability/metric_utils.py", "compute_rollout_step"),
    ],
    "miles": [
        (f"{_TRAINING}/data.py", "get_data_iterator"),
        (f"miles/{_MEGATRON}/model.py", "forward_only"),
        (f"miles/{_MEGATRON}/model.py", "train"),
        (f"{_TRAINING}/loss.py", "loss_function"),
        (f"{_TRAINING}/loss_hub/logit_processors.py", "get_log_probs_and_entropy"),
        (f"{_TRAINING}/loss_hub/losses.py", "policy_loss_function"),
        (f"{_TRAINING}/loss_hub/math_utils.py", "compute_policy_loss"),
        (f"{_TRAINING}/cp_utils.py", "all_gather_with_cp"),
        (f"{_TRAINING}/cp_utils.py", "slice_log_prob_with_cp"),
        (f"{_TRAINING}/cp_utils.py", "get_sum_of_sample_mean"),
        (f"{_TRAINING}/replay_data.py", "fill_replay_data"),
        ("miles/ray/rollout/train_data_conversion.py", "process_rollout_data_shard"),
        ("miles/utils/replay_base.py", "BaseReplayManager.clear_all_forward"),
        ("miles/utils/replay_base.py", "BaseReplayManager.check_replay_result"),
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
        (_WORKER, "MegatronPolicyWorkerImpl.begin_train_step"),
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
        (
            "megatron/core/inference/inference_request.py",
            "FinishedRequestRecord.from_request",
        ),
    ],
    "ms-swift": [
        (_SWIFT, "MegatronGRPOTrainer._init_grpo_params"),
        (_SWIFT, "MegatronGRPOTrainer._score_completions"),
        (_SWIFT, "MegatronGRPOTrainer._generate_and_score_completions"),
        (_SWIFT, "MegatronGRPOTrainer._maybe_compute_logps"),
        (_SWIFT, "MegatronGRPOTrainer.forward_step"),
        (_SWIFT, "MegatronGRPOTrainer.loss_func"),
        (_SWIFT, "MegatronGRPOTrainer._apply_rollout_importance_sampling"),
        (_SWIFT, "MegatronGRPOTrainer._compute_off_policy_sequence_mask"),
        ("swift/megatron/trainers/base.py", "BaseMegatronTrainer.train_step"),
        ("swift/megatron/trainers/base.py", "BaseMegatronTrainer._aggregated_metrics"),
        ("swift/megatron/trainers/rollout_mixin.py", "MegatronRolloutMixin._prepare_vllm_engine"),
        ("swift/megatron/trainers/rollout_mixin.py", "MegatronRolloutMixin._colocate_rollout"),
        ("swift/megatron/trainers/rollout_mixin.py", "MegatronRolloutMixin._replace_data_iterator"),
        ("swift/megatron/trainers/utils.py", "compute_per_token_logps_fn"),
        ("swift/megatron/trainers/utils.py", "reconstruct_tensor_cp"),
        ("swift/rlhf_trainers/utils.py", "collate_to_grpo_micro_batch"),
        ("swift/rlhf_trainers/utils.py", "build_completion_mask_and_seq_lengths"),
        ("swift/rlhf_trainers/utils.py", "pad_logps_back_to_batch"),
    ],
}  # fmt: skip
# Where a release has what a later revision moved.
BEFORE: dict[tuple[str, str], tuple[str, str]] = {
    (f"{_TRAINING}/loss_hub/logit_processors.py", "get_log_probs_and_entropy"):
        (f"{_TRAINING}/loss.py", "get_log_probs_and_entropy"),
    (f"{_TRAINING}/loss_hub/losses.py", "policy_loss_function"):
        (f"{_TRAINING}/loss.py", "policy_loss_function"),
    (f"{_TRAINING}/loss_hub/math_utils.py", "compute_policy_loss"):
        ("miles/utils/ppo_utils.py", "compute_policy_loss"),
    (f"{_TRAINING}/replay_data.py", "fill_replay_data"):
        (f"miles/{_MEGATRON}/actor.py", "MegatronTrainRayActor._fill_replay_data"),
    ("miles/ray/rollout/train_data_conversion.py", "process_rollout_data_shard"):
        ("miles/utils/data.py", "process_rollout_data"),
    ("miles/utils/tracking_utils/tracking.py", "log"):
        ("miles/utils/tracking_utils/__init__.py", "log"),
}  # fmt: skip
# miles 0.0.2 with nothing else, and ms-swift 4.6.0 with mcore-bridge and an older TRL: `make test`
# puts them there.
MILES_WHEEL = Path(__file__).parents[2] / ".venv-miles"
SWIFT_WHEELS = Path(__file__).parents[2] / ".venv-swift"


def places(hook: tuple[str, str]) -> list[tuple[str, str]]:
    """File and name of a hook, the newest first."""
    return [hook, *([BEFORE[hook]] if hook in BEFORE else [])]


def found_in(checkout: Path, stack: str) -> dict[str, dict[str, str]]:
    """`FILE:NAME` → signature and checksum, of every hook that is there."""
    found = {}
    for hook in HOOKS[stack]:
        for file, name in places(hook):
            if about := _about(checkout / file, name):
                found[f"{file}:{name}"] = about
                break
    return found


def _about(file: Path, name: str) -> dict[str, str] | None:
    if not file.is_file():
        return None
    source = file.read_text(encoding="utf-8")
    body = ast.parse(source).body
    *outer, last = name.split(".")
    for part in outer:
        classes = [n for n in body if isinstance(n, ast.ClassDef) and n.name == part]
        body = classes[0].body if classes else []
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [n for n in body if isinstance(n, functions) and n.name == last]
    if not nodes:
        return None
    return {
        "signature": f"({ast.unparse(nodes[-1].args)})",
        "sha256": hashlib.sha256(_computed(nodes[-1]).encode()).hexdigest()[:16],
    }


def _computed(node: Any) -> str:
    """A function's syntax tree without comments and layout: the same text on every Python.

    ast.dump's is not: of empty fields, 3.12 has more and 3.13 shows none.
    """
    if isinstance(node, list):
        return f"[{','.join(map(_computed, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = (f"{k}={_computed(v)}" for k, v in ast.iter_fields(node) if v not in (None, []))
    return f"{type(node).__name__}({','.join(fields)})"


def read() -> dict[str, dict[str, dict[str, dict[str, str]]]]:
    """Stack → revision → hook → what was found of it."""
    return json.loads(FOUND.read_text(encoding="utf-8"))


def difference(stack: str, checkout: Path, revision: str) -> list[str]:
    """Hooks of a checkout that are not as they were at a tested revision, one line each."""
    tested, here = read()[stack][revision], found_in(checkout, stack)
    lines = []
    for hook, before in tested.items():
        now = here.get(hook)
        if now is None:
            lines.append(f"{hook}: gone")
        elif now["signature"] != before["signature"]:
            lines.append(f"{hook}: takes {now['signature']}, before {before['signature']}")
        elif now != before:
            lines.append(f"{hook}: computes otherwise")
    return lines


def main(stack: str, revision: str, checkout: str) -> None:
    found = found_in(Path(checkout), stack)
    missing = [
        hook[1]
        for hook in HOOKS[stack]
        if not any(f"{file}:{name}" in found for file, name in places(hook))
    ]
    if missing:
        sys.exit(f"{checkout}: no {', '.join(missing)}")
    kept = read() if FOUND.exists() else {}
    kept.setdefault(stack, {})[revision] = found
    FOUND.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{stack} {revision}: {len(found)} hooks")


if __name__ == "__main__":
    main(*sys.argv[1:])
