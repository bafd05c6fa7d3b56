# SPDX-License-Identifier: Apache-2.0
"""The log of a trainer that generates sequences, scores them at the old weights and trains on them.

A stack's own log hands over what its forward pass and its loss saw; the rest is shared.

Shapes: B sequences of a micro-batch, T positions of its log-probs, S tokens of a sequence, X as in
`routers`, L MoE layers, K experts each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from moe_upgrpo.errors import UserError
from moe_upgrpo.integrations.kit import environment, routers
from moe_upgrpo.integrations.kit.run_log import RunLog, Step, check_free, gap_under_r3, reported
from moe_upgrpo.integrations.kit.second_look import SecondLook, clipped_tokens
from moe_upgrpo.record import SequenceRecord, known_rows


@dataclass(kw_only=True)
class Generated:
    """A sequence of this data-parallel rank as its stack generated it.

    routes: the engine's, a row for each token or for each but the last. native_logp [T]: at the old
    weights without replay, where a replay held those that the loss uses.
    """

    token_ids: np.ndarray
    reward: float
    routes: Any
    finished: bool | None = None
    staleness: int | None = None
    native_logp: np.ndarray | None = None


class SequenceLog:
    """The sequences of a step on one rank, and the run folder."""

    def __init__(self, config: Any, model: nn.Module, *, replay: str | None):
        """config: Megatron's, for this rank's part of the model. replay: R2, R3.

        Raises UserError: the environment asks for something impossible.
        """
        self.folder: Path = environment.run_folder()
        self.share, self.limits = environment.token_share(), environment.alarm_limits()
        check_free(self.folder)
        environment.refuse({"a model without MoE layers": not config.num_moe_experts})
        self.config, self.model, self.replay, self.step = config, model, replay, 0
        self.routers = routers.counted(model)
        if replay:
            routers.check_replayed(self.routers)
        self.last_stage = parallel_state.is_pipeline_last_stage()
        self.writes = self.last_stage and routers.first_of_stage()
        self.log: RunLog | None = None
        self.clear()

    def clear(self) -> None:
        """Forget the sequences."""
        self.sequences: list[Generated] = []
        self.found: dict[str, dict[int, routers.Layers]] = {"native": {}, "own": {}}
        self.native: routers.Routes | None = None
        self.own: routers.Routes | None = None
        self.gathered = Step()

    def generated(self, sequences: Sequence[Generated], *, needed: str) -> list[int]:
        """Take in sequences; returns their rows. needed: what provides routes, for the message."""
        if any(sequence.routes is None for sequence in sequences):
            raise UserError(
                f"{environment.RUN}: the engine gave no routed_experts; the routing log needs "
                f"{needed}"
            )
        self.sequences += sequences
        return list(range(len(self.sequences) - len(sequences), len(self.sequences)))

    # --- the old weights

    def watched(
        self,
        forward: Callable[[], Any],
        native_forward: Callable[[], Any],
        of_sequences: Callable[[Tensor], Mapping[int, Tensor]],
    ) -> Any:
        """Call `forward`, that of the old log-probs, with its routers watched; returns its result.

        native_forward: the same without replay, run where R3 holds the other. of_sequences: splits
        the table [N, L, X] of a micro-batch by row of `sequences`.
        """
        watched, into = routers.watched, "native"
        if self.replay == "R3":
            with routers.watched(self.routers) as watch:
                native_forward()
            self._keep(into, watch, of_sequences)
            watched, into = routers.watched_under_replay, "own"
        with watched(self.routers) as watch:
            result = forward()
        self._keep(into, watch, of_sequences)
        return result

    def _keep(
        self,
        into: Literal["native", "own"],
        watch: routers.Watch,
        of_sequences: Callable[[Tensor], Mapping[int, Tensor]],
    ) -> None:
        numbers, table_NLX = watch.take()
        for row, table in (of_sequences(table_NLX) if numbers else {}).items():
            table_SLX = table[: len(self.sequences[row].token_ids) - 1]
            self.found[into].setdefault(row, {}).update(routers.by_layer(numbers, table_SLX))

    def join(self) -> None:
        """Bring together the layers of all pipeline stages: a collective."""
        self.native = routers.joined(self.found["native"], writes=self.writes)
        if self.replay == "R3":
            self.own = routers.joined(self.found["own"], writes=self.writes)

    # --- the update

    def visited(
        self,
        look: SecondLook,
        rows: Sequence[int],
        lengths: Sequence[int] | None,
        *,
        share: float,
        mask: Tensor,
        logp_rollout: Tensor | None,
        **columns: Tensor,
    ) -> None:
        """Record a micro-batch of the last visit of its sequences.

        share: of this loss in the optimizer step's. mask and columns [B, T] (advantage,
        logp_old, logp_train): index t is the token at t + 1 or, where packed sequences have
        `lengths`, whose columns end together, at t + 1 − (T − length).
        """
        if logp_rollout is None:
            raise UserError(
                f"{environment.RUN}: the rollout gave no log-prob for each of its tokens; the "
                "routing log needs them"
            )
        pull, advantage = look.pulls[0], columns["advantage"]
        if look.metrics:
            self.gathered.loss_metrics.append(look.metrics)
        self.gathered.loss_sum += float(look.loss) * share
        clipped = clipped_tokens(pull, advantage, mask)
        self.gathered.visit(clipped, advantage, mask)
        columns |= {"logp_rollout": logp_rollout, "gradient_weight": pull.abs() * share}
        arrays = {name: x.detach().float().cpu().numpy() for name, x in columns.items()}
        masks, cut = mask.cpu().numpy(), clipped.cpu().numpy()
        for i, row in enumerate(rows):
            if len(at := np.flatnonzero(masks[i])):
                of_token = {name: x[i, at].astype(float) for name, x in arrays.items()}
                padding = 0 if lengths is None else masks.shape[1] - lengths[i]
                record = self._record(row, at, at + 1 - padding, cut[i, at], of_token)
                self.gathered.sequences.append(record)

    def _record(
        self,
        row: int,
        at: np.ndarray,
        positions: np.ndarray,
        clipped: np.ndarray,
        of_token: dict[str, np.ndarray],
    ) -> SequenceRecord:
        sequence, gap = self.sequences[row], None
        if sequence.native_logp is not None:
            logps = (of_token[f"logp_{name}"] for name in ("rollout", "old"))
            gap = gap_under_r3(*logps, sequence.native_logp[at], of_token["logp_train"])
        both = self._rollout_routes(sequence), self.native.routes[row]
        return SequenceRecord(
            prompt=sequence.token_ids[: positions[0]].tobytes().hex(),
            token_ids=sequence.token_ids,
            positions=positions,
            reward=sequence.reward,
            clipped=clipped,
            rollout_routes=both[0],
            train_routes=both[1],
            known=known_rows(*both, num_experts=self.config.num_moe_experts),
            own_routes=None if self.own is None else self.own.routes[row],
            margins=self.native.margins[row],
            gap=gap,
            staleness=sequence.staleness,
            finished=sequence.finished,
            **of_token,
        )

    def _rollout_routes(self, sequence: Generated) -> np.ndarray:
        routes, tokens = np.asarray(sequence.routes), len(sequence.token_ids)
        if len(routes) not in (tokens - 1, tokens):
            raise UserError(
                f"{environment.RUN}: routed_experts of {len(routes)} rows given for a sequence of "
                f"{tokens} tokens; allowed: one for each, or one less"
            )
        return routers.moe_layers(
            "routed_experts",
            routes[: tokens - 1],
            layer_ids=self.native.layer_ids,
            num_layers=self.config.num_layers,
        )

    def write(self, args: Any, *, tokenizer: str | Path, **about: str) -> dict[str, float]:
        """Write the step: a collective of the last pipeline stage.

        args: Megatron's arguments, for the layout. tokenizer: the folder or name of the model that
        has it. about: entries of the run's config that the stack knows. Returns what goes to the
        stack's own trackers, on every rank of the stage.
        """
        shared: list[Any] = [None]
        if self.writes:
            group = parallel_state.get_data_parallel_group()
            if self.log is None:
                self.log = RunLog(
                    self.folder,
                    {"layout": _layout(args), "replay": self.replay or "none", **about},
                    group=group,
                    layer_ids=self.native.layer_ids,
                    top_k=self.config.moe_router_topk,
                    num_experts=self.config.num_moe_experts,
                    share=self.share,
                    limits=self.limits,
                    modules=[self.model],
                    tokenizer=tokenizer,
                )
            shared = [reported(self.log.write_step(self.step, self.gathered))]
        stage = parallel_state.get_tensor_and_context_parallel_group()
        dist.broadcast_object_list(shared, src=dist.get_process_group_ranks(stage)[0], group=stage)
        return shared[0]


def _layout(args: Any) -> str:
    sizes = {"tp": "tensor_model", "pp": "pipeline_model", "ep": "expert_model", "cp": "context"}
    return ", ".join(f"{k} {getattr(args, f'{name}_parallel_size')}" for k, name in sizes.items())
