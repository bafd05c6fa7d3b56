# SPDX-License-Identifier: Apache-2.0
"""The routing log of verl's Megatron engine: rollout against trainer, token by token.

It wraps `MegatronEngine.forward_backward_batch`, the one place that both the old log-probs and the
update go through, on every rank:

- the forward pass of the old log-probs is native with router_replay.mode `disabled` and `R2` (which
  records it): forward hooks take the routers' own outputs. Under `R3` it is held to the rollout's
  routes; another pass without replay gives the native routes, and the held one what each router
  would have chosen (`RouterReplay.get_replay_topk` computes that and drops it);
- without such a pass (`bypass_mode`) the same is taken from the update's first pass over each
  sequence. It then includes the effects of earlier optimizer steps and of the rollout's weights:
  `STALENESS` says so in the run's config;
- in the update, the policy loss is evaluated a second time, on detached log-probs: its gradient
  says which tokens the loss's own rule cut, whatever the loss is;
- after the last mini-batch the step's token rows and metrics are written.

The rows of verl's `routed_experts` are indexed by the input's position and padded with zeros: the
token at position p takes row p - 1, and only tokens of the response mask count.

Shapes: S tokens of a sequence, N rows of a micro-batch on this rank, L MoE layers, K experts each.
"""

import functools
import hashlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import verl
import verl.workers.utils.losses as verl_losses
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.megatron.router_replay_patch import patched_routing
from verl.utils.megatron_utils import unwrap_model
from verl.utils.metric import AggregationType, Metric

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.kit import environment, routers
from moe_upgrpo.integrations.kit.hooking import replaced
from moe_upgrpo.integrations.kit.run_log import RunLog, Step, check_free, gap_under_r3, reported
from moe_upgrpo.integrations.kit.second_look import clipped_tokens, second_look
from moe_upgrpo.integrations.verl.forward import ROW, Forward, leads
from moe_upgrpo.integrations.verl.loss import VerlLoss
from moe_upgrpo.record import SequenceRecord, known_rows

REWARDS = ("token_level_scores", "rm_scores", "token_level_rewards")  # the last with a KL penalty
STALENESS = (
    "not separable: no forward at the old weights (bypass_mode), so that native routes are those "
    "of the update's first forward of each sequence; logp_old, ratio and entropy are null"
)


def install(module) -> None:
    """Wrap the parts of the module's MegatronEngine that run at start and for each batch; once."""
    engine_class = module.MegatronEngine
    initialize = engine_class.initialize
    forward_backward = engine_class.forward_backward_batch
    disable_adapter = engine_class.disable_adapter
    if hasattr(forward_backward, "moe_upgrpo_log"):
        return

    @functools.wraps(initialize)
    def initialize_with_log(self):
        initialize(self)
        # The reference model and the critic have engines of their own.
        if self.engine_config.forward_only or self.is_value_model:
            return
        before = getattr(self, "moe_upgrpo_log", None)
        self.moe_upgrpo_log = EngineLog(self, forward_backward)
        if before is not None:  # `TrainingWorker.reset`: another model, the same run
            self.moe_upgrpo_log.step, self.moe_upgrpo_log.log = before.step, before.log
        else:
            check_free(self.moe_upgrpo_log.folder)

    @functools.wraps(forward_backward)
    def forward_backward_batch(self, data, loss_function, forward_only=False):
        log = getattr(self, "moe_upgrpo_log", None)
        if log is None or log.without_adapter:
            return forward_backward(self, data, loss_function, forward_only)
        return log.score(data, loss_function) if forward_only else log.update(data, loss_function)

    @functools.wraps(disable_adapter)
    @contextmanager
    def disable_adapter_of_log(self):
        log = getattr(self, "moe_upgrpo_log", None)
        with disable_adapter(self):
            if log is not None:
                log.without_adapter = True
            try:
                yield
            finally:
                if log is not None:
                    log.without_adapter = False

    forward_backward_batch.moe_upgrpo_log = True
    engine_class.initialize = initialize_with_log
    engine_class.forward_backward_batch = forward_backward_batch
    engine_class.disable_adapter = disable_adapter_of_log


