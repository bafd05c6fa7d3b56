# SPDX-License-Identifier: Apache-2.0
"""The routing log of slime's and miles' Megatron actor: rollout against trainer, token by token.

The init hook (`--custom-megatron-init-path`) wraps three functions that the actor looks up in its
module, and one that its training step looks up, on every rank:

- `get_data_iterator`: takes the rollout's routes before the actor deletes them;
- `forward_only`: the pass for the old log-probs is native where nothing is replayed and where it is
  recorded (R2): forward hooks take the routers' own outputs. Under R3 it is held to the rollout's
  routes; another pass without replay gives the native routes, and the held one what each router
  would have chosen. Where the stack makes no such pass, the log makes its own;
- `loss_function`: the policy loss is evaluated a second time, on detached log-probs: its gradient
  says which tokens the loss's own rule cut, whatever the loss is;
- `train`: afterwards the step's token rows and metrics are written.

Shapes: S tokens of a sequence, R responses' tokens, N rows of a micro-batch on this rank, L MoE
layers, K experts each. Routes have S − 1 rows: row p − 1 for the token at p.
"""

import copy
import functools
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.kit import environment, routers
from moe_upgrpo.integrations.kit.hooking import replaced
from moe_upgrpo.integrations.kit.run_log import RunLog, Step, check_free, gap_under_r3, reported
from moe_upgrpo.integrations.kit.second_look import clipped_tokens, second_look
from moe_upgrpo.integrations.slime_miles.layout import rows_of_routers, split_places
from moe_upgrpo.integrations.slime_miles.loss import library_sums, scored_by
from moe_upgrpo.integrations.slime_miles.revisions import need
from moe_upgrpo.record import SequenceRecord, known_rows


class Stack(Protocol):
    """Where slime and miles differ.

    actor: its training loop finds get_data_iterator, forward_only and train there. model: has
    loss_function and get_batch. losses: has policy_loss_function, get_log_probs_and_entropy,
    all_gather_with_cp.
    """

    name: str
    actor: ModuleType
    model: ModuleType
    losses: ModuleType

    def prepare(self) -> None:
        """Find, before the log is put in place, what it alone needs, and watch how the stack deals
        out the sequences."""

    def extra_forward(self, stage: str) -> AbstractContextManager:
        """Enclose a forward pass that the stack does not make: its replay of routes is in stage
        `fallthrough` or `replay_forward`; what is replayed in it is replayed again afterwards."""

    def watched(self, see: Callable[[Tensor], None]) -> AbstractContextManager:
        """Inside, `see` gets `[N, K]`: what the running router would have chosen without replay."""

    def forward_arguments(self, rollout_id: int) -> dict[str, Any]:
        """Arguments of forward_only for the old log-probs, after the first five."""

    def loss_of(self, args: Namespace, batch: dict) -> tuple[Callable, Callable]:
        """The loss that args choose, and the reducer to call it with."""

    def rewards(self, data: dict) -> Sequence[float]:
        """One reward for each of this rank's sequences."""

    def report(self, args: Namespace, rollout_id: int, metrics: dict[str, float]) -> None:
        """Report the metrics to the stack's trackers."""


def check_replay(args: Namespace) -> str:
    """Set the trainer's replay flags as `moe_upgrpo_replay` says: none, R2 or R3.

    The flags of the rollout's processes stay, so that the engine keeps returning its routes.
    """
    asked = getattr(args, "moe_upgrpo_replay", "R3" if args.use_rollout_routing_replay else None)
    if asked not in (None, "observe", "R2", "R3"):
        raise UserError(f"moe_upgrpo_replay: {asked!r} given; allowed: observe, R2, R3")
    if asked and not args.use_rollout_routing_replay:
        raise UserError(
            f"moe_upgrpo_replay: {asked} given; add --use-rollout-routing-replay: without it the "
            "engine does not return its routes"
        )
    if asked in ("observe", "R2"):
        args.use_rollout_routing_replay = False
        args.use_routing_replay = asked == "R2"
    return "R3" if args.use_rollout_routing_replay else "R2" if args.use_routing_replay else "none"


