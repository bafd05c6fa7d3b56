# SPDX-License-Identifier: Apache-2.0
"""Count, row by row, whether a router used the routes that it was given.

Sums of a handful of integers for each layer, cheap enough to be counted in every forward: nothing
waits for the device, and no row is kept.

Shapes: N rows of one router's forward, E experts, K of them each, L layers, F figures counted.
"""

import torch
from torch import Tensor

FIGURES = ("rows", "given", "applied", "compared", "differs", "zero_filled", "repeated")


def count_rows(used_NE: Tensor, given_NK: Tensor | None = None, native_NK: Tensor | None = None,
               held_N: Tensor | None = None) -> Tensor:  # fmt: skip
    """The `FIGURES` of a forward, int64 `[F]` on the device of `used_NE`.

    - rows: N
    - given: rows that were given a route: not −1, and held_N where there is one
    - applied: given rows that used exactly the given set of experts
    - compared, differs: given rows of K different experts that are not zero-filled, and those of
      them for which the router would have chosen another set
    - zero_filled: given rows of nothing but expert 0, like a buffer that was never written; with K
      = 1 such a row is an ordinary route, and none is counted
    - repeated: given rows that name an expert twice, and are not zero-filled

    used_NE: the router's own map of tokens to experts, after every step behind its top-k.
    given_NK, native_NK: the routes that it was given, and those that it would have chosen; None: it
    was given none. held_N: rows that the given routes are meant for; None: all.
    """
    rows = used_NE.new_full((), len(used_NE), dtype=torch.int64)
    if given_NK is None:
        return torch.stack([rows, *[rows.new_zeros(())] * (len(FIGURES) - 1)])
    if native_NK is None:
        raise ValueError("native_NK: None given with given_NK; the router's own choice is needed")
    given_NK, top_k = given_NK.long(), given_NK.shape[1]
    given_N = (given_NK >= 0).all(dim=1)
    if held_N is not None:
        given_N = given_N & held_N.reshape(-1).to(given_N)
    ids_NK = given_NK.clamp(min=0)
    same_NKK = ids_NK[:, :, None] == ids_NK[:, None, :]
    repeats_N = same_NKK.sum(dim=(1, 2)) > top_k
    zero_N = (ids_NK == 0).all(dim=1) & repeats_N & given_N
    # Only an expert's first occurrence counts: below its diagonal, same_NKK marks the later ones.
    different_N = (~same_NKK.tril(diagonal=-1).any(dim=2)).sum(dim=1)
    all_used_N = used_NE.gather(1, ids_NK).bool().all(dim=1)
    applied_N = given_N & all_used_N & (used_NE.bool().sum(dim=1) == different_N)
    compared_N = given_N & ~repeats_N
    shared_NK = (ids_NK[:, :, None] == native_NK[:, None, :]).any(dim=2)
    counts = [given_N, applied_N, compared_N, compared_N & ~shared_NK.all(dim=1), zero_N,
              given_N & repeats_N & ~zero_N]  # fmt: skip
    return torch.cat([rows[None], torch.stack(counts).sum(dim=1)])


def metrics_of(counts_LF: Tensor, layer_ids: list[int]) -> dict[str, float]:
    """Metrics of a step from the sums over its forwards and all ranks.

    Without a row there is no metric but `replay/rows`, which then is 0. layer_ids: the model's
    layers, from 0.
    """
    total = dict(zip(FIGURES, counts_LF.sum(dim=0).tolist(), strict=True))
    metrics = {"replay/rows": float(total["rows"])}

    def rate(name: str, part: float, whole: float) -> None:
        if whole:
            metrics[f"replay/{name}"] = part / whole

    rate("applied_rate", total["applied"], total["rows"])
    rate("live_rate", total["rows"] - total["given"], total["rows"])
    rate("zero_filled_rate", total["zero_filled"], total["given"])
    rate("repeated_rate", total["repeated"], total["given"])
    rate("native_differs_rate", total["differs"], total["compared"])
    column = {name: i for i, name in enumerate(FIGURES)}
    for layer, counts in zip(layer_ids, counts_LF.tolist(), strict=True):
        rate(f"native_differs/layer_{layer}", counts[column["differs"]], counts[column["compared"]])
    return metrics