def _check(engine) -> None:
    """Raise UserError if the log cannot follow the engine's settings."""
    replays = engine.engine_config.router_replay.mode != "disabled"
    by_verl = TopKRouter.routing is patched_routing  # which does not ask for the fused kernel
    if replays and not by_verl and getattr(engine.tf_config, "moe_router_fusion", False):
        raise UserError(
            f"{environment.RUN}: moe_router_fusion given under router replay: Megatron-Core's "
            "fused kernel chooses the experts where a replay neither acts nor is seen. Set "
            "actor_rollout_ref.actor.megatron.override_transformer_config.moe_router_fusion=False"
        )


@dataclass(kw_only=True)
class _Scored:
    """A sequence at the old weights; on ranks that write nothing, empty.

    late: there was no pass at the old weights; this is from the update's first pass.
    """

    late: bool = False

    rollout_SLK: np.ndarray | None = None
    native_SLK: np.ndarray | None = None
    margins_SL: np.ndarray | None = None
    own_SLK: np.ndarray | None = None
    native_logp: np.ndarray | None = None  # [S], value p - 1 for the token at p
    entropy: np.ndarray | None = None


class EngineLog:
    """The log of one engine on one rank."""

    def __init__(self, engine, forward_backward):
        _check(engine)
        self.engine = engine
        self.mode = engine.engine_config.router_replay.mode
        self.forward = Forward(engine, forward_backward)
        if self.mode != "disabled":
            routers.check_replayed([r for chunk in self.forward.routers for r in chunk])
        self.writes = self.forward.writes
        # Under dynamic context parallelism each of these ranks has the losses of its sequences.
        self.has_losses = self.writes or (
            self.forward.dynamic
            and parallel_state.is_pipeline_last_stage(ignore_virtual=True)
            and parallel_state.get_tensor_model_parallel_rank() == 0
        )
        self.without_adapter = False  # inside `disable_adapter`: a reference model is asked
        self.folder = environment.run_folder()
        self.share, self.limits = environment.token_share(), environment.alarm_limits()
        self.loss_mode = ""
        self.step = 0
        self.log: RunLog | None = None
        self.layer_ids: list[int] = []
        self._clear()

    def _clear(self) -> None:
        self.scored: dict[str, list[_Scored]] = {}
        self.bypassed = True  # until a forward at the old weights comes
        self.visits = Counter()
        self.logged: dict[tuple[str, int], SequenceRecord] = {}
        self.gathered = Step()

    # --- old log-probs

    def score(self, data, loss_function) -> Any:
        """Run a forward pass without update: a batch's first computes the old log-probs."""
        keys = _keys(data)
        if set(keys) <= self.scored.keys():  # the same sequences again, such as for a reference
            return self.forward.plain(data, loss_function, True)
        self._clear()  # a batch that was never updated, such as under critic_warmup
        self.bypassed = False
        rollout = data["routed_experts"]
        data = data.clone(recurse=False)
        data[ROW] = torch.arange(len(keys))
        native_output = own = None
        if self.mode == "R3":
            native_output, native = self._native(data, loss_function)
            output, own = self.forward.recorded(data, loss_function, own=True)
        else:
            if self.mode == "R2":
                # With the rollout's routes in the batch, verl would replay those (:938).
                data = data.exclude("routed_experts")
            output, native = self.forward.recorded(data, loss_function)
        kept = self._kept(data, rollout, native, own)
        for row, (key, scored) in enumerate(zip(keys, kept, strict=True)):
            if self.writes:
                scored.native_logp = _of_row(native_output, "log_probs", row)
                scored.entropy = _of_row(output, "entropy", row)
            self.scored.setdefault(key, []).append(scored)
        return output

    def _native(self, data, loss_function) -> tuple[Any, routers.Routes | None]:
        """Run another forward pass, without replay, and return the routers' choices too."""
        data = data.clone(recurse=False)
        tu.assign_non_tensor(data, enable_routing_replay=False)
        with torch.no_grad():
            return self.forward.recorded(data, loss_function)

    def _kept(
        self, data, rollout, native: routers.Routes | None, own: routers.Routes | None
    ) -> list[_Scored]:
        """The routes of both sides for each sequence of a batch."""
        if not self.writes:
            return [_Scored() for _ in range(len(data))]
        self.layer_ids = native.layer_ids
        lengths = data["input_ids"].offsets().diff().tolist()
        return [
            _Scored(
                rollout_SLK=self._moe_layers(routes.cpu().numpy())[: length - 1],
                native_SLK=native.routes[row][: length - 1],
                margins_SL=native.margins[row][: length - 1],
                own_SLK=own.routes[row][: length - 1] if own else None,
            )
            for row, (routes, length) in enumerate(zip(rollout.unbind(), lengths, strict=True))
        ]

    def _moe_layers(self, routes_SLK: np.ndarray) -> np.ndarray:
        return routers.moe_layers(
            "routed_experts",
            routes_SLK,
            layer_ids=self.layer_ids,
            num_layers=self.engine.tf_config.num_layers,
        )

    def _open(self) -> None:
        if self.log is not None:
            return
        engine, sizes = self.engine, self.engine.engine_config
        replay = "none" if self.mode == "disabled" else self.mode
        config = {
            "stack": f"verl {verl.__version__}",
            "model": str(engine.model_config.local_path),
            "layout": f"tp {sizes.tensor_model_parallel_size}, "
            f"pp {sizes.pipeline_model_parallel_size}, ep {sizes.expert_model_parallel_size}, "
            + ("cp dynamic" if self.forward.dynamic else f"cp {sizes.context_parallel_size}"),
            "loss": self.loss_mode,
            "replay": replay,
            "engine": "verl rollout",
        }
        if self.bypassed:
            config["staleness"] = STALENESS
        self.log = RunLog(
            self.folder,
            config,
            group=engine.get_data_parallel_group(),
            layer_ids=self.layer_ids,
            top_k=engine.tf_config.moe_router_topk,
            num_experts=engine.tf_config.num_moe_experts,
            share=self.share,
            limits=self.limits,
            modules=unwrap_model(engine.module),
            tokenizer=engine.model_config.local_tokenizer_path,
        )

    # --- update

    def update(self, data, loss_function) -> Any:
        """Run an optimizer step, recording what the loss sees of each token; log after the last."""
        keys = _keys(data)
        data[ROW] = torch.arange(len(keys))
        seen: dict[int, dict[str, Any]] = {}
        with self._watched_loss(seen) as loss:
            if self._is_first_visit(keys):
                output = self._first_visit(data, keys, loss(loss_function))
            else:
                output = self.forward.plain(data, loss(loss_function), False)
        if self.forward.dynamic:
            self._collect(seen)
        if self.writes:
            self.gathered.updates += 1
            self._add(data, keys, seen)
        if tu.get_non_tensor_data(data, "update_lr_scheduler", False):
            self.step += 1
            if self.writes:
                self._open()
                self.gathered.sequences = list(self.logged.values())
                metrics = self.log.write_step(self.step, self.gathered)
                output["metrics"] |= {
                    name: Metric(value=value, aggregation=AggregationType.MEAN)
                    for name, value in reported(metrics).items()
                }
            self._clear()
        return output

    def _is_first_visit(self, keys: list[str]) -> bool:
        """Whether a sequence on any data-parallel rank has not been through a forward yet.

        The same on all ranks: under replay the answer decides on one more forward pass.
        """
        if not self.bypassed:
            return False
        new = torch.tensor([int(not set(keys) <= self.scored.keys())], device=get_device_id())
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(new, op=dist.ReduceOp.MAX, group=group)
        return bool(new)

    def _first_visit(self, data, keys: list[str], loss_function) -> Any:
        """Run the update's forward pass where no pass at the old weights came before it."""
        own = None
        if self.mode == "disabled":
            output, native = self.forward.recorded(data, loss_function, forward_only=False)
        else:
            # Held to the rollout's routes, under R2 too, which has recorded none of its own.
            _, native = self._native(data, None)
            output, own = self.forward.recorded(data, loss_function, forward_only=False, own=True)
        known = set(self.scored)
        found = self._kept(data, data["routed_experts"], native, own)
        for key, kept in zip(keys, found, strict=True):
            kept.late = True
            if key not in known:
                self.scored.setdefault(key, []).append(kept)
        return output

    def _collect(self, seen: dict[int, dict[str, Any]]) -> None:
        """Bring the parts dealt out by dynamic context parallelism to the rank that writes."""
        parts = self.forward.from_all_replicas((seen, self.gathered))
        for other, step in parts[1:]:
            seen |= other
            self.gathered.add(step)
        if not self.writes:
            self.gathered = Step()

    @contextmanager
    def _watched_loss(self, seen: dict[int, dict[str, Any]]):
        """Return a wrapper for verl's loss function; `seen` takes its tokens, by row."""
        rows: list[int] = []
        get = verl_losses.get_policy_loss_fn

        def watched(name):
            policy_loss, self.loss_mode = get(name), name

            def call(**arguments):
                if rows:
                    self._see(policy_loss, arguments, rows, seen)
                return policy_loss(**arguments)

            return call

        def wrapper(loss_function):
            @functools.wraps(loss_function)
            def call(*args, data, **kwargs):
                rows[:] = data[ROW].tolist() if leads(data) else []
                return loss_function(*args, data=data, **kwargs)

            return call

        if not self.has_losses:
            yield lambda loss_function: loss_function
            return
        with replaced(verl_losses, get_policy_loss_fn=watched):
            yield wrapper

    def _see(self, policy_loss, arguments: dict, rows: list[int], seen: dict) -> None:
        dp_size = arguments["config"].global_batch_info.get("dp_size") or 1

        def evaluate(leaves):
            given = arguments | {"log_prob": leaves[0]}
            if isinstance(policy_loss, VerlLoss):
                loss, result = policy_loss.evaluate(**given)
                return loss, result.metrics
            return policy_loss(**given)[0], {}

        look = second_look(evaluate, [arguments["log_prob"]])
        if look.metrics:
            self.gathered.loss_metrics.append(look.metrics)
        self.gathered.loss_sum += float(look.loss) / dp_size
        (pull_BT,) = look.pulls
        advantages_BT, mask_BT = arguments["advantages"], arguments["response_mask"].bool()
        clipped_BT = clipped_tokens(pull_BT, advantages_BT, mask_BT)
        self.gathered.visit(clipped_BT, advantages_BT, mask_BT)
        columns = {
            "logp_train": arguments["log_prob"].detach(),
            "logp_old": arguments["old_log_prob"],
            "advantage": advantages_BT,
            "clipped": clipped_BT,
            "gradient_weight": pull_BT.abs() / dp_size,
            "mask": mask_BT,
        }
        arrays = {name: column.cpu().numpy() for name, column in columns.items()}
        for i, row in enumerate(rows):
            seen[row] = {name: array[i] for name, array in arrays.items()}

    def _add(self, data, keys: list[str], seen: dict[int, dict[str, Any]]) -> None:
        prompt_lengths = _prompt_lengths(data)
        rewards = next((data[name] for name in REWARDS if name in data), None)
        if "rollout_log_probs" not in data or rewards is None:
            raise UserError(
                "MOE_UPGRPO_RUN: the batch lacks "
                + ("a reward" if rewards is None else "rollout_log_probs")
                + "; the routing log needs actor_rollout_ref.rollout.calculate_log_probs=True and "
                f"one of {', '.join(REWARDS)}"
            )
        uids = tu.get(data, "uid")
        tokens = data["input_ids"].unbind()
        if missing := set(range(len(keys))) - seen.keys():
            raise UserError(
                f"MOE_UPGRPO_RUN: verl called no policy loss for {len(missing)} of {len(keys)} "
                "sequences of a mini-batch; the routing log needs one (distillation alone has "
                "none: unset the variable)"
            )
        for row, key in enumerate(keys):
            token = seen[row]
            kept_N = np.flatnonzero(token["mask"])
            if not len(kept_N):  # a sequence that fills up the batch
                continue
            if key not in self.scored:
                raise UserError(
                    "MOE_UPGRPO_RUN: a sequence is updated that was not in the forward of the old "
                    "log-probs on this rank, which others were in; were the sequences dealt out "
                    "anew in between, or is their batch another in part?"
                )
            copies = self.scored[key]
            copy = self.visits[key] % len(copies)
            self.visits[key] += 1
            scored, positions = copies[copy], prompt_lengths[row] + kept_N
            ids = tokens[row].cpu().numpy()
            of_token = {
                name: token[name][kept_N].astype(float)
                for name in ("advantage", "logp_old", "logp_train", "gradient_weight")
            }
            logp_rollout = _row(data["rollout_log_probs"], row)[kept_N].astype(float)
            if scored.late and np.array_equal(of_token["logp_old"], logp_rollout):
                of_token["logp_old"] = None  # verl's stand-in for it
            uid = ids[: prompt_lengths[row]].tobytes().hex() if uids is None else str(uids[row])
            native_logp, entropy = (
                None if x is None else x[positions - 1]
                for x in (scored.native_logp, scored.entropy)
            )
            gap = None
            if native_logp is not None:
                gap = gap_under_r3(
                    logp_rollout, of_token["logp_old"], native_logp, of_token["logp_train"]
                )
            both = scored.rollout_SLK, scored.native_SLK
            self.logged[key, copy] = SequenceRecord(
                prompt=uid,
                token_ids=ids,
                positions=positions,
                reward=float(_row(rewards, row).sum()),
                logp_rollout=logp_rollout,
                clipped=token["clipped"][kept_N],
                rollout_routes=scored.rollout_SLK,
                train_routes=scored.native_SLK,
                known=known_rows(*both, num_experts=self.engine.tf_config.num_moe_experts),
                own_routes=scored.own_SLK,
                margins=scored.margins_SL,
                gap=gap,
                entropy=entropy,
                **of_token,
            )


