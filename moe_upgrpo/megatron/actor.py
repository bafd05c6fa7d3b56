"""The actor: a Megatron-Core model sharded over the ranks, its optimizer, and what RL asks of them.

Shapes: B sequences, S padded length, P prompt and T response tokens, L MoE layers, K experts each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config

from moe_upgrpo.errors import UserError
from moe_upgrpo.losses import Metric, PolicyLossConfig, merge_metrics, policy_loss
from moe_upgrpo.megatron.batch import Batch, Sample, make_batch
from moe_upgrpo.megatron.groups import device
from moe_upgrpo.megatron.layout import Layout
from moe_upgrpo.megatron.logprobs import token_entropy, token_log_probs
from moe_upgrpo.megatron.model import build_model, read_model_config
from moe_upgrpo.megatron.replay import RouteReplay
from moe_upgrpo.megatron.settings import DTYPES, OptimizerSettings
from moe_upgrpo.megatron.tap import RouterTap
from moe_upgrpo.megatron.weights import export_weights, load_weights, write_checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """One sequence as the trainer sees it, without gradient; routes native unless replayed."""

    log_probs: np.ndarray  # [T] float32, under the sampling temperature
    entropy: np.ndarray  # [T] float32, nats
    routes: np.ndarray  # [P+T-1, L, K] int16; L = 0 where they were not asked for


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What one optimizer step saw of this rank's samples."""

    log_probs: list[np.ndarray]  # [T] float32 for each sample, at the weights before the step
    clipped: list[np.ndarray]  # [T] bool
    loss: float  # this rank's share; the sum over data-parallel ranks is the loss
    metrics: dict[str, Metric]  # of moe_upgrpo.losses, this rank's sums
    grad_norm: float  # over all ranks, before clipping


