"""The routing log of slime's and miles' Megatron actor: rollout against trainer, token by token.

The init hook (`--custom-megatron-init-path`) puts this around three functions that the actor looks
up in its module, and one that its training step does, on every rank:

- `get_data_iterator`: takes the rollout's routes before the actor deletes them;
- `forward_only`: the forward of the old log-probs is native where nothing is replayed and where it
  is recorded (R2): the routers' own outputs are taken from forward hooks. Under R3 it is held to
  the rollout's routes; one more forward without replay gives the native routes, and the held one
  what each router would have chosen. Where the stack makes no such forward, the log makes its own;
- `loss_function`: the policy loss is evaluated a second time, on detached log-probs: its gradient
  says which tokens the loss's own rule cut, whatever loss it is;
- `train`: afterwards the step's token rows and metrics are written.

Shapes: S tokens of a sequence, R responses' tokens, N rows of a micro-batch on this rank, L MoE
layers, K experts each. Routes have S − 1 rows: row p − 1 for the token at p.
"""

import copy
import functools
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.run_log import LoggedSequence, RunLog, Step, check_free
from moe_upgrpo.integrations.slime_loss import library_sums, replaced, scored_by

REPORTED = ("mismatch/", "conditional/", "logp_gap/", "gap/", "counterfactual/", "clip/")


class Stack(Protocol):
    """Where slime and miles differ.

    actor: its training loop finds get_data_iterator, forward_only and train there. model: has
    loss_function. losses: has policy_loss_function, get_log_probs_and_entropy, all_gather_with_cp.
    """

    name: str
    actor: ModuleType
    model: ModuleType
    losses: ModuleType

    def rows(self, args, data_iterator, num_microbatches, ids: list[Tensor]) -> list[Tensor]:
        """For each micro-batch, what this rank's routers get in place of `ids`: `[N]`, -1 at
        padding. ids: for each sequence `[S - 1]`."""

    def stage(self, name: str) -> AbstractContextManager:
        """The stack's own replay is in the stage `fallthrough` or `replay_forward`, inside."""

    def watched(self, see: Callable[[Tensor], None]) -> AbstractContextManager:
        """Inside, `see` gets `[N, K]`: what the router at work would have chosen without replay."""

    def rewind(self) -> None:
        """The routes that were replayed forward are replayed again."""

    def forward_arguments(self, rollout_id: int) -> dict[str, Any]:
        """Those of forward_only, for the old log-probs, besides the first five."""

    def loss_of(self, args: Namespace, batch: dict) -> tuple[Callable, Callable]:
        """The loss that args choose, and the reducer that it is called with."""

    def rewards(self, data: dict) -> Sequence[float]:
        """One for each of this rank's sequences."""

    def report(self, args: Namespace, rollout_id: int, metrics: dict[str, float]) -> None:
        """To the stack's trackers."""


