"""From per-token losses to one number: loss = Σ_b w_b · Σ_t per_token[b, t].

Every mode is one weight per sequence, built from denominators over *all* micro-batches and ranks,
so that summing the micro-batches' losses gives the batch's loss whatever the split.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_upgrpo.errors import UserError

# name -> w_b from (lengths [B], tokens N, sequences S, constant H)
AGGREGATIONS: dict[str, Callable[[Tensor, float, float, float | None], Tensor]] = {
    # 1/N: DAPO (arXiv 2503.14476), verl's default
    "token-mean": lambda lengths, N, S, H: torch.full_like(lengths, 1 / N),
    # 1/S: TIC-GRPO, TOPR
    "seq-mean-token-sum": lambda lengths, N, S, H: torch.full_like(lengths, 1 / S),
    # 1/(S·|y|): GRPO as in arXiv 2402.03300, GSPO, GMPO, SAPO
    "seq-mean-token-mean": lambda lengths, N, S, H: 1 / (S * lengths.clamp(min=1)),
    # 1/(S·H) with a constant H: Dr.GRPO (arXiv 2503.20783)
    "seq-mean-token-sum-norm": lambda lengths, N, S, H: torch.full_like(lengths, 1 / (S * H)),
}


def aggregation_weights(
    lengths_B: Tensor,
    mode: str,
    *,
    global_tokens: float | None = None,
    global_sequences: float | None = None,
    token_sum_norm: float | None = None,
) -> Tensor:
    """The weight of each sequence's summed token losses, `[B]`.

    Args:
        lengths_B: response tokens per sequence.
        mode: a name in `AGGREGATIONS`.
        global_tokens: N, response tokens over all micro-batches and ranks; None: the local count.
        global_sequences: S, sequences over all micro-batches and ranks; None: the local count of
            non-empty ones.
        token_sum_norm: H of `seq-mean-token-sum-norm`, a constant such as the longest response.

    Raises:
        UserError: unknown mode, H missing, a denominator that is not positive, or (without global
            denominators) a mask that selects nothing.
    """
    if mode not in AGGREGATIONS:
        raise UserError(f"aggregation: {mode!r} given; allowed: {', '.join(AGGREGATIONS)}")
    if mode == "seq-mean-token-sum-norm" and not (token_sum_norm and token_sum_norm > 0):
        raise UserError(
            f"token_sum_norm: {token_sum_norm} given; allowed: a constant > 0, needed by "
            "aggregation 'seq-mean-token-sum-norm' (the longest response, for instance)"
        )
    denominators = {"global_tokens": global_tokens, "global_sequences": global_sequences}
    local = {"global_tokens": lengths_B.sum(), "global_sequences": (lengths_B > 0).sum()}
    for name, given in denominators.items():
        value = float(local[name] if given is None else given)
        if value <= 0 and given is None:
            raise UserError(
                "mask: it selects no token; allowed: at least one, or global_tokens and "
                "global_sequences of a batch that has some elsewhere"
            )
        if not 0 < value < float("inf"):
            raise UserError(f"{name}: {value} given; allowed: a finite count > 0")
        denominators[name] = value
    return AGGREGATIONS[mode](
        lengths_B, denominators["global_tokens"], denominators["global_sequences"], token_sum_norm
    )