class MegatronActor:
    """Scores and updates this data-parallel rank's samples; every method is a collective.

    Without `optimizer` the model is frozen: a reference policy.
    """

    def __init__(
        self,
        model_dir: Path,
        layout: Layout,
        *,
        dtype: str = "float32",
        temperature: float = 1.0,
        micro_batch_size: int = 64,
        optimizer: OptimizerSettings | None = None,
    ):
        if dtype not in DTYPES:
            raise UserError(f"dtype={dtype!r}: use one of {', '.join(DTYPES)}.")
        self.model_dir = Path(model_dir)
        self.layout = layout
        self.temperature = temperature
        self.micro_batch_size = micro_batch_size
        self.hf = read_model_config(self.model_dir)
        self.model = build_model(self.hf, layout, getattr(torch, dtype))
        load_weights(self.model, self.hf, self.model_dir)
        self.tap = RouterTap(self.model)
        self.replay = RouteReplay(self.tap.routers)
        if dtype == "bfloat16":
            self.model = Float16Module(get_model_config(self.model), self.model)
        self.optimizer = None
        if optimizer is None:
            self.model.requires_grad_(False)
        else:
            self._prepare_training(optimizer)

    def _prepare_training(self, settings: OptimizerSettings) -> None:
        config = get_model_config(self.model)
        split_state = settings.algorithm == "adam"
        self.model = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=split_state, grad_reduce_in_fp32=True
            ),
            self.model,
        )
        # Every DP rank read the same files, so no broadcast of parameters is needed.
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer=settings.algorithm,
                lr=settings.lr,
                adam_beta1=settings.beta1,
                adam_beta2=settings.beta2,
                adam_eps=settings.eps,
                sgd_momentum=0.0,
                weight_decay=settings.weight_decay,
                clip_grad=settings.clip_grad,
                bf16=config.bf16,
                params_dtype=config.params_dtype,
                use_distributed_optimizer=split_state,
            ),
            [self.model],
        )
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=settings.lr,
            lr_warmup_steps=settings.warmup_steps,
            lr_decay_steps=max(1, settings.warmup_steps + 1),
            lr_decay_style="constant",
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads

    @property
    def layer_ids(self) -> list[int]:
        """The model's layers that are MoE layers, in the order of the routes' axis L."""
        return self.tap.layer_ids

    def parameter_count(self) -> int:
        """Parameters of the whole model."""
        return sum(tensor.numel() for _, tensor in self.export_weights())

    def _micro_batches(self, samples: Sequence[Sample], size: int | None = None) -> list[Batch]:
        size = size or self.micro_batch_size
        if not samples:
            raise UserError("No samples for the actor on this rank: nothing to compute.")
        return [
            make_batch(samples[i : i + size], multiple_of=self.layout.tp).to(device())
            for i in range(0, len(samples), size)
        ]

    def _run(self, batches: Sequence[Batch], on_logits, *, train: bool) -> list:
        """Megatron's schedule over the micro-batches; `on_logits(batch, logits)` ends each."""

        def forward_step(data: Iterator[Batch], model):
            batch = next(data)
            native = batch.routes_BSLK is None
            with nullcontext() if native else self.replay.replaying(batch.routes_BSLK):
                logits_BSv = model(batch.tokens_BS, batch.positions_BS, None)
            return logits_BSv, partial(on_logits, batch)

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[self.model],
            num_microbatches=len(batches),
            seq_length=batches[0].tokens_BS.shape[1],
            micro_batch_size=self.micro_batch_size,
            forward_only=not train,
            collect_non_loss_data=not train,
        )

    @torch.no_grad()
    def score(
        self,
        samples: Sequence[Sample],
        *,
        routes: bool = True,
        micro_batch_size: int | None = None,
    ) -> list[Scored]:
        """Log-probs, entropy and (unless `routes` is off) the routes of each sample.

        Samples that carry routes are scored with those replayed.
        """
        self.model.eval()

        def on_logits(batch: Batch, logits_BSv: torch.Tensor, non_loss_data: bool):
            routes_BSLK = self.tap.take(len(batch.tokens_BS)) if routes else None
            return (
                token_log_probs(logits_BSv, batch.targets_BS, self.temperature).cpu().numpy(),
                token_entropy(logits_BSv, self.temperature).cpu().numpy(),
                routes_BSLK.cpu().numpy() if routes else None,
            )

        batches = self._micro_batches(samples, micro_batch_size)
        if routes:
            with self.tap:
                outputs = self._run(batches, on_logits, train=False)
        else:
            outputs = self._run(batches, on_logits, train=False)
        by_row = [row for output in outputs for row in _rows(output)]
        return [
            Scored(
                log_probs=log_probs[s.response_rows],
                entropy=entropy[s.response_rows],
                routes=row_routes[: len(s.tokens) - 1],
            )
            for s, (log_probs, entropy, row_routes) in zip(samples, by_row, strict=True)
        ]

    def update(self, samples: Sequence[Sample], loss: PolicyLossConfig) -> Update:
        """One optimizer step on this rank's part of a mini-batch, replaying the samples' routes.

        Every rank gives the same number of samples. Raises UserError, before any weight changes,
        where a log-prob is not finite.
        """
        self.model.train()
        batches = self._micro_batches(samples)
        dp_group = parallel_state.get_data_parallel_group()
        counts = torch.tensor(
            [sum(int(b.mask_BS.sum()) for b in batches), len(samples)],
            dtype=torch.float64,
            device=device(),
        )
        dist.all_reduce(counts, group=dp_group)
        # DistributedDataParallel divides gradients by the data-parallel ranks and the schedule by
        # the micro-batches; the loss has the global denominators already.
        undo_means = dp_group.size() * len(batches)

        def on_logits(batch: Batch, logits_BSv: torch.Tensor):
            log_probs_BS = token_log_probs(logits_BSv, batch.targets_BS, self.temperature)
            bad = ~log_probs_BS.isfinite() & batch.mask_BS
            if bad.any():
                b, row = bad.nonzero()[0].tolist()
                raise UserError(
                    f"The trainer's log-prob of token {batch.targets_BS[b, row]} at position "
                    f"{row + 1} of a sequence is {log_probs_BS[b, row]}: the weights have diverged "
                    "or are broken. Lower the learning rate or clip the gradient; the weights "
                    "were not changed by this step."
                )
            result = policy_loss(
                log_probs_BS,
                batch.old_log_probs_BS,
                batch.advantages_BS,
                batch.mask_BS,
                config=loss,
                rollout_log_probs=batch.rollout_log_probs_BS,
                global_tokens=counts[0],
                global_sequences=counts[1],
            )
            seen = log_probs_BS.detach().cpu().numpy(), result.clipped.cpu().numpy()
            return result.loss * undo_means, (seen, float(result.loss.detach()), result.metrics)

        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = self._run(batches, on_logits, train=True)
        self.scheduler.step(increment=1)  # before the step: warm-up starts at lr / warmup_steps
        _, grad_norm, _ = self.optimizer.step()
        rows = [row for seen, *_ in outputs for row in _rows(seen)]
        return Update(
            log_probs=[r[0][s.response_rows] for s, r in zip(samples, rows, strict=True)],
            clipped=[r[1][s.response_rows] for s, r in zip(samples, rows, strict=True)],
            loss=sum(loss for _, loss, _ in outputs),
            metrics=merge_metrics([metrics for *_, metrics in outputs]),
            grad_norm=float(grad_norm),
        )

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, whole tensor) pairs on every rank, for an engine."""
        return export_weights(self.model, self.hf)

    def save(self, output_dir: Path) -> None:
        """Write the weights as a Hugging Face checkpoint folder that transformers loads."""
        write_checkpoint(self.model, self.hf, self.model_dir, output_dir)


def _rows(arrays: tuple) -> Iterator[tuple]:
    """The sequences of a micro-batch, one at a time; None stays an empty array."""
    size = len(arrays[0])
    filled = [np.empty((size, 0, 0, 0), np.int16) if a is None else a for a in arrays]
    yield from zip(*filled, strict=True)
