# SPDX-License-Identifier: Apache-2.0
"""The routing log of Megatron-LM's own RL: its inference against its trainer, token by token.

- inference: the routes that its engine recorded ride in the ledger of finished requests
  (`inference`);
- trainer: forward hooks of the routers in the forward of the old log-probs, at the weights that
  the update starts from; joined over sequence and context parallelism there, over the pipeline
  stages at the end of the collection, on the last;
- update: the loss is evaluated a second time on detached log-probs; its gradient says which tokens
  the loss's own rule cut, whatever the loss is.

A step of the log is a collection; it is written when the next begins, or at the end of the job. One
rank of each data-parallel replica writes: the first of its last stage.

Shapes: S tokens of a sequence, N rows of a micro-batch on this rank, L MoE layers, K experts each.
"""

import functools
import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import megatron.core
import numpy as np
import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.utils import get_attr_wrapped_model
from megatron.rl import rl_utils
from megatron.training import get_args

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.kit import environment, routers
from moe_upgrpo.integrations.kit.run_log import RunLog, Step, check_free
from moe_upgrpo.integrations.kit.second_look import clipped_tokens, second_look
from moe_upgrpo.integrations.megatron_lm import inference, loss
from moe_upgrpo.integrations.megatron_lm.settings import loss_name
from moe_upgrpo.record import SequenceRecord, known_rows


@dataclass
class Sequence:
    """A row that this rank trains on. rollout: None if it only fills up the batch.

    turn: of a rollout of several turns that are not a prefix chain, else None: all of them.
    """

    key: bytes
    rollout: Any
    turn: int | None
    prompt: str
    train_SLK: np.ndarray = field(default=None, repr=False)
    margins_SL: np.ndarray = field(default=None, repr=False)