def check_replay(args: Namespace) -> str:
    """Set the trainer's replay flags as `moe_upgrpo_replay` has it: none, R2 or R3.

    The flags of the rollout's processes stay, so that the engine goes on returning its routes.
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
    """The log of this process, once.

    mode: what `check_replay` returned.
    """
    if hasattr(stack.actor, "moe_upgrpo_log"):
        return
    if mode == "R3" and getattr(args, "moe_router_fusion", False):
        raise UserError(
            "MOE_UPGRPO_RUN: the routing log does not cover moe_router_fusion under R3; unset it"
        )
    stack.actor.moe_upgrpo_log = TrainLog(stack, args, mode, run_folder())


def run_folder() -> Path | None:
    """The folder that MOE_UPGRPO_RUN names; None: no routing log."""
    path = os.environ.get("MOE_UPGRPO_RUN")
    return Path(path) if path else None


def _share() -> float:
    given = os.environ.get("MOE_UPGRPO_TOKENS", "1")
    try:
        share = float(given)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(
            f"MOE_UPGRPO_TOKENS: {given!r} given; allowed: a share of the sequences, 0 < x <= 1"
        )
    return share


class TrainLog:
    """The log of one actor process."""

    def __init__(self, stack: Stack, args: Namespace, mode: str, path: Path):
        check_free(path)
        self.stack, self.args, self.mode, self.path, self.share = stack, args, mode, path, _share()
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
        sizes, *rest, **kwargs,
    ):  # fmt: skip
        """All optimizer steps of a rollout. sizes: of each, the rollouts that its loss counts."""
        call = functools.partial(
            original, rollout_id, model, optimizer, scheduler, data_iterator, num_microbatches,
            sizes, *rest, **kwargs,
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
        data = data_iterator[0].rollout_data
        lengths = [len(tokens) - 1 for tokens in data["tokens"]]
        self.starts = np.cumsum([0, *lengths])
        ids = torch.arange(int(self.starts[-1])).split(lengths)
        rows = stack.rows(self.args, data_iterator, num_microbatches, list(ids))
        chunks = [
            [m for m in _decoder(chunk).modules() if isinstance(m, TopKRouter)] for chunk in model
        ]
        recorded = functools.partial(self._recorded, rows=rows, model=model, chunks=chunks)
        native_output, own = None, None
        if self.mode == "R3":
            with stack.stage("fallthrough"):
                native_output, native = recorded(call)
            with stack.stage("replay_forward"):
                output, own = recorded(call, own=True)
            if own_forward:
                stack.rewind()
        else:
            with stack.stage("fallthrough") if own_forward else nullcontext():
                output, native = recorded(call)
        self.last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        self.writes = self.last and _first_of_its_stage()
        self.scored = {
            "native_routes": self._joined(native),
            "own_routes": None if own is None else self._joined(own),
            "logp": output.get("log_probs"),
            "native_logp": native_output and native_output.get("log_probs"),
            "entropy": output.get("entropy"),
        }
        return output

    def _recorded(self, call, *, rows, model, chunks, own=False) -> tuple[Any, dict]:
        """Give the forward's result; by layer number, the experts `[R, K]` of all of this rank's
        sequences, complete on the first rank of each pipeline stage.

        own: what the routers would choose without replay, else what they chose.
        """
        found: dict[int, np.ndarray] = {}
        current: dict[int, Tensor] = {}
        done = Counter()
        at_work: list[int] = []

        def chosen(router, _, outputs):
            map_NE = outputs[1]
            ids_NK = map_NE.int().topk(router.topk, dim=1).indices
            # A token that was not sent to K experts has no K ids to compare.
            whole_N1 = map_NE.sum(dim=1, keepdim=True) == router.topk
            current[router.layer_number] = torch.where(whole_N1, ids_NK, -1)

        def see(ids_NK: Tensor):
            if at_work:  # not a router of multi-token prediction
                current[at_work[0]] = ids_NK

        def end_of_chunk(index: int):
            numbers = sorted(current)
            if numbers:
                routes_NLK = torch.stack([current[n].int() for n in numbers], dim=1)
                self._place(routes_NLK, rows[done[index]], numbers, found)
            current.clear()
            done[index] += 1

        with ExitStack() as undo:
            if own:
                undo.enter_context(self.stack.watched(see))
            for index, (chunk, routers) in enumerate(zip(model, chunks, strict=True)):
                for router in routers:
                    self.top_k = router.topk
                    if own:
                        hooks = [
                            router.register_forward_pre_hook(
                                lambda m, *_: at_work.append(m.layer_number)
                            ),
                            router.register_forward_hook(lambda *_: at_work.clear()),
                        ]
                    else:
                        hooks = [router.register_forward_hook(chosen)]
                    for hook in hooks:
                        undo.callback(hook.remove)
                end = chunk.register_forward_hook(lambda *_, index=index: end_of_chunk(index))
                undo.callback(end.remove)
            return call(), found

    def _place(self, routes_NLK: Tensor, ids_N: Tensor, numbers: list[int], found: dict) -> None:
        """Join the shards of sequence and context parallelism, and sort the rows into `found`."""
        table = torch.cat([ids_N[:, None].to(routes_NLK), routes_NLK.flatten(1)], dim=1)
        sizes = self.args.context_parallel_size > 1, self.args.sequence_parallel
        if any(sizes):
            group = parallel_state.get_tensor_and_context_parallel_group()
            shards = [torch.empty_like(table) for _ in range(dist.get_world_size(group))]
            dist.all_gather(shards, table.contiguous(), group=group)
            table = torch.cat(shards)
        if not _first_of_its_stage():
            return
        table = table.cpu().numpy()
        table = table[table[:, 0] >= 0]
        routes = table[:, 1:].reshape(len(table), len(numbers), -1).astype(np.int16)
        for layer, number in enumerate(numbers):
            whole = found.setdefault(
                number, np.full((self.starts[-1], routes.shape[2]), -1, np.int16)
            )
            whole[table[:, 0]] = routes[:, layer]

    def _joined(self, mine: dict[int, np.ndarray]) -> np.ndarray | None:
        """`[R, L, K]` of all layers, on the ranks that write; the pipeline's stages join."""
        if not _first_of_its_stage():
            return None
        group = parallel_state.get_pipeline_model_parallel_group()
        last = dist.get_process_group_ranks(group)[-1]
        stages = [None] * dist.get_world_size(group) if self.writes else None
        dist.gather_object(mine, stages, dst=last, group=group)
        if not self.writes:
            return None
        by_number = {number: routes for stage in stages for number, routes in stage.items()}
        if not by_number:
            raise UserError("MOE_UPGRPO_RUN: the model has no MoE router; unset it")
        self.layer_ids = [number - 1 for number in sorted(by_number)]
        return np.stack([by_number[number] for number in sorted(by_number)], axis=1)

    def _moe_layers(self, routes: Any, i: int, tokens: int) -> np.ndarray:
        """The rollout's of a sequence; of an engine with rows for dense layers the others alone."""
        routes_SLK = np.asarray(routes)
        rows, layers = routes_SLK.shape[:2]
        if rows != tokens - 1:
            raise UserError(
                f"rollout_routed_experts: {rows} rows given for sequence {i} of {tokens} tokens; "
                f"allowed: {tokens - 1}"
            )
        if layers == self.args.num_layers:
            return routes_SLK[:, self.layer_ids]
        if layers == len(self.layer_ids):
            return routes_SLK
        raise UserError(
            f"rollout_routed_experts: {layers} layers given; the model has {len(self.layer_ids)} "
            f"MoE layers of {self.args.num_layers}"
        )

    # --- update

    def _tokens_of_steps(self, data: dict, data_iterator) -> list[float] | None:
        """With --calculate-per-token-loss: the tokens that each step's loss is divided by."""
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
        """The stack's loss_function, and after it the policy loss alone once more."""
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
        leaves = [x.detach().requires_grad_() for x in scored_by(output)["log_probs"]]
        detached = {"log_probs": leaves, "entropy": [torch.zeros_like(x) for x in leaves]}
        if isinstance(output, tuple):
            detached = output[0], detached
        alone = copy.copy(args)
        alone.entropy_coef, alone.use_kl_loss, alone.dump_details = 0.0, False, None
        loss_of, reducer = stack.loss_of(alone, batch)
        again = replaced(stack.losses, get_log_probs_and_entropy=lambda *_, **__: detached)
        with torch.enable_grad(), again:
            loss, _ = loss_of(alone, batch, logits.detach(), reducer)
            # Not autograd.grad(loss, leaves): a context-parallel rank without tokens of a sequence
            # would leave out its part in the backward of all_gather_with_cp, and the others wait.
            loss.backward()
        with torch.no_grad():
            grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
            logp, grad = self._whole([x.detach() for x in leaves], batch), self._whole(grads, batch)
            loss = loss.detach().clone()
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
            clipped = (pull == 0) & (advantage != 0) & mask
            for sign, here in (("positive", advantage > 0), ("negative", advantage < 0)):
                self.step.clips[sign] += [(clipped & here).sum(), (mask & here).sum()]
            self.seen[self.index[id(tokens)]] = {
                "advantage": advantage,
                "logp_train": logp_train,
                "clipped": clipped,
                "gradient_weight": np.abs(pull) / denominator,
            }

    def _whole(self, parts: Sequence[Tensor], batch: dict) -> list[np.ndarray]:
        """Log-probs of whole responses; a collective where context parallelism has split them."""
        lengths = zip(batch["total_lengths"], batch["response_lengths"], strict=True)
        gather = self.stack.losses.all_gather_with_cp
        return [
            gather(part, total, response).float().cpu().numpy().astype(float)
            for part, (total, response) in zip(parts, lengths, strict=True)
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
            own = self.scored["own_routes"]
            self.step.sequences.append(
                LoggedSequence(
                    prompt=ids[:prompt_length].tobytes().hex(),
                    token_ids=ids,
                    positions=prompt_length + kept_N,
                    reward=float(rewards[i]),
                    logp_rollout=whole["rollout"][i][kept_N],
                    logp_old=whole["old"][i][kept_N],
                    native_logp=whole["native"] and whole["native"][i][kept_N],
                    entropy=whole["entropy"] and whole["entropy"][i][kept_N],
                    rollout_routes=self._moe_layers(self.routes[i], i, len(ids)),
                    train_routes=self.scored["native_routes"][rows],
                    own_routes=None if own is None else own[rows],
                    **{name: column[kept_N] for name, column in self.seen[i].items()},
                )
            )
        self._open()
        metrics = self.log.write_step(rollout_id, self.step)
        if self.log.rank == 0:
            scalars = {n: v for n, v in metrics.items() if not isinstance(v, list)}
            self.stack.report(
                self.args, rollout_id, {n: v for n, v in scalars.items() if n.startswith(REPORTED)}
            )

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
        )


def _first_of_its_stage() -> bool:
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
    )


def _decoder(chunk: torch.nn.Module) -> torch.nn.Module:
    """Without multi-token prediction."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return getattr(chunk, "decoder", chunk)
