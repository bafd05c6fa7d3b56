# SPDX-License-Identifier: Apache-2.0
"""The routing log of NeMo-RL's Megatron workers: rollout against trainer, token by token.

`moe-upgrpo patch apply nemo-rl` puts `logged` on `MegatronPolicyWorkerImpl`, the class of the
workers of all tensor, pipeline, context and data ranks. It wraps

- `get_logprobs`, the forward pass at the old weights: forward hooks record the routers' own choice.
  With replay that pass is held to the rollout's routes; another one without replay goes before it,
  and the held one shows what each router would have chosen (NeMo-RL's and Megatron-Core's
  `RouterReplay.get_replay_topk` drop it);
- `train`: the loss is evaluated a second time, on detached log-probs and without its KL term; the
  gradient says which tokens the loss's own rule cut. After the last optimizer step the token rows
  and metrics of the step are written;
- `begin_train_step`, `train_microbatch`, `finish_train_step`, where a revision has them: the same
  for the single controller, which hands a step over in chunks, with its loss as a sum that is
  divided by the number of tokens or sequences at the end.

`policy.router_replay.observe_only` carries the rollout's routes to the workers as router_replay
does, but nothing is replayed there.

Row p - 1 of `routed_experts` belongs to the token at p. A row of -1 is missing: its token is left
out of the log, and counted.

Shapes: S tokens of a sequence, N rows of a micro-batch on this rank, L MoE layers, K experts each.
"""

import functools
import hashlib
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from nemo_rl.algorithms.loss.interfaces import LossType
from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossFn
from nemo_rl.models.megatron import router_replay
from nemo_rl.package_info import __version__

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.kit import environment, routers
from moe_upgrpo.integrations.kit.hooking import replaced
from moe_upgrpo.integrations.kit.run_log import RunLog, Step, check_free, gap_under_r3, reported
from moe_upgrpo.integrations.kit.second_look import clipped_tokens, second_look
from moe_upgrpo.integrations.nemo_rl import start
from moe_upgrpo.integrations.nemo_rl.forward import ROW, Recorder
from moe_upgrpo.record import SequenceRecord, known_rows


def logged(worker_class: type) -> type:
    """Return the class with `observe_only` and, where MOE_UPGRPO_RUN is set, with the log."""
    init = worker_class.__init__

    @functools.wraps(init)
    def __init__(self, config, *args, **kwargs):
        replay = config.get("router_replay") or {}
        observes = bool(replay.get("enabled") and replay.get("observe_only"))
        init(
            self,
            {**config, "router_replay": {"enabled": False}} if observes else config,
            *args,
            **kwargs,
        )
        if environment.run_folder() is None:
            return
        if replay.get("enabled"):
            self.moe_upgrpo_log = WorkerLog(self, get_logprobs, replay)
        elif dist.get_rank() == 0:
            start.warn(start.NO_ROUTES)

    worker_class.__init__ = __init__
    if environment.run_folder() is None:
        return worker_class
    get_logprobs = worker_class.get_logprobs
    for name, wrap in {
        "get_logprobs": _with_routes,
        "train": _with_log,
        "begin_train_step": _opened,
        "train_microbatch": _with_chunk,
        "finish_train_step": _finished,
        "abort_train_step": _aborted,
    }.items():
        method = getattr(worker_class, name, None)
        if method is not None:  # v0.7.0 has no split training step
            setattr(worker_class, name, functools.wraps(method)(wrap(method)))
    return worker_class


def _log(worker) -> "WorkerLog | None":
    return getattr(worker, "moe_upgrpo_log", None)


def _with_routes(get_logprobs):
    def method(self, *, data, micro_batch_size=None, require_router_replay=True):
        def call():
            return get_logprobs(
                self,
                data=data,
                micro_batch_size=micro_batch_size,
                require_router_replay=require_router_replay,
            )

        log = _log(self)
        if log is None or not require_router_replay:  # a pass of the reference, or a calibration
            return call()
        return log.score(data, call)

    return method


def _with_log(train):
    def method(self, data, loss_fn, eval_mode=False, gbs=None, *args, **kwargs):
        log = _log(self)
        if log is None or eval_mode or not log.follows(loss_fn):
            return train(self, data, loss_fn, eval_mode, gbs, *args, **kwargs)
        return log.update(
            data, loss_fn, gbs, lambda loss: train(self, data, loss, False, gbs, *args, **kwargs)
        )

    return method


def _opened(begin):
    def method(self, loss_fn, *args, **kwargs):
        log = _log(self)
        if log is not None and log.follows(loss_fn):
            loss_fn = log.open_step(loss_fn)
        return begin(self, loss_fn, *args, **kwargs)

    return method