def install(stack: Stack, args: Namespace, mode: str) -> None:
    """Install the log of this process, once.

    mode: what `check_replay` returned.
    """
    if hasattr(stack.actor, "moe_upgrpo_log"):
        return
    need(stack.actor, "get_data_iterator", "forward_only", "train")
    need(stack.model, "loss_function", "get_batch")
    need(stack.losses, "policy_loss_function", "get_log_probs_and_entropy", "all_gather_with_cp")
    stack.prepare()
    environment.refuse(
        {"moe_router_fusion under R3": mode == "R3" and getattr(args, "moe_router_fusion", False)}
    )
    stack.actor.moe_upgrpo_log = TrainLog(stack, args, mode, environment.run_folder())


class TrainLog:
    """The log of one actor process."""

    def __init__(self, stack: Stack, args: Namespace, mode: str, path: Path):
        check_free(path)
        self.stack, self.args, self.mode, self.path = stack, args, mode, path
        self.share, self.limits = environment.token_share(), environment.alarm_limits()
        self.log: RunLog | None = None
        self.layer_ids: list[int] = []
        self.top_k = 0
        self.last = False  # this rank has the last pipeline stage
        self.writes = False
        actor = stack.actor
        self._forward_only = actor.forward_only
        for name, wrapper in {
            "get_data_iterator": self._begin,
            "forward_only": self._score,
            "train": self._update,
        }.items():
            original = getattr(actor, name)
            setattr(actor, name, functools.wraps(original)(functools.partial(wrapper, original)))

    # --- what the actor's training loop calls

    def _begin(self, original, *args, **kwargs):
        data = next(x for x in (*args, *kwargs.values()) if isinstance(x, dict))
        self.routes = data.get("rollout_routed_experts")  # the actor deletes them
        self.scored: dict[str, Any] | None = None
        return original(*args, **kwargs)

    def _score(self, original, f, args, model, data_iterator, num_microbatches, *rest, **kwargs):
        call = functools.partial(
            original, f, args, model, data_iterator, num_microbatches, *rest, **kwargs
        )
        is_policy = f.__name__ == "get_log_probs_and_entropy"
        if not is_policy or kwargs.get("store_prefix"):  # the critic, a reference, a teacher
            return call()
        return self._scored(call, model, data_iterator, num_microbatches)

    def _update(
        self, original, rollout_id, model, optimizer, scheduler, data_iterator, num_microbatches,
        *rest, **kwargs,
    ):  # fmt: skip
        """All optimizer steps of a rollout. rest[0]: the rollouts that each step's loss counts."""
        call = functools.partial(
            original, rollout_id, model, optimizer, scheduler, data_iterator, num_microbatches,
            *rest, **kwargs,
        )  # fmt: skip
        if self.args.loss_type not in ("policy_loss", "custom_loss"):
            return call()
        if self.scored is None:  # --use-rollout-logprobs; one step of the stack's own loss
            forward = functools.partial(
                self._forward_only, self.stack.losses.get_log_probs_and_entropy, self.args, model,
                data_iterator, num_microbatches, **self.stack.forward_arguments(rollout_id),
            )  # fmt: skip
            self._scored(forward, model, data_iterator, num_microbatches, own_forward=True)
        data = data_iterator[0].rollout_data
        whole = data.get("dynamic_global_batch_size", self.args.global_batch_size)  # miles 0.0.2
        sizes = rest[0] if rest else [whole] * len(num_microbatches)
        self.index = {id(tokens): i for i, tokens in enumerate(data["tokens"])}
        self.ends = np.cumsum(num_microbatches)
        self.denominators = self._tokens_of_steps(data, data_iterator) or list(sizes)
        self.microbatch, self.seen, self.step = 0, {}, Step(updates=len(sizes))
        with replaced(self.stack.model, loss_function=self._watching()):
            result = call()
        if self.last:
            self._write(rollout_id, data)
        self.routes = self.scored = None
        return result

    # --- routes

    def _scored(self, call, model, data_iterator, num_microbatches, own_forward=False) -> Any:
        stack = self.stack
        lengths = [len(tokens) - 1 for tokens in data_iterator[0].rollout_data["tokens"]]
        self.starts = np.cumsum([0, *lengths])
        rows = rows_of_routers(
            stack.model.get_batch, self.args, data_iterator, num_microbatches,
            tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        )  # fmt: skip
        self.model = model
        chunks = [routers.counted(chunk) for chunk in model]
        recorded = functools.partial(self._recorded, rows=rows, model=model, chunks=chunks)
        native_output, own = None, None
        if self.mode == "R3":
            with stack.extra_forward("fallthrough"):
                native_output, native = recorded(call)
            with stack.extra_forward("replay_forward") if own_forward else nullcontext():
                output, own = recorded(call, own=True)
        else:
            with stack.extra_forward("fallthrough") if own_forward else nullcontext():
                output, native = recorded(call)
        self.last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        self.writes = self.last and routers.first_of_stage()
        native = routers.joined({0: native}, writes=self.writes)
        own = None if own is None else routers.joined({0: own}, writes=self.writes)
        if self.writes:
            self.layer_ids = native.layer_ids
        self.scored = {
            "native_routes": native and native.routes[0],
            "margins": native and native.margins[0],
            "own_routes": own and own.routes[0],
            "logp": output.get("log_probs"),
            "native_logp": native_output and native_output.get("log_probs"),
            "entropy": output.get("entropy"),
        }
        return output

    def _recorded(self, call, *, rows, model, chunks, own=False) -> tuple[Any, dict]:
        """Return the forward's result and, by layer number, the record `[R, X]` of all of this
        rank's sequences, complete on the first rank of each pipeline stage.

        own: what the routers would choose without replay, else what they chose.
        """
        found: routers.Layers = {}
        self.top_k = next((r.topk for of_chunk in chunks for r in of_chunk), self.top_k)
        with ExitStack() as undo:
            watches = (
                undo.enter_context(self._would_choose(chunks))
                if own
                else [undo.enter_context(routers.watched(of_chunk)) for of_chunk in chunks]
            )
            for chunk, watch in zip(model, watches, strict=True):
                end = functools.partial(self._end_of_chunk, watch, iter(rows), found)
                undo.callback(chunk.register_forward_hook(end).remove)
            return call(), found

    def _end_of_chunk(self, watch, rows_of_batches, found: dict, *_) -> None:
        """Take the record of a micro-batch's forward pass."""
        ids_N, (numbers, table_NLX) = next(rows_of_batches), watch.take()
        if numbers:
            self._place(table_NLX, ids_N, numbers, found)

    @contextmanager
    def _would_choose(self, chunks):
        """Inside, a watch of each chunk takes what its routers would choose without replay."""
        watches = [routers.Watch(of_chunk) for of_chunk in chunks]
        by_number = {number: watch for watch in watches for number in watch.numbers}
        with routers.at_work([r for of_chunk in chunks for r in of_chunk]) as running:

            def see(ids_NK: Tensor):
                if running:  # not a router of multi-token prediction
                    number = running[0].layer_number
                    by_number[number].saw(number, ids_NK)

            with self.stack.watched(see):
                yield watches

    def _place(self, table_NLX: Tensor, ids_N: Tensor, numbers: list[int], found: dict) -> None:
        """Join the shards of sequence and context parallelism, and sort the rows into `found`."""
        table = torch.cat([ids_N[:, None].to(table_NLX), table_NLX.flatten(1)], dim=1)
        sizes = self.args.context_parallel_size > 1, self.args.sequence_parallel
        if any(sizes):
            group = parallel_state.get_tensor_and_context_parallel_group()
            shards = [torch.empty_like(table) for _ in range(dist.get_world_size(group))]
            dist.all_gather(shards, table.contiguous(), group=group)
            table = torch.cat(shards)
        if not routers.first_of_stage():
            return
        table = table.cpu().numpy()
        table = table[table[:, 0] >= 0]
        of_rows = table[:, 1:].reshape(len(table), len(numbers), -1)
        for layer, number in enumerate(numbers):
            whole = found.setdefault(
                number, np.full((self.starts[-1], of_rows.shape[2]), -1, np.int32)
            )
            whole[table[:, 0]] = of_rows[:, layer]

    def _moe_layers(self, routes: Any, i: int, tokens: int) -> np.ndarray:
        """The rollout's routes of a sequence, without rows that an engine has for dense layers."""
        routes_SLK = torch.as_tensor(routes).cpu().numpy()
        if len(routes_SLK) != tokens - 1:
            raise UserError(
                f"rollout_routed_experts: {len(routes_SLK)} rows given for sequence {i} of "
                f"{tokens} tokens; allowed: {tokens - 1}"
            )
        return routers.moe_layers(
            "rollout_routed_experts",
            routes_SLK,
            layer_ids=self.layer_ids,
            num_layers=self.args.num_layers,
        )

    # --- update

    def _tokens_of_steps(self, data: dict, data_iterator) -> list[float] | None:
        """Tokens by which each step's loss is divided, with --calculate-per-token-loss."""
        if not self.args.calculate_per_token_loss:
            return None
        iterator, keys, start, mine = data_iterator[0].reset(), ["loss_masks"], 0, []
        for end in self.ends:
            masks = [m for _ in range(start, end) for m in iterator.get_next(keys)["loss_masks"]]
            mine.append(sum(max(int(mask.sum()), 1) for mask in masks))
            start = end
        iterator.reset()
        group = parallel_state.get_data_parallel_group()
        ranks = [None] * dist.get_world_size(group)
        dist.all_gather_object(ranks, mine, group=group)
        return np.sum(ranks, axis=0).tolist()

    def _watching(self) -> Callable:
        """The stack's loss_function, followed by the policy loss alone once more."""
        stack, original = self.stack, self.stack.model.loss_function

        @functools.wraps(original)
        def loss_function(args, batch, *rest, **kwargs):
            get, found = stack.losses.get_log_probs_and_entropy, []

            def kept(*a, **k):
                found[:] = [get(*a, **k)]
                return found[0]

            with replaced(stack.losses, get_log_probs_and_entropy=kept):
                result = original(args, batch, *rest, **kwargs)
            if not found:
                raise UserError(
                    f"MOE_UPGRPO_RUN: the loss {self._loss_name()} does not take its log-probs "
                    "from get_log_probs_and_entropy: the routing log does not cover it; unset it"
                )
            logged = result[2]
            values = dict(zip(logged["keys"], logged["values"].tolist()[1:], strict=True))
            self._see(args, batch, found[0], values, logits=rest[-1])
            return result

        return loss_function

    def _see(self, args, batch: dict, output: Any, values: dict[str, float], logits) -> None:
        stack, denominator = self.stack, self.denominators[
            int(np.searchsorted(self.ends, self.microbatch, side="right"))
        ]  # fmt: skip
        self.microbatch += 1
        log_probs = scored_by(output)["log_probs"]
        alone = copy.copy(args)
        alone.entropy_coef, alone.use_kl_loss, alone.dump_details = 0.0, False, None
        loss_of, reducer = stack.loss_of(alone, batch)

        def evaluate(leaves):
            detached = {"log_probs": leaves, "entropy": [torch.zeros_like(x) for x in leaves]}
            if isinstance(output, tuple):
                detached = output[0], detached
            again = replaced(stack.losses, get_log_probs_and_entropy=lambda *_, **__: detached)
            with again:
                return loss_of(alone, batch, logits.detach(), reducer)[0], {}

        look = second_look(evaluate, log_probs)
        with torch.no_grad():
            logp, grad = (
                self._whole([x.detach() for x in parts], batch) for parts in (log_probs, look.pulls)
            )
            loss = look.loss.clone()
            if parallel_state.get_context_parallel_world_size() > 1:
                dist.all_reduce(loss, group=parallel_state.get_context_parallel_group())
            advantages = self._whole(batch["advantages"], batch)
        if not self.writes:
            return
        self.step.loss_sum += float(loss) / denominator
        if sums := library_sums(values):
            self.step.loss_metrics.append(sums)
        masks = (mask.cpu().numpy().astype(bool) for mask in batch["loss_masks"])
        columns = zip(batch["unconcat_tokens"], masks, advantages, logp, grad, strict=True)
        for tokens, mask, advantage, logp_train, pull in columns:
            clipped = clipped_tokens(pull, advantage, mask)
            self.step.visit(clipped, advantage, mask)
            self.seen[self.index[id(tokens)]] = {
                "advantage": advantage,
                "logp_train": logp_train,
                "clipped": clipped,
                "gradient_weight": np.abs(pull) / denominator,
            }

    def _whole(self, parts: Sequence[Tensor], batch: dict) -> list[np.ndarray]:
        """Log-probs of whole responses; a collective where context parallelism has split them."""
        gather, places = self.stack.losses.all_gather_with_cp, split_places(self.args, batch)
        return [
            gather(part, *place).float().cpu().numpy().astype(float)
            for part, place in zip(parts, places, strict=True)
        ]

    def _write(self, rollout_id: int, data: dict) -> None:
        with torch.no_grad():
            whole = {
                name: values and self._whole(values, data)
                for name, values in {
                    "rollout": data.get("rollout_log_probs"),
                    "old": self.scored["logp"],
                    "native": self.scored["native_logp"],
                    "entropy": self.scored["entropy"],
                }.items()
            }
        if not self.writes:
            return
        for name, found, flag in (
            ("rollout_routed_experts", self.routes, "--use-rollout-routing-replay"),
            ("rollout_log_probs", whole["rollout"], "log-probs of the rollout"),
        ):
            if not found:
                raise UserError(
                    f"MOE_UPGRPO_RUN: the batch has no {name}; the routing log needs {flag}"
                )
        rewards = self.stack.rewards(data)
        for i, tokens in enumerate(data["tokens"]):
            kept_N = np.flatnonzero(data["loss_masks"][i].cpu().numpy())
            if i not in self.seen or not len(kept_N):
                continue
            ids = tokens.cpu().numpy()
            prompt_length = data["total_lengths"][i] - data["response_lengths"][i]
            rows = slice(self.starts[i], self.starts[i + 1])
            routes = self._moe_layers(self.routes[i], i, len(ids))
            native, own = self.scored["native_routes"][rows], self.scored["own_routes"]
            of_token = {
                "logp_rollout": whole["rollout"][i][kept_N],
                "logp_old": whole["old"][i][kept_N],
                **{name: column[kept_N] for name, column in self.seen[i].items()},
            }
            gap = whole["native"] and gap_under_r3(
                of_token["logp_rollout"],
                of_token["logp_old"],
                whole["native"][i][kept_N],
                of_token["logp_train"],
            )
            self.step.sequences.append(
                SequenceRecord(
                    prompt=ids[:prompt_length].tobytes().hex(),
                    token_ids=ids,
                    positions=prompt_length + kept_N,
                    reward=float(rewards[i]),
                    entropy=whole["entropy"] and whole["entropy"][i][kept_N],
                    rollout_routes=routes,
                    train_routes=native,
                    known=known_rows(routes, native, num_experts=self.args.num_experts),
                    own_routes=None if own is None else own[rows],
                    margins=self.scored["margins"][rows],
                    gap=gap,
                    **of_token,
                )
            )
        self._open()
        metrics = self.log.write_step(rollout_id, self.step)
        if self.log.rank == 0:
            self.stack.report(self.args, rollout_id, reported(metrics))

    def _loss_name(self) -> str:
        args = self.args
        if args.loss_type != "custom_loss":
            return f"{args.loss_type} {args.advantage_estimator}"
        return getattr(args, "moe_upgrpo_loss", None) or args.custom_loss_function_path

    def _open(self) -> None:
        if self.log is not None:
            return
        args = self.args
        self.log = RunLog(
            self.path,
            {
                "stack": self.stack.name,
                "model": str(args.hf_checkpoint),
                "layout": f"tp {args.tensor_model_parallel_size}, "
                f"pp {args.pipeline_model_parallel_size}, ep {args.expert_model_parallel_size}, "
                f"cp {args.context_parallel_size}",
                "loss": self._loss_name(),
                "replay": self.mode,
                "engine": "SGLang",
            },
            group=parallel_state.get_data_parallel_group(),
            layer_ids=self.layer_ids,
            top_k=self.top_k,
            num_experts=args.num_experts,
            share=self.share,
            limits=self.limits,
            modules=self.model,
            tokenizer=args.hf_checkpoint,
        )
