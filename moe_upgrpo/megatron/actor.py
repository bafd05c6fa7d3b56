# SPDX-License-Identifier: Apache-2.0
"""The actor: a Megatron-Core model sharded over the ranks, its optimizer, and what RL asks of them.

Shapes: B sequences, S padded length, P prompt and T response tokens, L MoE layers, K experts each.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config, unwrap_model

from moe_upgrpo import heap
from moe_upgrpo.errors import NumericalFailure, UserError
from moe_upgrpo.hugging_face.export import side_files, try_export
from moe_upgrpo.losses import LossTerms, Metric, PolicyLossConfig, merge_metrics
from moe_upgrpo.megatron import context, groups, passthrough, tap
from moe_upgrpo.megatron.balance import Cost, Limit
from moe_upgrpo.megatron.batch import Batch, Sample
from moe_upgrpo.megatron.experts import gather_before
from moe_upgrpo.megatron.families import moe_layers, num_experts, read_model_config, top_k
from moe_upgrpo.megatron.head import HEAD_RECORDS, Wanted
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.model import build_model, uses_transformer_engine
from moe_upgrpo.megatron.objective import NO_TERMS, Objective, statistics_of
from moe_upgrpo.megatron.optimizer import ReleasedWithItsActor, ddp_config, make_optimizer
from moe_upgrpo.megatron.packing import Inputs, check_attention
from moe_upgrpo.megatron.scored import Scored, scored_of
from moe_upgrpo.megatron.settings import DTYPES, OptimizerSettings
from moe_upgrpo.megatron.tap import RECORDS, RouterTap, Run, Visit
from moe_upgrpo.megatron.weights import (
    export_weights,
    load_weights,
    mark_split_weights,
    write_checkpoint,
)
from moe_upgrpo.megatron.work import Work, check_samples, make_work, tells_shapes

_RECORDS_GIVEN_BACK = 64 << 20  # bytes of records; below, faults of the pages cost more


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """Record of this rank's samples in one optimizer step."""

    log_probs: list[np.ndarray]  # [T] float32 for each sample, at the weights before the step
    clipped: list[np.ndarray]  # [T] bool
    gradient_weight: list[np.ndarray]  # [T] float32, |∂loss/∂log-prob|
    loss: float  # this rank's share; the sum over data-parallel ranks is the loss
    metrics: dict[str, Metric]  # of moe_upgrpo.losses, this rank's sums
    grad_norm: float  # over all ranks, before clipping
    # Terms beside the policy loss by name: this rank's shares, as `loss`, and their metrics' sums.
    terms: dict[str, float] = field(default_factory=dict)
    term_metrics: dict[str, Metric] = field(default_factory=dict)
    scored: list[Scored] | None = None  # the training forward as `score` has it, where asked for
    # (token, layer) pairs whose router, run again in the backward, would have chosen other experts
    # than in the forward; the forward's were used. 0 where kernels are deterministic.
    recompute_flips: int = 0


