# SPDX-License-Identifier: Apache-2.0
"""Log-probs, entropy and Σp² from hidden states and the head's weight, a few rows at a time.

No tensor of the size of a micro-batch's logits is ever made; the backward computes each row's
logits again. Imports no Megatron.

N rows of hidden states of size H, M of them asked for, C of those at a time; V vocabulary,
v = V / tp of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

# Size of one fp32 buffer for logits: large enough that the product with the head keeps a GPU busy,
# small beside the rest of a micro-batch.
BUFFER_BYTES = 2**27


def rows_at_a_time(vocabulary: int) -> int:
    """C, for v of this rank."""
    return max(1, BUFFER_BYTES // (4 * vocabulary))


def log_probs_and_entropy(
    hidden_NH: torch.Tensor,
    weight_vH: torch.Tensor,
    targets_N: torch.Tensor,
    mask_N: torch.Tensor,
    *,
    temperature: float,
    group: dist.ProcessGroup,
    entropy: bool = True,
    entropy_gradient: bool = False,
    squares: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """log p(target), −Σ p log p in nats and Σ p², p = softmax(logits / temperature): [N] in fp32.

    Rows outside `mask_N` are not computed: 0. The log-probs have a gradient, the entropy only with
    `entropy_gradient`, Σ p² none; without `entropy` or `squares` that one is None. group: the ranks
    over which the vocabulary is split; each passes the same hidden states and gets its part of
    their gradient, to be summed.
    Where the weight has a `main_grad` (Megatron-Core's buffer of summed gradients), its gradient is
    added to that.
    """
    index_M = mask_N.nonzero()[:, 0]
    log_probs_N, entropy_N, squares_N = _FromHidden.apply(
        hidden_NH,
        weight_vH,
        targets_N[index_M],
        index_M,
        temperature,
        group,
        entropy,
        entropy_gradient,
        squares,
    )
    return log_probs_N, entropy_N if entropy else None, squares_N


class _Rows:
    """The rows asked for, C at a time, with their logits in buffers that are used again."""

    def __init__(self, hidden_NH, weight_vH, targets_M, index_M, temperature, group):
        self.hidden_NH, self.weight_vH, self.index_M = hidden_NH, weight_vH, index_M
        self.temperature = temperature
        v = len(weight_vH)
        local_M = targets_M - group.rank() * v
        self.mine_M = (local_M >= 0) & (local_M < v)  # targets in this rank's vocabulary
        self.local_M1 = local_M.clamp(0, v - 1).unsqueeze(1)
        self.size = min(rows_at_a_time(v), max(1, len(index_M)))
        self.product_Cv = hidden_NH.new_empty(self.size, v)
        self.logits_Cv = self.product_Cv
        if hidden_NH.dtype != torch.float32:
            self.logits_Cv = self.product_Cv.new_empty(self.size, v, dtype=torch.float32)

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """(which of the M, their hidden states, their logits / temperature in fp32)"""
        for begin in range(0, len(self.index_M), self.size):
            part = slice(begin, min(begin + self.size, len(self.index_M)))
            rows_CH = self.hidden_NH[self.index_M[part]]
            product_Cv = self.product_Cv[: len(rows_CH)]
            logits_Cv = self.logits_Cv[: len(rows_CH)]
            torch.mm(rows_CH, self.weight_vH.t(), out=product_Cv)
            if logits_Cv.dtype != product_Cv.dtype:
                logits_Cv.copy_(product_Cv)
            if self.temperature != 1:
                logits_Cv.div_(self.temperature)
            yield part, rows_CH, logits_Cv

    def in_models_dtype(self, gradient_Cv: torch.Tensor) -> torch.Tensor:
        """The current contents of the logits' buffer, in the weight's dtype."""
        if gradient_Cv.dtype == self.product_Cv.dtype:
            return gradient_Cv
        return self.product_Cv[: len(gradient_Cv)].copy_(gradient_Cv)


class _FromHidden(torch.autograd.Function):
    """With m the largest logit, z = Σ exp(l − m), w = Σ (l − m) exp(l − m), q = Σ exp(2(l − m)):

    log p(y) = l_y − m − log z, entropy = log z − w / z, Σ p² = q / z²,
    ∂ log p(y) / ∂ l_i = [i = y] − p_i, ∂ entropy / ∂ l_i = −p_i (log p_i + entropy).
    """

    @staticmethod
    def forward(
        ctx,
        hidden_NH,
        weight_vH,
        targets_M,
        index_M,
        temperature,
        group,
        entropy,
        entropy_gradient,
        squares,
    ):
        rows = _Rows(hidden_NH, weight_vH, targets_M, index_M, temperature, group)
        largest_M = hidden_NH.new_empty(len(index_M), dtype=torch.float32)
        # z, w, l_y and, where asked for, q: of this rank's vocabulary
        sums_xM = largest_M.new_zeros(3 + squares, len(index_M))
        exps_Cv = torch.empty_like(rows.logits_Cv) if entropy else rows.logits_Cv
        for part, _, logits_Cv in rows:
            target_C = logits_Cv.gather(1, rows.local_M1[part])[:, 0]
            sums_xM[2, part] = target_C.where(rows.mine_M[part], 0)
            torch.amax(logits_Cv, dim=1, out=largest_M[part])
            logits_Cv -= largest_M[part, None]
            exp_Cv = torch.exp(logits_Cv, out=exps_Cv[: len(logits_Cv)])
            torch.sum(exp_Cv, dim=1, out=sums_xM[0, part])
            if entropy:
                torch.sum(logits_Cv.mul_(exp_Cv), dim=1, out=sums_xM[1, part])
            if squares:
                torch.sum(exp_Cv.square_(), dim=1, out=sums_xM[3, part])
        if group.size() > 1 and len(index_M):
            here_M = largest_M.clone()
            dist.all_reduce(largest_M, op=dist.ReduceOp.MAX, group=group)
            below_M = here_M - largest_M
            sums_xM[1] += below_M * sums_xM[0]
            sums_xM[:2] *= below_M.exp()
            if squares:
                sums_xM[3] *= (2 * below_M).exp()
            dist.all_reduce(sums_xM, group=group)
        log_z_M = sums_xM[0].log()
        log_sum_M = largest_M + log_z_M
        ctx.given = temperature, group, entropy_gradient
        ctx.main_grad = getattr(weight_vH, "main_grad", None)
        log_probs_N, entropy_N = (largest_M.new_zeros(len(hidden_NH)) for _ in range(2))
        log_probs_N[index_M] = sums_xM[2] - largest_M - log_z_M
        if entropy:
            entropy_N[index_M] = log_z_M - sums_xM[1] / sums_xM[0]
        entropy_M = entropy_N[index_M] if entropy_gradient else None
        ctx.save_for_backward(hidden_NH, weight_vH, targets_M, index_M, log_sum_M, entropy_M)
        squares_N = None
        if squares:
            squares_N = torch.zeros_like(entropy_N)
            squares_N[index_M] = sums_xM[3] / sums_xM[0].square()
        without = [None if entropy_gradient else entropy_N, squares_N]
        ctx.mark_non_differentiable(*(x_N for x_N in without if x_N is not None))
        return log_probs_N, entropy_N, squares_N

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_N, of_entropy_N, _of_squares_N):
        hidden_NH, weight_vH, targets_M, index_M, log_sum_M, entropy_M = ctx.saved_tensors
        temperature, group, entropy_gradient = ctx.given
        rows = _Rows(hidden_NH, weight_vH, targets_M, index_M, temperature, group)
        scaled_M = gradient_N[index_M] / temperature
        of_targets_M = scaled_M.where(rows.mine_M, 0)
        if entropy_gradient:
            of_entropy_M = of_entropy_N[index_M] / temperature
            factors_Cv = torch.empty_like(rows.logits_Cv)
        of_hidden_NH = torch.zeros_like(hidden_NH) if ctx.needs_input_grad[0] else None
        of_weight_vH = None
        if ctx.needs_input_grad[1]:
            of_weight_vH = ctx.main_grad
            if of_weight_vH is None:
                of_weight_vH = torch.zeros_like(weight_vH, dtype=torch.float32)
        for part, rows_CH, logits_Cv in rows:
            of_logits_Cv = logits_Cv.sub_(log_sum_M[part, None])
            if entropy_gradient:
                factor_Cv = factors_Cv[: len(logits_Cv)].copy_(of_logits_Cv)
                factor_Cv.add_(entropy_M[part, None]).mul_(-of_entropy_M[part, None])
                of_logits_Cv.exp_().mul_(factor_Cv.sub_(scaled_M[part, None]))
            else:
                of_logits_Cv.exp_().mul_(-scaled_M[part, None])
            of_logits_Cv.scatter_add_(1, rows.local_M1[part], of_targets_M[part, None])
            of_logits_Cv = rows.in_models_dtype(of_logits_Cv)
            if of_hidden_NH is not None:
                of_hidden_NH[index_M[part]] = of_logits_Cv @ weight_vH
            if of_weight_vH is None:
                continue
            if of_weight_vH.dtype == of_logits_Cv.dtype:
                of_weight_vH.addmm_(of_logits_Cv.t(), rows_CH)
            else:
                of_weight_vH += of_logits_Cv.t() @ rows_CH
        if of_weight_vH is not None:
            if of_weight_vH is ctx.main_grad:
                # Nothing more to add; but DistributedDataParallel, when it overlaps communication,
                # insists on a gradient (distributed_data_parallel.py:433).
                of_weight_vH = weight_vH.new_empty(weight_vH.shape, layout=torch.sparse_coo)
            else:
                of_weight_vH = of_weight_vH.to(weight_vH.dtype)
        return of_hidden_NH, of_weight_vH, *[None] * 7