def _with_chunk(train_microbatch):
    def method(self, data):
        log = _log(self)
        if log is None or log.open is None:
            return train_microbatch(self, data)
        return log.chunk(data, lambda: train_microbatch(self, data))

    return method


def _finished(finish):
    def method(self):
        log = _log(self)
        if log is None or log.open is None:
            return finish(self)
        return log.close_step(finish(self))

    return method


def _aborted(abort):
    def method(self):
        if (log := _log(self)) is not None:
            log.clear()
        return abort(self)

    return method


@dataclass
class _Scored:
    """A sequence at the old weights. Log-probs: `[S]`, value p for the token at p."""

    native_SLK: np.ndarray
    margins_SL: np.ndarray
    own_SLK: np.ndarray | None = None
    native_logp: np.ndarray | None = None


class _Seen:
    """A loss that is called like the worker's, and shows its arguments."""

    def __init__(self, loss_fn: ClippedPGLossFn, see):
        self.loss_fn, self._see = loss_fn, see

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loss_fn, name)

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        totals = (global_valid_seqs, global_valid_toks)
        self._see(self.loss_fn, next_token_logprobs, data, *totals)
        return self.loss_fn(next_token_logprobs, data, *totals)


class WorkerLog:
    """The log of one worker."""

    def __init__(self, worker, get_logprobs, replay: dict[str, Any]):
        """get_logprobs: the worker's own. replay: policy.router_replay as the user set it."""
        self.worker, self.path = worker, environment.run_folder()
        self.share, self.limits = environment.token_share(), environment.alarm_limits()
        check_free(self.path)
        self.replays = worker._router_replay_enabled
        config = router_replay._unwrap_model_config(worker.model)
        environment.refuse(start.not_covered(worker, config, replay))
        self.config = config
        self.recorder = Recorder(worker.model, get_logprobs, config.sequence_parallel)
        self.writes = (
            parallel_state.is_pipeline_last_stage(ignore_virtual=True) and routers.first_of_stage()
        )
        self.group = parallel_state.get_data_parallel_group()
        self.layer_ids: list[int] = []
        self.log: RunLog | None = None
        self.step = 0
        self.clear()

    def clear(self) -> None:
        """Forget what was gathered in a step."""
        self.scored: dict[str, _Scored] = {}
        self.seen: dict[int, dict[str, np.ndarray]] = {}
        self.gathered = Step(without_routes=0)
        self.counted = np.zeros(2)  # sequences and tokens of an open step
        self.open: ClippedPGLossFn | None = None  # the loss of a step that comes in chunks

    @staticmethod
    def follows(loss_fn) -> bool:
        """Whether it is a policy loss; prints a line if not."""
        if not (known := isinstance(loss_fn, ClippedPGLossFn)) and dist.get_rank() == 0:
            start.warn(f"{environment.RUN}: no log of {type(loss_fn).__name__}, no policy loss")
        return known

    # --- old log-probs

    def score(self, data, forward) -> Any:
        """Run the worker's forward pass, with routes. `forward` calls its `get_logprobs`."""
        if "routed_experts" not in data:
            raise UserError(
                "MOE_UPGRPO_RUN: the batch has no routed_experts; the routing log needs "
                "policy.router_replay.enabled=true (with observe_only=true nothing is replayed) "
                "and vLLM as the generation backend"
            )
        data[ROW] = torch.arange(data.size)
        try:
            native_logp = own = None
            if self.replays:
                with replaced(self.worker, _router_replay_enabled=False):
                    native_output, native = self.recorder.recorded(forward)
                native_logp = native_output["logprobs"]
                output, own = self.recorder.recorded(forward, own=True)
            else:
                output, native = self.recorder.recorded(forward)
        finally:
            del data[ROW]
        native = routers.joined(native, writes=self.writes)
        own = None if own is None else routers.joined(own, writes=self.writes)
        if self.writes:
            self.layer_ids = native.layer_ids
            for row, key in enumerate(_keys(data)):
                self.scored[key] = _Scored(
                    native.routes[row],
                    native.margins[row],
                    own.routes[row] if own else None,
                    None if native_logp is None else native_logp[row].double().numpy(),
                )
        return output

    # --- update

    def update(self, data, loss_fn: ClippedPGLossFn, gbs: int | None, train) -> Any:
        """Run all optimizer steps of a rollout batch. `train` calls the worker's with a loss."""
        output = self._visited(data, lambda: train(self._shown(loss_fn)))
        per_update = (gbs or self.worker.cfg["train_global_batch_size"]) // self.worker.dp_size
        self.gathered.updates = data.size // per_update
        return self._written(output, loss_fn)

    def open_step(self, loss_fn: ClippedPGLossFn) -> Any:
        """Return the loss for an optimizer step whose batch comes in chunks."""
        self.open = loss_fn
        return self._shown(loss_fn)

    def chunk(self, data, train) -> Any:
        """Train on a part of the batch of an open step. `train` calls the worker's."""
        sample_mask = data["sample_mask"]
        tokens = (data["token_mask"][:, 1:] * sample_mask.unsqueeze(-1)).sum()
        self.counted += [float(sample_mask.sum()), float(tokens)]
        return self._visited(data, train)

    def close_step(self, output) -> Any:
        """End an open step. Its losses were sums: NeMo-RL divides the gradient only now."""
        loss_fn = self.open
        if self.writes:
            counted = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(counted, self.counted, self.group)
            sequences, tokens = sum(counted)
            total = max(tokens if loss_fn.loss_type == LossType.TOKEN_LEVEL else sequences, 1.0)
            self.gathered.loss_sum /= total
            for sequence in self.gathered.sequences:
                sequence.gradient_weight /= total
        self.gathered.updates = 1
        return self._written(output, loss_fn)

    def _shown(self, loss_fn: ClippedPGLossFn) -> Any:
        return _Seen(loss_fn, self._see) if self.writes else loss_fn

    def _visited(self, data, train) -> Any:
        data[ROW] = torch.arange(data.size)
        try:
            output = train()
        finally:
            del data[ROW]
        if self.writes:
            self._gather(data)
        return output

    def _written(self, output, loss_fn) -> Any:
        metrics: dict[str, float] = {}
        if self.writes:
            self._open(loss_fn)
            self.step += 1
            metrics = self.log.write_step(self.step, self.gathered)
        self.clear()
        return self._reported(output, metrics)

    def _see(self, loss_fn, logprobs, data, global_valid_seqs, global_valid_toks) -> None:
        totals = (global_valid_seqs, global_valid_toks)

        def evaluate(leaves):
            if getattr(loss_fn, "config", None) is not None:
                loss, result = loss_fn.evaluate(leaves[0], data, *totals)
                return loss, result.metrics
            alone = copy(loss_fn)
            alone.reference_policy_kl_penalty = alone.positive_example_nll_weight = 0
            return alone(leaves[0], data, *totals)[0], {}

        look = second_look(evaluate, [logprobs.float()])
        if look.metrics:
            self.gathered.loss_metrics.append(look.metrics)
        self.gathered.loss_sum += float(look.loss)
        (pull_BT,) = look.pulls
        mask_BT = (data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)) > 0
        advantages_BT = data["advantages"][:, 1:]
        clipped_BT = clipped_tokens(pull_BT, advantages_BT, mask_BT)
        self.gathered.visit(clipped_BT, advantages_BT, mask_BT)
        columns = {
            "logp_train": logprobs.detach().float(),
            "logp_old": data["prev_logprobs"][:, 1:],
            "logp_rollout": data["generation_logprobs"][:, 1:],
            "advantage": advantages_BT,
            "clipped": clipped_BT,
            "gradient_weight": pull_BT.abs(),
            "mask": mask_BT,
        }
        arrays = {name: column.cpu().numpy() for name, column in columns.items()}
        for i, row in enumerate(data[ROW].tolist()):
            self.seen[row] = {name: array[i] for name, array in arrays.items()}

    def _gather(self, data) -> None:
        """Gather the step's sequences; a collective over the data-parallel ranks."""
        keys = _keys(data)
        self._fetch(keys)
        if "total_reward" not in data or any(key not in self.scored for key in keys):
            raise UserError(
                f"{environment.RUN}: a batch is trained on "
                + (
                    "without old log-probs: the routing log needs their forward "
                    "(loss_fn.force_on_policy_ratio=false)"
                    if "total_reward" in data
                    else "without rewards: the routing log covers GRPO, in a checkout that is "
                    "patched (moe-upgrpo patch apply nemo-rl)"
                )
            )
        for row, key in enumerate(keys):
            sequence, left_out = self._sequence(data, row, self.scored[key])
            self.gathered.without_routes += left_out
            if sequence is not None:
                self.gathered.sequences.append(sequence)
        self.seen = {}

    def _fetch(self, keys: list[str]) -> None:
        """Fetch scores of sequences whose old log-probs another data-parallel rank computed.

        NeMo-RL shards a batch anew for `train`, by its global batches and packing.
        """
        size = dist.get_world_size(self.group)
        wanted: list[list[str]] = [None] * size
        dist.all_gather_object(
            wanted, [key for key in dict.fromkeys(keys) if key not in self.scored], self.group
        )
        if not any(wanted):
            return
        mine = dict(self.scored)
        for source in dist.get_process_group_ranks(self.group):
            parts, found = None, [None]
            if source == dist.get_rank():
                parts = [{key: mine[key] for key in names if key in mine} for names in wanted]
            dist.scatter_object_list(found, parts, src=source, group=self.group)
            self.scored |= found[0]

    def _sequence(self, data, row: int, scored: _Scored) -> tuple[SequenceRecord | None, int]:
        """The sequence, and the number of its tokens whose rollout routes are missing."""
        token = self.seen[row]
        length = int(data["input_lengths"][row])
        ids = data["input_ids"][row, :length].cpu().numpy()
        routes = self._moe_layers(data["routed_experts"][row, : length - 1].cpu().numpy())
        at = np.flatnonzero(token["mask"])
        there = (routes[at] >= 0).all(axis=(1, 2))
        kept, missing = at[there], int((~there).sum())
        if not len(kept):
            return None, missing
        positions = kept + 1
        names = ("advantage", "logp_rollout", "logp_old", "logp_train", "gradient_weight")
        of_token = {name: token[name][kept].astype(float) for name in names}
        gap = None
        if scored.native_logp is not None:
            logps = (of_token[f"logp_{name}"] for name in ("rollout", "old"))
            gap = gap_under_r3(*logps, scored.native_logp[positions], of_token["logp_train"])
        native_SLK = scored.native_SLK[: length - 1]
        return SequenceRecord(
            prompt=ids[: int(at[0]) + 1].tobytes().hex(),
            token_ids=ids,
            positions=positions,
            reward=float(data["total_reward"][row]),
            clipped=token["clipped"][kept],
            rollout_routes=routes,
            train_routes=native_SLK,
            known=known_rows(routes, native_SLK, num_experts=self.config.num_moe_experts),
            own_routes=None if scored.own_SLK is None else scored.own_SLK[: length - 1],
            margins=scored.margins_SL[: length - 1],
            gap=gap,
            **of_token,
        ), missing

    def _moe_layers(self, routes_SLK: np.ndarray) -> np.ndarray:
        return routers.moe_layers(
            "routed_experts",
            routes_SLK,
            layer_ids=self.layer_ids,
            num_layers=self.config.num_layers,
        )

    def _open(self, loss_fn) -> None:
        if self.log is not None:
            return
        cfg, preset = self.worker.cfg, getattr(loss_fn, "preset", None)
        sizes = cfg["megatron_cfg"]
        self.log = RunLog(
            self.path,
            {
                "stack": f"NeMo-RL {__version__}",
                "model": str(cfg["model_name"]),
                "layout": f"tp {sizes['tensor_model_parallel_size']}, "
                f"pp {sizes['pipeline_model_parallel_size']}, "
                f"ep {sizes['expert_model_parallel_size']}, cp {sizes['context_parallel_size']}",
                "loss": f"moe_upgrpo/{preset}" if preset else "ClippedPGLossFn of NeMo-RL",
                "replay": "R3" if self.replays else "none",
                "engine": "vLLM",
            },
            group=self.group,
            layer_ids=self.layer_ids,
            top_k=self.config.moe_router_topk,
            num_experts=self.config.num_moe_experts,
            share=self.share,
            limits=self.limits,
            modules=[self.worker.model],
            tokenizer=(cfg.get("tokenizer") or {}).get("name") or cfg["model_name"],
        )

    def _reported(self, output: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
        """Add the metrics for the driver: it reads the first stage and adds up the replicas."""
        group = parallel_state.get_pipeline_model_parallel_group()
        if dist.get_world_size(group) > 1:
            shared = [metrics]
            last = dist.get_process_group_ranks(group)[-1]
            dist.broadcast_object_list(shared, src=last, group=group)
            metrics = shared[0]
        if dist.get_rank(self.group) == 0:
            for name, value in reported(metrics).items():
                output["all_mb_metrics"][name] = [value]
        return output


def _keys(data) -> list[str]:
    """Keys that identify sequences, from old log-probs to training: their tokens.

    Sequences with the same tokens have the same routes in the trainer, and share them.
    """
    ids, lengths = data["input_ids"].cpu(), data["input_lengths"].tolist()
    return [
        hashlib.blake2b(row[:n].numpy().tobytes(), digest_size=16).hexdigest()
        for row, n in zip(ids, lengths, strict=True)
    ]