class CollectionLog:
    """The log of one rank."""

    def __init__(self, path: Path):
        check_free(path)
        self.path = path
        self.share, self.limits = environment.token_share(), environment.alarm_limits()
        self.log: RunLog | None = None
        self.step = 0
        self.layer_ids: list[int] = []
        self.partition: Any = None  # of the positions, by Megatron-LM's context parallelism
        self._clear()
        self._install()
        inference.Stages().install()

    def _clear(self) -> None:
        self.sequences: list[Sequence] = []
        self.by_key: dict[bytes, list[int]] = defaultdict(list)
        self.visits: Counter = Counter()
        self.logged: dict[int, SequenceRecord] = {}
        self.gathered = Step()
        self.seen = self.micro_batches = 0
        # [N, L, X] of each micro-batch, see kit.routers; None of a stage without MoE layers.
        self.recorded: list[torch.Tensor | None] = []
        self.recording = False

    def _install(self) -> None:
        compute, forward = rl_utils.compute_logprobs_batch, rl_utils.logprobs_forward_step
        shutdown, scatter = (
            rl_utils.rl_inference_interface_shutdown,
            rl_utils._scatter_for_context_parallel,
        )

        @functools.wraps(scatter)
        def _scatter_for_context_parallel(*args, **kwargs):
            *local, self.partition = scatter(*args, **kwargs)
            return *local, self.partition

        @functools.wraps(compute)
        def compute_logprobs_batch(*args, **kwargs):
            # The first of a collection computes the old log-probs, the second the reference's.
            self.recording = not self.recorded
            try:
                return compute(*args, **kwargs)
            finally:
                self.recording = False

        @functools.wraps(forward)
        def logprobs_forward_step(data_iterator, model, *args, **kwargs):
            if not self.recording:
                return forward(data_iterator, model, *args, **kwargs)
            return self._recorded(model, lambda: forward(data_iterator, model, *args, **kwargs))

        @functools.wraps(shutdown)
        def rl_inference_interface_shutdown():
            self.finish()
            return shutdown()  # ends the process

        rl_utils._scatter_for_context_parallel = _scatter_for_context_parallel
        rl_utils.compute_logprobs_batch = compute_logprobs_batch
        rl_utils.logprobs_forward_step = logprobs_forward_step
        rl_utils.rl_inference_interface_shutdown = rl_inference_interface_shutdown

    # --- a collection: rollouts, and the forward of the old log-probs

    def begin(self, model: list, groups, request_ledger: dict[str, Any]) -> None:
        """Prepare, before Megatron-LM takes the requests' records out of the ledger."""
        self.finish()
        self._clear()
        self._watch(model)
        self.rollouts = [(r, str(i)) for i, group in enumerate(groups) for r in group]
        self.routes = {
            name: routes
            for name, record in request_ledger.items()
            if (routes := getattr(record, "routing_indices", None)) is not None
        }
        self.epochs = {
            name: epochs[0][1]  # of the oldest token
            for name, record in request_ledger.items()
            if (epochs := getattr(record, "policy_epoch", None))
        }
        if request_ledger and not self.routes:
            raise UserError(
                "MOE_UPGRPO_RUN: no finished request has routing_indices, although "
                "--moe-enable-routing-replay is set: Megatron-LM's inference recorded nothing. "
                "Unset the variable, and tell us the job's flags"
            )

    def _watch(self, model: list) -> None:
        # Inference leaves its recorders at work, and with CUDA graphs their buffers, which hold
        # less than a micro-batch of training. It sets both anew with each of its steps.
        RouterReplay.clear_global_router_replay_action()
        self.model = rl_utils.unwrap_model(model)
        self.routers = [r for chunk in self.model for r in routers.counted(chunk)]
        self.numbers = sorted(router.layer_number for router in self.routers)
        self.config = get_attr_wrapped_model(model[0], "config")
        self.writes = routers.first_of_stage() and mpu.is_pipeline_last_stage()

    def _recorded(self, model, forward) -> Any:
        self.partition = None
        with routers.watched(self.routers) as watch:
            result = forward()
        _, table_NLX = watch.take()
        if table_NLX is not None:
            table_NLX = routers.whole_sequence_parallel(table_NLX, self.config.sequence_parallel)
            table_NLX = _whole_context_parallel(table_NLX, self.partition).cpu()
        self.recorded.append(table_NLX)
        return result

    def collected(self, rows: list, trajs: torch.Tensor, packed) -> None:
        """The rows that this rank trains on, in the order in which the loader has them."""
        number = {id(rollout): i for i, (rollout, _) in enumerate(self.rollouts)}
        named = [self._named(row, number) for row in rows]
        found, mine = [], {}
        if packed is None:
            width, size = trajs.shape[1], get_args().micro_batch_size
            for i, (name, tokens_S) in enumerate(zip(named, trajs, strict=True)):
                table_NLX = self.recorded[i // size]
                found.append((name, tokens_S))
                mine[i] = self._layers(  # position-major
                    table_NLX, lambda x, i=i: x.unflatten(0, (width, -1))[:, i % size]
                )
        else:
            ranks = [None] * mpu.get_data_parallel_world_size()
            dist.all_gather_object(ranks, named, group=mpu.get_data_parallel_group())
            everywhere = [name for rank in ranks for name in rank]
            info = packed.packing_info
            for i, indices in enumerate(info.bin_seq_indices):
                for start, index in zip(info.seq_starts[i], indices, strict=False):
                    here = slice(start, start + info.seq_lengths[index])
                    mine[len(found)] = self._layers(self.recorded[i], lambda x, here=here: x[here])
                    found.append((everywhere[index], packed.packed_trajs[i, here]))
        self.micro_batches = len(self.recorded)
        whole = routers.joined(mine, writes=self.writes) if mine else None
        if whole is None:
            return
        self.layer_ids = whole.layer_ids
        for i, ((index, turn), tokens_S) in enumerate(found):
            rollout, prompt = (None, "") if index is None else self.rollouts[index]
            sequence = Sequence(
                _key(tokens_S), rollout, turn, prompt, whole.routes[i], whole.margins[i]
            )
            self.by_key[sequence.key].append(len(self.sequences))
            self.sequences.append(sequence)

    def _layers(self, table_NLX: torch.Tensor | None, of_sequence) -> routers.Layers:
        if table_NLX is None:
            return {}
        return routers.by_layer(self.numbers, of_sequence(table_NLX)[:-1])

    @staticmethod
    def _named(row, number: dict[int, int]) -> tuple[int | None, int | None]:
        if row is None:
            return None, None
        rollout, turn = row if isinstance(row, tuple) else (row, None)
        return number[id(rollout)], turn

    # --- the update

    def see(
        self, given: dict, loss_mask: torch.Tensor, tokens: torch.Tensor, config, counts
    ) -> None:
        """Record a micro-batch of the update; arguments as in `loss.evaluate`."""
        if not self.writes:
            return
        current = given["current_logprobs"].detach().float()
        mask = loss_mask.to(current.device) > 0
        divisor = counts.divisor(get_args().calculate_per_token_loss, float(mask.sum()))

        def evaluate(leaves):
            alone = given | {"current_logprobs": leaves[0], "kl_beta": 0.0, "entropy_weight": 0.0}
            terms, metrics = loss.evaluate(alone, loss_mask, config, counts)
            return torch.where(mask, terms[0].float(), 0.0).sum() / divisor, metrics

        look = second_look(evaluate, [current])
        self.seen += 1
        self.gathered.loss_sum += float(look.loss)
        if look.metrics:
            self.gathered.loss_metrics.append(look.metrics)
        starts, lengths = given.get("seq_starts"), given.get("seq_lengths")
        rows = loss.Rows.of(current.shape, starts, lengths, current.device)
        of_token = {
            "mask": mask,
            "logp_train": current,
            "logp_old": given["old_logprobs"],
            "pull": look.pulls[0],
        }
        of_token = {
            n: rows.take(x.to(current.device)).float().cpu().numpy() for n, x in of_token.items()
        }
        of_token["mask"] = (of_token["mask"] > 0) & rows.there_BT.cpu().numpy()
        if starts is None:
            sequences = tokens.unbind()
        else:
            sequences = [tokens[0, s : s + n] for s, n in zip(starts, lengths, strict=False)]
        advantages = given["advantages"].float().tolist()
        for i, (tokens_S, advantage) in enumerate(zip(sequences, advantages, strict=True)):
            self._add(tokens_S, advantage, {name: rows_[i] for name, rows_ in of_token.items()})

    def _add(self, tokens_S: torch.Tensor, advantage: float, token: dict[str, np.ndarray]) -> None:
        key = _key(tokens_S)
        if key not in self.by_key:
            raise UserError(
                "MOE_UPGRPO_RUN: a sequence is updated that was not in the last collection"
            )
        copies = self.by_key[key]
        index = copies[self.visits[key] % len(copies)]
        self.visits[key] += 1
        sequence = self.sequences[index]
        positions = np.flatnonzero(token["mask"]) + 1
        advantages = np.full(len(token["mask"]), advantage)
        clipped = clipped_tokens(token["pull"], advantages, token["mask"])
        self.gathered.visit(clipped, advantages, token["mask"])
        rollout_SLK, logp_S = self._of_rollout(sequence, len(tokens_S))
        # Tokens that inference did not compute: appended by an environment, or evicted requests.
        there = (rollout_SLK[:, 0, 0] != -2) & np.isfinite(logp_S[1:])
        positions = positions[there[positions - 1]]
        if not len(positions):
            return
        at = positions - 1
        self.logged[index] = SequenceRecord(
            prompt=sequence.prompt,
            token_ids=tokens_S.cpu().numpy(),
            positions=positions,
            reward=float(np.sum(sequence.rollout.reward)),
            advantage=advantages[at],
            logp_rollout=logp_S[positions],
            logp_old=token["logp_old"][at].astype(float),
            logp_train=token["logp_train"][at].astype(float),
            clipped=clipped[at],
            gradient_weight=np.abs(token["pull"][at]).astype(float),
            rollout_routes=rollout_SLK,
            train_routes=sequence.train_SLK,
            known=known_rows(
                rollout_SLK, sequence.train_SLK, num_experts=self.config.num_moe_experts
            ),
            margins=sequence.margins_SL,
            staleness=self._staleness(sequence),
        )

    def _staleness(self, sequence: Sequence) -> int | None:
        """Training steps since the weights that sampled its oldest token."""
        names = sequence.rollout.completion_ids or []
        if sequence.turn is not None:
            names = names[sequence.turn : sequence.turn + 1]
        epochs = [self.epochs[name] for name in names if name in self.epochs]
        return get_args().curr_iteration - min(epochs) if epochs else None

    def _of_rollout(self, sequence: Sequence, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Routes `[S - 1, L, K]`, -2 where there are none, and log-probs `[S]`, NaN likewise.

        If a row holds several turns, the routes are those with which each token was generated.
        """
        rollout, turn = sequence.rollout, sequence.turn
        routes_SLK = np.full_like(sequence.train_SLK, -2)
        logp_S = np.full(length, np.nan)
        if getattr(rollout, "logprobs", None) is None:
            return routes_SLK, logp_S
        turns = range(len(rollout.trajectory)) if turn is None else [turn]
        masks = [np.flatnonzero(np.asarray(rollout.generation_mask[t])) for t in turns]
        logps = [float(x) for t in turns for x in rollout.logprobs[t]]
        for position, logp in zip(np.unique(np.concatenate(masks)), logps, strict=False):
            if position < length:  # a packed row ends before its padding, and so may the turn
                logp_S[position] = logp
        for t, positions in zip(turns, masks, strict=True):
            routes = self.routes.get(rollout.completion_ids[t]) if rollout.completion_ids else None
            if routes is None:
                continue
            if routes.shape[1:] != routes_SLK.shape[1:]:
                raise UserError(
                    f"routing_indices: {routes.shape[1]} layers and top-{routes.shape[2]} given; "
                    f"the model has {routes_SLK.shape[1]} MoE layers and top-{routes_SLK.shape[2]}"
                )
            at = positions[(positions > 0) & (positions <= len(routes))] - 1
            at = at[at < len(routes_SLK)]
            routes_SLK[at] = routes[at]
        return routes_SLK, logp_S

    # --- writing

    def finish(self) -> None:
        """Write the collection that was trained on, if there was one; on every rank."""
        if not self.seen:
            return
        self.seen, passes = 0, self.seen / self.micro_batches
        found = torch.tensor(float(len(self.logged))).cuda()
        dist.all_reduce(found, group=mpu.get_data_parallel_group())
        if not found:  # all from an earlier job's rollout bank, or evicted
            print("moe_upgrpo: a collection without routes is not logged", flush=True)
            return
        args = get_args()
        if self.log is None:
            self.log = RunLog(
                self.path,
                {
                    "stack": f"Megatron-LM, Megatron-Core {megatron.core.__version__}",
                    "model": str(args.pretrained_checkpoint or args.load),
                    "layout": f"tp {args.tensor_model_parallel_size}, "
                    f"pp {args.pipeline_model_parallel_size}, "
                    f"ep {args.expert_model_parallel_size}, cp {args.context_parallel_size}",
                    "loss": loss_name(),
                    "replay": "none",
                    "engine": f"Megatron-Core inference{_inference_layout(args)}",
                },
                group=mpu.get_data_parallel_group(),
                layer_ids=self.layer_ids,
                top_k=self.config.moe_router_topk,
                num_experts=self.config.num_moe_experts,
                share=self.share,
                limits=self.limits,
                modules=self.model,
                tokenizer=getattr(args, "tokenizer_model", None),
            )
        self.step += 1
        self.gathered.sequences = [self.logged[i] for i in sorted(self.logged)]
        self.gathered.updates = passes
        self.log.write_step(self.step, self.gathered)


def _key(tokens_S: torch.Tensor) -> bytes:
    return hashlib.blake2b(tokens_S.cpu().numpy().tobytes(), digest_size=16).digest()


def _whole_context_parallel(table_NLX: torch.Tensor, partition: Any) -> torch.Tensor:
    """The rows of all context-parallel ranks, in the order of the positions.

    partition: Megatron-LM's of this micro-batch (`_CPScatterCache`); None: not split.
    """
    if partition is None:
        return table_NLX
    split = table_NLX.unflatten(
        0, (partition.seq_len // dist.get_world_size(partition.cp_group), -1)
    )
    parts = [torch.empty_like(split) for _ in range(dist.get_world_size(partition.cp_group))]
    dist.all_gather(parts, split.contiguous(), group=partition.cp_group)
    return torch.cat(parts).index_select(0, partition.inverse_gather_perm).flatten(0, 1)


def _inference_layout(args) -> str:
    """Say how inference is split where it has its own model, and how that differs from training."""
    sizes = {
        short: getattr(args, f"rl_inference_{name}_parallel_size", None)
        for short, name in (("tp", "tensor_model"), ("pp", "pipeline_model"),
                            ("ep", "expert_model"), ("etp", "expert_tensor_model"))
    }  # fmt: skip
    given = [f"{short} {size}" for short, size in sizes.items() if size is not None]
    if not given and args.context_parallel_size == 1:
        return ""
    return f", a model of its own ({', '.join([*given, 'cp 1'])})"
