# SPDX-License-Identifier: Apache-2.0
"""A paired test by prompt: two figures of the same tokens, whose difference may have either sign.

Shape suffixes: P prompts, R draws.
"""

import numpy as np

from moe_upgrpo.errors import UserError

_EXACT = 14  # prompts up to which all 2^P signs are tried
_DRAWS = 20_000
_AT_ONCE = 1 << 22
_MANY = 10_000  # prompts; from here on, those of the same size are drawn together


def sign_flip_test(differences_P: np.ndarray, *, seed: int = 0) -> float:
    """The chance that Σ_p ±|difference_p| is as large as Σ_p difference_p, signs drawn at random.

    One-sided: small where the differences are above 0. If the two figures of a prompt are drawn
    alike, each difference is as likely as its opposite, whatever the prompts' sizes and spreads, so
    p < α occurs in at most a share α of such cases (Fisher, The Design of Experiments, 1935, §21).
    Up to 14 prompts, all signs are tried; beyond that, 20,000 draws of them, the observed ones
    included. If nothing differs, the result is 1.

    Raises:
        UserError: no prompt, or a difference that is not finite.
    """
    d_P = np.asarray(differences_P, dtype=np.float64)
    if d_P.ndim != 1 or not len(d_P) or not np.isfinite(d_P).all():
        raise UserError(f"a paired test takes finite differences [P], got shape {list(d_P.shape)}")
    d_P = d_P[d_P != 0]  # they have no sign and add nothing
    if not len(d_P):
        return 1.0
    observed = d_P.sum() - 1e-9 * np.abs(d_P).sum()  # allows for sums in another order
    if len(d_P) <= _EXACT:
        bits = np.arange(2 ** len(d_P))[:, None] >> np.arange(len(d_P)) & 1
        return float((((2 * bits - 1) @ d_P) >= observed).mean())
    rng = np.random.default_rng(seed)
    counts = None
    if len(d_P) > _MANY:  # differences of routers: few sizes, each of many prompts
        d_P, counts = np.unique(np.abs(d_P), return_counts=True)
    reached, chunk = 0, max(1, _AT_ONCE // len(d_P))
    for begin in range(0, _DRAWS, chunk):
        size = (min(chunk, _DRAWS - begin), len(d_P))
        if counts is None:
            signs = rng.integers(0, 2, size, dtype=np.int8) * 2.0 - 1
        else:
            signs = rng.binomial(counts, 0.5, size) * 2.0 - counts
        reached += int((signs @ d_P >= observed).sum())
    return (1 + reached) / (1 + _DRAWS)