class MegatronActor:
    """Scores and updates this data-parallel rank's samples; every method is a collective.

    All ranks of one copy of the model (pipeline stages, tensor- and context-parallel ranks) pass
    the same samples and get the same results. Without `optimizer` the model is frozen: a reference
    policy.
    micro_batch_tokens: the tokens that a micro-batch may hold, instead of micro_batch_size;
    sequences are then moved between data-parallel ranks to balance the work, see
    `moe_upgrpo.megatron.work`. longest: tokens of the longest sequence; the budget is then what
    micro_batch_size of them take, and sequences are moved where that saves enough.
    packing: everything but attention computes real tokens only (`moe_upgrpo.megatron.packing`).
    recompute: "full" keeps each layer's input only and runs the layer again in the backward.
    megatron: Megatron-Core's own options, name -> value as text (`passthrough`).
    """

    def __init__(
        self,
        model_dir: Path,
        layout: Layout,
        *,
        dtype: str = "float32",
        temperature: float = 1.0,
        micro_batch_size: int = 64,
        micro_batch_tokens: int | None = None,
        longest: int | None = None,
        packing: bool = False,
        optimizer: OptimizerSettings | None = None,
        recompute: str = "none",
        megatron: Mapping[str, str] | None = None,
    ):
        if dtype not in DTYPES:
            raise UserError(f"dtype={dtype!r}: use one of {', '.join(DTYPES)}.")
        self.model_dir = Path(model_dir)
        self.layout = layout
        self._dtype = getattr(torch, dtype)
        self.temperature = temperature
        self.limit = Limit(
            sequences=micro_batch_size,
            tokens=micro_batch_tokens,
            longest=longest,
            packed=packing,
        )
        self.recompute = recompute
        self._given = dict(megatron or {})
        self._passed = passthrough.read(self._given)
        check_attention(
            self._passed.transformer,
            layout,
            packing=packing,
            dtype=dtype,
            transformer_engine=uses_transformer_engine(),
        )
        self._split = False  # whether other ranks hold newer values of some weights
        self.hf = read_model_config(self.model_dir)
        self._cost = Cost.of(self.hf)
        # Read now, so that a file that cannot be copied is known before anything is trained.
        self._side_files = side_files(self.model_dir) if optimizer and groups.rank() == 0 else {}
        with passthrough.told(self._given):
            self.chunks = build_model(
                self.hf, layout, self._dtype, recompute, self._passed.transformer
            )
        if tells_shapes(self.limit, layout):
            for chunk in self.chunks:
                get_model_config(chunk).variable_seq_lengths = True
        self.tap = RouterTap(self.chunks)
        if self.tap.layer_ids != moe_layers(self.hf):
            raise RuntimeError(
                f"The model's config.json describes experts in layers {moe_layers(self.hf)}, "
                f"routers were built in layers {self.tap.layer_ids}."
            )
        if dtype == "bfloat16":
            self.chunks = [Float16Module(get_model_config(chunk), chunk) for chunk in self.chunks]
        # Last: Float16Module rounds the routers' selection bias, which stays fp32, with the rest.
        load_weights(self.chunks, self.hf, self.model_dir)
        self.optimizer = None
        if optimizer is None:
            for chunk in self.chunks:
                chunk.requires_grad_(False)
        else:
            self._prepare_training(optimizer)

    def _prepare_training(self, settings: OptimizerSettings) -> None:
        if settings.frozen == "router":
            for router in self.tap.routers.values():
                router.weight.requires_grad_(False)
        mark_split_weights(self.chunks, self.hf)  # before the optimizer copies the marks
        config, passed = get_model_config(self.chunks[0]), self._passed
        passthrough.check_optimizer(passed, settings)
        with passthrough.told(self._given):
            of_chunks = ddp_config(settings, passed.ddp)
            self.chunks = [ReleasedWithItsActor(config, of_chunks, chunk) for chunk in self.chunks]
            self.optimizer, self.scheduler = make_optimizer(self.chunks, settings, passed.optimizer)
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads
        if of_chunks.overlap_grad_reduce:  # all but the last micro-batch then only add up
            no_sync = [chunk.no_sync for chunk in self.chunks]
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        if passed.overlaps_gather:
            for chunk in self.chunks:
                gather_before(chunk)

    def make_whole(self) -> None:
        """Gather the weights that the last step left on the ranks that own them. A collective.

        With overlap_param_gather each weight is gathered when the next update's forward reaches
        it; everything else that reads weights needs them whole.
        """
        if self._split:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)
            self._split = False

    @property
    def layer_ids(self) -> list[int]:
        """The MoE layers of the whole model, in the order of the routes' axis L; none if dense."""
        return self.tap.layer_ids

    @property
    def top_k(self) -> int:
        """Experts per token; 0 for a dense model."""
        return top_k(self.hf)

    @property
    def num_experts(self) -> int:
        """Experts in each MoE layer; 0 for a dense model."""
        return num_experts(self.hf)

    def check_length(self, tokens: int) -> None:
        """Raise UserError where a sequence has more tokens than the model has positions, or than a
        micro-batch may have."""
        self._check_positions(tokens)
        self.limit.check(-(-tokens // self._multiple_of) * self._multiple_of)

    def _check_positions(self, tokens: int) -> None:
        limit = self.hf.max_position_embeddings
        if tokens > limit:
            raise UserError(
                f"A sequence of {tokens} tokens, prompt and response together: the model has "
                f"max_position_embeddings={limit}. Shorten the prompts or max_new_tokens."
            )

    def parameter_count(self) -> int:
        """Parameters of the whole model."""
        return sum(tensor.numel() for _, tensor in self.export_weights())

    def _work(self, samples: Sequence[Sample], limit: Limit) -> Work:
        """The samples as micro-batches, within `limit`. A collective."""
        check_samples(samples, len(self.layer_ids), self.top_k)
        self._check_positions(max(len(sample.tokens) for sample in samples))
        return make_work(samples, limit, self.layout, self._cost, multiple_of=self._multiple_of)

    @property
    def _multiple_of(self) -> int:
        """The number that padded lengths are multiples of."""
        # Transformer Engine's FP8 and FP4 kernels take each rank's rows in blocks of 32.
        config = get_model_config(self.chunks[0])
        each = self.layout.tp * (32 if config.fp8 or config.fp4 else 1)
        return each * (2 * self.layout.cp if self.layout.cp > 1 else 1)

    def _run(
        self,
        work: Work,
        on_output,
        *,
        train: bool,
        record: Collection[str],
        **of_head: bool,
    ) -> tuple[list, list[dict[str, np.ndarray]], int]:
        """Run Megatron's schedule over the micro-batches; `on_output(batch, output)` ends each.

        output: [B, S, x] of the response's rows: log-probs and, each where `of_head`, fields of
        `Wanted`, asks for it, entropy, Σπ² and hidden states. Returns, on every rank of the copy:
        the results of `on_output`, the records of each input's rows by name ([B, S, L, ...] or
        [1, N, L, ...]), and the number of recomputed routers that chose other experts.
        """
        if unknown := set(record) - set(RECORDS):
            raise UserError(f"record={sorted(unknown)}: use any of {', '.join(RECORDS)}.")
        visits = [
            [self.tap.visit(c, len(i.tokens_BS), i.routes_BSLK, record) for i in work.inputs]
            for c in range(len(self.chunks))
        ]
        recomputations = int(train and self.recompute != "none")
        tapped = record or recomputations or any(i.routes_BSLK is not None for i in work.inputs)

        def forward_step(data: Iterator[tuple[Batch, Inputs, Visit]], chunk):
            batch, inputs, visit = next(data)
            wanted = Wanted(
                targets_BS=inputs.targets_BS,
                mask_BS=inputs.mask_BS,
                temperature=self.temperature,
                **of_head,
            )
            with visit:
                output = chunk(
                    inputs.tokens_BS,
                    inputs.positions_BS,
                    None,
                    wanted=wanted,
                    packed_seq_params=inputs.packed,
                )
            visit.backward_of(output)
            return output, lambda out, **kind: on_output(batch, inputs.in_batch(out), **kind)

        data = [
            iter(list(zip(work.batches, work.inputs, of_chunk, strict=True))) for of_chunk in visits
        ]
        with self.tap.installed() if tapped else nullcontext():
            outputs = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=data if len(data) > 1 else data[0],
                model=self.chunks,
                num_microbatches=len(work.batches),
                seq_length=work.inputs[0].tokens_BS.shape[1] * self.layout.cp,
                micro_batch_size=len(work.inputs[0].tokens_BS),
                forward_only=not train,
                collect_non_loss_data=not train,
            )
        if not tapped:
            visits = []
        runs = tap.together([i.tokens_BS.numel() for i in work.inputs], len(self.layer_ids))
        return self._share(outputs, visits, recomputations, runs if record and visits else ())

    def _share(
        self,
        outputs: list,
        visits: list[list[Visit]],
        recomputations: int,
        runs: Sequence[Run],
    ) -> tuple[list, list[dict[str, np.ndarray]], int]:
        """Every stage's and every sequence shard's part of the results, joined on every rank."""
        shard = self._shard
        problems = [tap.wrong_uses(of_chunk, recomputations) for of_chunk in visits]
        part = {
            "outputs": outputs if shard == 0 else [],  # of the last stage; elsewhere none
            "problems": [problem for problem in problems if problem],
            "flips": sum(tap.flips(of_chunk) for of_chunk in visits),
        }
        parts = groups.gather_in_model_copy([part])
        for problem in (problem for part in parts for problem in part["problems"]):
            raise RuntimeError(problem)
        outputs = [output for part in parts for output in part["outputs"]]
        traces: list[dict[str, np.ndarray]] = [{} for _ in outputs]
        handed_over = 0
        for run in runs:
            mine = [tap.hand_over(of_chunk, run, self.tap.num_experts) for of_chunk in visits]
            tap.join(groups.gather_in_model_copy([(shard, mine)]), run, traces)
            handed_over += sum(
                array.nbytes for chunk in mine for *_, arrays in chunk for array in arrays.values()
            )
            if run.part + 1 == run.parts and handed_over > _RECORDS_GIVEN_BACK:
                heap.give_back()  # the visits' records: else a step would hold them twice
                handed_over = 0
        if self.layout.cp > 1:
            for trace in traces:
                trace.update({name: context.in_order(array) for name, array in trace.items()})
        return outputs, traces, sum(part["flips"] for part in parts)

    @property
    def _shard(self) -> int:
        """The shard of the rows: context-parallel ranks have parts of them, and shard those."""
        return context.rank() * self.layout.tp + parallel_state.get_tensor_model_parallel_rank()

    @torch.no_grad()
    def score(
        self,
        samples: Sequence[Sample],
        *,
        record: Collection[str] = ("routes", "margins"),
        micro_batch_size: int | None = None,
    ) -> list[Scored]:
        """Log-probs and entropy of each sample, and the records of its routing that `record` names.

        Samples that carry routes are scored with those replayed. record: any of "routes",
        "margins", "gates", "sum_pi_squared" and "hidden". The last one costs, while a micro-batch
        is scored, its last hidden states in fp32 once more on the device, and then those of the
        tokens that count on the CPU of one rank of each copy of the model.
        """
        self.make_whole()
        for chunk in self.chunks:
            chunk.eval()

        of_head = {name: name in record for name in HEAD_RECORDS}
        record = [name for name in record if name not in HEAD_RECORDS]
        columns, hidden = 2 + of_head["sum_pi_squared"], []

        def on_output(batch: Batch, output_BSx: torch.Tensor, non_loss_data: bool):
            if of_head["hidden"]:
                if self._shard == 0:
                    mask_BS = batch.mask_BS
                    mine_NH = output_BSx[..., columns:][mask_BS].to("cpu", self._dtype)
                    hidden.append(mine_NH.split(mask_BS.sum(1).tolist()))
                output_BSx = output_BSx[..., :columns].clone()
            return tuple(part_BS.numpy() for part_BS in output_BSx.cpu().unbind(-1))

        limit = self.limit
        if micro_batch_size:
            limit = replace(limit, sequences=micro_batch_size, tokens=None, longest=None)
        work = self._work(samples, limit)
        outputs, traces, _ = self._run(
            work,
            on_output,
            train=False,
            record=record,
            entropy=True,
            squares=of_head["sum_pi_squared"],
            hidden=of_head["hidden"],
        )
        moe = bool(self.layer_ids)
        return work.back(scored_of(work, outputs, traces, record, moe=moe, hidden=hidden))

    def head_rows(self, ids_V: torch.Tensor) -> torch.Tensor | None:
        """The rows `[V, H]` of the output layer's weight that make these tokens' logits, in fp32.

        A collective. None on ranks that are not of the last stage.
        """
        return unwrap_model(self.chunks[-1]).head_rows(ids_V)

    def update(
        self,
        samples: Sequence[Sample],
        loss: PolicyLossConfig,
        *,
        terms: LossTerms = NO_TERMS,
        record: Collection[str] = (),
        at: Sequence[torch.Tensor] | None = None,
        seed: int = 0,
    ) -> Update:
        """One optimizer step on this rank's part of a mini-batch, replaying the samples' routes.

        Every rank passes the same number of samples. terms: added to the loss. record: as in
        `score`; if not empty, this forward's results are returned in the form that `score` has.
        at: weights from `weights_now` at which the gradient, and all that is recorded, is computed;
        None: the weights that the step changes. seed: for the loss's random draws. Raises
        NumericalFailure on every rank: before any weight changes, where a log-prob or the loss is
        not finite; after it, where the gradient is not.
        """
        statistics = None
        if "statistics" in loss.arguments:
            scored = None
            if loss.statistics_of_policy:
                with self._at(at):
                    scored = self.score(samples, record=())
            statistics = statistics_of(samples, scored, loss, seed)
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        work = self._work(samples, self.limit)
        objective = Objective.over(
            work.batches, len(samples), loss=loss, terms=terms, seed=seed, statistics=statistics
        )
        has_entropy = terms.entropy_coef > 0 or "entropy" in loss.arguments
        with self._at(at):
            seen, traces, flips = self._run(
                work,
                objective,
                train=True,
                record=record,
                entropy=bool(record) or has_entropy,
                entropy_gradient=terms.entropy_coef > 0,
            )
        problems = groups.gather_everywhere([one.problem for one in seen if one.problem])
        if problems:
            raise NumericalFailure(problems[0])
        self.scheduler.step(increment=1)  # before the step: warm-up starts at lr / warmup_steps
        _, grad_norm, _ = self.optimizer.step()
        if not math.isfinite(grad_norm):
            raise NumericalFailure(
                f"The gradient's norm is {float(grad_norm)}, of finite log-probs: the weights are "
                "lost with this step. Lower the learning rate, and go on from the last checkpoint."
            )
        self._split = self._passed.overlaps_gather
        of_samples = [
            [seen[m].arrays[kind][b][sample.response_rows] for kind in range(3)]
            for sample, (m, b) in zip(work.samples, work.places, strict=True)
        ]
        log_probs, clipped, gradient_weight = map(list, zip(*work.back(of_samples), strict=True))
        scored = None
        if record:
            outputs = [(one.arrays[0], one.arrays[3]) for one in seen]
            scored = work.back(scored_of(work, outputs, traces, record, moe=bool(self.layer_ids)))
        return Update(
            log_probs=log_probs,
            clipped=clipped,
            gradient_weight=gradient_weight,
            loss=sum(one.loss for one in seen),
            metrics=merge_metrics([one.metrics for one in seen]),
            terms={name: sum(one.terms[name] for one in seen) for name in seen[0].terms},
            term_metrics=merge_metrics([one.term_metrics for one in seen]),
            grad_norm=float(grad_norm),
            scored=scored,
            recompute_flips=flips,
        )

    @torch.no_grad()
    def weights_now(self) -> list[torch.Tensor]:
        """A copy of this rank's part of the weights. A collective."""
        self.make_whole()
        return [p.detach().clone() for chunk in self.chunks for p in chunk.parameters()]

    @contextmanager
    def _at(self, weights: Sequence[torch.Tensor] | None) -> Iterator[None]:
        """Inside, the model computes with these weights; afterwards it has its own again."""
        if weights is None:
            yield
            return
        own = self.weights_now()
        self._put(weights)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, weights: Sequence[torch.Tensor]) -> None:
        parameters = (p for chunk in self.chunks for p in chunk.parameters())
        for parameter, values in zip(parameters, weights, strict=True):
            parameter.copy_(values)

    @torch.no_grad()
    def take_weights(self, other: MegatronActor) -> None:
        """Copy another actor's weights, of the same model in the same layout. A collective."""
        other.make_whole()
        self._put([p for chunk in other.chunks for p in chunk.parameters()])

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, whole tensor) pairs on every rank, for an engine."""
        self.make_whole()
        return export_weights(self.chunks, self.hf)

    def save(self, output_dir: Path) -> None:
        """Write the weights as a Hugging Face checkpoint folder that transformers loads.

        The tokenizer of `model_dir` is in it, as it was when this actor was made.
        """
        self.make_whole()
        write_checkpoint(self.chunks, self.hf, self._side_files, output_dir)

    def try_saving(self, folder: Path) -> None:
        """Raise UserError where the files beside the weights cannot be written below `folder`.

        Not a collective: for the rank that writes, before anything is trained.
        """
        try_export(self.hf, self._side_files, folder)