def _keys(data) -> list[str]:
    """Key of a sequence from one forward to the next: its tokens, routes, log-probs."""
    if "routed_experts" not in data:
        raise UserError(
            "MOE_UPGRPO_RUN: the batch has no routed_experts; the routing log needs "
            "actor_rollout_ref.rollout.enable_rollout_routing_replay=True"
        )
    rows = [data["input_ids"].unbind()]
    if "rollout_log_probs" in data:
        rows.append([_row(data["rollout_log_probs"], i) for i in range(len(rows[0]))])
    keys = []
    for parts in zip(*rows, strict=True):
        digest = hashlib.blake2b(digest_size=16)
        for part in parts:
            digest.update(np.ascontiguousarray(torch.as_tensor(part).cpu().numpy()).tobytes())
        keys.append(digest.hexdigest())
    return keys


def _row(column: torch.Tensor, row: int) -> np.ndarray:
    """One sequence of a padded or nested `[B, T]`."""
    return column[row].detach().cpu().numpy()


def _prompt_lengths(data) -> list[int]:
    prompts = data["prompts"]
    if prompts.is_nested:
        return prompts.offsets().diff().tolist()
    return data["attention_mask"][:, : prompts.shape[1]].sum(dim=1).tolist()


def _of_row(output, name: str, row: int) -> np.ndarray | None:
    if output is None or name not in output["model_output"]:
        return None
    return output["model_output"][name][row].detach().float().cpu().numpy().astype(float)
