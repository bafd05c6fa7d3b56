"""The routing log of verl 0.9.1's Megatron engine: rollout against trainer, token by token.

Stands around `MegatronEngine.forward_backward_batch`, the one place that both the old log-probs and
the update go through, on every rank:

- the forward of the old log-probs is native with router_replay.mode `disabled` and `R2` (which
  records it): the routers' own outputs are taken from forward hooks. Under `R3` it is held to the
  rollout's routes; one more forward without replay gives the native routes, and the held one what
  each router would have chosen (`RouterReplay.get_replay_topk` computes that and drops it);
- in the update, the policy loss is evaluated a second time, on detached log-probs: its gradient
  says which tokens the loss's own rule cut, whatever loss it is;
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
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import verl.workers.utils.losses as verl_losses
from megatron.core import parallel_state
from verl.models.mcore.util import (
    postprocess_bshd_engine,
    postprocess_thd_engine,
    preprocess_bshd_engine,
    preprocess_thd_engine,
)
from verl.utils import tensordict_utils as tu
from verl.utils.megatron_utils import unwrap_model
from verl.utils.metric import AggregationType, Metric

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.kit import environment, routers
from moe_upgrpo.integrations.kit.run_log import RunLog, Step, check_free, gap_under_r3, reported
from moe_upgrpo.integrations.kit.second_look import clipped_tokens, second_look
from moe_upgrpo.integrations.verl.loss import VerlLoss
from moe_upgrpo.record import SequenceRecord, known_rows

ROW = "moe_upgrpo_row"  # of each sequence in the engine's batch; travels with the micro-batches
REWARDS = ("token_level_scores", "rm_scores", "token_level_rewards")  # the last with a KL penalty


def install(module) -> None:
    """Wrap `forward_backward_batch` of the module's MegatronEngine; once."""
    engine_class = module.MegatronEngine
    original = engine_class.forward_backward_batch
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def forward_backward_batch(self, data, loss_function, forward_only=False):
        # The reference model and the critic have engines of their own.
        if self.engine_config.forward_only or self.is_value_model:
            return original(self, data, loss_function, forward_only)
        if not hasattr(self, "moe_upgrpo_log"):
            self.moe_upgrpo_log = EngineLog(self, original)
        log = self.moe_upgrpo_log
        return log.score(data, loss_function) if forward_only else log.update(data, loss_function)

    engine_class.forward_backward_batch = forward_backward_batch


@dataclass(kw_only=True)
class _Scored:
    """A sequence at the old weights; on ranks that write nothing, empty."""

    rollout_SLK: np.ndarray | None = None
    native_SLK: np.ndarray | None = None
    margins_SL: np.ndarray | None = None
    own_SLK: np.ndarray | None = None
    native_logp: np.ndarray | None = None  # [S], value p - 1 for the token at p
    entropy: np.ndarray | None = None


class EngineLog:
    """The log of one engine on one rank."""

    def __init__(self, engine, forward_backward):
        self.engine = engine
        self.mode = engine.engine_config.router_replay.mode
        self._forward_backward = functools.partial(forward_backward, engine)
        not_covered = {
            "dynamic_context_parallel": engine.engine_config.dynamic_context_parallel,
            "LoRA": engine.peft_cls is not None,
            "use_fused_kernels": engine.engine_config.use_fused_kernels,
            "moe_router_fusion under R3": self.mode == "R3" and engine.tf_config.moe_router_fusion,
        }
        environment.refuse(not_covered)
        self.routers = [routers.counted(chunk) for chunk in unwrap_model(engine.module)]
        self.writes = engine.is_mp_src_rank_with_outputs()
        self.folder, self.share = environment.run_folder(), environment.token_share()
        check_free(self.folder)
        self.loss_mode = ""
        self.step = 0
        self.log: RunLog | None = None
        self.layer_ids: list[int] = []
        self._clear()

    def _clear(self) -> None:
        self.scored: dict[str, list[_Scored]] = {}
        self.visits = Counter()
        self.logged: dict[tuple[str, int], SequenceRecord] = {}
        self.gathered = Step()

    # --- old log-probs

    def score(self, data, loss_function) -> Any:
        """A forward without update: the first of a batch is that of the old log-probs."""
        keys = _keys(data)
        if set(keys) <= self.scored.keys():  # the same sequences again, such as for a reference
            return self._forward_backward(data, loss_function, True)
        self._clear()  # a batch that was never updated, such as under critic_warmup
        rollout = data["routed_experts"]
        data = data.clone(recurse=False)
        data[ROW] = torch.arange(len(keys))
        native_output = None
        if self.mode == "R3":
            native = data.clone(recurse=False)
            tu.assign_non_tensor(native, enable_routing_replay=False)
            native_output, native_parts = self._recorded(native, loss_function)
            output, own_parts = self._recorded(data, loss_function, own=True)
        else:
            if self.mode == "R2":
                # With the rollout's routes in the batch, verl would replay those (:938).
                data = data.exclude("routed_experts")
            output, native_parts = self._recorded(data, loss_function)
        native = routers.joined(native_parts, writes=self.writes)
        own = routers.joined(own_parts, writes=self.writes) if self.mode == "R3" else None
        if native is not None:
            self.layer_ids = native.layer_ids
        lengths = data["input_ids"].offsets().diff().tolist()
        routes = rollout.unbind() if self.writes else [None] * len(keys)
        for row, (key, length) in enumerate(zip(keys, lengths, strict=True)):
            scored = _Scored()
            if self.writes:
                scored = _Scored(
                    rollout_SLK=self._moe_layers(routes[row].cpu().numpy())[: length - 1],
                    native_SLK=native.routes[row][: length - 1],
                    margins_SL=native.margins[row][: length - 1],
                    own_SLK=own.routes[row][: length - 1] if own else None,
                    native_logp=_of_row(native_output, "log_probs", row),
                    entropy=_of_row(output, "entropy", row),
                )
            self.scored.setdefault(key, []).append(scored)
        return output

    def _recorded(self, data, loss_function, own: bool = False) -> tuple[Any, dict]:
        """The forward, and for each row and each layer of this rank what was recorded.

        own: what the routers would choose without replay, else what they chose.
        """
        found: dict[int, routers.Layers] = {}
        engine = self.engine
        forward_step = type(engine).forward_step
        watched = routers.watched_under_replay if own else routers.watched
        of_chunk = dict(zip(unwrap_model(engine.module), self.routers, strict=True))

        def step(batch_iter, model, *args, **kwargs):
            batch = next(batch_iter)
            with watched(of_chunk[unwrap_model(model)]) as watch:
                result = forward_step(engine, iter([batch]), model, *args, **kwargs)
            numbers, table = watch.take()
            if numbers:
                for row, table_SLX in zip(
                    batch[ROW].tolist(), self._by_sequence(table, batch), strict=True
                ):
                    found.setdefault(row, {}).update(routers.by_layer(numbers, table_SLX))
            return result

        engine.forward_step = step
        try:
            output = self._forward_backward(data, loss_function, True)
        finally:
            del engine.forward_step
        return output, found

    def _by_sequence(self, table_NLX: torch.Tensor, batch) -> list[torch.Tensor]:
        """Rows of this rank's shard of a micro-batch -> `[S, L, X]` of each sequence.

        The shards of sequence and context parallelism are joined by verl's own functions, in the
        layouts in which its forward splits a micro-batch (model_forward.py:303 and 409).
        """
        config = self.engine.tf_config
        table_NLX = routers.whole_sequence_parallel(table_NLX, config.sequence_parallel)
        input_ids = batch["input_ids"].to(table_NLX.device)
        fp8 = config.fp8 in ("e4m3", "hybrid")
        if self.engine.engine_config.use_remove_padding:
            layout = self.engine._get_context_parallel_layout(unwrap_model(self.engine.module)[0])
            bucket = None
            if self.engine.engine_config.pad_to_length:
                bucket = self.engine.engine_config.pad_to_length_bucket
            _, packed, _ = preprocess_thd_engine(
                input_ids,
                pre_process=True,
                use_fp8_padding=fp8,
                pad_to_length_bucket=bucket,
                cp_layout=layout,
            )
            nested = postprocess_thd_engine(
                table_NLX[None], packed, input_ids, len(input_ids), cp_layout=layout
            )
        else:
            _, mask_BS, _ = preprocess_bshd_engine(
                input_ids,
                use_fp8_padding=fp8,
                forced_max_seqlen=tu.get_non_tensor_data(batch, "forced_max_seqlen", None),
            )
            table_BSLX = table_NLX.unflatten(0, mask_BS.T.shape).transpose(0, 1).contiguous()
            nested = postprocess_bshd_engine(table_BSLX, mask_BS)
        return list(nested.unbind())

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
        self.log = RunLog(
            self.folder,
            {
                "stack": f"verl {version('verl')}",
                "model": str(engine.model_config.local_path),
                "layout": f"tp {sizes.tensor_model_parallel_size}, "
                f"pp {sizes.pipeline_model_parallel_size}, ep {sizes.expert_model_parallel_size}, "
                f"cp {sizes.context_parallel_size}",
                "loss": self.loss_mode,
                "replay": "none" if self.mode == "disabled" else self.mode,
                "engine": "verl rollout",
            },
            group=parallel_state.get_data_parallel_group(),
            layer_ids=self.layer_ids,
            top_k=engine.tf_config.moe_router_topk,
            num_experts=engine.tf_config.num_moe_experts,
            share=self.share,
            modules=unwrap_model(engine.module),
        )

    # --- update

    def update(self, data, loss_function) -> Any:
        """An optimizer step: what the loss sees of each token, and the log after the last one."""
        keys = _keys(data)
        data[ROW] = torch.arange(len(keys))
        seen: dict[int, dict[str, Any]] = {}
        with self._watched_loss(seen) as loss:
            output = self._forward_backward(data, loss(loss_function), False)
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

    @contextmanager
    def _watched_loss(self, seen: dict[int, dict[str, Any]]):
        """Gives a wrapper for verl's loss function; `seen` takes its tokens, by row."""
        rows: list[int] = []
        get = verl_losses.get_policy_loss_fn

        def watched(name):
            policy_loss, self.loss_mode = get(name), name

            def call(**arguments):
                self._see(policy_loss, arguments, rows, seen)
                return policy_loss(**arguments)

            return call

        def wrapper(loss_function):
            @functools.wraps(loss_function)
            def call(*args, data, **kwargs):
                rows[:] = data[ROW].tolist()
                return loss_function(*args, data=data, **kwargs)

            return call

        if not self.writes:
            yield lambda loss_function: loss_function
            return
        verl_losses.get_policy_loss_fn = watched
        try:
            yield wrapper
        finally:
            verl_losses.get_policy_loss_fn = get

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
        for row, key in enumerate(keys):
            token = seen[row]
            kept_N = np.flatnonzero(token["mask"])
            if not len(kept_N):  # a sequence that fills up the batch
                continue
            if key not in self.scored:
                raise UserError(
                    "MOE_UPGRPO_RUN: a sequence is updated whose old log-probs this rank did not "
                    "compute: the routing log needs a forward at the old weights "
                    "(algorithm.rollout_correction.bypass_mode=False)"
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
            uid = ids[: prompt_lengths[row]].tobytes().hex() if uids is None else str(uids[row])
            logp_rollout = _row(data["rollout_log_probs"], row)[kept_N].astype(float)
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
